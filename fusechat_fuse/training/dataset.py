"""What a Trainer takes as data, and what the data's manifest says of its sources."""

import os
from typing import Any

from fusechat_fuse.errors import InputError
from fusechat_fuse.store.card import source_names
from fusechat_fuse.store.shards import Representation, load_representation


def load_aligned(path) -> Representation:
    """A directory that align or combine wrote.

    Raises: InputError where it holds something else.
    """
    return _must_be_aligned(load_representation(path))


def open_dataset(dataset) -> Any:
    """What `FusionTrainer` was given, ready for a DataLoader: a directory is loaded, data that is not aligned refused.

    Args:
        dataset: a directory, a Representation, rows in any other form (taken as they are), None, or a dict of these.
    """
    if isinstance(dataset, dict):
        return {name: open_dataset(one) for name, one in dataset.items()}
    if isinstance(dataset, str | os.PathLike):
        return load_aligned(dataset)
    return _must_be_aligned(dataset) if isinstance(dataset, Representation) else dataset


def check_length(dataset, max_steps: int) -> None:
    """Raise InputError for training data that does not say how long it is, where the run does not either."""
    if dataset is not None and not hasattr(dataset, "__len__") and max_steps <= 0:
        raise InputError(
            f"max_steps for {type(dataset).__name__}: expected more than 0, as an iterable does not tell its length, "
            f"got {max_steps}. Set it."
        )


def check_not_empty(dataset) -> None:
    """Raise InputError where data, which say how long they are, have no rows; of a dict the first that has none."""
    for one in dataset.values() if isinstance(dataset, dict) else [dataset]:
        if hasattr(one, "__len__") and len(one) == 0:
            raise InputError(
                f"data for {getattr(one, 'path', type(one).__name__)}: expected conversations, got none. Check how it "
                "was made."
            )


def check_rows(dataset, collate) -> None:
    """Raise InputError where data has no rows, or a first one that makes no batch.

    Args:
        dataset: what `open_dataset` answers; of an iterable nothing is taken.
        collate: makes a batch of a list of rows.
    """
    if isinstance(dataset, dict):
        for one in dataset.values():
            check_rows(one, collate)
    elif hasattr(dataset, "__len__"):
        check_not_empty(dataset)
        collate([dataset[0]])


def sources_of(dataset) -> list[str]:
    """Names of the sources of aligned or combined data, as its manifest says; ["source"] where it has none."""
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
