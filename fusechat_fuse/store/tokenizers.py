"""The tokenizer that lies in a store: put there, copied from another store, read back."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from fusechat_fuse.errors import InputError


def save_tokenizer(tokenizer, path) -> None:
    """Put a tokenizer into a store, as `tokenizer/`, whole or not at all; one that is there stays."""
    folder = Path(path) / "tokenizer"
    if folder.exists():
        return
    staging = Path(tempfile.mkdtemp(dir=path, prefix=".tokenizer.", suffix=".tmp"))
    try:
        tokenizer.save_pretrained(staging)
        staging.chmod(0o755)
        staging.rename(folder)
    except OSError:
        if not folder.exists():  # else another process was faster
            raise
        shutil.rmtree(staging, ignore_errors=True)


def load_tokenizer(path):
    """The tokenizer a representation was made with (a transformers fast tokenizer), from its directory alone."""
    from transformers import PreTrainedTokenizerFast

    folder = Path(path) / "tokenizer"
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"tokenizer for {path}: expected tokenizer/tokenizer.json in it, got none. Make it again.")
    return PreTrainedTokenizerFast.from_pretrained(folder)


def read_tokenizer(path):
    """The `tokenizers.Tokenizer` in a representation's directory (without transformers: seconds less)."""
    from tokenizers import Tokenizer

    file = Path(path) / "tokenizer" / "tokenizer.json"
    if not file.is_file():
        raise InputError(
            f"tokenizer for {path}: expected tokenizer/tokenizer.json in it, got none. Represent it again."
        )
    return Tokenizer.from_file(str(file))


def copy_tokenizer(source, target) -> None:
    """Give a store the tokenizer of another one, whole or not at all; one that is there stays."""
    there = Path(target) / "tokenizer"
    if there.exists():
        return
    staging = Path(tempfile.mkdtemp(dir=target, prefix=".tokenizer.", suffix=".tmp"))
    shutil.copytree(Path(source) / "tokenizer", staging / "tokenizer")
    (staging / "tokenizer").rename(there)
    staging.rmdir()
