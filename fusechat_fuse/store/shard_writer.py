"""Writes a store: checksummed Arrow shards that land one by one, then what makes the directory readable.

A directory holds `shard-00000.arrow` (one record batch of encoded rows) with `shard-00000.json` (rows, bytes, SHA-256)
beside each, `identity.json` (which run the directory belongs to), and, once all shards are there, `state.json` and
`dataset_info.json`, with which `datasets.load_from_disk` opens it, and last `manifest.json`. Every file is written
under a temporary name, flushed to disk and renamed, so a file with its final name is complete, and a killed run loses
at most the shard that it was computing. The bytes depend on the rows alone: no clock, no random name, no host.
`docs/format.md` describes every file; `store.shards` reads them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

from fusechat_fuse.errors import InputError, of_output
from fusechat_fuse.store.card import dataset_card
from fusechat_fuse.store.claim import check_claim
from fusechat_fuse.store.files import file_sha256, json_bytes, read_json, write_atomic
from fusechat_fuse.store.rows import ENCODINGS, encode_row
from fusechat_fuse.store.shards import SCHEMA_VERSION

STORE_KINDS = ("representation", "aligned", "combined")
ROWS_PER_SHARD = 256
logger = logging.getLogger(__name__)


def shard_ranges(rows: int) -> list[range]:
    """The rows that each shard of an aligned or combined store holds, in order."""
    return [range(first, min(first + ROWS_PER_SHARD, rows)) for first in range(0, rows, ROWS_PER_SHARD)]


class ShardWriter:
    """Writes a store shard by shard, from any number of processes that share the directory.

    Args:
        output_dir: created if missing; must be empty, or hold an earlier start of the same run, or of any run that
            ended before it wrote a shard with rows.
        identity: JSON-able; everything that decides the content (options, fingerprints, number of conversations).
        kind: representation, aligned or combined.
        encoding: plain or compact (see `store.rows`).
    Raises: InputError with the first key that differs if the directory holds another run's data, or with the path if
        the directory cannot be made.
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
            self._remove_created()
            raise of_output(error) from None

    def _claim(self) -> None:
        self._created = [place for place in (self.path, *self.path.absolute().parents) if not place.exists()]
        file = self.path / "identity.json"
        of_another = self.path.is_dir() and self._claimed_identity() not in (None, self.identity)
        if of_another and self._remove_empty_shards():
            write_atomic(file, json_bytes(self.identity))
        for _ in range(2):  # once more after writing: another run may have claimed it meanwhile
            check_claim(self.path, self.identity, self._claimed_identity, remedy=" or the same data and options")
            if file.exists():
                return
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomic(file, json_bytes(self.identity))

    def _claimed_identity(self) -> dict | None:
        return read_json(self.path / "identity.json", "identity")

    def _remove_empty_shards(self) -> bool:
        """Remove the empty shards of a run that left nothing else; if it left more, remove nothing and return False."""
        entries = [entry for entry in self.path.iterdir() if entry.suffix != ".tmp"]
        left = [entry for entry in entries if entry.match("shard-*.json") or entry.name == "skipped.jsonl"]
        if not {entry.name for entry in entries} <= {"identity.json", "tokenizer", *(entry.name for entry in left)}:
            return False
        for entry in left:
            entry.unlink(missing_ok=True)
        shutil.rmtree(self.path / "tokenizer", ignore_errors=True)
        return True

    def release(self) -> None:
        """Give up a directory without a shard with rows: restore it, or remove what this run created of it."""
        if self._claimed_identity() != self.identity or not self._remove_empty_shards():
            return
        (self.path / "identity.json").unlink(missing_ok=True)
        self._remove_created()

    def _remove_created(self) -> None:
        with contextlib.suppress(OSError):  # another process has written into it
            for place in self._created:
                place.rmdir()

    def _file(self, shard: int, suffix: str) -> Path:
        return self.path / f"shard-{shard:05d}.{suffix}"

    def info(self, shard: int) -> dict:
        """The shard's record: rows, bytes, sha256, counts and the `info` given to `write`."""
        return json.loads(self._file(shard, "json").read_bytes())

    def done(self, shard: int) -> bool:
        """Whether the shard was written and is undamaged; a warning names a damaged one."""
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
        """The shards that must still be computed; the log says how many are done."""
        shards = list(shards)
        left = [shard for shard in shards if not self.done(shard)]
        if not left and (self.path / "manifest.json").exists():
            logger.info("%s holds this very run, finished: nothing to compute.", self.path)
        elif len(left) < len(shards):
            logger.info("%s: %d of %d shards there, going on.", self.path, len(shards) - len(left), len(shards))
        return left

    def write(self, shard: int, rows: list[dict], info: dict | None = None) -> None:
        """Write one shard of documented rows, possibly none, whole or not at all; `info` is stored beside it."""
        if self._claimed_identity() != self.identity:
            raise InputError(
                f"output directory for {self.path}: expected this run's identity, got another run's. Choose another."
            )
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
        """Make the directory readable: files for `datasets`, a card, and last `manifest.json` with the counts.

        Where all of it is there already nothing is written: another run may be reading, or finishing it too.

        Raises: InputError if no shard has a row; RuntimeError if a shard is missing.
        """
        import pyarrow as pa

        missing = [shard for shard in range(num_shards) if not self._file(shard, "json").exists()]
        if missing:
            raise RuntimeError(f"{self.path}: shards {missing[:5]} of {num_shards} are missing")
        infos = [self.info(shard) for shard in range(num_shards)]
        written = [(self._file(n, "arrow").name, info) for n, info in enumerate(infos) if info["sha256"]]
        shards = [{"file": name, "rows": info["rows"], "sha256": info["sha256"]} for name, info in written]
        if not shards:
            raise InputError(
                f"data for {self.path}: expected at least one usable conversation, got none. See skipped.jsonl."
            )
        manifest = {**manifest, "kind": self.kind, "encoding": self.encoding, "schema_version": SCHEMA_VERSION}
        manifest |= {"counts": {**_totals(infos), **manifest.get("counts", {})}, "shards": shards}
        manifest["files"] = {
            str(file.relative_to(self.path)): file_sha256(file)
            for pattern in ("tokenizer/**/*", "skipped.jsonl", "counts.safetensors")
            for file in sorted(self.path.glob(pattern))
            if file.is_file()
        }
        places = [self.path / name for name in ("dataset_info.json", "state.json", "README.md", "manifest.json")]
        if all(place.exists() for place in places) and places[-1].read_bytes() == json_bytes(manifest):
            return
        schema = pa.ipc.open_stream(pa.memory_map(str(self.path / shards[0]["file"]))).schema
        for name, content in _for_datasets(shards, schema).items():
            write_atomic(self.path / name, json_bytes(content))
        write_atomic(self.path / "README.md", dataset_card(manifest, schema.names).encode())
        for leftover in self.path.glob(".*.tmp"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        write_atomic(self.path / "manifest.json", json_bytes(manifest))


def _totals(infos: list[dict]) -> dict[str, int | float]:
    """The manifest's counts: sums over the shards' records."""
    names = {"rows": "conversations", "tokens": "tokens", "predicted_tokens": "predicted_tokens", "bytes": "bytes"}
    counts: dict[str, int | float] = {name: sum(info[key] for info in infos) for key, name in names.items()}
    counts["bytes_per_predicted_token"] = round(counts["bytes"] / max(counts["predicted_tokens"], 1), 3)
    return counts


def _for_datasets(shards: list[dict], schema) -> dict[str, dict]:
    """The two files that `datasets.load_from_disk` needs, by name."""
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
    """One record batch as an Arrow IPC stream; `content_hash`, `slice` and, of a source, `source_tokens` are always
    columns, possibly all null."""
    import pyarrow as pa

    types = {bytes: pa.binary(), str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    kinds = {"id": pa.string(), "content_hash": pa.string(), "slice": pa.string()}
    if "source_ids" in encoded[0]:
        kinds["source_tokens"] = pa.int64()
    for row in encoded:
        kinds |= {key: types[type(value)] for key, value in row.items()}
    schema = pa.schema([(key, kinds[key]) for key in ["id", *sorted(set(kinds) - {"id"})]])
    batch = pa.RecordBatch.from_pylist(encoded, schema=schema)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()
