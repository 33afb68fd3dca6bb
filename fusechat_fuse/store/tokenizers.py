"""The tokenizer that lies in a store: put there, copied from another store, read back."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from fusechat_fuse.errors import InputError

_FOLDER = "tokenizer"


def save_tokenizer(tokenizer, path) -> None:
    """Put a tokenizer into a store, as `tokenizer/`, whole or not at all; one that is there stays.

    Args:
        tokenizer: transformers fast tokenizer; borrowed.
        path: the store's directory.
    """
    _put(Path(path), tokenizer.save_pretrained)


def copy_tokenizer(source, target) -> None:
    """Give a store the tokenizer of another one, whole or not at all; one that is there stays."""
    _put(Path(target), lambda staging: shutil.copytree(Path(source) / _FOLDER, staging, dirs_exist_ok=True))


def _put(path: Path, fill: Callable[[Path], object]) -> None:
    folder = path / _FOLDER
    if folder.exists():
        return
    staging = Path(tempfile.mkdtemp(dir=path, prefix=f".{_FOLDER}.", suffix=".tmp"))
    try:
        fill(staging)
        staging.chmod(0o755)
        staging.rename(folder)
    except Exception:
        shutil.rmtree(staging, ignore_errors=True)
        if not folder.exists():  # else another process was faster
            raise


def load_tokenizer(path):
    """The tokenizer a representation was made with (a transformers fast tokenizer), from its directory alone.

    Raises: InputError where there is none.
    """
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(_file(path).parent)


def read_tokenizer(path):
    """The `tokenizers.Tokenizer` in a representation's directory (without transformers: seconds less).

    Raises: InputError where there is none.
    """
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(_file(path)))


def _file(path) -> Path:
    file = Path(path) / _FOLDER / "tokenizer.json"
    if not file.is_file():
        raise InputError(
            f"tokenizer for {path}: expected {_FOLDER}/tokenizer.json in it, got none. Make the directory again."
        )
    return file
