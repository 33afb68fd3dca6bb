"""Files that land whole or not at all, JSON whose bytes depend on its content alone, YAML, and checksums."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusechat_fuse.errors import InputError


def _fsync_directory(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file completely or not at all: temporary name in the same folder, flush to disk, rename.

    Raises: OSError with the path; the temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _fsync_directory(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def replace_into(aside: Path, folder: Path, *, last: str) -> None:
    """Flush all files in `aside`, a directory within `folder`, move all into `folder`, and remove `aside`.

    Files and directories of the same names are replaced; the file `last`, moved last, marks the others as complete.
    """
    for file in aside.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    for entry in sorted(aside.iterdir(), key=lambda entry: (entry.name == last, entry.name)):
        if entry.is_dir() and (folder / entry.name).exists():
            shutil.rmtree(folder / entry.name)
        os.replace(entry, folder / entry.name)
    aside.rmdir()
    _fsync_directory(folder)


def json_bytes(value: Any) -> bytes:
    """A value as JSON for a file: sorted keys, two blanks of indent, UTF-8, a line end."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_json(path: Path, what: str, object_hook: Callable[[dict], dict] | None = None) -> Any:
    """The content of a JSON file, None if there is no file; `object_hook` as of `json.loads`.

    Raises: InputError if it is not JSON; `what` names the file in the message.
    """
    try:
        return json.loads(path.read_bytes(), object_hook=object_hook)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{what} for {path}: expected JSON, got {error}. Make the directory again.") from error


def read_yaml(path: str | Path, what: str) -> dict[str, Any]:
    """The mapping in a YAML file; InputError, where it is none or cannot be read, names it as `what`."""
    import yaml

    try:
        entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        got = " ".join(str(error).split())
        raise InputError(f"{what} {path}: expected a readable YAML file, got: {got}. Correct it.") from error
    if not isinstance(entries, dict) or not all(isinstance(name, str) for name in entries):
        raise InputError(f"{what} {path}: expected name: value pairs, got {entries!r:.80}. Correct it.")
    return entries


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with keys joined by dots."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, item in value.items() for k, v in flatten(item, f"{prefix}.{key}" if prefix else key).items()}


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def short_digest(content: bytes | str | hashlib._Hash) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of bytes or a text, or of a hashlib object that has read them."""
    if isinstance(content, str):
        content = content.encode()
    digest = hashlib.sha256(content) if isinstance(content, bytes) else content
    return digest.hexdigest()[:16]
