"""Which pivot token each source candidate became at each pivot position, and why not where it became none.

Written as plain loops, for `inspect`; the mappings themselves compute whole batches at once.
"""

from __future__ import annotations

from collections.abc import Callable

from fusechat_fuse.alignment.candidates import SourceStream, Stream, Vocabularies, candidates_of, place
from fusechat_fuse.alignment.correspondence import Correspondence

Outcome = tuple[int, str]  # the pivot id that a kept candidate became (-1: none), and the reason why none


def prefix_outcomes(
    pivot: Stream, source: SourceStream, match: Correspondence, vocab: Vocabularies
) -> list[list[Outcome]]:
    """For each pivot token the outcomes of the candidates that answer it, most likely first, as in `prefix_rows`."""
    placement = place(pivot, source)
    rows = candidates_of(pivot, source, placement, vocab)

    def outcome(p: int, q: int, k: int) -> Outcome:
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
) -> list[list[Outcome]]:
    """The same as in `single_id_rows`."""
    to_pivot = vocab.to_pivot
    assert to_pivot is not None

    def outcome(p: int, q: int, k: int) -> Outcome:
        i = int(to_pivot[source.topk_ids[q, k]]) if pivot.start[p] == source.start[q] else -1
        return i, "" if i >= 0 else "no pivot token for it"

    return _outcomes(source, match, outcome)


def _outcomes(
    source: SourceStream, match: Correspondence, outcome: Callable[[int, int, int], Outcome]
) -> list[list[Outcome]]:
    kept = range(source.topk_ids.shape[1])
    return [[outcome(p, q, k) for k in kept if q >= 0] for p, q in enumerate(match.source.tolist())]
