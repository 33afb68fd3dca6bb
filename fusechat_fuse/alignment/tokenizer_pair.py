"""The vocabularies of one tokenizer pair, ready for the mappings: built once, kept under both tokenizers' hashes.

The cache is a folder of safetensors files named by content (`FUSECHAT_CACHE`, else `~/.cache/fusechat`); deleting it
costs seconds for `exact` and `prefix` and minutes for `min_edit`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusechat_fuse.alignment.candidates import Vocabularies
from fusechat_fuse.alignment.mappings import Mapping
from fusechat_fuse.alignment.paths import PathTable
from fusechat_fuse.alignment.side import Side
from fusechat_fuse.alignment.speller import Speller
from fusechat_fuse.alignment.vocabulary_maps import AlignedCounts, preferred_ids
from fusechat_fuse.errors import InputError
from fusechat_fuse.store.files import write_atomic
from fusechat_fuse.store.shards import Representation
from fusechat_fuse.store.tokenizers import read_tokenizer
from fusechat_fuse.text.tokens import same_vocabulary

logger = logging.getLogger(__name__)
_CACHE_VERSION = 1


def cache_folder(cache_dir=None) -> Path:
    """Where vocabulary maps are kept: the argument, else FUSECHAT_CACHE, else ~/.cache/fusechat."""
    return Path(cache_dir or os.environ.get("FUSECHAT_CACHE") or Path.home() / ".cache" / "fusechat")


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
        logger.warning("vocabulary map not kept in %s: %s", folder, error)
    return arrays


@dataclass
class TokenizerPair:
    """Pivot and source side, whether they share one vocabulary, and what the mappings need."""

    pivot: Side
    source: Side
    identity: bool
    speller: Speller
    by_bytes: dict
    folder: Path

    @classmethod
    def load(cls, pivot: Representation, source: Representation, cache_dir=None) -> TokenizerPair:
        """Read both tokenizers from the representations' directories."""
        tokenizer = read_tokenizer(pivot.path)
        equal = pivot.manifest["tokenizer"]["sha256"] == source.manifest["tokenizer"]["sha256"]
        other = tokenizer if equal else read_tokenizer(source.path)
        speller, side = Speller(tokenizer), Side.of(pivot, tokenizer)
        return cls(
            pivot=side,
            source=Side.of(source, other),
            identity=equal or same_vocabulary(tokenizer, other),
            speller=speller,
            by_bytes=preferred_ids(side.bytes, [*speller.is_byte_piece, *[False] * len(side.bytes)]),
            folder=cache_folder(cache_dir) / "vocabulary",
        )

    def _name(self, kind: str) -> str:
        return f"{kind}-{self.pivot.sha256[:16]}-{self.source.sha256[:16]}-v{_CACHE_VERSION}"

    def vocabularies(self, mapping: Mapping, counts: AlignedCounts | None = None, workers: int = 1) -> Vocabularies:
        """Maps of the pair for one mapping.

        Args:
            mapping: an entry of `MAPPINGS`.
            counts: for one that needs them.
            workers: threads.

        Returns:
            Vocabularies; special tokens are mapped by role (end of turn, BOS), identical ones also where the two
            vocabularies are one.
        """
        if self.identity:
            table = PathTable([[i] if same else [] for i, same in enumerate(self._same())])
            single = table.first.copy()
        else:
            table, single = self._paths(), self._ids(mapping, counts, workers)
        vocab = Vocabularies(
            pivot_bytes=self.pivot.bytes,
            source_bytes=self.source.bytes,
            to_pivot=single,
            table=table,
            spell=self.speller.paths,
            by_bytes=self.by_bytes,
            identity=self.identity,
        )
        return self._by_role(vocab)

    def _same(self) -> list[bool]:
        mine, theirs = self.pivot.pieces, self.source.pieces
        return [i < len(mine) and piece is not None and mine[i] == piece for i, piece in enumerate(theirs)]

    def _by_role(self, vocab: Vocabularies) -> Vocabularies:
        """End of turn and BOS of the source become the pivot's."""
        paths = {}
        for role in ("bos", "end_of_turn"):
            theirs, mine = getattr(self.source, role), getattr(self.pivot, role)
            if theirs is not None:
                paths[theirs] = [] if mine is None else [mine]
                if vocab.to_pivot is not None:
                    vocab.to_pivot[theirs] = -1 if mine is None else mine
        vocab.table.replace(paths)
        return vocab

    def _ids(self, mapping: Mapping, counts: AlignedCounts | None, workers: int) -> np.ndarray | None:
        build = mapping.to_pivot
        if build is None:
            return None
        make = lambda: build(self.source.bytes, self.pivot.bytes, self.by_bytes, counts, workers)  # noqa: E731
        if not mapping.kept_on_disk:
            return make()
        kept = _cached(self.folder, self._name(mapping.name), lambda: {"ids": make()})
        cached = kept["ids"].astype(np.int32)
        ids = np.full(len(self.source.bytes), -1, np.int32)
        ids[: len(cached)] = cached[: len(ids)]
        return ids

    def _paths(self) -> PathTable:
        def build() -> dict[str, np.ndarray]:
            table = PathTable(self.speller.paths([piece or b"" for piece in self.source.bytes]))
            return {"flat": table.flat, "length": table.length}

        cached = _cached(self.folder, self._name("prefix"), build)
        size = len(self.source.bytes)  # padding of the embedding differs between models of one tokenizer
        missing = max(size - len(cached["length"]), 0)
        return PathTable.from_flat(cached["flat"], np.append(cached["length"], np.zeros(missing, np.int32))[:size])


def save_counts(path, counts: AlignedCounts, pair: TokenizerPair) -> None:
    """Keep alignment counts for another corpus: safetensors with both tokenizers' hashes."""
    from safetensors.numpy import save

    about = {"pivot": pair.pivot.sha256, "source": pair.source.sha256, "pivot_size": counts.pivot_size}
    described = {"about": json.dumps(about)}  # one entry: safetensors writes several in any order
    write_atomic(Path(path), save({"keys": counts.keys, "counts": counts.counts}, metadata=described))


def load_counts(path, pair: TokenizerPair) -> AlignedCounts:
    """Counts that an earlier `align` left (a file, or the directory that holds `counts.safetensors`).

    Raises: InputError where they are of another tokenizer pair or cannot be read.
    """
    from safetensors import safe_open

    file = Path(path) / "counts.safetensors" if Path(path).is_dir() else Path(path)
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
