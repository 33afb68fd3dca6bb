"""The paper's mappings: one pivot id for each candidate, at common starts, renormalised."""

from __future__ import annotations

import numpy as np

from fusechat_fuse.alignment.candidates import Stream, Vocabularies, prepare
from fusechat_fuse.alignment.correspondence import EXACT, NONE, Correspondence
from fusechat_fuse.alignment.prefix import fill
from fusechat_fuse.alignment.sparse_rows import Mapped, add_up_equal_ids, empty_rows, row_sums


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
    out = empty_rows(P, C)
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
    mass = row_sums(probs)
    some = mass > 0
    out.ids[p], out.probs[p], out.mass[p] = ids, probs / np.where(some, mass, 1)[:, None], mass
    out.answered[p] = some
    out.kind = np.where(out.answered, match.kind, NONE).astype(np.uint8)
    hot = ~out.answered
    out.ids[hot], out.probs[hot] = -1, 0
    out.ids[hot, 0], out.probs[hot, 0] = pivot.ids[hot], 1.0
    if len(p):
        scratch, total = empty_rows(P, C + 1), np.ones(len(p))
        fill(scratch, pivot, source, work, p, q, vocab.table.at(work.rows[q], 0), work.probs[q], total)
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
