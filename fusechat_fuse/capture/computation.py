"""Shards of conversations through the model: tokenized before it runs, written after it, both beside it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from fusechat_fuse.capture.batches import BatchRunner
from fusechat_fuse.capture.manifest import check_finite
from fusechat_fuse.errors import InputError
from fusechat_fuse.store.shards import ShardWriter
from fusechat_fuse.text.chat import ConversationEncoder, Encoded
from fusechat_fuse.text.conversations import Conversation, Unusable


def compute(model, encoder, shards, mine, writer: ShardWriter, top_k: int, tokens_per_batch: int, show: bool) -> None:
    """Compute and write the shards `mine`; a second thread tokenizes the next one and writes the last one meanwhile."""
    from tqdm.auto import tqdm

    from fusechat_fuse.capture.distributions import PredictionHead

    rows = int(model.get_input_embeddings().weight.shape[0])
    runner = BatchRunner(PredictionHead(model, np.arange(16) % rows), top_k, tokens_per_batch)
    total, non_finite = sum(map(len, shards)), 0
    progress = tqdm(total=sum(len(shards[n]) for n in mine), unit="conversation", disable=None if show else True)
    with progress, ThreadPoolExecutor(1) as background:
        upcoming = background.submit(_encode_shard, encoder, shards[mine[0]])
        written = None
        for number, following in zip(mine, [*mine[1:], None]):
            kept, encoded, skipped = upcoming.result()
            if following is not None:
                upcoming = background.submit(_encode_shard, encoder, shards[following])
            _check_ids(encoded, rows)
            padded = runner.padded
            results = runner(encoded, progress)
            info = {
                "vocab_size": rows,
                "skipped": skipped,
                "truncated": sum(one.truncated for one in encoded),
                "padded_tokens": runner.padded - padded,
                "run_tokens": sum(len(one.input_ids) for one in encoded),
            }
            rows_found = _rows(kept, encoded, results, skipped)
            progress.update(len(shards[number]) - len(kept))
            if written is not None:
                written.result()
            written = background.submit(writer.write, number, rows_found, info)
            non_finite += len(kept) - len(rows_found)
            check_finite(non_finite, total)
        written.result()


def _check_ids(encoded: list[Encoded], rows: int) -> None:
    if (highest := max((int(one.input_ids.max()) for one in encoded), default=0)) >= rows:
        raise InputError(
            f"tokenizer for the model: expected ids below its {rows} embedding rows, got {highest}. "
            "Give the tokenizer that belongs to the model."
        )


def _entry(conversation: Conversation, reason: str, detail: str) -> dict:
    return {"row": conversation.row, "id": conversation.id, "reason": reason, "detail": detail}


def _encode_shard(encoder: ConversationEncoder, shard: list[Conversation]):
    """(conversations, encoded, skipped entries) of one shard."""
    kept, encoded, skipped = [], [], []
    for conversation in shard:
        try:
            encoded.append(encoder.encode(conversation.messages))
            kept.append(conversation)
        except Unusable as problem:
            skipped.append(_entry(conversation, problem.reason, str(problem)))
    return kept, encoded, skipped


def _rows(kept: list[Conversation], encoded: list[Encoded], results: list, skipped: list[dict]) -> list[dict]:
    rows = []
    for conversation, one, found in zip(kept, encoded, results):
        if not found.finite.all():
            where = int(one.predicted[int(np.argmin(found.finite))])
            detail = f"logits for token {where} of {len(one.input_ids)} are not finite"
            skipped.append(_entry(conversation, "non_finite", detail))
            continue
        row = {"id": conversation.id, "content_hash": conversation.content_hash, "slice": conversation.slice}
        row |= {name: getattr(one, name) for name in ("input_ids", "predicted", "message", "start", "end")}
        rows.append({**row, "topk_ids": found.ids, "topk_logprobs": found.logprobs, "ce": found.ce})
    return rows
