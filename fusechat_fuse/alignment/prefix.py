"""From a source's distributions to the pivot's tokens: the four mappings, on arrays alone.

The exact one is `prefix`. Every candidate of a source prediction (the kept top-k and the actual token, whose
probability exp(-ce) is always known) is read as the path of pivot tokens that spells its bytes. At the pivot token p
that lies c pivot tokens into the source token q, with y the actual pivot token,

    alive(c) = candidates whose path begins with the c actual pivot tokens,     D = sum of P over alive(c), 1 at c = 0
    p(v) = sum of P over alive candidates whose next token is v / D                                    for v != y
    p(y) = the same sum                                                       if y ends inside the actual token of q
           P(actual) / D                                                      if y ends with it
           P(actual) / D * P(further actual tokens covered) * P(those that begin with the part covered last)  else

so that between two common starts the product of p(y) *is* the source's own probability of the text. The paper's three
map each candidate to one pivot id at common starts and renormalise.

Shape letters: P pivot tokens, Q source tokens, K kept top-k, C = K + 1 candidates.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fusechat_fuse.alignment.correspondence import EXACT, NONE, Correspondence
from fusechat_fuse.alignment.vocabulary_maps import PathTable


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
class Mapped:
    """What the source says at each pivot token.

    ids int32 [P, C] (-1: no entry), probs float64 [P, C]; log_actual float64 [P], log of the source's probability of
    the actual pivot token (-inf: no answer); answered bool [P]; mass float64 [P], what of the source's probability was
    mapped; kind uint8 [P] as in Correspondence, NONE where not answered.
    """

    ids: np.ndarray
    probs: np.ndarray
    log_actual: np.ndarray
    answered: np.ndarray
    mass: np.ndarray
    kind: np.ndarray
    exact_actual: bool = False  # whether a row's probability of the actual token is the source's own, however small


@dataclass
class _Work:
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


def prefix_rows(pivot: Stream, source: Stream, match: Correspondence, vocab: Vocabularies) -> Mapped:
    """The `prefix` mapping: every comparable position, nothing invented.

    Args:
        pivot: ids, start, end, header of P tokens. source: also ce, topk_ids, topk_logprobs of Q tokens. Borrowed.
        match: `correspond` of the two.
        vocab: with `table` and `spell`.

    Returns:
        Mapped; rows sum to at most 1, an unanswered position has none.

    Source: method section 2b (the equations above).
    """
    work, out = prepare(pivot, source, vocab), _empty(len(pivot), source.topk_ids.shape[1] + 1)
    chosen = np.flatnonzero((work.inside > 0) & work.usable)
    common = (source.start[chosen] == pivot.start[work.first[chosen]]) if len(chosen) else np.zeros(0, bool)
    total = np.where(common, 1.0, work.alive_sum[chosen])
    probs, rows = work.probs[chosen], work.rows[chosen]
    c = 0
    while len(chosen):
        p = work.first[chosen] + c
        ids = vocab.table.at(rows, c)
        _fill(out, pivot, source, work, p, chosen, ids, probs, total)
        deeper = work.inside[chosen] > c + 1
        deeper[deeper] = pivot.start[p[deeper] + 1] == pivot.end[p[deeper]]  # no hole on the way
        chosen, rows = chosen[deeper], rows[deeper]
        probs = np.where(ids[deeper] == pivot.ids[p[deeper], None], probs[deeper], 0)
        total = _row_sums(probs) + work.actual[chosen]
        c += 1
    answered = np.isfinite(out.log_actual)
    out.kind = np.where(answered, match.kind, NONE).astype(np.uint8)
    out.answered = answered
    out.ids[~answered], out.probs[~answered] = -1, 0
    add_up_equal_ids(out.ids, out.probs)
    out.mass, out.exact_actual = _row_sums(out.probs), True
    return out


def _row_sums(values: np.ndarray) -> np.ndarray:
    """Sums along the short axis: a matrix product is several times faster there than a reduction."""
    return values @ np.ones(values.shape[1])


def _empty(P: int, C: int) -> Mapped:
    return Mapped(
        ids=np.full((P, C), -1, np.int32),
        probs=np.zeros((P, C)),
        log_actual=np.full(P, -np.inf),
        answered=np.zeros(P, bool),
        mass=np.zeros(P),
        kind=np.zeros(P, np.uint8),
    )


def prepare(pivot: Stream, source: Stream, vocab: Vocabularies) -> _Work:
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
    return _Work(
        first=first,
        inside=inside,
        offset=offset,
        probs=probs,
        rows=rows,
        slot=slot,
        actual=actual,
        log_actual=log_actual,
        alive_sum=_row_sums(probs) + actual,
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


def _fill(out, pivot, source, work, p, q, ids, probs, total) -> None:
    """One answer for each (pivot token p, source token q that it starts in): the equations of the module's text."""
    y, end, source_end = pivot.ids[p], pivot.end[p], source.end[q]
    lands = ids == y[:, None]
    log_actual = work.log_actual[q]
    within = np.flatnonzero(end < source_end)
    with np.errstate(divide="ignore"):
        log_actual[within] = np.log(work.actual[q[within]] + _row_sums(probs[within] * lands[within]))
        log_actual -= np.log(total)
    beyond = np.flatnonzero(end > source_end)
    if len(beyond):
        log_actual[beyond] += _log_further(pivot, source, work, p[beyond], q[beyond])
    keep = ~lands & (ids >= 0) & (probs > 0)
    out.ids[p] = np.where(keep, ids, -1)
    out.probs[p] = np.where(keep, probs, 0) / total[:, None]
    out.ids[p, work.slot[q]] = y
    out.probs[p, work.slot[q]] = np.exp(log_actual)
    out.log_actual[p] = log_actual


def _log_further(pivot: Stream, source: Stream, work: _Work, p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """log P of the source tokens after q that pivot token p also covers; -inf where there is a hole on the way."""
    last = np.searchsorted(source.start, pivot.end[p], side="left") - 1
    breaks = np.cumsum(np.concatenate([[0], source.start[1:] != source.end[:-1]]))
    whole = breaks[last] == breaks[q]
    whole &= source.end[last] >= pivot.end[p]
    partly = source.end[last] > pivot.end[p]
    sums = np.concatenate([[0.0], np.cumsum(work.log_actual)])
    with np.errstate(divide="ignore"):
        logs = sums[last + 1 - partly] - sums[q + 1] + np.where(partly, np.log(work.alive_sum[last]), 0.0)
    return np.where(whole, logs, -np.inf)


def add_up_equal_ids(ids: np.ndarray, probs: np.ndarray) -> None:
    """Within each row, add the probability of entries with one id to the first of them, in place ([P, C] each)."""
    ordered = np.sort(ids, axis=1)
    rows = np.flatnonzero(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1))
    if not len(rows):
        return
    some, value = ids[rows], probs[rows]
    at = np.arange(len(rows))
    for k in range(1, ids.shape[1]):
        same = (some[:, :k] == some[:, k : k + 1]) & (some[:, k : k + 1] >= 0)
        hit = same.any(1)
        first = same.argmax(1)
        value[at[hit], first[hit]] += value[hit, k]
        some[hit, k], value[hit, k] = -1, 0
    ids[rows], probs[rows] = some, value


def single_id_rows(pivot: Stream, source: Stream, match: Correspondence, vocab: Vocabularies) -> Mapped:
    """The paper's mappings: at a common start each kept candidate becomes one pivot id, the row is renormalised to 1.

    Any other position, and one where no candidate has a pivot id, takes the one-hot distribution of the actual token.

    Args:
        pivot, source, match: as in `prefix_rows`.
        vocab: with `to_pivot` (`exact_map`, `min_edit_map`, `statistics_map` or identity).

    Returns:
        Mapped; every row sums to 1; `answered` is False and `mass` 0 for the one-hot ones; `log_actual` is the
        source's own log-probability of the actual pivot token where they start together, else -inf.

    Source: FuseChat (arXiv 2408.07990) section 3.2.
    Differs from the released code: positions by bytes, candidates that land on one pivot token add up.
    """
    work, P, C = prepare(pivot, source, vocab), len(pivot), source.topk_ids.shape[1]
    out = _empty(P, C)
    p = np.flatnonzero(match.kind == EXACT)
    q = match.source[p]
    ids = np.where(source.topk_ids[q] >= 0, vocab.to_pivot[np.maximum(source.topk_ids[q], 0)], -1)
    moved = (source.header[q] > 0) | (pivot.header[p] > 0)
    if moved.any():
        _reread_headers(pivot, source, vocab, p, q, moved, ids)
    probs = np.exp(source.topk_logprobs[q].astype(np.float64))
    probs[ids < 0] = 0
    ids = np.where(probs > 0, ids, -1).astype(np.int32)
    add_up_equal_ids(ids, probs)
    mass = _row_sums(probs)
    some = mass > 0
    out.ids[p], out.probs[p], out.mass[p] = ids, probs / np.where(some, mass, 1)[:, None], mass
    out.answered[p] = some
    out.kind = np.where(out.answered, match.kind, NONE).astype(np.uint8)
    hot = ~out.answered
    out.ids[hot], out.probs[hot] = -1, 0
    out.ids[hot, 0], out.probs[hot, 0] = pivot.ids[hot], 1.0
    if len(p):
        scratch, total = _empty(P, C + 1), np.ones(len(p))
        _fill(scratch, pivot, source, work, p, q, vocab.table.at(work.rows[q], 0), work.probs[q], total)
        out.log_actual = np.where(out.answered, scratch.log_actual, -np.inf)
    return out


def _reread_headers(pivot, source, vocab, p, q, moved, ids) -> None:
    """Where a token holds header bytes too: the pivot id of (pivot's header bytes + candidate without the source's)."""
    for n in np.flatnonzero(moved).tolist():
        read = (vocab.source_bytes[source.ids[q[n]]] or b"")[: source.header[q[n]]]
        put = (vocab.pivot_bytes[pivot.ids[p[n]]] or b"")[: pivot.header[p[n]]]
        if read == put:
            continue
        for k, i in enumerate(source.topk_ids[q[n]].tolist()):
            piece = vocab.source_bytes[i] if i >= 0 else None
            if piece is not None:
                there = piece.startswith(read)
                ids[n, k] = vocab.by_bytes.get(put + piece[len(read) :], -1) if there else -1
