"""What became of each candidate at each pivot token, and why: for a reader, by plain loops (`inspect`)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fusechat_fuse.alignment.candidates import SourceStream, Stream, Vocabularies, candidates_of, place
from fusechat_fuse.alignment.correspondence import Correspondence


class Fate(NamedTuple):
    """Of one kept candidate: its source id and P, the pivot id it became (-1: none, and `why` not), whether it is the
    actual token."""

    id: int
    probability: float
    pivot_id: int
    why: str
    actual: bool


def prefix_fates(pivot: Stream, source: SourceStream, match: Correspondence, vocab: Vocabularies) -> list[list[Fate]]:
    """For each pivot token the fates of its source prediction's candidates, most likely first, by `prefix_rows`."""
    placement = place(pivot, source)
    rows = candidates_of(pivot, source, placement, vocab)

    def fate(p: int, q: int, k: int) -> tuple[int, str]:
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

    return _fates(source, match, fate)


def single_id_fates(
    pivot: Stream, source: SourceStream, match: Correspondence, vocab: Vocabularies
) -> list[list[Fate]]:
    """The same for `single_id_rows`."""
    to_pivot = vocab.to_pivot
    assert to_pivot is not None

    def fate(p: int, q: int, k: int) -> tuple[int, str]:
        i = int(to_pivot[source.topk_ids[q, k]]) if pivot.start[p] == source.start[q] else -1
        return i, "" if i >= 0 else "no pivot token for it"

    return _fates(source, match, fate)


def _fates(source: SourceStream, match: Correspondence, fate) -> list[list[Fate]]:
    probs = np.exp(source.topk_logprobs.astype(np.float64))  # [Q, K]
    return [
        [
            Fate(int(i), float(probs[q, k]), *fate(p, q, k), actual=bool(i == source.ids[q]))
            for k, i in enumerate(source.topk_ids[q])
        ]
        if q >= 0
        else []
        for p, q in enumerate(match.source.tolist())
    ]
