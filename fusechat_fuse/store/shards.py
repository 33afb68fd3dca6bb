"""The store behind representations, aligned and combined data: checksummed Arrow shards that land one by one.

A directory holds `shard-00000.arrow` (one record batch of encoded rows) with `shard-00000.json` (rows, bytes, SHA-256)
beside each, `identity.json` (what makes this run this run: a directory is never shared by two), and, once all shards
are there, `state.json` and `dataset_info.json`, with which `datasets.load_from_disk` opens it, and last
`manifest.json`. Every file is written under a temporary name, flushed to disk and renamed, so what carries a final name
is whole; a kill costs at most the shard in the making. Bytes depend on the rows alone: no clock, no
random name, no host. `docs/format.md` describes every file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from pathlib import Path

import numpy as np

from fusechat_fuse.errors import InputError, describe_os_error
from fusechat_fuse.store.card import dataset_card
from fusechat_fuse.store.claim import check_claim
from fusechat_fuse.store.files import file_sha256, json_bytes, read_json, write_atomic
from fusechat_fuse.store.rows import ENCODINGS, decode_row, encode_row

SCHEMA_VERSION = 1
STORE_KINDS = ("representation", "aligned", "combined")
logger = logging.getLogger(__name__)


class ShardWriter:
    """Writes a store shard by shard, from any number of processes that share the directory.

    Args:
        output_dir: made if missing; must be empty, hold an earlier start of the same run, or of any run that ended
            before it had a shard with rows.
        identity: JSON-able; what decides the content (options, fingerprints, number of conversations).
        kind: representation, aligned or combined.
        encoding: plain or compact (see `store.rows`).
    Raises: InputError naming the first key that differs where the directory holds another run's data, or the path where
        it cannot be made.
    """

    def __init__(self, output_dir, identity: dict, *, kind: str, encoding: str = "plain"):
        if kind not in STORE_KINDS or encoding not in ENCODINGS:
            raise InputError(
                f"store for {output_dir}: expected kind in {STORE_KINDS} and encoding in {ENCODINGS}, got {kind!r} and "
                f"{encoding!r}. Choose one of each."
            )
        self.path, self.kind, self.encoding = Path(output_dir), kind, encoding
        own = {"kind": kind, "encoding": encoding, "schema_version": SCHEMA_VERSION}
        self.identity = json.loads(json.dumps({**identity, **own}))
        try:
            self._claim()
        except OSError as error:
            self._remove_new()
            raise InputError(describe_os_error(error)) from error

    def _claim(self) -> None:
        self._new = [place for place in (self.path, *self.path.absolute().parents) if not place.exists()]
        self._take_over()
        file = self.path / "identity.json"
        for _ in range(2):  # checked again once it is written: another run may have been as fast
            check_claim(self.path, self.identity, self._claimed, remedy=" or the same options")
            if file.exists():
                return
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomic(file, json_bytes(self.identity))

    def _claimed(self) -> dict | None:
        return read_json(self.path / "identity.json", "identity")

    def _take_over(self) -> None:
        """Make the directory this run's where another one left nothing in it but its claim and empty shards."""
        if not self.path.is_dir() or self._claimed() in (None, self.identity):
            return
        if self._clear():
            write_atomic(self.path / "identity.json", json_bytes(self.identity))

    def _clear(self) -> bool:
        """Remove the empty shards of a run that left nothing else but its claim; whether it is so."""
        entries = [entry for entry in self.path.iterdir() if entry.suffix != ".tmp"]
        left = [entry for entry in entries if entry.match("shard-*.json") or entry.name == "skipped.jsonl"]
        if not {entry.name for entry in entries} <= {"identity.json", "tokenizer", *(entry.name for entry in left)}:
            return False
        for entry in left:
            entry.unlink(missing_ok=True)
        shutil.rmtree(self.path / "tokenizer", ignore_errors=True)
        return True

    def release(self) -> None:
        """Give the directory up where no shard with rows was written: as it was before, and gone if this run made it,
        with the parents that it made."""
        if self._claimed() != self.identity or not self._clear():
            return
        (self.path / "identity.json").unlink(missing_ok=True)
        self._remove_new()

    def _remove_new(self) -> None:
        with contextlib.suppress(OSError):  # something else has come into it
            for place in self._new:
                place.rmdir()

    def _file(self, shard: int, suffix: str) -> Path:
        return self.path / f"shard-{shard:05d}.{suffix}"

    def info(self, shard: int) -> dict:
        """What was written with the shard: rows, bytes, sha256, counts and the writer's own `info`."""
        return json.loads(self._file(shard, "json").read_bytes())

    def holds(self, shard: int) -> bool:
        """Whether the shard is there, whole or damaged."""
        return self._file(shard, "json").exists()

    def done(self, shard: int) -> bool:
        """Whether the shard is there and whole; a damaged one is named in a warning and answers False."""
        try:
            info = self.info(shard)
        except FileNotFoundError:
            return False
        except ValueError:
            info = {"sha256": "unreadable"}
        file = self._file(shard, "arrow")
        if info["sha256"] is None or (file.exists() and file_sha256(file) == info["sha256"]):
            return True
        logger.warning("%s is damaged (its checksum differs); it is computed again.", file)
        return False

    def left(self, shards: Iterable[int]) -> list[int]:
        """Those that must still be computed, of some shards' numbers; says in the log what is there."""
        shards = list(shards)
        left = [shard for shard in shards if not self.done(shard)]
        if not left and (self.path / "manifest.json").exists():
            logger.info("%s holds this very run, finished: nothing to compute.", self.path)
        elif len(left) < len(shards):
            logger.info("%s: %d of %d shards there, going on.", self.path, len(shards) - len(left), len(shards))
        return left

    def write(self, shard: int, rows: list[dict], info: dict | None = None) -> None:
        """Write one shard whole or not at all.

        Args:
            shard: its number from 0.
            rows: documented rows (`encode_row` says which names), at least zero.
            info: JSON-able, kept beside the shard (e.g. what was skipped) and found again by `.info(shard)`.
        """
        if self._claimed() != self.identity:
            raise InputError(f"output directory for {self.path}: expected this run's, got another's. Choose another.")
        encoded = [encode_row(row, self.encoding) for row in rows]
        record = {"rows": len(rows), "bytes": 0, "sha256": None, "info": info or {}}
        record["tokens"] = sum(row["num_tokens"] for row in encoded)
        record["predicted_tokens"] = sum(row["num_predicted"] for row in encoded)
        if encoded:
            data = _arrow_stream(encoded)
            record |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            write_atomic(self._file(shard, "arrow"), data)
        write_atomic(self._file(shard, "json"), json_bytes(record))

    def finish(self, num_shards: int, manifest: dict) -> None:
        """Make the directory readable: counts, what `datasets` reads, a card, and `manifest.json` as the last file.

        Raises: InputError where not one row is left; RuntimeError where a shard is missing.
        """
        missing = [shard for shard in range(num_shards) if not self._file(shard, "json").exists()]
        if missing:
            raise RuntimeError(f"{self.path}: shards {missing[:5]} of {num_shards} are missing")
        infos = [self.info(shard) for shard in range(num_shards)]
        files = [(f"shard-{n:05d}.arrow", info) for n, info in enumerate(infos) if info["sha256"]]
        if not files:
            raise InputError(
                f"data for {self.path}: expected at least one usable conversation, got none. See skipped.jsonl."
            )
        shards = [{"file": name, "rows": info["rows"], "sha256": info["sha256"]} for name, info in files]
        manifest = {**manifest, "kind": self.kind, "encoding": self.encoding, "schema_version": SCHEMA_VERSION}
        manifest |= {"counts": {**_totals(infos), **manifest.get("counts", {})}, "shards": shards}
        schema = _schema(self.path / files[0][0])
        for name, content in _for_datasets(shards, schema).items():
            write_atomic(self.path / name, json_bytes(content))
        write_atomic(self.path / "README.md", dataset_card(manifest, schema.names).encode())
        for leftover in self.path.glob(".*.tmp"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        write_atomic(self.path / "manifest.json", json_bytes(manifest))


def _totals(infos: list[dict]) -> dict[str, int | float]:
    """The manifest's counts out of those of the shards."""
    names = {"rows": "conversations", "tokens": "tokens", "predicted_tokens": "predicted_tokens", "bytes": "bytes"}
    counts: dict[str, int | float] = {name: sum(info[key] for info in infos) for key, name in names.items()}
    counts["bytes_per_predicted_token"] = round(counts["bytes"] / max(counts["predicted_tokens"], 1), 3)
    return counts


def _for_datasets(shards: list[dict], schema) -> dict[str, dict]:
    """The two files with which `datasets.load_from_disk` opens a directory, by name."""
    features = {field.name: {"dtype": str(field.type), "_type": "Value"} for field in schema}
    state = {
        "_data_files": [{"filename": shard["file"]} for shard in shards],
        "_fingerprint": hashlib.sha256(json_bytes(shards)).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    info = {"features": features, "citation": "", "description": ""}
    return {"dataset_info.json": info, "state.json": state}


def _arrow_stream(encoded: list[dict]) -> bytes:
    """One record batch as an Arrow IPC stream; `content_hash` and `slice` are always columns, perhaps of nulls."""
    import pyarrow as pa

    types = {bytes: pa.binary(), str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    kinds = {"id": pa.string(), "content_hash": pa.string(), "slice": pa.string()}
    for row in encoded:
        kinds |= {key: types[type(value)] for key, value in row.items()}
    schema = pa.schema([(key, kinds[key]) for key in ["id", *sorted(set(kinds) - {"id"})]])
    batch = pa.RecordBatch.from_pylist(encoded, schema=schema)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _schema(file: Path):
    import pyarrow as pa

    with pa.memory_map(str(file)) as source:
        return pa.ipc.open_stream(source).schema


@cache
def _sha256_once(file: Path, size: int, modified: int) -> str:
    """A file's SHA-256, taken once a process as long as size and time of change stay the same."""
    return file_sha256(file)


class Representation:
    """A finished store, memory-mapped: `len`, `[i]`, iteration, `.ids`; a map-style dataset that pickles and forks.

    `[i]` is the documented row as numpy arrays (`store.rows.decode_row`). A row is read from a shard whose SHA-256 is
    the manifest's, or refused with the shard's name; the sum is taken once a process.
    """

    def __init__(self, path):
        self.path = Path(path)
        file = self.path / "manifest.json"
        if not file.is_file():
            got = "no such directory" if not self.path.is_dir() else "no manifest.json in it"
            remedy = "Give a directory that represent, align or combine wrote"
            if (self.path / "identity.json").exists():
                remedy = "Run the command that makes it once more to finish it"
            raise InputError(f"representation for {self.path}: expected a finished directory, got {got}. {remedy}.")
        self.manifest: dict = read_json(file, "manifest")
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
        """Compare every shard with the manifest's SHA-256 (once a process, several at a time); returns itself.

        Raises: InputError with the name of the first damaged one.
        """
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for number, whole in enumerate(pool.map(self._is_whole, range(len(self._ends)))):
                if not whole:
                    raise self._damaged(number)
        return self

    def _is_whole(self, number: int) -> bool:
        shard = self.manifest["shards"][number]
        with contextlib.suppress(OSError):
            file = self.path / shard["file"]
            about = file.stat()
            return _sha256_once(file.absolute(), about.st_size, about.st_mtime_ns) == shard["sha256"]
        return False

    def _damaged(self, number: int) -> InputError:
        return InputError(
            f"shard for {self.path / self.manifest['shards'][number]['file']}: expected the file the manifest lists, "
            "got a missing or damaged one. Run the command that makes it once more to compute it again."
        )

    def _shard(self, number: int) -> tuple:
        if number not in self._batches:
            import pyarrow as pa

            shard, batch = self.manifest["shards"][number], None
            with contextlib.suppress(OSError, pa.ArrowInvalid, StopIteration):
                batch = pa.ipc.open_stream(pa.memory_map(str(self.path / shard["file"]))).read_next_batch()
            if batch is None or batch.num_rows != shard["rows"]:
                raise self._damaged(number)
            columns = [(f.name, batch.column(n), str(f.type) == "binary") for n, f in enumerate(batch.schema)]
            self._batches[number] = (batch, columns)
        return self._batches[number]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def stored_row(self, index: int) -> dict:
        """The stored fields of row `index`; binary ones as buffers into the mapped file."""
        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        number = int(np.searchsorted(self._ends, index, side="right"))
        local = index - (int(self._ends[number - 1]) if number else 0)
        if number not in self._checked:
            if not self._is_whole(number):
                raise self._damaged(number)
            self._checked.add(number)
        _, columns = self._shard(number)
        return {
            name: column[local].as_buffer() if binary else column[local].as_py() for name, column, binary in columns
        }

    def __getitem__(self, index: int) -> dict:
        return decode_row(self.stored_row(index))

    def __iter__(self) -> Iterator[dict]:
        return (self[index] for index in range(len(self)))

    def column(self, name: str) -> list:
        """A stored field of every row, in order, as Python values (bytes for a binary one); nothing is checked."""
        return [v for n in range(len(self._ends)) for v in self._shard(n)[0].column(name).to_pylist()]

    @cached_property
    def ids(self) -> list[str]:
        """The id of every row, in order."""
        return self.column("id")

    @cached_property
    def num_tokens(self) -> np.ndarray:
        """T of every row (int64 [rows]), without decoding: for batches of like length."""
        return np.asarray(self.column("num_tokens"))

    @cached_property
    def num_predicted(self) -> np.ndarray:
        """P of every row (int64 [rows])."""
        return np.asarray(self.column("num_predicted"))

    def verify(self) -> list[str]:
        """Names of the shard files whose SHA-256 is not the manifest's."""
        shards = self.manifest["shards"]
        files = [self.path / shard["file"] for shard in shards]
        return [s["file"] for s, f in zip(shards, files) if not f.exists() or file_sha256(f) != s["sha256"]]

    def __getstate__(self) -> dict:
        return {"path": self.path}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["path"])

    def __repr__(self) -> str:
        return f"Representation({str(self.path)!r}, {self.manifest['kind']}, {len(self)} conversations)"


def load_representation(path) -> Representation:
    """Open a directory that `represent`, `align` or `combine` wrote.

    Args:
        path: the directory.
    Returns: a Representation: `.manifest`, `len()`, `[i]` -> dict of numpy arrays, iteration, `.ids`.
    Raises: InputError where the directory is missing, unfinished, of another schema version, or damaged.
    """
    return Representation(path)
