"""The vocabularies of one tokenizer pair, ready for the mappings: built once, then cached.

The cache is a folder of safetensors files (`FUSECHAT_CACHE`, else `~/.cache/fusechat`), each named by a digest of what
it was built from, so that a file can never serve another pair. Deleting it costs seconds.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from fusechat_fuse.alignment.candidates import Vocabularies
from fusechat_fuse.alignment.correspondence import joined_bytes
from fusechat_fuse.alignment.mappings import Mapping
from fusechat_fuse.alignment.paths import PathTable
from fusechat_fuse.alignment.speller import Speller
from fusechat_fuse.alignment.vocabulary_maps import AlignedCounts, preferred_ids
from fusechat_fuse.errors import InputError
from fusechat_fuse.store.files import short_digest, write_atomic
from fusechat_fuse.store.shards import Representation
from fusechat_fuse.store.tokenizers import read_tokenizer
from fusechat_fuse.text.tokens import same_vocabulary, token_table

logger = logging.getLogger(__name__)
_CACHE_VERSION = 2


class Side:
    """One tokenizer as alignment sees it; lists and arrays are by id [V], padded to the embedding's size."""

    def __init__(self, representation: Representation, tokenizer):
        about, table = representation.manifest["tokenizer"], token_table(tokenizer)
        size = max(len(table.bytes), int(representation.manifest.get("model", {}).get("vocab_size") or 0))
        self.path, self.sha256 = representation.path, about["sha256"]
        self.bytes = table.bytes + [None] * (size - len(table.bytes))  # None: special
        self.pieces = table.pieces + [None] * (size - len(table.pieces))
        self.end_of_turn, self.bos = about.get("end_of_turn_id"), about.get("bos_id")
        for name, role in {"end_of_turn_id": self.end_of_turn, "bos_id": self.bos}.items():
            if role is not None and not 0 <= role < size:
                raise InputError(
                    f"{name} for {self.path}: expected an id below {size}, got {role}. Represent the model again."
                )
            if role is not None:
                self.bytes[role] = None
        self.lengths = np.array([len(piece or b"") for piece in self.bytes], np.int64)
        self.first_byte = np.array([piece[0] if piece else -1 for piece in self.bytes], np.int64)
        self.last_byte = np.array([piece[-1] if piece else -1 for piece in self.bytes], np.int64)  # -1: special
        self.joined = joined_bytes(self.bytes)

    def check(self, row: dict) -> None:
        """Raise InputError for a row with an id beyond the vocabulary, or with a figure that is not a number."""
        for name in ("input_ids", "topk_ids"):
            low, high = row[name].min(initial=0), row[name].max(initial=0)
            if high >= len(self.bytes) or low < (-1 if name == "topk_ids" else 0):
                raise InputError(
                    f"{name} of conversation {row['id']!r} for {self.path}: expected ids below {len(self.bytes)}, got "
                    f"{high if low >= 0 else low}. Represent the model again."
                )
        for name in ("ce", "topk_logprobs"):
            if not np.isfinite(row[name]).all():
                raise InputError(
                    f"{name} of conversation {row['id']!r} for {self.path}: expected finite numbers, got NaN or "
                    "infinity. Represent the model again."
                )


class TokenizerPair:
    """Both tokenizers, read in their stores' directories, whether they share one vocabulary, and what mappings need."""

    def __init__(self, pivot: Representation, source: Representation, cache_dir=None):
        tokenizer = read_tokenizer(pivot)
        equal = pivot.manifest["tokenizer"]["sha256"] == source.manifest["tokenizer"]["sha256"]
        other = tokenizer if equal else read_tokenizer(source)
        self.pivot, self.source = Side(pivot, tokenizer), Side(source, other)
        self.identity = equal or same_vocabulary(tokenizer, other)
        self.speller = Speller(tokenizer)
        byte_pieces = [*self.speller.is_byte_piece, *[False] * len(self.pivot.bytes)]
        self.by_bytes = preferred_ids(self.pivot.bytes, byte_pieces)
        folder = cache_dir or os.environ.get("FUSECHAT_CACHE") or Path.home() / ".cache" / "fusechat"
        self.folder = Path(folder) / "vocabulary"

    def vocabularies(self, mapping: Mapping, counts: AlignedCounts | None = None, workers: int = 1) -> Vocabularies:
        """Maps of the pair for one mapping.

        Special tokens are mapped by role (end of turn, BOS), or to the same id if the two vocabularies are one and the
        piece is the same.
        """
        mine, theirs = self.pivot, self.source
        if self.identity:
            same = [i < len(mine.pieces) and p is not None and mine.pieces[i] == p for i, p in enumerate(theirs.pieces)]
            table = PathTable.of([[i] if equal else [] for i, equal in enumerate(same)])
            single = table.first.copy()
        else:
            table = PathTable(**self._cached("prefix", self._paths))
            single = self._ids(mapping, counts, workers)
        roles = {theirs.bos: mine.bos, theirs.end_of_turn: mine.end_of_turn}
        paths = {i: [] if own is None else [own] for i, own in roles.items() if i is not None}
        table.replace(paths)
        if single is not None:
            single[list(paths)] = table.first[list(paths)]
        return Vocabularies(
            pivot_bytes=self.pivot.bytes,
            source_bytes=self.source.bytes,
            to_pivot=single,
            table=table,
            spell=self.speller.paths,
            by_bytes=self.by_bytes,
            identity=self.identity,
        )

    def _ids(self, mapping: Mapping, counts: AlignedCounts | None, workers: int) -> np.ndarray | None:
        if mapping.to_pivot is None:
            return None
        build = partial(mapping.to_pivot, self.source.bytes, self.pivot.bytes, self.by_bytes, counts, workers)
        ids = self._cached(mapping.name, lambda: {"ids": build()})["ids"] if mapping.kept_on_disk else build()
        return ids.copy()  # what is read from a file cannot be changed

    def _paths(self) -> dict[str, np.ndarray]:
        table = PathTable.of(self.speller.paths([piece or b"" for piece in self.source.bytes]))
        return {"flat": table.flat, "length": table.length}

    def _cached(self, kind: str, build: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """What `build` makes, from the cache if it is there; named by the bytes of both vocabularies and all that
        decides how the pivot spells."""
        from safetensors.numpy import load, save

        digest = hashlib.sha256(f"{self.pivot.sha256} {self.speller.pipeline}".encode())
        for side in (self.pivot, self.source):
            digest.update(side.lengths.tobytes() + b"".join(piece or b"" for piece in side.bytes))
        file = self.folder / f"{kind}-{short_digest(digest)}-v{_CACHE_VERSION}.safetensors"
        if file.exists():
            try:
                return load(file.read_bytes())
            except Exception as error:
                logger.warning("%s cannot be read (%s); it is computed again.", file, error)
        arrays = build()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(file, save(arrays))
        except OSError as error:
            logger.warning("vocabulary map cannot be cached in %s: %s", self.folder, error)
        return arrays


def save_counts(path, counts: AlignedCounts, pair: TokenizerPair) -> None:
    """Write alignment counts for another corpus: safetensors with both tokenizers' hashes."""
    from safetensors.numpy import save

    about = {"pivot": pair.pivot.sha256, "source": pair.source.sha256, "pivot_size": counts.pivot_size}
    described = {"about": json.dumps(about)}  # one entry: safetensors writes several in any order
    write_atomic(Path(path), save({"keys": counts.keys, "counts": counts.counts}, metadata=described))


def load_counts(path, pair: TokenizerPair) -> AlignedCounts:
    """Counts that an earlier `align` wrote (`counts.safetensors`, or its directory), of the same tokenizers."""
    from safetensors import safe_open

    file = Path(path) / "counts.safetensors" if Path(path).is_dir() else Path(path)
    if (file.parent / "manifest.json").exists() and file.name == "counts.safetensors":
        file = Representation(file.parent).file(file.name)
    try:
        with safe_open(file, framework="numpy") as tensors:
            about = json.loads((tensors.metadata() or {}).get("about", "{}"))
            keys, counts = tensors.get_tensor("keys"), tensors.get_tensor("counts")
    except Exception as error:
        raise InputError(
            f"counts for {file}: expected counts.safetensors that align wrote, got {error}. Give another path."
        ) from error
    for side in ("pivot", "source"):
        if about.get(side) != getattr(pair, side).sha256:
            raise InputError(
                f"counts for {file}: expected counts of the same tokenizers, got another {side} tokenizer. "
                "Leave counts out to collect them from this corpus."
            )
    return AlignedCounts(keys, counts, int(about["pivot_size"]))
