"""One batch of conversations: from stored rows to streams on one line, and the aligned row of each pivot token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fusechat_fuse.alignment.candidates import SourceStream, Stream, Vocabularies
from fusechat_fuse.alignment.correspondence import Correspondence, correspond, line_up, safe_starts
from fusechat_fuse.alignment.mappings import Mapping
from fusechat_fuse.alignment.sparse_rows import Mapped
from fusechat_fuse.alignment.tokenizer_pair import Side, TokenizerPair


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
    pivot, kept = _arrays(pivot_rows, pair.pivot)
    source, _ = _arrays(source_rows, pair.source, "ce", "topk_ids", "topk_logprobs")
    return Batch(Stream(*pivot[:4]), SourceStream(*source[:4], *source[6:]), kept, *pivot[4:])


def _arrays(rows: list[dict], side: Side, *more: str) -> tuple[list[np.ndarray], np.ndarray]:
    """(ids, start, end, header, conversation, byte in the message and further columns of the tokens that a stream
    keeps, bool [P_all] which these are)."""
    conversation = np.repeat(np.arange(len(rows)), [len(row["predicted"]) for row in rows])
    ids = np.concatenate([row["input_ids"][row["predicted"]] for row in rows])
    start, stop, message, *others = (
        np.concatenate([row[name] for row in rows]) for name in ("start", "end", "message", *more)
    )
    width = (stop - start).astype(np.int64)
    place = line_up(conversation, message, start)
    header = np.where(side.lengths[ids] > 0, np.maximum(side.lengths[ids] - width, 0), 0)
    arrays, kept = [ids, place, place + width, header, conversation, start, *others], width > 0
    return arrays if kept.all() else [array[kept] for array in arrays], kept


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
