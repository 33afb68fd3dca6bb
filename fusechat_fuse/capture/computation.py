"""Shards of conversations through the model: tokenized before it runs, written after it, both beside it.

One thread is enough for models that take more than a millisecond for a conversation. For faster ones several processes
may tokenize, each a shard at a time.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from typing import Protocol

import numpy as np

from fusechat_fuse.capture.batches import TopK
from fusechat_fuse.capture.manifest import check_finite
from fusechat_fuse.errors import InputError
from fusechat_fuse.store.shards import ShardWriter
from fusechat_fuse.text.chat import ConversationEncoder, Encoded
from fusechat_fuse.text.conversations import Conversation
from fusechat_fuse.text.messages import Unusable
from fusechat_fuse.text.templates import check_template

logger = logging.getLogger(__name__)
Outcome = Encoded | tuple[str, str]  # or the rule by which a conversation is left out, and what was found
_encoder: ConversationEncoder | None = None  # of a process that tokenizes


@dataclass
class _Shard:
    """What of a shard goes through the model, conversation beside ids, and what was skipped and why."""

    conversations: list[Conversation] = field(default_factory=list)
    encoded: list[Encoded] = field(default_factory=list)
    skipped: list[dict] = field(default_factory=list)

    def skip(self, conversation: Conversation, reason: str, detail: str) -> None:
        entry = {"row": conversation.row, "id": conversation.id, "reason": reason, "detail": detail}
        self.skipped.append(entry)


class Runner(Protocol):
    """What a representation's distributions come from: a `BatchRunner` or a `ServerRunner`.

    vocab_size: ids are below it. padded: tokens run so far, padding included.
    """

    vocab_size: int
    padded: int

    def __call__(self, encoded: list[Encoded], progress) -> list[TopK]:
        """A TopK for each conversation, in order; `progress` is told of what is done (tqdm's `update`)."""
        ...


def compute(
    runner: Runner,
    encoder: ConversationEncoder,
    shards: list[list[Conversation]],
    mine: list[int],
    writer: ShardWriter,
    *,
    show: bool,
    encoding_processes: int = 0,
) -> None:
    """Compute and write shards; others are tokenized and written meanwhile.

    Args:
        runner: gives the distributions.
        shards: the conversations of the whole run. mine: numbers of the shards to be computed, at least one.
        show: whether to show progress. encoding_processes: that tokenize; 0: a thread.
    Raises: InputError where the tokenizer is not the model's, the template refuses too many conversations, or one does
        not fit into memory; RuntimeError where too many conversations have logits that are not finite.
    """
    from tqdm.auto import tqdm

    vocab_size = runner.vocab_size
    total, non_finite, skipped = sum(map(len, shards)), 0, []
    progress = tqdm(total=sum(len(shards[n]) for n in mine), unit="conversation", disable=None if show else True)
    left = iter(mine)
    with progress, ThreadPoolExecutor(1) as background, tokenizing(encoder, encoding_processes) as tokenize:
        upcoming: deque[Future] = deque()
        written: Future | None = None
        for number in mine:
            while len(upcoming) <= max(encoding_processes, 1) and (following := next(left, None)) is not None:
                upcoming.append(tokenize(shards[following]))
            shard = _shard(shards[number], upcoming.popleft().result())
            skipped += shard.skipped
            check_template(skipped, total)
            _check_ids(shard.encoded, vocab_size)
            padded = runner.padded
            rows = _rows(shard, runner(shard.encoded, progress))
            if number == mine[0]:
                _say_if_senseless(rows)
            progress.update(len(shards[number]) - len(shard.encoded))
            info = {
                "vocab_size": vocab_size,
                "skipped": shard.skipped,
                "truncated": sum(one.truncated for one in shard.encoded),
                "context_answers": sum(one.context_answers for one in shard.encoded),
                "padded_tokens": runner.padded - padded,
                "run_tokens": sum(len(one.input_ids) for one in shard.encoded),
                "ends": _ends(rows, encoder.end_of_turn_id),
            }
            if written is not None:
                written.result()
            written = background.submit(writer.write, number, rows, info)
            non_finite += len(shard.encoded) - len(rows)
            check_finite(non_finite, total)
        if written is not None:
            written.result()


def _say_if_senseless(rows: list[dict]) -> None:
    """Warn where a model predicts worse than bytes drawn at random would be: 8 bits each."""
    width = sum(int((row["end"] - row["start"]).sum()) for row in rows)
    bits = sum(float(row["ce"].sum()) for row in rows) / math.log(2) / max(width, 1)
    if bits > 8:
        logger.warning(
            "The model gives the answers %.1f bits per byte, more than bytes drawn at random would take: look whether "
            "its weights were converted rightly, and whether tokenizer and template are its own.",
            bits,
        )


def _ends(rows: list[dict], end_of_turn: int) -> list[int]:
    """How many predicted tokens end a turn, and at how many of them that is among the kept entries."""
    kept = [(row["topk_ids"] == end_of_turn).any(1)[row["input_ids"][row["predicted"]] == end_of_turn] for row in rows]
    return [sum(map(len, kept)), int(sum(each.sum() for each in kept))]


@contextmanager
def tokenizing(encoder: ConversationEncoder, processes: int) -> Iterator[Callable[[list[Conversation]], Future]]:
    """What begins to tokenize a shard: in a thread, or in so many processes; the result is a list of Outcome."""
    if not processes:
        with ThreadPoolExecutor(1) as thread:
            yield lambda shard: thread.submit(lambda: [_encoded(encoder, one.messages) for one in shard])
        return
    spawn = get_context("spawn")
    try:
        with ProcessPoolExecutor(processes, mp_context=spawn, initializer=_use, initargs=(encoder,)) as pool:
            yield lambda shard: pool.submit(_encode_here, [one.messages for one in shard])
    except BrokenProcessPool as error:
        raise RuntimeError(
            "A process that tokenizes ended (memory? a script without `if __name__ == '__main__':`?). What is finished "
            "stays; the same command continues, with encoding_processes 0 in a thread."
        ) from error


def _use(encoder: ConversationEncoder) -> None:
    """Begin a process that tokenizes: it ends with its parent, however that ends."""
    global _encoder
    _encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's business
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _encode_here(messages: list[list[dict]]) -> list[Outcome]:
    assert _encoder is not None
    return [_encoded(_encoder, each) for each in messages]


def _encoded(encoder: ConversationEncoder, messages: list[dict]) -> Outcome:
    try:
        return encoder.encode(messages)
    except Unusable as problem:
        return problem.reason, str(problem)


def _shard(conversations: list[Conversation], outcomes: list[Outcome]) -> _Shard:
    shard = _Shard()
    for conversation, outcome in zip(conversations, outcomes):
        if isinstance(outcome, Encoded):
            shard.encoded.append(outcome)
            shard.conversations.append(conversation)
        else:
            shard.skip(conversation, *outcome)
    return shard


def _check_ids(encoded: list[Encoded], vocab_size: int) -> None:
    if (highest := max((int(one.input_ids.max()) for one in encoded), default=0)) >= vocab_size:
        raise InputError(
            f"tokenizer for the model: expected ids below its {vocab_size} embedding rows, got {highest}. "
            "Give the tokenizer that belongs to the model."
        )


def _rows(shard: _Shard, results: list[TopK]) -> list[dict]:
    """The documented rows of a shard; conversations whose logits are not finite are skipped."""
    rows = []
    for conversation, one, found in zip(shard.conversations, shard.encoded, results):
        if not found.finite.all():
            where = int(one.predicted[int(np.argmin(found.finite))])
            detail = f"logits for token {where} of {len(one.input_ids)} are not finite"
            shard.skip(conversation, "non_finite", detail)
            continue
        row = {"id": conversation.id, "content_hash": conversation.content_hash, "slice": conversation.slice}
        row |= {name: getattr(one, name) for name in ("input_ids", "predicted", "message", "start", "end")}
        rows.append({**row, "topk_ids": found.ids, "topk_logprobs": found.logprobs, "ce": found.ce})
    return rows
