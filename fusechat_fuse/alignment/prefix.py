"""The `prefix` mapping: the source's own next-token probabilities at every pivot token that lies in a source token.

Every candidate of a source prediction (`candidates`) is read as its *path*, the pivot tokens that spell its bytes. At
the pivot token p that lies c pivot tokens into the source token q, with y the actual pivot token,

    alive(c) = candidates whose path begins with the c actual pivot tokens,     D = sum of P over alive(c), 1 at c = 0
    p(v) = sum of P over alive candidates whose next token is v / D                                    for v != y
    p(y) = the same sum                                                       if y ends inside the actual token of q
           P(actual) / D                                                      if y ends with it
           P(actual) / D * P(further actual tokens covered) * P(those that begin with the part covered last)  else

so that between two common starts the product of p(y) *is* the source's own probability of the text. (D is 1 at a
common start only; where q begins inside a pivot token, D at c = 0 is the sum over those that begin with what was read.)

Example: the text " then" is one token of the source, which gave it 0.5, " the" 0.2 and " they" 0.1. The pivot reads it
as " th", "e", "n", and would spell the others " th", "e" and " th", "e", "y".

    >>> import numpy as np
    >>> from fusechat_fuse.alignment.correspondence import correspond
    >>> from fusechat_fuse.alignment.paths import PathTable
    >>> pivot_bytes, source_bytes = [b" th", b"e", b"n", b"y"], [b" then", b" the", b" they"]
    >>> table = PathTable.of([[0, 1, 2], [0, 1], [0, 1, 3]])
    >>> pivot = Stream(*np.array([[0, 1, 2], [0, 3, 4], [3, 4, 5], [0, 0, 0]]))  # ids, start, end, header
    >>> own = {"ce": -np.log([0.5]), "topk_ids": np.array([[0, 1, 2]]), "topk_logprobs": np.log([[0.5, 0.2, 0.1]])}
    >>> source = SourceStream(*np.array([[0], [0], [5], [0]]), **own)
    >>> vocab = Vocabularies(pivot_bytes, source_bytes, None, table, spell=lambda pieces: [])
    >>> mapped = prefix_rows(pivot, source, correspond(pivot.start, pivot.end, source.start, source.end), vocab)
    >>> for ids, probs in zip(mapped.ids, mapped.probs):
    ...     print({pivot_bytes[i].decode(): round(float(p), 4) for i, p in zip(ids, probs) if i >= 0})
    {' th': 0.8}
    {'e': 1.0}
    {'n': 0.625, 'y': 0.125}
    >>> round(float(np.exp(mapped.log_actual.sum())), 12)
    0.5

D is 1, 0.8, 0.8. At "n" 0.2 / 0.8 stay unmapped: " the" has ended, and what the source would say after it is not known.

Shape letters: P pivot tokens, Q source tokens, K kept top-k, C = K + 1 candidates, n pairs (p, q) worked on at once.
"""

from __future__ import annotations

import numpy as np

from fusechat_fuse.alignment.candidates import Candidates, SourceStream, Stream, Vocabularies, candidates_of, place
from fusechat_fuse.alignment.correspondence import NONE, Correspondence
from fusechat_fuse.alignment.sparse_rows import Mapped, add_up_equal_ids, row_sums


def prefix_rows(pivot: Stream, source: SourceStream, match: Correspondence, vocab: Vocabularies) -> Mapped:
    """Rows by the equations above, at every comparable position: nothing invented.

    Args:
        pivot, source: P and Q tokens, borrowed.
        match: `correspond` of the two.
        vocab: with `table` and `spell`.

    Returns:
        Mapped; rows sum to at most 1, an unanswered position has none.

    Source: `docs/method.md`, "Prefix mapping". Precision: see `candidates`.
    """
    placement = place(pivot, source)
    candidates = candidates_of(pivot, source, placement, vocab)
    out = Mapped.empty(len(pivot), candidates.probs.shape[1])
    q = np.flatnonzero((placement.inside > 0) & placement.no_hole)  # [n] source tokens not read to their end
    p = placement.first[q]  # [n] the pivot token each was read to
    probs, rows = candidates.probs[q], candidates.rows[q]  # [n, C]; P is 0 for the dead, and for the actual token
    common = source.start[q] == pivot.start[p]
    D = np.where(common, 1.0, candidates.alive[q])  # [n]
    unkept = np.concatenate(
        [[0], np.cumsum(candidates.slot == probs.shape[1] - 1)]
    )  # [Q + 1] actual tokens before each
    c = 0
    while len(q):
        following = vocab.table.at(rows, c)  # [n, C] next token of each candidate
        lands = following == pivot.ids[p, None]  # [n, C] on y
        log_actual = log_p_actual(pivot, source, candidates, p, q, probs * lands, D)  # [n]
        _fill(out, pivot, p, candidates.slot[q], log_actual, np.where(lands, -1, following), probs / D[:, None])
        last = np.maximum(np.searchsorted(source.start, pivot.end[p], side="left") - 1, q)  # the source token y reaches
        of_kept = np.where(pivot.end[p] < source.end[q], row_sums(probs * lands), 0)  # what y has from kept ones
        out.label_tail[p] = np.where(unkept[last + 1] > unkept[q], np.where(common & (c == 0), 1 + of_kept, -1), 0)
        on = placement.inside[q] > c + 1  # another pivot token starts in q, and
        on[on] = pivot.start[p[on] + 1] == pivot.end[p[on]]  # right where p ends: after a hole there is no answer
        alive = lands[on]  # [n', C] those that begin with y too
        q, p, rows, common, c = q[on], p[on] + 1, rows[on], common[on], c + 1
        probs = np.where(alive, probs[on], 0)
        D = row_sums(probs) + candidates.actual[q]
    out.answered = np.isfinite(out.log_actual)
    out.kind = np.where(out.answered, match.kind, NONE).astype(np.uint8)
    out.leave_out(~out.answered)
    add_up_equal_ids(out.ids, out.probs)
    out.mass, out.exact_actual = row_sums(out.probs), True
    return out


def log_p_actual(
    pivot: Stream,
    source: SourceStream,
    candidates: Candidates,
    p: np.ndarray,  # int [n]
    q: np.ndarray,  # int [n]
    on_actual: np.ndarray,  # float64 [n, C]
    D: np.ndarray,  # float64 [n]
) -> np.ndarray:
    """log p(y) for each pivot token p, which starts in source token q: the three cases of the module's text.

    on_actual is P of the other alive candidates whose next token is y, else 0. -inf where there is no answer.
    """
    log = candidates.log_actual[q]
    inside = np.flatnonzero(pivot.end[p] < source.end[q])
    with np.errstate(divide="ignore"):
        log[inside] = np.log(candidates.actual[q[inside]] + row_sums(on_actual[inside]))
        log -= np.log(D)
    beyond = np.flatnonzero(pivot.end[p] > source.end[q])
    if len(beyond):
        log[beyond] += _log_further(pivot, source, candidates, p[beyond], q[beyond])
    return log


def _log_further(pivot, source, candidates: Candidates, p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """log P of the source tokens after q that pivot token p covers too; -inf where there is a hole on the way."""
    last = np.searchsorted(source.start, pivot.end[p], side="left") - 1  # [n] the last source token that p reaches
    holes = np.cumsum(np.concatenate([[0], source.start[1:] != source.end[:-1]]))  # [Q] before each source token
    whole = (holes[last] == holes[q]) & (source.end[last] >= pivot.end[p])
    partly = source.end[last] > pivot.end[p]  # then those count that begin with the part covered
    log_text = np.concatenate([[0.0], np.cumsum(candidates.log_actual)])  # [Q + 1] of all source tokens before each
    with np.errstate(divide="ignore"):
        log_part = np.where(partly, np.log(candidates.alive[last]), 0.0)
    return np.where(whole, log_text[last + 1 - partly] - log_text[q + 1] + log_part, -np.inf)


def _fill(out: Mapped, pivot: Stream, p, slot, log_actual, others, probs) -> None:
    """Write rows p: p(y) in the actual token's column, beside it p(v) of the others ([n, C], -1: none)."""
    kept = (others >= 0) & (probs > 0)
    out.ids[p] = np.where(kept, others, -1)
    out.probs[p] = np.where(kept, probs, 0)
    out.ids[p, slot] = pivot.ids[p]
    out.probs[p, slot] = np.exp(log_actual)
    out.log_actual[p] = log_actual
