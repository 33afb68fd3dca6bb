"""Checks whether a run may write into a directory: an empty one, its own, but not another run's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from fusechat_fuse.errors import InputError
from fusechat_fuse.store.files import flatten


def check_is_directory(path: Path) -> None:
    """Raise InputError if an output directory cannot be created: a file is in the way, or there is no write permission.

    Creates and changes nothing.
    """
    there = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        where = "a file" if there == path else f"a file ({there}) on the way to it"
        raise InputError(f"output for {path}: expected a directory, got {where}. Choose another path.")
    if there != path and not os.access(there, os.W_OK | os.X_OK):
        raise InputError(
            f"output for {path}: expected a place to write, got {there}, which is not. Choose another path."
        )


def check_claim(path: Path, identity: dict, found: Callable[[], dict | None], *, remedy: str = "") -> None:
    """Raise InputError unless a run may write into a directory; creates and changes nothing.

    Args:
        path: the directory; may be missing.
        identity: what makes this run this run, JSON-able; the error joins nested names by dots.
        found: reads the directory's identity, None if it has none. Then it must be empty, apart from unfinished files
            of a killed run (`*.tmp`).
        remedy: what the user can do besides choosing another directory, e.g. " or the same data and options".
    """
    check_is_directory(path)
    # listed before the identity is read: a process beside this one may write it in between
    entries = sorted(entry.name for entry in path.iterdir() if entry.suffix != ".tmp") if path.exists() else []
    there = found()
    if there is None and entries:
        raise InputError(
            f"output directory for {path}: expected an empty one, got other files ({entries[0]!r}). "
            f"Choose another directory{remedy}."
        )
    if there is not None and (difference := first_difference(there, identity)):
        raise InputError(
            f"output directory for {path}: expected this run's data, got another run's ({difference}). "
            f"Choose another directory{remedy}."
        )


def first_difference(there: dict, here: dict) -> str | None:
    """`name = A there and B here`, for the first name in which two identities differ; None if they are equal."""
    theirs, mine = flatten(there), flatten(json.loads(json.dumps(here)))
    for name in [*mine, *theirs]:
        if theirs.get(name) != mine.get(name):
            return f"{name} = {theirs.get(name)!r} there and {mine.get(name)!r} here"
    return None
