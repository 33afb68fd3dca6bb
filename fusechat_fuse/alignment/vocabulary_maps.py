"""Which pivot token a source token becomes in the paper's mappings: computed once per tokenizer pair.

Three maps from source id to pivot id, all by bytes (`tokens.TokenTable`), none of them V x V:
    exact       the pivot token of the same bytes
    min_edit    else the pivot token at the least Levenshtein distance (in characters)
    statistics  else the pivot token most often aligned with it over the corpus
Here -1 is "no pivot token". Special tokens are mapped by role, by the caller, never by name.

Each takes `source_bytes` [V_S], the bytes of each source id (None: special), and `by_bytes`, the pivot id of each byte
string (`preferred_ids`); statistics also `pivot_bytes` [V_P] and the counts. Each returns int32 [V_S].
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Bytes = bytes | None


def preferred_ids(pivot_bytes: Sequence[Bytes], is_byte_piece: Sequence[bool]) -> dict[bytes, int]:
    """Bytes -> pivot id; of several ids with the same bytes an ordinary one before a `<0xNN>` one, then the lowest."""
    chosen: dict[bytes, int] = {}
    for byte_piece in (False, True):
        for i, piece in enumerate(pivot_bytes):
            if piece and bool(is_byte_piece[i]) == byte_piece:
                chosen.setdefault(piece, i)
    return chosen


def exact_map(source_bytes: Sequence[Bytes], by_bytes: dict[bytes, int]) -> np.ndarray:
    """EM: the pivot token of the same bytes; -1 where none has these bytes."""
    return np.array([by_bytes.get(piece, -1) if piece else -1 for piece in source_bytes], np.int32)


def _characters(piece: bytes) -> str:
    """Characters, and one symbol for each byte that is no part of one."""
    return piece.decode("utf-8", "surrogateescape")


def min_edit_map(source_bytes: Sequence[Bytes], by_bytes: dict[bytes, int], *, workers: int = 1) -> np.ndarray:
    """MinED: the pivot token of least Levenshtein distance; of several at that distance the one of lowest id.

    Distance 1, more than half of them, is looked up (`_one_edit_away`). For the rest pivot tokens are tried by length,
    nearest first, as a distance is at least the difference in length; a source token is settled once the next
    difference exceeds its best distance. A progress bar shows how many are settled. -1 is for special tokens only.

    Source: FuseLLM (arXiv 2401.10491) section 3.2. The released FuseChat code cannot run this mode.
    """
    from fusechat_fuse.progress import progress

    mapping = exact_map(source_bytes, by_bytes)
    texts = {i: _characters(piece) for i, piece in enumerate(source_bytes) if piece and mapping[i] < 0}
    ascending = [(_characters(piece), i) for piece, i in sorted(by_bytes.items(), key=lambda item: item[1])]
    with progress(total=len(texts), desc="nearest tokens", unit="token", show=len(texts) >= 2048) as bar:
        for i, nearest in _one_edit_away(texts, ascending):
            mapping[i] = nearest
            del texts[i]
            bar.update()
        by_length, queries = defaultdict(list), defaultdict(list)
        for text, i in ascending:
            by_length[len(text)].append((text, i))
        pivot = {n: ([text for text, _ in some], np.array([i for _, i in some])) for n, some in by_length.items()}
        for i, text in texts.items():
            queries[len(text)].append(i)
        for length, group in queries.items():
            for at in range(0, len(group), 2048):
                ids = group[at : at + 2048]
                mapping[ids] = _nearest([texts[i] for i in ids], length, pivot, workers)
                bar.update(len(ids))
    return mapping


def _one_edit_away(texts: dict[int, str], ascending: list[tuple[str, int]]) -> list[tuple[int, int]]:
    """(source id, lowest pivot id at distance 1) of the texts that have one; none is a pivot text itself.

    Texts that differ are one edit apart if one is the other without a character, or both are the same without the
    character at some place.
    """
    whole, shorter = dict(ascending), {}
    without: dict[tuple[str, str], int] = {}
    for text, i in ascending:
        for k in range(len(text)):
            shorter.setdefault(text[:k] + text[k + 1 :], i)
            without.setdefault((text[:k], text[k + 1 :]), i)
    found = []
    for i, text in texts.items():
        near = [shorter.get(text)]
        for k in range(len(text)):
            near += whole.get(text[:k] + text[k + 1 :]), without.get((text[:k], text[k + 1 :]))
        if known := [n for n in near if n is not None]:
            found.append((i, min(known)))
    return found


def _nearest(
    texts: Sequence[str], length: int, pivot: dict[int, tuple[list[str], np.ndarray]], workers: int
) -> np.ndarray:
    """Nearest pivot ids of texts that all have `length` characters; `pivot`: texts and ascending ids by length."""
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    worst = np.iinfo(np.uint16).max
    best, chosen = np.full(len(texts), worst, np.int64), np.full(len(texts), -1, np.int64)
    for other in sorted(pivot, key=lambda n: abs(n - length)):
        open_ = np.flatnonzero(best >= abs(other - length))  # equal: a lower id at the same distance is still possible
        if not len(open_):
            break
        candidates, ids = pivot[other]
        cutoff = min(int(best[open_].max()), max(length, other))
        for first in range(0, len(candidates), 4096):
            distances = cdist(
                [texts[i] for i in open_],
                candidates[first : first + 4096],
                scorer=Levenshtein.distance,
                score_cutoff=cutoff,
                dtype=np.uint16,
                workers=workers,
            )
            at = distances.argmin(axis=1)
            found, found_ids = distances[np.arange(len(open_)), at].astype(np.int64), ids[first + at]
            better = (found < best[open_]) | ((found == best[open_]) & (found_ids < chosen[open_]))
            better &= found <= max(length, other)
            best[open_[better]], chosen[open_[better]] = found[better], found_ids[better]
    return chosen


@dataclass
class AlignedCounts:
    """How often source id and pivot id were aligned over a corpus: sparse, sorted, summable."""

    keys: np.ndarray  # int64 [N] = source_id * pivot_size + pivot_id, ascending and unique
    counts: np.ndarray  # int64 [N]
    pivot_size: int

    @classmethod
    def of(cls, source_ids: np.ndarray, pivot_ids: np.ndarray, pivot_size: int) -> AlignedCounts:
        """Counts of aligned pairs (source_ids[i], pivot_ids[i])."""
        keys, counts = np.unique(source_ids.astype(np.int64) * pivot_size + pivot_ids, return_counts=True)
        return cls(keys, counts.astype(np.int64), pivot_size)

    @classmethod
    def total(cls, parts: Sequence[AlignedCounts], pivot_size: int) -> AlignedCounts:
        """The sum of several counts."""
        keys = np.concatenate([np.zeros(0, np.int64), *(part.keys for part in parts)])
        counts = np.concatenate([np.zeros(0, np.int64), *(part.counts for part in parts)])
        unique, where = np.unique(keys, return_inverse=True)
        return cls(unique, np.bincount(where, counts, len(unique)).astype(np.int64), pivot_size)


def statistics_map(
    source_bytes: Sequence[Bytes], pivot_bytes: Sequence[Bytes], by_bytes: dict[bytes, int], counts: AlignedCounts
) -> np.ndarray:
    """MS: the same bytes if a pivot token has them, else the pivot token most often aligned with the source token.

    Among pivot tokens aligned equally often the one at the least edit distance, then of the lowest id; -1 where no
    pivot token has the bytes and none was ever aligned with the source token.

    Source: FuseChat (arXiv 2408.07990) section 3.2.
    Differs from the released code, where a larger count makes a pair *less* likely to be chosen.
    """
    from rapidfuzz.distance import Levenshtein

    mapping = exact_map(source_bytes, by_bytes)
    source, pivot = counts.keys // counts.pivot_size, counts.keys % counts.pivot_size
    usable = mapping[source] < 0
    usable &= np.array([piece is not None for piece in source_bytes])[source]
    usable &= np.array([piece is not None for piece in pivot_bytes])[pivot]
    source, pivot, count = source[usable], pivot[usable], counts.counts[usable]
    most = np.zeros(len(mapping), np.int64)
    np.maximum.at(most, source, count)
    often = count == most[source]
    source, pivot = source[often], pivot[often]
    mapping[source[::-1]] = pivot[::-1]  # of several the lowest id
    for i in np.unique(source[1:][np.diff(source) == 0]).tolist():
        ids = pivot[slice(*np.searchsorted(source, [i, i + 1]))]
        text = _characters(source_bytes[i] or b"")
        distances = [Levenshtein.distance(text, _characters(pivot_bytes[k] or b"")) for k in ids.tolist()]
        mapping[i] = ids[int(np.argmin(distances))]
    return mapping
