"""Digests of files, directories and Hub names by their content."""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import os
from pathlib import Path

from fusechat_fuse.models.files import adapter_base, is_gguf
from fusechat_fuse.models.identity import add_samples
from fusechat_fuse.store.files import file_sha256, short_digest

_NOTES = {"", *".md .rst .org .txt .pdf .doc .docx .odt .png .jpg .jpeg .gif .svg .html .log .bak".split()}  # suffixes
_NO_NOTES = ("vocab.txt", "merges.txt")


def content_digest(path: Path, *, whole: bool = False, kind: str = "") -> str | None:
    """What a path or Hub name holds, in 16 hexadecimal digits.

    Args:
        path: a file; a directory, of which notes, hidden files and checkpoints do not count; a glob pattern; or a Hub
            name, which stands for its cached commit. Adapters count with their base model.
        whole: read the files of a directory whole, as data; else by their sizes and samples, as models' (files of up to
            64 KiB count whole).
        kind: `data_path` for a Hub name of data, else of a model.
    Returns: None for a Hub name that is not cached.
    """
    if path.is_file():
        status = path.stat()
        return _file_digest(path, whole or not is_gguf(path), status.st_size, status.st_mtime_ns)
    if path.is_dir():
        digest = hashlib.sha256()
        for file in sorted(path.rglob("*")):
            if file.is_file() and _counts(file.relative_to(path), whole):
                digest.update(f"{file.relative_to(path)}\n".encode())
                status = file.stat()
                digest.update(_file_digest(file, whole, status.st_size, status.st_mtime_ns).encode())
        base = None if whole else adapter_base(path)
        return short_digest(digest) + (f" on {content_digest(Path(base))}" if base else "")
    matches = [match for match in sorted(glob.glob(str(path), recursive=True)) if os.path.exists(match)]
    if matches and matches != [str(path)]:
        return short_digest(json.dumps([[match, content_digest(Path(match), whole=whole)] for match in matches]))
    return _cached_commit(str(path), "datasets" if kind == "data_path" else "models")


def _counts(file: Path, data: bool) -> bool:
    """Whether a file of a directory may decide what is made from it; the README of data may name their splits."""
    if any(part.startswith((".", "checkpoint-")) for part in file.parts):
        return False
    return file.suffix.lower() not in _NOTES or file.name in _NO_NOTES or (data and file.name == "README.md")


@functools.cache
def _file_digest(path: Path, whole: bool, size: int, modified: int) -> str:
    """Each file is read once per run; size and time of modification tell whether it changed meanwhile."""
    if whole:
        return file_sha256(path)[:16]
    digest = hashlib.sha256()
    add_samples(digest, path)
    return short_digest(digest)


def _cached_commit(name: str, kind: str) -> str | None:
    """The commit that the Hub's cache holds of a name (of data, perhaps with a configuration: NAME:CONFIGURATION)."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = f"{kind}--{name.partition(':')[0].replace('/', '--')}"
    reference = Path(HF_HUB_CACHE) / folder / "refs" / "main"
    return reference.read_text().strip() if os.path.exists(reference) else None
