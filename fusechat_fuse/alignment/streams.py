"""One batch of conversations: from stored rows to streams on one line, and what the source says at each pivot token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fusechat_fuse.alignment.candidates import Stream, Vocabularies, prepare
from fusechat_fuse.alignment.correspondence import correspond, line_up, safe_starts
from fusechat_fuse.alignment.prefix import prefix_rows
from fusechat_fuse.alignment.single_id import single_id_rows
from fusechat_fuse.alignment.sparse_rows import Mapped
from fusechat_fuse.alignment.tokenizer_pair import Pair, Side


@dataclass
class Batch:
    """Two streams over the same conversations, and which pivot tokens they leave out (empty spans)."""

    pivot: Stream
    source: Stream
    kept: np.ndarray  # bool [P_all]
    conversation: np.ndarray  # [P]
    start: np.ndarray  # [P] byte in the message


def make_batch(pivot_rows: list[dict], source_rows: list[dict], pair: Pair) -> Batch:
    """Rows of both sides (documented names) as streams on one line."""
    p_stream, kept, conversation, start = _stream(pivot_rows, pair.pivot, with_topk=False)
    q_stream, *_ = _stream(source_rows, pair.source, with_topk=True)
    return Batch(p_stream, q_stream, kept, conversation, start)


def _stream(rows: list[dict], side: Side, *, with_topk: bool):
    conversation = np.repeat(np.arange(len(rows)), [len(row["predicted"]) for row in rows])

    def joined(name: str) -> np.ndarray:
        return np.concatenate([row[name] for row in rows])

    ids = np.concatenate([row["input_ids"][row["predicted"]] for row in rows])
    message, start, end = joined("message"), joined("start"), joined("end")
    width = (end - start).astype(np.int64)
    place = line_up(conversation, message, start)
    kept = width > 0
    arrays = {
        "ids": ids,
        "start": place,
        "end": place + width,
        "header": np.where(side.lengths[ids] > 0, np.maximum(side.lengths[ids] - width, 0), 0),
    }
    if with_topk:
        arrays |= {name: joined(name) for name in ("ce", "topk_ids", "topk_logprobs")}
    if not kept.all():
        arrays = {name: array[kept] for name, array in arrays.items()}
        conversation, start = conversation[kept], start[kept]
    return Stream(**arrays), kept, conversation, start


def align_batch(batch: Batch, pair: Pair, vocab: Vocabularies, mapping: str, safe_only: bool):
    """(Correspondence, Mapped, safe) of one batch."""
    pivot, source = batch.pivot, batch.source
    match = correspond(pivot.start, pivot.end, source.start, source.end)
    follows = np.concatenate([[False], (pivot.start[1:] == pivot.end[:-1])])
    before = np.where(follows, pair.pivot.last_byte[np.roll(pivot.ids, 1)], -1)
    source_header = np.append(source.header, 0)[match.source] > 0
    safe = safe_starts(
        match,
        batch.start,
        pair.pivot.first_byte[pivot.ids],
        before,
        (pivot.header > 0) | source_header,
        pair.pivot.joined | pair.source.joined,
    )
    mapped = (prefix_rows if mapping == "prefix" else single_id_rows)(pivot, source, match, vocab)
    if safe_only:
        _leave_out(mapped, ~safe, pivot, one_hot=mapping != "prefix")
    return match, mapped, safe


def became(batch: Batch, vocab: Vocabularies, mapping: str, p: int, q: int) -> list[dict]:
    """What each candidate of source prediction q became at pivot token p, for a reader (plain loops, one position).

    Returns:
        [{source id, probability, pivot id or -1, why}] of the kept candidates, most likely first; `why` is '' where the
        candidate was mapped.
    """
    pivot, source = batch.pivot, batch.source
    kept = np.exp(source.topk_logprobs[q].astype(np.float64))
    work = prepare(pivot, source, vocab)
    done = pivot.ids[work.first[q] : p].tolist()
    shorter = pivot.end[p] < source.end[q]
    rows = []
    for k, i in enumerate(source.topk_ids[q].tolist()):
        actual = bool(i == source.ids[q])
        path = vocab.table.path(work.rows[q, k])
        if mapping != "prefix":
            target = int(vocab.to_pivot[i]) if pivot.start[p] == source.start[q] else -1
            why = "" if target >= 0 else "no pivot token for it"
        elif actual:
            target, why = int(pivot.ids[p]), ""
        elif work.probs[q, k] == 0 or path[: len(done)] != done:
            target, why = -1, "does not begin with the text so far"
        elif len(path) == len(done):
            target, why = -1, "ends here, or cannot be spelled"
        elif path[len(done)] == pivot.ids[p] and not shorter:
            target, why = -1, "another, longer word"
        else:
            target, why = path[len(done)], ""
        rows.append({"id": i, "probability": float(kept[k]), "pivot_id": target, "why": why, "actual": actual})
    return rows


def _leave_out(mapped: Mapped, out: np.ndarray, pivot: Stream, *, one_hot: bool) -> None:
    mapped.ids[out], mapped.probs[out] = -1, 0
    mapped.log_actual[out], mapped.mass[out] = -np.inf, 0
    mapped.answered[out], mapped.kind[out] = False, 0
    if one_hot:
        mapped.ids[out, 0], mapped.probs[out, 0] = pivot.ids[out], 1.0
