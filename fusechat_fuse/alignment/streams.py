"""One batch of conversations: from stored rows to streams on one line, and the aligned row of each pivot token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fusechat_fuse.alignment.candidates import SourceStream, Stream, Vocabularies
from fusechat_fuse.alignment.correspondence import Correspondence, correspond, line_up, safe_starts
from fusechat_fuse.alignment.mappings import Mapping
from fusechat_fuse.alignment.side import Side
from fusechat_fuse.alignment.sparse_rows import Mapped
from fusechat_fuse.alignment.tokenizer_pair import TokenizerPair


@dataclass
class Batch:
    """Two streams over the same conversations, and which pivot tokens they leave out (empty spans)."""

    pivot: Stream
    source: SourceStream
    kept: np.ndarray  # bool [P_all]
    conversation: np.ndarray  # [P]
    start: np.ndarray  # [P] byte in the message


def make_batch(pivot_rows: list[dict], source_rows: list[dict], pair: TokenizerPair) -> Batch:
    """Rows of both sides (documented names) as streams on one line.

    Raises: InputError for ids beyond a vocabulary, and for figures that are not finite.
    """
    for side, rows in ((pair.pivot, pivot_rows), (pair.source, source_rows)):
        for row in rows:
            side.check(row)
    places, kept, conversation, start = _places(pivot_rows, pair.pivot)
    of_source, has_text, _, _ = _places(source_rows, pair.source)
    predictions = {name: _where(has_text, _joined(source_rows, name)) for name in ("ce", "topk_ids", "topk_logprobs")}
    return Batch(Stream(**places), SourceStream(**of_source, **predictions), kept, conversation, start)


def _joined(rows: list[dict], name: str) -> np.ndarray:
    return np.concatenate([row[name] for row in rows])


def _where(kept: np.ndarray, array: np.ndarray) -> np.ndarray:
    return array if kept.all() else array[kept]


def _places(rows: list[dict], side: Side) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
    """(fields of a Stream, which tokens it kept, conversation and byte in the message of those)."""
    conversation = np.repeat(np.arange(len(rows)), [len(row["predicted"]) for row in rows])
    ids = np.concatenate([row["input_ids"][row["predicted"]] for row in rows])
    start = _joined(rows, "start")
    width = (_joined(rows, "end") - start).astype(np.int64)
    place = line_up(conversation, _joined(rows, "message"), start)
    kept = width > 0
    places = {
        "ids": ids,
        "start": place,
        "end": place + width,
        "header": np.where(side.lengths[ids] > 0, np.maximum(side.lengths[ids] - width, 0), 0),
    }
    places = {name: _where(kept, array) for name, array in places.items()}
    return places, kept, _where(kept, conversation), _where(kept, start)


def align_batch(
    batch: Batch, pair: TokenizerPair, vocab: Vocabularies, mapping: Mapping, safe_only: bool
) -> tuple[Correspondence, Mapped, np.ndarray]:
    """The correspondence, the mapped rows, and which starts are safe (bool [P]), for one batch.

    Where a turn ends and the source did not keep its end of turn, the label is marked to stand alone: a base model, or
    one that ends its turns differently, predicts further text there, and would teach the pivot not to stop.
    """
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
    mapped = mapping.rows(pivot, source, match, vocab)
    if pair.pivot.end_of_turn is not None:
        mapped.label_tail[(pivot.ids == pair.pivot.end_of_turn) & (mapped.label_tail > 0)] = -1
    if safe_only:
        mapped.leave_out(~safe, one_hot=pivot.ids if mapping.renormalised else None)
    return match, mapped, safe
