"""The data that a FusionTrainer takes, checked, and the names of their sources from the manifest."""

import os
from typing import Any

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler

from fusechat_fuse.errors import InputError
from fusechat_fuse.store.card import source_names
from fusechat_fuse.store.shards import Representation, load_representation


def load_aligned(path) -> Representation:
    """A directory that align or combine wrote.

    Raises: InputError where it holds something else.
    """
    return _must_be_aligned(load_representation(path))


def open_dataset(dataset) -> Any:
    """The data that `FusionTrainer` was given, ready for a DataLoader: directories are loaded, unaligned data refused.

    Args:
        dataset: a directory, a Representation, rows in any other form (returned unchanged), None, or a dict of these.
    """
    if isinstance(dataset, dict):
        return {name: open_dataset(one) for name, one in dataset.items()}
    if isinstance(dataset, str | os.PathLike):
        return load_aligned(dataset)
    return _must_be_aligned(dataset) if isinstance(dataset, Representation) else dataset


class LengthGrouped(LengthGroupedSampler):
    """Conversations of like length together, in an order drawn from seed and epoch: a resumed run draws the same."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()


def set_epoch(dataloader, epoch: int) -> None:
    """Tell every sampler below a DataLoader the epoch; accelerate's own search ends before the one of a resumed run."""
    sampler = getattr(dataloader, "batch_sampler", None)
    while sampler is not None:
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)


def check_length(dataset, max_steps: int) -> None:
    """Raise InputError for training data without a length where max_steps does not limit the run either."""
    if dataset is not None and not hasattr(dataset, "__len__") and max_steps <= 0:
        raise InputError(
            f"max_steps for {type(dataset).__name__}: expected more than 0, since an iterable has no length, "
            f"got {max_steps}. Set it."
        )


def check_not_empty(dataset) -> None:
    """Raise InputError where data with a length have no rows (of a dict: any of them)."""
    for one in dataset.values() if isinstance(dataset, dict) else [dataset]:
        if hasattr(one, "__len__") and len(one) == 0:
            raise InputError(
                f"data for {getattr(one, 'path', type(one).__name__)}: expected conversations, got none. Check how "
                "they were made."
            )


def check_rows(dataset, collate) -> None:
    """Raise InputError where data have no rows, or the first row makes no batch.

    Args:
        dataset: as `open_dataset` returned it; nothing is taken from an iterable.
        collate: makes a batch of a list of rows.
    """
    if isinstance(dataset, dict):
        for one in dataset.values():
            check_rows(one, collate)
    elif hasattr(dataset, "__len__"):
        check_not_empty(dataset)
        collate([dataset[0]])


def sources_of(dataset) -> list[str]:
    """Names of the sources of aligned or combined data, from the manifest; ["source"] without one."""
    if isinstance(dataset, dict):
        dataset = next(iter(dataset.values()), None)
    return source_names(getattr(dataset, "manifest", {}))


def _must_be_aligned(data: Representation) -> Representation:
    if data.manifest["kind"] not in ("aligned", "combined"):
        raise InputError(
            f"data for {data.path}: expected aligned data, got a {data.manifest['kind']}. Align it to a source's "
            "representation first: fusechat-fuse align."
        )
    return data.check()
