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
from pathlib import Path

import numpy as np

from fusechat_fuse.alignment.candidates import Vocabularies
from fusechat_fuse.alignment.mappings import Mapping
from fusechat_fuse.alignment.paths import PathTable
from fusechat_fuse.alignment.side import Side
from fusechat_fuse.alignment.speller import Speller
from fusechat_fuse.alignment.vocabulary_maps import AlignedCounts, preferred_ids
from fusechat_fuse.errors import InputError
from fusechat_fuse.store.files import short_digest, write_atomic
from fusechat_fuse.store.shards import Representation
from fusechat_fuse.store.tokenizers import read_tokenizer
from fusechat_fuse.text.tokens import same_vocabulary

logger = logging.getLogger(__name__)
_CACHE_VERSION = 2


def _cached(folder: Path, name: str, build: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    from safetensors.numpy import load, save

    file = folder / f"{name}.safetensors"
    if file.exists():
        try:
            return load(file.read_bytes())
        except Exception as error:
            logger.warning("%s cannot be read (%s); it is computed again.", file, error)
    arrays = build()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(file, save(arrays))
    except OSError as error:
        logger.warning("vocabulary map cannot be cached in %s: %s", folder, error)
    return arrays


class TokenizerPair:
    """Both tokenizers, whether they share one vocabulary, and what the mappings need.

    Args:
        pivot, source: stores, in whose directories the tokenizers are read.
        cache_dir: directory of the vocabulary maps; None: FUSECHAT_CACHE, else ~/.cache/fusechat.
    """

    def __init__(self, pivot: Representation, source: Representation, cache_dir=None):
        tokenizer = read_tokenizer(pivot)
        equal = pivot.manifest["tokenizer"]["sha256"] == source.manifest["tokenizer"]["sha256"]
        other = tokenizer if equal else read_tokenizer(source)
        self.pivot, self.source = Side.of(pivot, tokenizer), Side.of(source, other)
        self.identity = equal or same_vocabulary(tokenizer, other)
        self.speller = Speller(tokenizer)
        byte_pieces = [*self.speller.is_byte_piece, *[False] * len(self.pivot.bytes)]
        self.by_bytes = preferred_ids(self.pivot.bytes, byte_pieces)
        folder = cache_dir or os.environ.get("FUSECHAT_CACHE") or Path.home() / ".cache" / "fusechat"
        self.folder = Path(folder) / "vocabulary"

    def _name(self, kind: str) -> str:
        """Name of a cached map: by the bytes of both vocabularies and all that decides how the pivot spells."""
        digest = hashlib.sha256(f"{self.pivot.sha256} {self.speller.pipeline}".encode())
        for side in (self.pivot, self.source):
            digest.update(side.lengths.tobytes() + b"".join(piece or b"" for piece in side.bytes))
        return f"{kind}-{short_digest(digest)}-v{_CACHE_VERSION}"

    def vocabularies(self, mapping: Mapping, counts: AlignedCounts | None = None, workers: int = 1) -> Vocabularies:
        """Maps of the pair for one mapping.

        Args:
            mapping: an entry of `MAPPINGS`.
            counts: for one that needs them.
            workers: threads.

        Returns:
            Vocabularies; special tokens are mapped by role (end of turn, BOS), or to the same id if the two
            vocabularies are one and the piece is the same.
        """
        mine, theirs = self.pivot, self.source
        if self.identity:
            same = [i < len(mine.pieces) and p is not None and mine.pieces[i] == p for i, p in enumerate(theirs.pieces)]
            table = PathTable([[i] if equal else [] for i, equal in enumerate(same)])
            single = table.first.copy()
        else:
            table, single = self._paths(), self._ids(mapping, counts, workers)
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
        build = mapping.to_pivot
        if build is None:
            return None
        make = lambda: build(self.source.bytes, self.pivot.bytes, self.by_bytes, counts, workers)  # noqa: E731
        if not mapping.kept_on_disk:
            return make()
        return _cached(self.folder, self._name(mapping.name), lambda: {"ids": make()})["ids"].astype(np.int32)

    def _paths(self) -> PathTable:
        def build() -> dict[str, np.ndarray]:
            table = PathTable(self.speller.paths([piece or b"" for piece in self.source.bytes]))
            return {"flat": table.flat, "length": table.length}

        cached = _cached(self.folder, self._name("prefix"), build)
        return PathTable.from_flat(cached["flat"], cached["length"])


def save_counts(path, counts: AlignedCounts, pair: TokenizerPair) -> None:
    """Write alignment counts for another corpus: safetensors with both tokenizers' hashes."""
    from safetensors.numpy import save

    about = {"pivot": pair.pivot.sha256, "source": pair.source.sha256, "pivot_size": counts.pivot_size}
    described = {"about": json.dumps(about)}  # one entry: safetensors writes several in any order
    write_atomic(Path(path), save({"keys": counts.keys, "counts": counts.counts}, metadata=described))


def load_counts(path, pair: TokenizerPair) -> AlignedCounts:
    """Counts that an earlier `align` wrote (`counts.safetensors`, or its directory).

    Raises: InputError if they are damaged, cannot be read, or belong to another tokenizer pair.
    """
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
