"""Shards of conversations through the model, while one thread tokenizes the next shard and another writes the last."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
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


@dataclass
class EncodedShard:
    """A shard's conversations with their token ids, and those that were skipped, with the reasons."""

    conversations: list[Conversation] = field(default_factory=list)
    encoded: list[Encoded] = field(default_factory=list)
    skipped: list[dict] = field(default_factory=list)

    def skip(self, conversation: Conversation, reason: str, detail: str) -> None:
        entry = {"row": conversation.row, "id": conversation.id, "reason": reason, "detail": detail}
        self.skipped.append(entry)


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
    """
    found = capture.conversations
    shards = [found[n : n + shard_size] for n in range(0, len(found), shard_size)]
    try:
        if mine := writer.left(range(process.index, len(shards), process.count)):
            compute(make_runner(), capture.encoder, shards, mine, writer, show=process.first)
        process.wait()
        if process.first:
            finish(writer, len(shards), capture)
    except Exception:
        if process.first:
            writer.release()
        raise
    process.wait()
    return load_representation(writer.path)


def compute(
    runner: Runner,
    encoder: ConversationEncoder,
    shards: list[list[Conversation]],
    mine: list[int],
    writer: ShardWriter,
    *,
    show: bool,
) -> None:
    """Compute and write shards.

    Args:
        runner: computes the distributions.
        shards: the conversations of the whole run. mine: numbers of the shards to compute.
        show: whether to show progress.
    Raises: InputError where the tokenizer is not the model's, the template refuses too many conversations, or one does
        not fit into memory; RuntimeError where too many conversations have logits that are not finite.
    """
    total, skipped = sum(map(len, shards)), []
    bar = progress(total=sum(len(shards[n]) for n in mine), unit="conversation", show=show)
    with bar, ThreadPoolExecutor(1) as background:
        written: Future | None = None
        for number, shard in zip(mine, encode_ahead(encoder, (shards[n] for n in mine))):
            check_template(skipped + shard.skipped, total)
            _check_ids(shard.encoded, runner.vocab_size)
            bar.update(len(shards[number]) - len(shard.encoded))
            padded = runner.padded
            rows = _rows(shard, runner(shard.encoded, bar))
            if number == mine[0]:
                _warn_if_worse_than_random(rows)
            info = _info(shard, rows, runner, padded, encoder.end_of_turn_id)
            if written is not None:
                written.result()
            written = background.submit(writer.write, number, rows, info)
            skipped += shard.skipped
            check_finite(skipped, total)
        if written is not None:
            written.result()


def encode_ahead(encoder: ConversationEncoder, shards: Iterable[list[Conversation]]) -> Iterator[EncodedShard]:
    """The shards encoded, each by a thread while the one before it is in use."""
    with ThreadPoolExecutor(1) as thread:
        before: Future[EncodedShard] | None = None
        for conversations in shards:
            following = thread.submit(_encode, encoder, conversations)
            if before is not None:
                yield before.result()
            before = following
        if before is not None:
            yield before.result()


def _encode(encoder: ConversationEncoder, conversations: list[Conversation]) -> EncodedShard:
    shard = EncodedShard()
    for conversation in conversations:
        try:
            one = encoder.encode(conversation.messages)
        except Unusable as problem:
            shard.skip(conversation, problem.reason, str(problem))
            continue
        shard.encoded.append(one)
        shard.conversations.append(conversation)
    return shard


def _info(shard: EncodedShard, rows: list[dict], runner: Runner, padded_before: int, end_of_turn_id: int) -> dict:
    """The counts that are kept beside a shard, for the manifest."""
    return {
        "vocab_size": runner.vocab_size,
        "skipped": shard.skipped,
        "truncated": sum(one.truncated for one in shard.encoded),
        "context_answers": sum(one.context_answers for one in shard.encoded),
        "padded_tokens": runner.padded - padded_before,
        "run_tokens": sum(len(one.input_ids) for one in shard.encoded),
        "ends": _ends(rows, end_of_turn_id),
    }


def _ends(rows: list[dict], end_of_turn_id: int) -> list[int]:
    """[number of predicted tokens that end a turn, at how many of them the end of turn is among the top k]."""
    kept = [
        (row["topk_ids"] == end_of_turn_id).any(1)[row["input_ids"][row["predicted"]] == end_of_turn_id] for row in rows
    ]
    return [sum(map(len, kept)), int(sum(each.sum() for each in kept))]


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


def _rows(shard: EncodedShard, results: Sequence[TopK | Unusable]) -> list[dict]:
    """The documented rows of a shard; conversations whose logits are not finite are skipped."""
    rows = []
    for conversation, one, found in zip(shard.conversations, shard.encoded, results):
        if isinstance(found, Unusable):
            shard.skip(conversation, found.reason, str(found))
            continue
        if not found.finite.all():
            where = int(one.predicted[int(np.argmin(found.finite))])
            detail = f"logits for token {where} of {len(one.input_ids)} are not finite"
            shard.skip(conversation, "non_finite", found.problem or detail)
            continue
        row = {"id": conversation.id, "content_hash": conversation.content_hash, "slice": conversation.slice}
        row |= {name: getattr(one, name) for name in ("input_ids", "predicted", "message", "start", "end")}
        rows.append({**row, "topk_ids": found.ids, "topk_logprobs": found.logprobs, "ce": found.ce})
    return rows
