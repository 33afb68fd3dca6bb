"""The paper's mappings: at a common start each kept candidate becomes one pivot id, and the row is renormalised.

They differ in the map from source id to pivot id (`vocabulary_maps`) alone. Shape letters as in `candidates`.
"""

from __future__ import annotations

import numpy as np

from fusechat_fuse.alignment.candidates import SourceStream, Stream, Vocabularies, candidates_of, place
from fusechat_fuse.alignment.correspondence import EXACT, NONE, Correspondence
from fusechat_fuse.alignment.prefix import log_p_actual
from fusechat_fuse.alignment.sparse_rows import Mapped, add_up_equal_ids, row_sums


def single_id_rows(pivot: Stream, source: SourceStream, match: Correspondence, vocab: Vocabularies) -> Mapped:
    """q(v) = sum of P over the kept candidates that become v / sum of P over those that become anything.

    Any other position, and one where no candidate has a pivot id, takes the one-hot distribution of the actual token.

    Args:
        pivot, source: P and Q tokens, borrowed.
        match: `correspond` of the two.
        vocab: with `to_pivot`, and `table` for `log_actual`.

    Returns:
        Mapped; every row sums to 1; `answered` is False and `mass` 0 for the one-hot ones; `log_actual` is the
        source's own log-probability of the actual pivot token where they start together, else -inf.

    Source: FuseChat (arXiv 2408.07990) section 3.2; `docs/method.md`, "The paper's mappings".
    Differs from the released code: positions by bytes, candidates that land on one pivot token add up.
    Precision: float64; the stored log-probabilities are float16.
    """
    out = Mapped.empty(len(pivot), source.topk_ids.shape[1])
    p = np.flatnonzero(match.kind == EXACT)  # [n]
    q = match.source[p]
    ids = _pivot_ids(pivot, source, vocab, p, q)  # [n, K]
    probs = np.exp(source.topk_logprobs[q].astype(np.float64))
    probs[ids < 0] = 0
    ids = np.where(probs > 0, ids, -1).astype(np.int32)
    came = ((source.topk_ids[q] == source.ids[q, None]) & (ids >= 0)).any(1)  # [n] the actual token became an id
    add_up_equal_ids(ids, probs)
    mass = row_sums(probs)  # [n]
    out.label_tail[p] = np.where(came, 0, 1 + row_sums(probs * (ids == pivot.ids[p, None])))
    out.ids[p], out.probs[p], out.mass[p] = ids, probs / np.where(mass > 0, mass, 1)[:, None], mass
    candidates = candidates_of(pivot, source, place(pivot, source), vocab)
    lands = vocab.table.at(candidates.rows[q], 0) == pivot.ids[p, None]  # [n, C]
    D = np.ones(len(p))  # as in the prefix equations at c = 0
    out.log_actual[p] = log_p_actual(pivot, source, candidates, p, q, candidates.probs[q] * lands, D)
    out.answered[p] = mass > 0
    out.kind = np.where(out.answered, match.kind, NONE).astype(np.uint8)
    out.leave_out(~out.answered, one_hot=pivot.ids)
    return out


def _pivot_ids(pivot: Stream, source: SourceStream, vocab: Vocabularies, p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """The pivot id of each kept candidate, -1 for none (int [n, K])."""
    assert vocab.to_pivot is not None
    ids = np.where(source.topk_ids[q] >= 0, vocab.to_pivot[np.maximum(source.topk_ids[q], 0)], -1)
    for n in np.flatnonzero((source.header[q] > 0) | (pivot.header[p] > 0)).tolist():
        read = (vocab.source_bytes[source.ids[q[n]]] or b"")[: source.header[q[n]]]
        put = (vocab.pivot_bytes[pivot.ids[p[n]]] or b"")[: pivot.header[p[n]]]
        if read == put:
            continue
        for k, i in enumerate(source.topk_ids[q[n]].tolist()):  # the pivot's header, the candidate without the source's
            piece = vocab.source_bytes[i] if i >= 0 else None
            if piece is not None:
                rest = put + piece[len(read) :]
                ids[n, k] = vocab.by_bytes.get(rest, -1) if piece.startswith(read) else -1
    return ids
