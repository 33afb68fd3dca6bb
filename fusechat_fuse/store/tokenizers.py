"""The tokenizer in a store: saved, copied from another store, read."""

from __future__ import annotations

import errno
import filecmp
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from fusechat_fuse.errors import InputError, writing
from fusechat_fuse.store.shards import Representation

_FOLDER, _FILE = "tokenizer", "tokenizer/tokenizer.json"


def save_tokenizer(tokenizer, path) -> None:
    """Write a fast tokenizer of transformers into a store, as `tokenizer/`, complete or not at all."""
    _put(Path(path), tokenizer.save_pretrained)


def copy_tokenizer(source: Representation, target) -> None:
    """Copy the tokenizer of one store into another, complete or not at all; InputError if a file is damaged."""

    def fill(staging: Path) -> None:
        for name in source.manifest["files"]:
            if name.startswith(f"{_FOLDER}/"):
                copied = staging / Path(name).relative_to(_FOLDER)
                copied.parent.mkdir(exist_ok=True)
                shutil.copyfile(source.file(name), copied)

    source.file(_FILE)
    _put(Path(target), fill)


def _put(path: Path, fill: Callable[[Path], object]) -> None:
    folder = path / _FOLDER
    staging = Path(tempfile.mkdtemp(dir=path, prefix=f".{_FOLDER}.", suffix=".tmp"))
    try:
        with writing(folder):
            fill(staging)
        names = [str(file.relative_to(staging)) for file in staging.rglob("*") if file.is_file()]
        if filecmp.cmpfiles(staging, folder, names, shallow=False)[0] != names:  # not from another process or run
            shutil.rmtree(folder, ignore_errors=True)
            staging.chmod(0o755)
            staging.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another process was faster
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def read_tokenizer(store: Representation):
    """The `tokenizers.Tokenizer` in a store (without transformers, whose import takes seconds).

    Raises: InputError if it is missing, or not the one that the manifest lists.
    """
    from tokenizers import Tokenizer

    file = store.file(_FILE)
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise InputError(
            f"tokenizer for {file}: expected a tokenizer.json, got {error}. Make the directory again."
        ) from error
