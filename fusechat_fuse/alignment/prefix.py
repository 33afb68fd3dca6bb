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

import numpy as np

from fusechat_fuse.alignment.candidates import Stream, Vocabularies, Work, prepare
from fusechat_fuse.alignment.correspondence import NONE, Correspondence
from fusechat_fuse.alignment.sparse_rows import Mapped, add_up_equal_ids, empty_rows, row_sums


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
    work, out = prepare(pivot, source, vocab), empty_rows(len(pivot), source.topk_ids.shape[1] + 1)
    chosen = np.flatnonzero((work.inside > 0) & work.usable)
    common = (source.start[chosen] == pivot.start[work.first[chosen]]) if len(chosen) else np.zeros(0, bool)
    total = np.where(common, 1.0, work.alive_sum[chosen])
    probs, rows = work.probs[chosen], work.rows[chosen]
    c = 0
    while len(chosen):
        p = work.first[chosen] + c
        ids = vocab.table.at(rows, c)
        fill(out, pivot, source, work, p, chosen, ids, probs, total)
        deeper = work.inside[chosen] > c + 1
        deeper[deeper] = pivot.start[p[deeper] + 1] == pivot.end[p[deeper]]  # no hole on the way
        chosen, rows = chosen[deeper], rows[deeper]
        probs = np.where(ids[deeper] == pivot.ids[p[deeper], None], probs[deeper], 0)
        total = row_sums(probs) + work.actual[chosen]
        c += 1
    answered = np.isfinite(out.log_actual)
    out.kind = np.where(answered, match.kind, NONE).astype(np.uint8)
    out.answered = answered
    out.ids[~answered], out.probs[~answered] = -1, 0
    add_up_equal_ids(out.ids, out.probs)
    out.mass, out.exact_actual = row_sums(out.probs), True
    return out


def fill(out, pivot, source, work, p, q, ids, probs, total) -> None:
    """One answer for each (pivot token p, source token q that it starts in): the equations of the module's text."""
    y, end, source_end = pivot.ids[p], pivot.end[p], source.end[q]
    lands = ids == y[:, None]
    log_actual = work.log_actual[q]
    within = np.flatnonzero(end < source_end)
    with np.errstate(divide="ignore"):
        log_actual[within] = np.log(work.actual[q[within]] + row_sums(probs[within] * lands[within]))
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


def _log_further(pivot: Stream, source: Stream, work: Work, p: np.ndarray, q: np.ndarray) -> np.ndarray:
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
