"""The input of the mappings: two streams of tokens on one line, their relative placement, and the candidates.

The *candidates* of a source token are the kept top-k of its prediction and the actual token, whose probability exp(-ce)
is always known. `place` says where the pivot's tokens start in each source token, `candidates_of` which candidates are
still possible there and what they would become (`docs/method.md`, "Prefix mapping": `headers`, `literal_mark`).

Precision: the probability of a kept candidate is the float32 exp of a stored float16 logarithm, which loses nothing and
takes half the time; that of the actual token, and every sum, is float64, so that the product of the actual tokens'
probabilities equals the source's own to the last digits.

Shape letters: P pivot tokens, Q source tokens, K kept top-k, C = K + 1 candidates.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fusechat_fuse.alignment.paths import PathTable, Spell
from fusechat_fuse.alignment.sparse_rows import row_sums

_MARK = "▁".encode()


@dataclass(frozen=True)
class Stream:
    """The predicted tokens of a batch, in order, with places on one line (`correspondence.line_up`); integers [P]."""

    ids: np.ndarray
    start: np.ndarray
    end: np.ndarray
    header: np.ndarray  # the bytes a token has before its start: chat header, or a '▁' that stands for no byte

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class SourceStream(Stream):
    """A stream with the model's predictions."""

    ce: np.ndarray  # float [Q]
    topk_ids: np.ndarray  # int [Q, K], -1: none
    topk_logprobs: np.ndarray  # float [Q, K]


@dataclass
class Vocabularies:
    """Both vocabularies, as the mappings need them."""

    pivot_bytes: list[bytes | None]  # by id, None for special tokens
    source_bytes: list[bytes | None]
    to_pivot: np.ndarray | None  # int32 [V_S], one pivot id each or -1; None where the mapping has no such map
    table: PathTable  # by source id; later rows hold the byte strings that `rows_of` spelled
    spell: Spell  # of byte strings that are no source token
    by_bytes: dict[bytes, int] = field(default_factory=dict)  # pivot id of each byte string
    identity: bool = False  # whether the two vocabularies are one
    _rows: dict[bytes, int] = field(default_factory=dict)

    def rows_of(self, spelled: list[bytes]) -> list[int]:
        """Rows of the path table for byte strings; spelled once, then remembered."""
        new = [piece for piece in dict.fromkeys(spelled) if piece not in self._rows]
        if new:
            first = self.table.extend(self.spell(new))
            self._rows.update(zip(new, range(first, first + len(new))))
        return [self._rows[piece] for piece in spelled]


@dataclass(frozen=True)
class Placement:
    """The position of each source token relative to the pivot's tokens: integers [Q], and whether the text is known."""

    first: np.ndarray  # the first pivot token that starts in it (where none does, the first that starts after it)
    inside: np.ndarray  # how many pivot tokens start in it
    read: np.ndarray  # its bytes before that start, or those that a pivot token which began earlier covers
    header: np.ndarray  # header bytes of the pivot token that starts where it starts, else 0
    no_hole: np.ndarray  # False: a pivot token ends inside it, and none starts there; which bytes were read is unknown


@dataclass(frozen=True)
class Candidates:
    """The candidates of each source prediction, after the bytes before the first pivot start in its token.

    A candidate is *alive* if it begins with these bytes. The actual token always is; its probability stands apart.
    """

    probs: np.ndarray  # float64 [Q, C], P of the others, kept ones first; 0 for the actual token and for dead ones
    rows: np.ndarray  # int [Q, C], the path table's row for the rest of each candidate
    slot: np.ndarray  # int [Q], the column of the actual token: its own among the kept ones, else the last
    actual: np.ndarray  # float64 [Q], P of the actual token, exp(-ce)
    log_actual: np.ndarray  # its logarithm
    alive: np.ndarray  # float64 [Q], sum of P over all that are alive, the actual one included


def place(pivot: Stream, source: Stream) -> Placement:
    """Where the pivot's tokens start in each source token: one sorted search, O(Q log P)."""
    first = np.searchsorted(pivot.start, source.start, side="left")  # [Q]
    inside = np.searchsorted(pivot.start, source.end, side="left") - first  # [Q]
    gap = np.where(inside > 0, np.append(pivot.start, 0)[first] - source.start, 0)  # [Q] bytes before the first start
    covered = np.concatenate([[0], pivot.end])[first] - source.start  # [Q] by the pivot token before that
    covered = np.where((covered > 0) & (covered < source.end - source.start), covered, 0)
    return Placement(
        first=first,
        inside=inside,
        read=np.where(covered > 0, covered, gap),
        header=np.append(pivot.header, 0)[first] * ((inside > 0) & (gap == 0)),
        no_hole=(covered == 0) | (gap == covered) | (inside == 0),
    )


def candidates_of(pivot: Stream, source: SourceStream, placement: Placement, vocab: Vocabularies) -> Candidates:
    """The candidates of every source token, read up to the first pivot start in it; adds rows to the path table."""
    Q, K = source.topk_ids.shape
    log_actual = -source.ce.astype(np.float64)  # [Q]
    actual = np.exp(log_actual)
    same = source.topk_ids == source.ids[:, None]  # [Q, K]
    probs = np.zeros((Q, K + 1))
    probs[:, :K] = np.exp(source.topk_logprobs.astype(np.float32))
    probs[:, :K][same | (source.topk_ids < 0)] = 0
    rows = np.concatenate([np.maximum(source.topk_ids, 0), np.maximum(source.ids, 0)[:, None]], axis=1)  # [Q, C]
    _read_on(pivot, source, placement, vocab, probs, rows)
    return Candidates(
        probs=probs,
        rows=rows,
        slot=np.where(same.any(1), same.argmax(1), K) if K else np.zeros(Q, np.int64),
        actual=actual,
        log_actual=log_actual,
        alive=row_sums(probs) + actual,
    )


def _read_on(pivot, source, placement: Placement, vocab: Vocabularies, probs, rows) -> None:
    """Where bytes were read already (r, a header): mark candidates dead, or set the path of their rest, in place.

    At a common start the pivot token's own header bytes come before that rest, as its actual token has them too.
    """
    if vocab.identity:  # equal headers change nothing
        moved = placement.header != source.header
    else:
        moved = (placement.header > 0) | (source.header > 0)
    pieces, places = [], []
    for q in np.flatnonzero((placement.read > 0) | (moved & (placement.inside > 0))).tolist():
        read, put = _text_read(pivot, source, vocab, q, int(placement.read[q])), b""
        if placement.read[q] == 0 and placement.header[q]:
            put = (vocab.pivot_bytes[pivot.ids[placement.first[q]]] or b"")[: placement.header[q]]
        for k in np.flatnonzero(probs[q] > 0).tolist():
            piece = vocab.source_bytes[source.topk_ids[q, k]]
            if piece is None and placement.read[q] == 0:
                continue  # an end of turn or BOS is mapped by its role, whatever the header bytes
            if piece is None or not piece.startswith(read):
                probs[q, k] = 0
            else:
                pieces.append(put + piece[len(read) :])
                places.append((q, k))
    if pieces:
        q, k = np.array(places).T
        rows[q, k] = vocab.rows_of(pieces)


def _text_read(pivot: Stream, source: Stream, vocab: Vocabularies, q: int, length: int) -> bytes:
    """The source token's header bytes and its first `length` bytes of text (its own, not its vocabulary entry's)."""
    own = vocab.source_bytes[source.ids[q]]
    if own is None:
        return b""
    header, width = int(source.header[q]), int(source.end[q] - source.start[q])
    if len(own) - header == width:
        return own[: header + length]
    return own[:header] + _literal_marks(own[header:], width, int(source.start[q]), pivot, vocab)[:length]


def _literal_marks(own: bytes, width: int, start: int, pivot: Stream, vocab: Vocabularies) -> bytes:
    """Text of a token some of whose blanks are literal '▁' (three bytes): the pivot's bytes say which.

    Of several readings that agree with the pivot's bytes the one whose marks come last.
    """
    known = _known_text(start, width, pivot, vocab)
    return _reading(own, known) or _reading(own, [None] * width) or own.ljust(width)[:width]


def _known_text(start: int, width: int, pivot: Stream, vocab: Vocabularies) -> list[int | None]:
    """The bytes of a stretch of text, None where the pivot's tokens do not tell."""
    known: list[int | None] = [None] * width
    p = max(int(np.searchsorted(pivot.start, start, side="right")) - 1, 0)
    while p < len(pivot) and pivot.start[p] < start + width:
        piece, at = (vocab.pivot_bytes[pivot.ids[p]] or b"")[pivot.header[p] :], int(pivot.start[p]) - start
        for text in (piece, piece.replace(b" ", _MARK)):  # between all blanks and all marks it does not tell
            if len(text) == pivot.end[p] - pivot.start[p]:
                for n in range(max(at, 0), min(at + len(text), width)):
                    known[n] = text[n - at]
        p += 1
    return known


def _reading(own: bytes, known: list[int | None]) -> bytes | None:
    """`own` with some blanks as marks, as long as `known` and equal to it where that is known; None: there is none.

    Backwards, the places where the rest of `own` can begin: one of each where all is known, so this takes
    O(bytes), and where nothing is O(bytes * marks). Then forwards along them, a blank wherever both go on.
    """

    def fits(text: bytes, at: int) -> bool:
        return 0 <= at <= len(known) - len(text) and all(known[at + n] in (None, byte) for n, byte in enumerate(text))

    forms = [(own[k : k + 1], _MARK) if own[k : k + 1] == b" " else (own[k : k + 1],) for k in range(len(own))]
    begins = [{len(known)}]  # of the rest after the last byte, then after the one before it, ...
    for several in reversed(forms):
        begins.append({end - len(form) for end in begins[-1] for form in several if fits(form, end - len(form))})
    begins.reverse()
    if 0 not in begins[0]:
        return None
    text = b""
    for several, after in zip(forms, begins[1:]):
        text += next(form for form in several if len(text) + len(form) in after and fits(form, len(text)))
    return text
