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
    """Two streams over the same conversations."""

    pivot: Stream
    source: SourceStream
    match: Correspondence  # of the P pivot tokens
    safe: np.ndarray  # bool [P], which of their starts are safe
    conversation: np.ndarray  # int [P], of the batch, that a pivot token belongs to
    kept: np.ndarray  # bool [P_all], which of the pivot's predicted tokens are in the stream: those with bytes
    predicted: np.ndarray  # int [conversations], how many each has, those of no bytes too


def make_batch(pivot_rows: list[dict], source_rows: list[dict], pair: TokenizerPair) -> Batch:
    """Rows of both sides (documented names) as streams on one line.

    Raises: InputError for ids beyond a vocabulary, and for figures that are not finite.
    """
    for side, rows in ((pair.pivot, pivot_rows), (pair.source, source_rows)):
        for row in rows:
            side.check(row)
    (*of_pivot, conversation, start), kept = _arrays(pivot_rows, pair.pivot)
    (*of_source, _, _), has_text = _arrays(source_rows, pair.source)
    predictions = (np.concatenate([row[name] for row in source_rows]) for name in ("ce", "topk_ids", "topk_logprobs"))
    pivot, source = Stream(*of_pivot), SourceStream(*of_source, *(array[has_text] for array in predictions))
    match = correspond(pivot.start, pivot.end, source.start, source.end)
    follows = np.concatenate([[False], (pivot.start[1:] == pivot.end[:-1])])
    safe = safe_starts(
        match,
        start,
        pair.pivot.first_byte[pivot.ids],
        np.where(follows, pair.pivot.last_byte[np.roll(pivot.ids, 1)], -1),
        (pivot.header > 0) | (np.append(source.header, 0)[match.source] > 0),
        pair.pivot.joined | pair.source.joined,
    )
    predicted = np.array([len(row["predicted"]) for row in pivot_rows])
    return Batch(pivot, source, match, safe, conversation, kept, predicted)


def _arrays(rows: list[dict], side: Side) -> tuple[list[np.ndarray], np.ndarray]:
    """(ids, start, end, header, conversation and byte in the message of the tokens with bytes, which these are)."""
    conversation = np.repeat(np.arange(len(rows)), [len(row["predicted"]) for row in rows])
    ids = np.concatenate([row["input_ids"][row["predicted"]] for row in rows])
    start, stop, message = (np.concatenate([row[name] for row in rows]) for name in ("start", "end", "message"))
    width = (stop - start).astype(np.int64)
    place = line_up(conversation, message, start)
    header = np.where(side.lengths[ids] > 0, np.maximum(side.lengths[ids] - width, 0), 0)
    kept = width > 0
    return [array[kept] for array in (ids, place, place + width, header, conversation, start)], kept


def align_batch(batch: Batch, pair: TokenizerPair, vocab: Vocabularies, mapping: Mapping, safe_only: bool) -> Mapped:
    """The mapped rows of one batch.

    Where a turn ends and the source did not keep its end of turn, the label is marked to stand alone: a base model, or
    one that ends its turns differently, predicts further text there, and would teach the pivot not to stop.
    """
    mapped = mapping.rows(batch.pivot, batch.source, batch.match, vocab)
    ids, end_of_turn = batch.pivot.ids, pair.pivot.end_of_turn
    if end_of_turn is not None:
        mapped.label_tail[(ids == end_of_turn) & (mapped.label_tail > 0)] = -1
    if safe_only:
        mapped.leave_out(~batch.safe, one_hot=ids if mapping.renormalised else None)
    return mapped
