"""What the mappings work on: streams of tokens, and of every source token its candidates.

Shape letters: P pivot tokens, Q source tokens, K kept top-k, C = K + 1 candidates.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fusechat_fuse.alignment.paths import PathTable
from fusechat_fuse.alignment.sparse_rows import row_sums


@dataclass(frozen=True)
class Stream:
    """The predicted tokens of a batch, in order, with places on one line (`correspondence.line_up`).

    ids, start, end, header: integers [P]; header counts the bytes a token has before its start (chat header or a '▁'
    that stands for no byte). Of a source also ce float [Q], topk_ids int [Q, K], topk_logprobs float [Q, K].
    """

    ids: np.ndarray
    start: np.ndarray
    end: np.ndarray
    header: np.ndarray
    ce: np.ndarray | None = None
    topk_ids: np.ndarray | None = None
    topk_logprobs: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Vocabularies:
    """What the mappings need to know of both vocabularies.

    pivot_bytes, source_bytes: by id, None for special tokens; to_pivot int32 [V_S]: one pivot id each or -1 (exact,
    min_edit, statistics, identity); table: paths by source id; spell: bytes -> paths, for the few that must be spelled
    anew; by_bytes: pivot id of bytes; identity: the two vocabularies are one.
    """

    pivot_bytes: list
    source_bytes: list
    to_pivot: np.ndarray | None
    table: PathTable
    spell: object
    by_bytes: dict = field(default_factory=dict)
    identity: bool = False
    _rows: dict = field(default_factory=dict)

    def rows_of(self, spelled: list[bytes]) -> list[int]:
        """Rows of the path table for byte strings; spelled once, then remembered."""
        new = [piece for piece in dict.fromkeys(spelled) if piece not in self._rows]
        if new:
            first = self.table.extend(self.spell(new))
            self._rows.update(zip(new, range(first, first + len(new))))
        return [self._rows[piece] for piece in spelled]


@dataclass
class Work:
    """Per source token: candidates and how it lies to the pivot's tokens. See `prepare`."""

    first: np.ndarray  # [Q] first pivot token that starts in it
    inside: np.ndarray  # [Q] how many pivot tokens start in it
    offset: np.ndarray  # [Q] its bytes before that start (r)
    probs: np.ndarray  # [Q, C] P of the candidates, 0 for the actual one and for dead ones
    rows: np.ndarray  # [Q, C] their rows in the path table
    slot: np.ndarray  # [Q] where the actual token stands among them
    actual: np.ndarray  # [Q] P of the actual token
    log_actual: np.ndarray  # [Q]
    alive_sum: np.ndarray  # [Q] P of all that begin with r, actual included
    usable: np.ndarray  # [Q] no hole in the pivot's tokens makes r ambiguous


def prepare(pivot: Stream, source: Stream, vocab: Vocabularies) -> Work:
    """Candidates of every source token and how it lies to the pivot's tokens, for `prefix_rows`."""
    Q, K = source.topk_ids.shape
    first = np.searchsorted(pivot.start, source.start, side="left")
    inside = np.searchsorted(pivot.start, source.end, side="left") - first
    start_of = np.append(pivot.start, np.iinfo(np.int64).max)[first]
    before = np.maximum(first - 1, 0)
    covered = pivot.end[before] - source.start if len(pivot) else np.zeros(Q, np.int64)
    covered = np.where((first > 0) & (covered > 0) & (covered < source.end - source.start), covered, 0)
    gap = np.where(inside > 0, start_of - source.start, 0)
    offset = np.where(covered > 0, covered, gap)
    log_actual = -source.ce.astype(np.float64)
    actual = np.exp(log_actual)
    same = source.topk_ids == source.ids[:, None]
    probs = np.zeros((Q, K + 1))
    probs[:, :K] = np.exp(source.topk_logprobs.astype(np.float32))
    probs[:, :K][same | (source.topk_ids < 0)] = 0
    rows = np.concatenate([np.maximum(source.topk_ids, 0), np.maximum(source.ids, 0)[:, None]], axis=1)
    slot = np.where(same.any(1), same.argmax(1), K) if K else np.zeros(Q, np.int64)
    header = np.append(pivot.header, 0)[first] * ((inside > 0) & (gap == 0))
    moved = (source.header != header) if vocab.identity else (source.header > 0) | (header > 0)
    special = np.flatnonzero(((offset > 0) | moved) & ((inside > 0) | (covered > 0)))
    if len(special):
        _spell_anew(pivot, source, vocab, special, offset, header, first, probs, rows)
    return Work(
        first=first,
        inside=inside,
        offset=offset,
        probs=probs,
        rows=rows,
        slot=slot,
        actual=actual,
        log_actual=log_actual,
        alive_sum=row_sums(probs) + actual,
        usable=(covered == 0) | (gap == covered) | (inside == 0),
    )


def _spell_anew(pivot, source, vocab, special, offset, header, first, probs, rows) -> None:
    """Candidates that must begin with bytes already read (r, the source's header): dead, or the path of the rest."""
    pieces, places = [], []
    for q in special.tolist():
        read = _text_of(source, vocab, pivot, q, int(offset[q]))
        if offset[q] == 0 and header[q]:
            put = vocab.pivot_bytes[pivot.ids[first[q]]][: header[q]]
        else:
            put = b""
        for k in np.flatnonzero(probs[q] > 0).tolist():
            piece = vocab.source_bytes[source.topk_ids[q, k]]
            if piece is None or not piece.startswith(read):
                probs[q, k] = 0
            else:
                pieces.append(put + piece[len(read) :])
                places.append((q, k))
    if pieces:
        q, k = np.array(places).T
        rows[q, k] = vocab.rows_of(pieces)


def _text_of(source: Stream, vocab: Vocabularies, pivot: Stream, q: int, length: int) -> bytes:
    """The source token's header bytes and its first `length` bytes of text (its own, not its vocabulary entry's)."""
    own = vocab.source_bytes[source.ids[q]]
    if own is None:
        return b""
    header, width = int(source.header[q]), int(source.end[q] - source.start[q])
    if len(own) - header == width:
        return own[: header + length]
    return own[:header] + _literal(own[header:], width, length, source.start[q], pivot, vocab)


def _literal(own: bytes, width: int, length: int, start: int, pivot: Stream, vocab: Vocabularies) -> bytes:
    """Text of a token some of whose blanks are literal '▁' (three bytes): the pivot's bytes say which."""
    mark, readings = "▁".encode(), [b""]
    for k in range(len(own)):
        piece = own[k : k + 1]
        readings = [r + alternative for r in readings for alternative in ((piece, mark) if piece == b" " else (piece,))]
        readings = readings[:256]
    readings = [reading for reading in readings if len(reading) == width] or [own.ljust(width)[:width]]
    low = int(np.searchsorted(pivot.start, start, side="left"))
    for p in range(low, min(low + width, len(pivot))):
        piece, at = vocab.pivot_bytes[pivot.ids[p]], int(pivot.start[p] - start)
        if piece is None or at >= width or len(piece) != pivot.end[p] - pivot.start[p]:
            continue
        fits = [reading for reading in readings if piece.startswith(reading[at : at + len(piece)])]
        readings = fits or readings
    return readings[0][:length]
