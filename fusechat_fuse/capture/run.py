"""Run a chat model over conversations once and keep what fusion needs of it: `represent`.

Conversations go to shards in their order, shards to processes by number (shard i to process i mod n), so any number of
processes, on any number of machines that share the directory, writes the same files. Within a shard conversations are
batched by length under a token budget, longest first. A shard that is complete is never computed again: a killed run
continues where it stopped. What is left out is listed in `skipped.jsonl` with its reason. Conversations whose logits
are not finite are among it (the released procedure dropped them in a later pass of its own, filter_nan); above 1 % of
them the run ends with an error.
"""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fusechat_fuse.capture.batches import BatchRunner
from fusechat_fuse.capture.computation import Runner, write_representation
from fusechat_fuse.capture.manifest import Capture
from fusechat_fuse.errors import InputError, check_integer
from fusechat_fuse.models.files import (
    is_named,
    load_config,
    load_fast_tokenizer,
    positions_of,
    rope_boundary,
    with_gguf,
)
from fusechat_fuse.models.identity import identify
from fusechat_fuse.models.loading import check_causal, check_loading, load_to_device, quantization_of
from fusechat_fuse.processes import Process
from fusechat_fuse.store.files import short_digest
from fusechat_fuse.store.shard_writer import ENCODINGS, ROWS_PER_SHARD, ShardWriter
from fusechat_fuse.store.shards import Representation
from fusechat_fuse.text.chat import ConversationEncoder
from fusechat_fuse.text.conversations import Conversation, ReadReport, read_conversations
from fusechat_fuse.text.messages import Unusable
from fusechat_fuse.text.templates import check_template, resolve_template

logger = logging.getLogger(__name__)
SAMPLE_SIZE = 5_000  # conversations on which the template is tried before the model is loaded


def represent(
    model: Any,
    conversations: Any,
    output_dir: str | Path,
    *,
    pivot: Any = None,
    template: str = "pivot",
    top_k: int = 10,
    max_length: int = 2048,
    tokens_per_batch: int = 8192,
    shard_size: int = ROWS_PER_SHARD,
    dtype: str = "auto",
    device_map: str | dict | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    split: str = "train",
    limit: int | None = None,
    shuffle_seed: int | None = None,
    messages_column: str | None = None,
    strict: bool = False,
    encoding: str = "plain",
    tokenizer: Any = None,
    gguf_file: str | None = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    server: str | list[str] | None = None,
    server_kind: str = "vllm",
    server_model: str | None = None,
    server_requests: int = 32,
) -> Representation:
    """Write a model's top-k next-token distributions on the answers of a data set.

    For every predicted token (content and end of turn of each assistant message), at index t of the sequence:
    log softmax(z_{t-1}) at its k largest entries, and ce = -log softmax(z_{t-1})[token t].

    Args:
        model: directory (of PEFT adapters, too), Hub name, GGUF file, or loaded causal language model (then give
            `tokenizer`).
        conversations: paths or Hub names as `load_conversations` takes them, its result, or rows of {id, messages}.
        output_dir: created if missing; an interrupted run of the same options is continued.
        pivot: the pivot's directory, Hub name or tokenizer, for template="pivot"; None: the model is the pivot.
        template: pivot (the pivot's chat template with the model's own BOS and end of turn), native (the model's own),
            the name of a built-in one, or a .jinja file.
        top_k: entries kept per predicted token, 1 to the vocabulary's size.
        max_length: tokens kept of each conversation; lowered, with a warning, to the model's number of positions.
        tokens_per_batch: rows x longest row of a forward pass; halved on out of memory.
        shard_size: conversations per shard (lost at most if the run is killed).
        dtype: auto (the checkpoint's), float32, bfloat16 or float16.
        device_map: e.g. auto, one model over several devices; not together with several processes.
        attn_implementation: as transformers takes it.
        trust_remote_code: run code from the model's repository.
        split, limit, shuffle_seed, messages_column: as `load_conversations` takes them.
        strict: rows that would be skipped or repaired, and conversations the tokenizer or template refuses, are errors.
        encoding: plain (about 61 bytes per predicted token at k = 10 and prompts half the tokens) or compact (below 40,
            log-probabilities rounded within 1e-3 max(1, |lp|), ce within 1e-4).
        tokenizer: the loaded model's.
        gguf_file: name of the GGUF file in the model's directory or repository; its path where `model` is None.
        load_in_4bit, load_in_8bit: quantise the weights on loading (bitsandbytes; 4-bit NF4). Checkpoints that are
            already quantised are run as they are.
        server: URLs (a list, or separated by commas) of inference servers that run the model; `model` then gives
            tokenizer, template and configuration.
        server_kind: vllm or sglang. server_model: the name to ask for, where several models (adapters) are served.
        server_requests: requests in flight at each server. An API key: environment variable FUSECHAT_SERVER_API_KEY.
    Returns: the Representation in output_dir.
    Raises: InputError for bad input, before the model is loaded; RuntimeError where over 1 % of the conversations have
        logits that are not finite.
    Source: `docs/method.md`, "Representations"; arXiv 2408.07990, section 3.2. Differs from the released code, which
        keeps top-k logits of all positions, prompts and padding included, without their normalizer.
    Precision: the model's dtype; log-softmax, top-k and ce in float32; log-probabilities stored as float16.
    """
    load_in = check_options(locals())
    process, model = Process.current(), with_gguf(model, gguf_file)
    if device_map and process.count > 1:
        raise InputError(f"device_map for {process.count} processes: expected none, got {device_map!r}. Leave it out.")
    options = {"top_k": top_k, "max_length": max_length, "shard_size": shard_size, "dtype": dtype}
    loading = {"dtype": dtype, "device_map": device_map, "attn_implementation": attn_implementation}
    loading |= {"trust_remote_code": trust_remote_code, "load_in": load_in}
    encoder = _encoder(model, tokenizer, pivot, template, options, trust_remote_code)
    reading = {"split": split, "limit": limit, "messages_column": messages_column, "shuffle_seed": shuffle_seed}
    found, report = read_conversations(conversations, strict=strict, **reading)
    _refuse_unusable(encoder, found, report)
    _check_template(encoder, found)
    if server is None:
        made_from = identify(model)
        if is_named(model) and (quantization := quantization_of(model, load_in)):
            made_from["quantization"] = quantization
        make_runner = partial(_batch_runner, model, process.device, loading, top_k, tokens_per_batch)
        options |= {"load_in": load_in} if load_in else {}
    else:
        asked = {"server": server, "kind": server_kind, "model": server_model, "requests": server_requests}
        served = _connect(model, encoder, loading, top_k, asked)
        made_from, make_runner = served.identity, lambda: served
        options |= {"dtype": "the server's", "server": server_kind}
    capture = Capture(found, report, encoder, made_from, _template_of(template, encoder, made_from["name"], pivot))
    data = short_digest("".join(json.dumps([one.id, one.content_hash, one.slice]) for one in found))
    writer = ShardWriter(output_dir, capture.identity(options, data), kind="representation", encoding=encoding)
    if process.first:
        _log_settings(capture, template, pivot, max_length)
    return write_representation(capture, writer, shard_size, process, make_runner)


def check_options(options: dict[str, Any]) -> str | None:
    """Raise InputError for options of `represent` that are wrong whatever is represented; returns `load_in`."""
    for name in ("top_k", "max_length", "shard_size", "tokens_per_batch"):
        check_integer(f"{name} for represent", options[name])
    if (encoding := options["encoding"]) not in ENCODINGS:
        raise InputError(f"encoding for represent: expected {' or '.join(ENCODINGS)}, got {encoding!r}. Use one.")
    return check_loading("represent", options)


def _connect(model, encoder: ConversationEncoder, loading: dict, top_k: int, asked: dict):
    """The runner of the servers; conversations are cut at what they take."""
    from fusechat_fuse.capture.server import ServerRunner
    from fusechat_fuse.models.servers import Servers

    vocab_size = load_config(model, trust_remote_code=loading["trust_remote_code"]).get_text_config().vocab_size
    servers = Servers("represent", **asked)
    served = ServerRunner(servers, tokenizer=encoder.tokenizer, top_k=top_k, vocab_size=vocab_size)
    encoder.max_length = min(encoder.max_length, served.max_length or encoder.max_length)
    return served


def _encoder(model, tokenizer, pivot, template: str, options: dict, trust_remote_code: bool) -> ConversationEncoder:
    """The encoder with the model's tokenizer and the chosen template, cut at the model's number of positions."""
    config = load_config(model, trust_remote_code=trust_remote_code)
    if tokenizer is None and not is_named(model):
        raise InputError("tokenizer for represent: expected one beside a loaded model, got none. Give tokenizer=.")
    tokenizer = load_fast_tokenizer(model if tokenizer is None else tokenizer, trust_remote_code)
    rows = getattr(config.get_text_config(), "vocab_size", None) or len(tokenizer)
    _check_top_k(options["top_k"], min(rows, len(tokenizer)))
    pivot = None if pivot is None else load_fast_tokenizer(pivot, trust_remote_code)
    max_length = min(options["max_length"], positions_of(config) or options["max_length"])
    return ConversationEncoder(tokenizer, resolve_template(template, tokenizer, pivot), max_length)


def _check_top_k(top_k: int, tokens: int) -> None:
    if top_k > tokens:
        raise InputError(f"top_k for represent: expected at most the model's {tokens} tokens, got {top_k}. Lower it.")


def _batch_runner(model, device: str | None, loading: dict, top_k: int, tokens_per_batch: int) -> Runner:
    from fusechat_fuse.capture.distributions import PredictionHead

    name = model if is_named(model) else type(model).__name__
    model = load_to_device(model, device, **loading)
    check_causal(model, name)
    rows = int(model.get_input_embeddings().weight.shape[0])
    head = PredictionHead(model, np.arange(16) % rows)
    _check_top_k(top_k, head.vocab_size)  # which the configuration may not say
    return BatchRunner(head, top_k, tokens_per_batch, rows, rope_boundary(model.config))


def _check_template(encoder: ConversationEncoder, found: list[Conversation]) -> None:
    """Raise InputError, before the model is loaded, where the template refuses too many conversations.

    It is tried on a sample, and on all where it refuses too many of the sample.
    """
    sample = [found[n] for n in np.random.default_rng(0).permutation(len(found))[:SAMPLE_SIZE]]
    for tried in (sample, found):
        refused = []
        for conversation in tried:
            try:
                encoder.check(conversation.messages)
            except Unusable as problem:
                refused.append({"reason": problem.reason, "detail": str(problem)})
        try:
            return check_template(refused, len(tried))
        except InputError:
            if len(tried) == len(found):
                raise


def _template_of(template: str, encoder: ConversationEncoder, model: str, pivot) -> str:
    """Name of the model or file that the encoder's chat template comes from."""
    if template not in ("pivot", "native"):
        return encoder.template.name
    if template == "native" or pivot is None:
        return model
    return Path(pivot).name if is_named(pivot) else getattr(pivot, "name_or_path", "") or "the pivot"


def _log_settings(capture: Capture, template: str, pivot, max_length: int) -> None:
    encoder, template_of = capture.encoder, capture.template_of
    if encoder.max_length < max_length:
        logger.warning("max_length is lowered from %d to the model's %d positions.", max_length, encoder.max_length)
    if template in ("pivot", "native") and (name := encoder.template.built_in):
        logger.info("%s has no chat template: its family's built-in template, %s, is used.", template_of, name)
    if template == "pivot" and pivot is None:
        logger.info("Chat template: %s's own, as no pivot is given. If this is a source, give its pivot.", template_of)


def _refuse_unusable(encoder: ConversationEncoder, found: list[Conversation], report: ReadReport) -> None:
    """Raise InputError, if reading is strict, for a conversation that cannot be encoded."""
    for conversation in found if report.strict else ():
        try:
            encoder.encode(conversation.messages)
        except Unusable as problem:
            report.note("skip", conversation.row, conversation.id, problem.reason, str(problem))
