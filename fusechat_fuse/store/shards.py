"""Reads a store: representations, aligned and combined data, as checksummed and memory-mapped rows.

`store.shard_writer` says what a directory holds; `docs/format.md` describes every file byte by byte.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property, partial
from pathlib import Path

import numpy as np

from fusechat_fuse.errors import InputError
from fusechat_fuse.store.files import file_sha256, read_json
from fusechat_fuse.store.rows import decode_row

SCHEMA_VERSION = 2  # 1: blanks that the model generates around an answer were not predicted


@cache
def _sha256_once(file: Path, size: int, modified: int) -> str:
    """A file's SHA-256, computed once per process as long as its size and modification time stay the same."""
    return file_sha256(file)


class _Entries(dict):
    """A JSON object of a manifest: a missing entry is an InputError with the file's path, no KeyError."""

    def __init__(self, file: Path, entries: dict):
        super().__init__(entries)
        self.file = file

    def __missing__(self, name):
        raise InputError(f"manifest for {self.file}: expected an entry {name!r}, got none. Make the directory again.")


class Representation:
    """A finished store, memory-mapped: `len`, `[i]`, iteration, `.ids`; a map-style dataset that pickles and forks.

    `[i]` is the documented row as numpy arrays (`store.rows.decode_row`). Before the first row of a shard is read, its
    SHA-256 is compared with the manifest's, once per process; a damaged shard is refused by name.
    """

    def __init__(self, path):
        self.path = Path(path)
        file = self.path / "manifest.json"
        if not file.is_file():
            got = "no such directory" if not self.path.is_dir() else "no manifest.json in it"
            remedy = "Give a directory that represent, align or combine wrote"
            if (self.path / "identity.json").exists():
                remedy = "Repeat the command that writes it to finish it"
            raise InputError(f"representation for {self.path}: expected a finished directory, got {got}. {remedy}.")
        self.manifest: dict = read_json(file, "manifest", partial(_Entries, file))
        if not isinstance(self.manifest, dict):
            got = f"{self.manifest!r:.40}"
            raise InputError(f"manifest for {file}: expected an object, got {got}. Make the directory again.")
        version = self.manifest.get("schema_version")
        if version != SCHEMA_VERSION:
            raise InputError(
                f"representation for {self.path}: expected schema version {SCHEMA_VERSION}, got {version!r}. "
                "Make it again with this version."
            )
        self._ends = np.cumsum([shard["rows"] for shard in self.manifest["shards"]])
        self._batches: dict[int, tuple] = {}
        self._checked: set[int] = set()

    def check(self) -> Representation:
        """Compare every shard with the manifest's SHA-256, once per process and several in parallel; returns itself.

        Raises: InputError with the name of the first damaged shard.
        """
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            list(pool.map(lambda shard: self._check(shard["file"], shard["sha256"]), self.manifest["shards"]))
        return self

    def _check(self, name: str, sha256: str | None) -> None:
        file = self.path / name
        with contextlib.suppress(OSError):
            status = file.stat()
            if _sha256_once(file.absolute(), status.st_size, status.st_mtime_ns) == sha256:
                return
        raise self._damaged(name)

    def _damaged(self, name: str) -> InputError:
        return InputError(
            f"file for {self.path / name}: expected the file the manifest lists, got a missing or damaged one. Repeat "
            "the command that writes it."
        )

    def file(self, name: str) -> Path:
        """The path of a file that the manifest lists under `files`, such as tokenizer/tokenizer.json.

        Raises: InputError if the file is missing, or its SHA-256 is not the manifest's.
        """
        self._check(name, self.manifest["files"].get(name))
        return self.path / name

    def _shard(self, number: int) -> tuple:
        if number not in self._batches:
            import pyarrow as pa

            shard, batch = self.manifest["shards"][number], None
            with contextlib.suppress(OSError, pa.ArrowInvalid, StopIteration):
                batch = pa.ipc.open_stream(pa.memory_map(str(self.path / shard["file"]))).read_next_batch()
            if batch is None or batch.num_rows != shard["rows"]:
                raise self._damaged(shard["file"])
            columns = [(f.name, batch.column(n), str(f.type) == "binary") for n, f in enumerate(batch.schema)]
            self._batches[number] = (batch, columns)
        return self._batches[number]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def stored_row(self, index: int) -> dict:
        """The stored fields of row `index`; binary fields are buffers into the mapped file."""
        index = range(len(self))[int(index)]
        number = int(np.searchsorted(self._ends, index, side="right"))
        local = index - (int(self._ends[number - 1]) if number else 0)
        if number not in self._checked:
            shard = self.manifest["shards"][number]
            self._check(shard["file"], shard["sha256"])
            self._checked.add(number)
        _, columns = self._shard(number)
        return {name: of[local].as_buffer() if binary else of[local].as_py() for name, of, binary in columns}

    def __getitem__(self, index: int) -> dict:
        stored = self.stored_row(index)
        try:
            return decode_row(stored)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise InputError(
                f"row {index} for {self.path}: expected the fields of docs/format.md, got {error!r}. "
                "Make the directory again."
            ) from error

    def __iter__(self) -> Iterator[dict]:
        return (self[index] for index in range(len(self)))

    def column(self, name: str) -> list:
        """A stored field of every row, in order, as Python values (binary: bytes); checksums are not compared."""
        values = []
        for number, shard in enumerate(self.manifest["shards"]):
            batch = self._shard(number)[0]
            if name not in batch.schema.names:
                raise InputError(
                    f"shard for {self.path / shard['file']}: expected a column {name!r}, got none. "
                    "Make the directory again."
                )
            values += batch.column(name).to_pylist()
        return values

    @cached_property
    def ids(self) -> list[str]:
        """The id of every row, in order."""
        return self.column("id")

    @cached_property
    def num_tokens(self) -> np.ndarray:
        """Number of tokens of every row (int64 [rows]), without decoding the rows."""
        return np.asarray(self.column("num_tokens"))

    def __reduce__(self) -> tuple:
        return type(self), (self.path,)

    def __repr__(self) -> str:
        return f"Representation({str(self.path)!r}, {self.manifest['kind']}, {len(self)} conversations)"


def load_representation(path) -> Representation:
    """Open a directory that `represent`, `align` or `combine` wrote.

    Args:
        path: the directory.
    Returns: a Representation: `.manifest`, `len()`, `[i]` -> dict of numpy arrays, iteration, `.ids`.
    Raises: InputError if the directory is missing, unfinished, damaged or of another schema version.
    """
    return Representation(path)
