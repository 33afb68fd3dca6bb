"""Shards of conversations through the model, while one thread tokenizes the next shard and another writes the last."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, pairwise
from typing import Protocol

import numpy as np

from fusechat_fuse.capture.batches import TopK
from fusechat_fuse.capture.manifest import Capture, check_finite, finish
from fusechat_fuse.errors import InputError
from fusechat_fuse.processes import Process
from fusechat_fuse.progress import progress
from fusechat_fuse.store.shard_writer import ShardWriter
from fusechat_fuse.store.shards import Representation, load_representation
from fusechat_fuse.text.chat import ConversationEncoder, Encoded
from fusechat_fuse.text.conversations import Conversation
from fusechat_fuse.text.messages import Unusable
from fusechat_fuse.text.templates import check_template

logger = logging.getLogger(__name__)


class Runner(Protocol):
    """What computes the distributions: a `BatchRunner` or a `ServerRunner`.

    vocab_size: all token ids are below it. padded: number of tokens run so far, padding included.
    """

    vocab_size: int
    padded: int

    def __call__(self, encoded: list[Encoded], progress) -> Sequence[TopK | Unusable]:
        """A TopK for each conversation, in order, or why it has none; `progress.update` is called as conversations are
        finished."""
        ...


def write_representation(
    capture: Capture, writer: ShardWriter, shard_size: int, process: Process, make_runner: Callable[[], Runner]
) -> Representation:
    """Compute the shards that are missing, of n processes in the i-th one those whose number is i mod n, and finish the
    directory.

    Args:
        make_runner: loads what computes the distributions; called only where a shard is missing.
    Raises: InputError where the tokenizer is not the model's, the template refuses too many conversations, or one does
        not fit into memory; RuntimeError where too many conversations have logits that are not finite.
    """
    found = capture.conversations
    shards = [found[n : n + shard_size] for n in range(0, len(found), shard_size)]
    try:
        if mine := writer.left(range(process.index, len(shards), process.count)):
            _compute(make_runner(), capture.encoder, shards, mine, writer, process.first)
        process.wait()
        if process.first:
            finish(writer, len(shards), capture)
    except Exception:
        if process.first:
            writer.release()
        raise
    process.wait()
    return load_representation(writer.path)


def _compute(runner: Runner, encoder: ConversationEncoder, shards, mine: list[int], writer: ShardWriter, show: bool):
    """Compute the shards `mine`, and write each while the next one is computed."""
    total, skipped = sum(map(len, shards)), []
    bar = progress(total=sum(len(shards[n]) for n in mine), unit="conversation", show=show)
    with bar, ThreadPoolExecutor(1) as background:
        written: Future | None = None
        for number, results in zip(mine, encode_ahead(encoder, (shards[n] for n in mine))):
            skips, kept = [], []
            for conversation, one in zip(shards[number], results):
                if isinstance(one, Unusable):
                    skips.append(_skip(conversation, one))
                else:
                    kept.append((conversation, one))
            encoded = [one for _, one in kept]
            check_template(skipped + skips, total)
            _check_ids(encoded, runner.vocab_size)
            bar.update(len(skips))
            padded, rows = runner.padded, []
            for (conversation, one), found in zip(kept, runner(encoded, bar)):
                try:
                    rows.append(_row(conversation, one, found))
                except Unusable as problem:
                    skips.append(_skip(conversation, problem))
            if number == mine[0]:
                _warn_if_worse_than_random(rows)
            info = {"vocab_size": runner.vocab_size, "skipped": skips, "padded_tokens": runner.padded - padded}
            info |= _counts(encoded, rows, encoder.end_of_turn_id)
            if written is not None:
                written.result()
            written = background.submit(writer.write, number, rows, info)
            skipped += skips
            check_finite(skipped, total)
        if written is not None:
            written.result()


def encode_ahead(
    encoder: ConversationEncoder, shards: Iterable[list[Conversation]]
) -> Iterator[list[Encoded | Unusable]]:
    """The shards encoded, each by a thread while the one before it is in use."""
    with ThreadPoolExecutor(1) as thread:
        begun = (thread.submit(_encode, encoder, conversations) for conversations in shards)
        for one, _ in pairwise(chain(begun, [None])):
            if one is not None:  # none comes after the last
                yield one.result()


def _encode(encoder: ConversationEncoder, conversations: list[Conversation]) -> list[Encoded | Unusable]:
    results = []
    for conversation in conversations:
        try:
            results.append(encoder.encode(conversation.messages))
        except Unusable as problem:
            results.append(problem)
    return results


def _counts(encoded: list[Encoded], rows: list[dict], end_of_turn_id: int) -> dict:
    """The counts of a shard; ends: predicted tokens that end a turn, and of these how many are among the top k."""
    ends = [row["input_ids"][row["predicted"]] == end_of_turn_id for row in rows]
    kept = [(row["topk_ids"][end] == end_of_turn_id).any(1) for row, end in zip(rows, ends)]
    return {
        "truncated": sum(one.truncated for one in encoded),
        "context_answers": sum(one.context_answers for one in encoded),
        "tool_call_turns": sum(one.tool_call_turns for one in encoded),
        "run_tokens": sum(len(one.input_ids) for one in encoded),
        "ends": [int(sum(each.sum() for each in of)) for of in (ends, kept)],
    }


def _warn_if_worse_than_random(rows: list[dict]) -> None:
    """Warn where the cross-entropy per byte is above that of random bytes, 8 bits."""
    width = sum(int((row["end"] - row["start"]).sum()) for row in rows)
    bits = sum(float(row["ce"].sum()) for row in rows) / math.log(2) / max(width, 1)
    if bits > 8:
        logger.warning(
            "The model predicts the answers with %.1f bits per byte, worse than random bytes (8): check that its "
            "weights were converted correctly, and that tokenizer and template are its own.",
            bits,
        )


def _check_ids(encoded: list[Encoded], vocab_size: int) -> None:
    if (highest := max((int(one.input_ids.max()) for one in encoded), default=0)) >= vocab_size:
        raise InputError(
            f"tokenizer for the model: expected ids below its {vocab_size} embedding rows, got {highest}. "
            "Give the tokenizer that belongs to the model."
        )


def _skip(conversation: Conversation, problem: Unusable) -> dict:
    return {"row": conversation.row, "id": conversation.id, "reason": problem.reason, "detail": str(problem)}


def _row(conversation: Conversation, one: Encoded, found: TopK | Unusable) -> dict:
    """The documented row of a conversation. Raises: Unusable where its logits are not finite."""
    if isinstance(found, Unusable):
        raise found
    finite = np.isfinite(found.ce) & np.isfinite(found.logprobs).all(1)
    if not finite.all():
        where = int(one.predicted[int(np.argmin(finite))])
        raise Unusable("non_finite", f"logits for token {where} of {len(one.input_ids)} are not finite")
    row = {"id": conversation.id, "content_hash": conversation.content_hash, "slice": conversation.slice}
    row |= {name: getattr(one, name) for name in ("input_ids", "predicted", "message", "start", "end")}
    return {**row, "topk_ids": found.ids, "topk_logprobs": found.logprobs, "ce": found.ce}
