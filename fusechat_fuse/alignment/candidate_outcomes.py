"""Which pivot token each source candidate became at each pivot position, and why not where it became none.

Written as plain loops, for `inspect`; the mappings themselves compute whole batches at once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fusechat_fuse.alignment.candidates import SourceStream, Stream, Vocabularies, candidates_of, place
from fusechat_fuse.alignment.correspondence import Correspondence


class CandidateOutcome(NamedTuple):
    """The outcome for one kept candidate: its source id and probability, the pivot id it became (-1: none, `why` says
    the reason), and whether it is the actual token."""

    id: int
    probability: float
    pivot_id: int
    why: str
    actual: bool


def prefix_outcomes(
    pivot: Stream, source: SourceStream, match: Correspondence, vocab: Vocabularies
) -> list[list[CandidateOutcome]]:
    """For each pivot token the outcomes of the candidates that answer it, most likely first, as in `prefix_rows`."""
    placement = place(pivot, source)
    rows = candidates_of(pivot, source, placement, vocab)

    def outcome(p: int, q: int, k: int) -> tuple[int, str]:
        y, done = int(pivot.ids[p]), pivot.ids[placement.first[q] : p].tolist()
        if source.topk_ids[q, k] == source.ids[q]:
            return y, ""
        path = vocab.table.path(rows.rows[q, k])
        if rows.probs[q, k] == 0 or path[: len(done)] != done:
            return -1, "does not begin with the text so far"
        if len(path) == len(done):
            return -1, "ends here, or cannot be spelled"
        if path[len(done)] == y and pivot.end[p] >= source.end[q]:
            return -1, "another, longer word"
        return path[len(done)], ""

    return _outcomes(source, match, outcome)


def single_id_outcomes(
    pivot: Stream, source: SourceStream, match: Correspondence, vocab: Vocabularies
) -> list[list[CandidateOutcome]]:
    """The same as in `single_id_rows`."""
    to_pivot = vocab.to_pivot
    assert to_pivot is not None

    def outcome(p: int, q: int, k: int) -> tuple[int, str]:
        i = int(to_pivot[source.topk_ids[q, k]]) if pivot.start[p] == source.start[q] else -1
        return i, "" if i >= 0 else "no pivot token for it"

    return _outcomes(source, match, outcome)


def _outcomes(source: SourceStream, match: Correspondence, outcome) -> list[list[CandidateOutcome]]:
    probs = np.exp(source.topk_logprobs.astype(np.float64))  # [Q, K]
    return [
        [
            CandidateOutcome(int(i), float(probs[q, k]), *outcome(p, q, k), actual=bool(i == source.ids[q]))
            for k, i in enumerate(source.topk_ids[q])
        ]
        if q >= 0
        else []
        for p, q in enumerate(match.source.tolist())
    ]
