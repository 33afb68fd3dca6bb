"""Run a chat model over conversations once and keep what fusion needs of it: `represent`.

Conversations go to shards in their order, shards to processes by number (shard i to process i mod n), so any number of
processes, on any number of machines that share the directory, writes the same files. Within a shard conversations are
batched by length under a token budget, longest first. A shard that is there and whole is never computed again: a run
that was killed goes on where it was. What is left out is listed in `skipped.jsonl` with its reason. Conversations whose
logits are not finite are among it (the released procedure dropped them in a later pass of its own, filter_nan); above
1 % of them the run ends with an error.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta

import numpy as np

from fusechat_fuse.errors import InputError
from fusechat_fuse.models import (
    identify,
    is_named,
    library_versions,
    load_config,
    load_fast_tokenizer,
    load_model,
    positions_of,
)
from fusechat_fuse.store.files import write_atomic
from fusechat_fuse.store.shards import Representation, ShardWriter, load_representation
from fusechat_fuse.store.tokenizers import save_tokenizer
from fusechat_fuse.text.chat import ConversationEncoder, Encoded
from fusechat_fuse.text.conversations import Conversation, ReadReport, Unusable, read_conversations
from fusechat_fuse.text.templates import resolve_template
from fusechat_fuse.text.tokens import tokenizer_hash

logger = logging.getLogger(__name__)
MAX_NON_FINITE_SHARE = 0.01


@dataclass
class _Process:
    """This process among those of an `accelerate launch`; alone without one."""

    index: int = 0
    count: int = 1
    device: str | None = None
    wait = staticmethod(lambda: None)

    @classmethod
    def current(cls) -> _Process:
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        from accelerate import PartialState

        # a process that is done waits for the slowest: days, not the usual ten minutes
        state = PartialState(timeout=timedelta(days=30))
        process = cls(state.process_index, state.num_processes, str(state.device))
        process.wait = state.wait_for_everyone
        return process

    @property
    def first(self) -> bool:
        return self.index == 0


def plan_batches(lengths: np.ndarray, tokens_per_batch: int) -> list[np.ndarray]:
    """Indices in batches of rows x longest row <= tokens_per_batch, longest first; a longer row stands alone.

    A batch of an eighth of the budget or more is also closed where one more row would make padding over 4 % of it.

    Args:
        lengths: tokens per conversation [n]. tokens_per_batch: the budget, padding included.
    Returns: arrays of indices, each a batch.
    """
    order = np.argsort(-lengths, kind="stable")
    batches, begin, tokens = [], 0, 0
    for place, index in enumerate(order):
        rows, longest = place - begin + 1, int(lengths[order[begin]])
        full = rows * longest > tokens_per_batch
        sparse = tokens * 8 >= tokens_per_batch and tokens + lengths[index] < 0.96 * rows * longest
        if rows > 1 and (full or sparse):
            batches.append(order[begin:place])
            begin, tokens = place, 0
        tokens += int(lengths[index])
    return [*batches, order[begin:]] if len(order) else []


def _is_out_of_memory(error: BaseException) -> bool:
    import torch

    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
    )


class _Runner:
    """Runs encoded conversations through the model; remembers a token budget that had to shrink."""

    def __init__(self, head, top_k: int, tokens_per_batch: int):
        self.head, self.top_k, self.budget = head, top_k, tokens_per_batch
        self.padded = 0  # tokens run, padding included

    def __call__(self, encoded: list[Encoded], progress) -> list:
        """A TopK for each conversation, in order."""
        lengths = np.array([len(one.input_ids) for one in encoded], dtype=np.int64)
        results: list = [None] * len(encoded)
        queue = plan_batches(lengths, self.budget)
        while queue:
            batch = queue.pop(0)
            size = len(batch) * int(lengths[batch].max())
            found = self._try([encoded[i] for i in batch], size)
            if found is None:  # out of memory; what the failed pass held is released by now
                self._shrink(size)
                left = np.concatenate([batch, *queue])
                queue = [left[part] for part in plan_batches(lengths[left], self.budget)]
                continue
            for i, one in zip(batch, found):
                results[i] = one
            self.padded += size
            progress.update(len(batch))
        return results

    def _try(self, batch: list[Encoded], size: int) -> list | None:
        """One forward pass; None where memory does not suffice."""
        try:
            return self.head([one.input_ids for one in batch], [one.predicted for one in batch], self.top_k)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise InputError(
                    f"memory for a conversation of {size} tokens: expected it to fit alone, got {error}. Give a "
                    "smaller max_length, a smaller dtype, or a device_map over more devices."
                ) from error
            return None

    def _shrink(self, size: int) -> None:
        import torch

        self.budget = size // 2
        logger.warning("Out of memory at %d tokens per batch; going on with %d.", size, self.budget)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


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


def represent(
    model,
    conversations,
    output_dir,
    *,
    pivot=None,
    template: str = "pivot",
    top_k: int = 10,
    max_length: int = 2048,
    tokens_per_batch: int = 8192,
    shard_size: int = 256,
    dtype: str = "auto",
    device_map: str | dict | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    split: str = "train",
    strict: bool = False,
    encoding: str = "plain",
    tokenizer=None,
) -> Representation:
    """Write a model's top-k next-token distributions on the answers of a data set.

    For every predicted token (content and end of turn of each assistant message), at index t of the sequence:
    log softmax(z_{t-1}) at its k largest entries, and ce = -log softmax(z_{t-1})[token t].

    Args:
        model: directory, Hub name, or loaded causal language model (then give `tokenizer`).
        conversations: path or Hub name as `load_conversations` takes it, its result, or rows of {id, messages}.
        output_dir: made if missing; an earlier start of the same run is continued.
        pivot: the pivot's directory, Hub name or tokenizer, for template="pivot"; None: the model is the pivot.
        template: pivot (the pivot's chat template with the model's own BOS and end of turn), native (the model's own),
            the name of a built-in one, or a .jinja file.
        top_k: entries kept per predicted token, 1 to the vocabulary's size.
        max_length: tokens kept of each conversation; lowered, with a warning, to the model's number of positions.
        tokens_per_batch: rows x longest row of a forward pass; halved on out of memory.
        shard_size: conversations per shard, what a kill costs at most.
        dtype: auto (the checkpoint's), float32, bfloat16 or float16.
        device_map: e.g. auto, one model over several devices; not together with several processes.
        attn_implementation: as transformers takes it.
        trust_remote_code: run code from the model's repository.
        split: of a data set with several.
        strict: rows that would be skipped or repaired, and conversations the tokenizer or template refuses, are errors.
        encoding: plain (about 61 bytes per predicted token at k = 10 and prompts half the tokens) or compact (below 40,
            log-probabilities rounded within 1e-3 max(1, |lp|), ce within 1e-4).
        tokenizer: the loaded model's.
    Returns: the Representation in output_dir.
    Raises: InputError for bad input, before the model is loaded; RuntimeError where over 1 % of the conversations have
        logits that are not finite.
    Source: arXiv 2408.07990, section 3.2. Differs from the released code, which keeps top-k logits of all positions,
        prompts and padding included, without their normalizer.
    Precision: the model's dtype; log-softmax, top-k and ce in float32; log-probabilities stored as float16.
    """
    options = {"top_k": top_k, "max_length": max_length, "shard_size": shard_size, "dtype": dtype}
    process = _Process.current()
    _check_options(options, tokens_per_batch, device_map, process)
    config = load_config(model, trust_remote_code=trust_remote_code)
    if tokenizer is None and not is_named(model):
        raise InputError("tokenizer for represent: expected one beside a loaded model, got none. Give tokenizer=.")
    encoder = _encoder(model if tokenizer is None else tokenizer, pivot, template, options, trust_remote_code)
    if (positions := positions_of(config) or max_length) < max_length:
        logger.warning("max_length is lowered from %d to the model's %d positions.", max_length, positions)
        encoder.max_length = positions
    found, report = read_conversations(conversations, split=split, strict=strict)
    if strict:
        _refuse_unusable(encoder, found, report)
    shards = [found[n : n + shard_size] for n in range(0, len(found), shard_size)]
    made_from = identify(model)
    identity = {
        "model": {"fingerprint": made_from["fingerprint"]},
        "options": options,
        "tokenizer": tokenizer_hash(encoder.tokenizer),
        "template": {"name": encoder.template.name, "sha256": encoder.template.sha256},
        "data": _data_hash(found),
    }
    writer = ShardWriter(output_dir, identity, kind="representation", encoding=encoding)
    mine = [n for n in range(process.index, len(shards), process.count) if not writer.done(n)]
    if mine:
        loading = {"dtype": dtype, "device_map": device_map, "attn_implementation": attn_implementation}
        loaded = _loaded(model, process.device, trust_remote_code=trust_remote_code, **loading)
        _compute(loaded, encoder, shards, mine, writer, top_k, tokens_per_batch, show=process.first)
    process.wait()
    if process.first:
        _finish(writer, len(shards), report, encoder, identity | {"model": made_from})
    process.wait()
    return load_representation(output_dir)


def _check_options(options: dict, tokens_per_batch: int, device_map, process: _Process) -> None:
    numbers = {**options, "tokens_per_batch": tokens_per_batch}
    dtype = numbers.pop("dtype")
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{name} for represent: expected an integer from 1, got {value!r}.")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise InputError(f"dtype for represent: expected auto, float32, bfloat16 or float16, got {dtype!r}.")
    if device_map and process.count > 1:
        raise InputError(f"device_map for {process.count} processes: expected none, got {device_map!r}. Leave it out.")


def _encoder(tokenizer, pivot, template: str, options: dict, trust_remote_code: bool) -> ConversationEncoder:
    tokenizer = load_fast_tokenizer(tokenizer, trust_remote_code)
    if (top_k := options["top_k"]) > len(tokenizer):
        raise InputError(f"top_k for represent: expected at most the vocabulary's {len(tokenizer)}, got {top_k}.")
    pivot = None if pivot is None else load_fast_tokenizer(pivot, trust_remote_code)
    return ConversationEncoder(tokenizer, resolve_template(template, tokenizer, pivot), options["max_length"])


def _loaded(model, device: str | None, *, device_map, **loading):
    """The model in evaluation mode, on this process's device; one that was given loaded stays where it is."""
    import torch

    if not is_named(model):
        return model.eval()
    loaded = load_model(model, device_map=device_map, **loading)
    return loaded if device_map else loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _refuse_unusable(encoder: ConversationEncoder, found: list[Conversation], report: ReadReport) -> None:
    for conversation in found:
        try:
            encoder.encode(conversation.messages)
        except Unusable as problem:
            raise InputError(
                f"conversation for {report.name}, row {conversation.row}: {problem} ({problem.reason}). "
                "Mend the row, or leave strict off to skip it."
            ) from problem


def _data_hash(found: list[Conversation]) -> str:
    digest = hashlib.sha256()
    for conversation in found:
        digest.update(json.dumps([conversation.id, conversation.content_hash, conversation.slice]).encode())
    return digest.hexdigest()[:16]


def _compute(model, encoder, shards, mine, writer: ShardWriter, top_k: int, tokens_per_batch: int, show: bool) -> None:
    """Compute and write the shards `mine`; a second thread tokenizes the next one and writes the last one meanwhile."""
    from tqdm.auto import tqdm

    from fusechat_fuse.capture.distributions import PredictionHead

    rows = int(model.get_input_embeddings().weight.shape[0])
    runner = _Runner(PredictionHead(model, np.arange(16) % rows), top_k, tokens_per_batch)
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
            _check_finite(non_finite, total)
        written.result()


def _check_ids(encoded: list[Encoded], rows: int) -> None:
    if (highest := max((int(one.input_ids.max()) for one in encoded), default=0)) >= rows:
        raise InputError(
            f"tokenizer for the model: expected ids below its {rows} embedding rows, got {highest}. "
            "Give the tokenizer that belongs to the model."
        )


def _check_finite(non_finite: int, total: int) -> None:
    if non_finite > MAX_NON_FINITE_SHARE * total:
        raise RuntimeError(
            f"{non_finite} of {total} conversations have logits that are not finite ({non_finite / total:.1%}; at most "
            f"{MAX_NON_FINITE_SHARE:.0%} are left out). Run the model in bfloat16 or float32, or check its weights."
        )


def _finish(writer: ShardWriter, num_shards: int, report: ReadReport, encoder: ConversationEncoder, made: dict) -> None:
    """Put the shards' accounts together: skipped.jsonl, tokenizer, manifest."""
    infos = [writer.info(n)["info"] for n in range(num_shards)]
    skipped = report.skipped + [entry for info in infos for entry in info["skipped"]]
    entries = [{"action": "skipped", **e} for e in skipped] + [{"action": "repaired", **e} for e in report.repaired]
    lines = [json.dumps(entry, ensure_ascii=True, sort_keys=True) + "\n" for entry in entries]
    write_atomic(writer.path / "skipped.jsonl", "".join(lines).encode())
    by_reason = dict(sorted(Counter(entry["reason"] for entry in skipped).items()))
    _check_finite(by_reason.get("non_finite", 0), report.rows - len(report.skipped))
    waste = round(1 - sum(i["run_tokens"] for i in infos) / max(sum(i["padded_tokens"] for i in infos), 1), 4)
    counts = {
        "rows_read": report.rows,
        "skipped": by_reason,
        "repaired": report.counts()["repaired"],
        "truncated": sum(info["truncated"] for info in infos),
        "padding_share": waste,
    }
    save_tokenizer(tokenizer := encoder.tokenizer, writer.path)
    manifest = {
        "options": {**made["options"], "template": made["template"]["name"]},
        "model": {**made["model"], "vocab_size": infos[0]["vocab_size"]},
        "tokenizer": {
            "sha256": made["tokenizer"],
            "class": type(tokenizer).__name__,
            "bos_id": tokenizer.bos_token_id,
            "eos_id": tokenizer.eos_token_id,
            "end_of_turn_id": encoder.end_of_turn_id,
        },
        "template": {**made["template"], "source": encoder.template.source},
        "data": made["data"],
        "versions": library_versions(),
        "counts": counts,
    }
    writer.finish(num_shards, manifest)
    if share := by_reason.get("non_finite", 0) / max(report.rows, 1):
        logger.warning(
            "%.2f %% of the conversations have logits that are not finite and are left out here; no later pass that "
            "filters NaN is needed.",
            100 * share,
        )
    if skipped:
        logger.warning("%d of %d rows skipped: %s (see %s)", len(skipped), report.rows, by_reason, "skipped.jsonl")
    logger.info("%s: padding %.1f %% of the tokens run", writer.path, 100 * waste)
