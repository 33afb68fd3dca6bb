"""The data that a FusionTrainer takes, checked, and the names of their sources from the manifest."""

import os
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, Subset

from fusechat_fuse.errors import InputError
from fusechat_fuse.models.files import rope_boundary
from fusechat_fuse.store.card import source_names
from fusechat_fuse.store.shards import Representation, load_representation


def load_aligned(data) -> Representation:
    """A directory that align or combine wrote, or its Representation; InputError where it holds something else."""
    if not isinstance(data, Representation):
        data = load_representation(data)
    if data.manifest["kind"] not in ("aligned", "combined"):
        raise InputError(
            f"data for {data.path}: expected aligned data, got a {data.manifest['kind']}. Align it to a source's "
            "representation first: fusechat-fuse align."
        )
    return data.check()


def each_of(dataset) -> list:
    """The data sets of a dict of them, or the one that is given."""
    return list(dataset.values()) if isinstance(dataset, dict) else [dataset]


def open_dataset(dataset, args, *, to_train_on: bool = False) -> Any:
    """The data (a dict of them, or None) that `FusionTrainer` was given: directories are loaded; what processes cannot
    share is refused, and, `to_train_on`, what has no end."""
    if isinstance(dataset, dict):
        return {name: open_dataset(one, args) for name, one in dataset.items()}
    if isinstance(dataset, str | os.PathLike | Representation):
        return load_aligned(dataset)
    iterable, kind = isinstance(dataset, IterableDataset), type(dataset).__name__
    if dataset is not None and not iterable and not hasattr(dataset, "__len__"):
        raise InputError(
            f"data for FusionTrainer: expected a directory, rows with a length or an IterableDataset, got {kind}. Make "
            "a list or datasets.IterableDataset.from_generator of it."
        )
    if iterable and args.world_size > 1:
        raise InputError(
            f"data for FusionTrainer on {args.world_size} processes: expected rows with a length, which they can "
            f"share, got {kind}. Make a list or a datasets.Dataset of it, or train on one process."
        )
    if isinstance(dataset, IterableDataset) and iter(dataset) is iter(dataset):
        raise InputError(
            f"data for FusionTrainer: expected an iterable whose rows can be read again, got {kind} with one iterator "
            "for all. Return a new one from __iter__: slices are chosen from the rows before the first epoch."
        )
    if iterable and to_train_on and not hasattr(dataset, "__len__") and args.max_steps <= 0:
        raise InputError(
            f"max_steps for {kind}: expected more than 0, since an iterable has no length, got {args.max_steps}. "
            "Set it."
        )
    return dataset


def bounded(dataset) -> Any:
    """The data, such that iterating ends at their length: `__getitem__` alone may go on for ever."""
    return dataset if hasattr(dataset, "__iter__") else Subset(dataset, range(len(dataset)))


def for_sampler(dataset) -> Any:
    """What a sampler asks of data: how many rows, and how long; from a store without reading them."""
    if isinstance(dataset, Representation):
        return [{"input_ids": range(tokens)} for tokens in dataset.num_tokens.tolist()]
    return bounded(dataset)


def check_not_empty(dataset) -> None:
    """Raise InputError where data with a length have no rows (of a dict: any of them)."""
    for one in each_of(dataset):
        if hasattr(one, "__len__") and len(one) == 0:
            raise InputError(
                f"data for {getattr(one, 'path', type(one).__name__)}: expected conversations, got none. Check how "
                "they were made."
            )


def check_rows(dataset, collate) -> None:
    """Raise InputError where data have no rows, or the first row makes no batch; nothing is taken from an iterable."""
    for one in each_of(dataset):
        if one is not None and not isinstance(one, IterableDataset):
            check_not_empty(one)
            collate([one[0]])


def check_rope(config, dataset, *, max_length: int, batch_size: int) -> None:
    """Raise InputError where a batch may hold conversations on both sides of LongRoPE's limit.

    Such a model (Phi-3 128k) turns all conversations of a batch by the factors of the longest: a short one would be
    trained otherwise than it is used.
    """
    limit = rope_boundary(config)
    if limit is None or batch_size == 1:
        return
    for data in each_of(dataset):
        lengths = getattr(data, "num_tokens", np.array([1, max_length]))  # any, where they are not known
        longer = np.minimum(lengths, max_length) > limit
        if data is not None and longer.any() and not longer.all():
            raise InputError(
                f"max_length for {config.model_type}: expected at most {limit} (original_max_position_embeddings), as "
                f"longer conversations change the rotary factors of those in their batch, got {max_length}. Lower it, "
                "or set per_device_train_batch_size and per_device_eval_batch_size to 1."
            )


def sources_of(dataset) -> list[str]:
    """Names of the sources of aligned or combined data, from the manifest; ["source"] without one."""
    return source_names(getattr(next(iter(each_of(dataset)), None), "manifest", {}))
