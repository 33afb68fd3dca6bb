"""Memory, disk space and FLOPs of a step, estimated from a model's configuration and token counts. Sizes are in bytes.

FLOPs       forward pass: 2 per token and active weight (the head's: predicted tokens only); a training step costs 3
            forward passes, 4 with activation checkpointing, 2 with adapters
training    memory: weights, gradients and Adam's two moments (16 bytes per float32 weight), the bfloat16 copy of the
            weights under autocast, and activations
activations per layer and token: 12 hidden + 4 intermediate sizes (a gated MLP and both norms, without attention
            scores); with checkpointing those of one layer, and one hidden size for each other layer
seconds     FLOPs / (the GPU's peak x UTILIZATION)
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from fusechat_fuse.errors import InputError, first_line
from fusechat_fuse.models.files import load_config

GPUS = {  # dense bfloat16 FLOPs per second, memory in GiB (vendors' data sheets)
    "v100": (125e12, 32),
    "a10": (125e12, 24),
    "a100-40": (312e12, 40),
    "a100": (312e12, 80),
    "rtx4090": (165e12, 24),
    "l40s": (362e12, 48),
    "h100": (989e12, 80),
    "h200": (989e12, 141),
    "b200": (2250e12, 180),
}
UTILIZATION = 0.4
MEMORY_WITHOUT_TORCH = {"align": 140 << 20, "combine": 130 << 20, "compare": 110 << 20}  # of a process, measured
_SHARD, _ROW, _SOURCE_ROW = 3000, 80, 70  # disk: a shard's headers; a row's id, hash and offsets; the same of a source
_COMPACT = 0.57  # size of the compact encoding relative to plain, measured on chat data
_STORE, _TARGET = 8000, 12000  # disk: small files of a store; of a target, besides weights and tokenizer
_KEPT = 0.7  # share of top_k entries that an aligned position keeps
_IMPORTS = "import torch, datasets; from transformers import AutoModelForCausalLM, Trainer"
_HEAD_CHUNK = {"represent": {"cpu": 128 << 20, "gpu": 1 << 30}, "train": {"cpu": 32 << 20, "gpu": 512 << 20}}
_QUANTIZED = {"load_in_4bit": 0.56, "load_in_8bit": 1.03}  # bytes per weight, scales included
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelSize:
    """A model's weight counts and dimensions."""

    parameters: int
    active: int  # weights below the head that one token uses (of experts, the routed ones)
    head: int
    largest: int  # tensor
    hidden: int
    intermediate: int
    layers: int
    vocab_size: int
    stored_bytes: int  # per weight in the checkpoint

    def forward_flops(self, tokens: float, predicted: float) -> float:
        """FLOPs of one forward pass over tokens, padding included, of which some are predicted."""
        return 2 * (self.active * tokens + self.head * predicted)


def size_of(model, *, trust_remote_code: bool = False) -> ModelSize:
    """Count the weights of a model, built from its configuration on the meta device.

    Raises: InputError if transformers cannot build the model from its configuration.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(model, trust_remote_code=trust_remote_code)
    try:
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        return _counted(built, config)
    except Exception as error:  # a model's own code may raise anything
        raise InputError(
            f"model for {model}: expected one whose weights can be counted, got {first_line(error)}."
        ) from error


def _counted(built, config) -> ModelSize:
    import torch

    text = config.get_text_config()
    counted = {name: parameter.numel() for name, parameter in built.named_parameters()}
    experts = sum(count for name, count in counted.items() if ".experts." in name)
    of = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or 1
    share = (getattr(text, "num_experts_per_tok", None) or 1) / of
    embedding = built.get_input_embeddings().weight
    head = built.get_output_embeddings()
    outside = embedding.numel() + (0 if head is None or head.weight is embedding else head.weight.numel())
    hidden = int(text.hidden_size)
    return ModelSize(
        parameters=sum(counted.values()),
        active=int(sum(counted.values()) - outside - experts * (1 - share)),
        head=embedding.numel() if head is None else head.weight.numel(),
        largest=max(counted.values()),
        hidden=hidden,
        intermediate=int(int(getattr(text, "intermediate_size", None) or 4 * hidden) * max(1, of * share)),
        layers=int(text.num_hidden_layers),
        vocab_size=len(embedding),
        stored_bytes=(getattr(config, "dtype", None) or torch.float32).itemsize,
    )


def bytes_of(dtype: str) -> int:
    """Bytes per weight of a dtype; raises InputError for an unknown one."""
    if dtype not in BYTES:
        raise InputError(f"dtype of weights: expected one of {', '.join(BYTES)}, got {dtype!r}. Use one.")
    return BYTES[dtype]


def represent_memory(size: ModelSize, options: dict[str, Any], tokens: int, predicted: int, device: str) -> int:
    """Memory of `represent` in its largest batch: weights, one layer's activations and one chunk of logits."""
    of_weight = BYTES.get(options["dtype"], size.stored_bytes)
    activations = tokens * (6 * size.hidden + 3 * size.intermediate) * of_weight
    logits = min(_HEAD_CHUNK["represent"][device], 4 * predicted * size.vocab_size)
    return _held(size, options, of_weight) + activations + 2 * logits


def _held(size: ModelSize, options: dict[str, Any], of_weight: int) -> int:
    """Memory of the weights; layers are quantised if the options say so, the head never is."""
    of_layer = next((_QUANTIZED[name] for name in _QUANTIZED if options.get(name)), of_weight)
    return int((size.parameters - size.head) * of_layer) + size.head * of_weight


def train_memory(size: ModelSize, options: dict[str, Any], tokens: int, device: str, shards: int = 1) -> int:
    """Memory of one rank in training, by the tokens of its largest batch: activations, one chunk of logits, and its
    share of the training state where `shards` ranks share it (FSDP, ZeRO-3)."""
    of_weight, bf16 = bytes_of(options["dtype"]), device == "gpu" and options["bf16"] is not False
    trained = 0 if options["lora_r"] else size.parameters
    state = _held(size, options, of_weight) + 3 * trained * of_weight
    state += 2 * size.parameters if bf16 and shards == 1 else 0
    of_layer = 12 * size.hidden + 4 * size.intermediate  # numbers kept per token for the backward pass
    kept = size.layers * size.hidden + of_layer if _checkpoints(options) else size.layers * of_layer
    activations = tokens * kept * (2 if bf16 else of_weight)
    head = 2 * min(_HEAD_CHUNK["train"][device], 4 * tokens * size.vocab_size) + 4 * size.head
    return state // shards + activations + head


def train_factor(options: dict[str, Any]) -> int:
    """The cost of a training step, in forward passes."""
    if options["lora_r"]:
        return 2
    return 4 if _checkpoints(options) else 3


def _checkpoints(options: dict[str, Any]) -> bool:
    return bool(options.get("activation_checkpointing") or options.get("gradient_checkpointing"))


def store_disk(conversations: int, row_bytes: int, options: dict[str, Any]) -> int:
    """Disk space of a representation without its tokenizer, from the bytes of all rows in the plain encoding."""
    shards = -(-conversations // options["shard_size"])
    rows = row_bytes * (_COMPACT if options["encoding"] == "compact" else 1)
    return round(rows) + conversations * _ROW + shards * _SHARD + _STORE


def source_disk(conversations: int, predicted: int, top_k: int, combined: bool) -> int:
    """Disk space that a source's rows add to the pivot's in aligned data, or in a combination of several sources."""
    per_token = _KEPT * top_k * 5 + 9 + (3 if combined else 0)
    return round(predicted * per_token + conversations * _SOURCE_ROW)


def target_disk(size: ModelSize, options: dict[str, Any]) -> int:
    """Disk space of a target without its tokenizer, and of the checkpoints kept beside it (weights, Adam's moments)."""
    saved = size.parameters * bytes_of(options["save_dtype"] or options["dtype"])
    checkpoints = options["save_total_limit"] or int(options["num_train_epochs"])
    if options["save_strategy"] == "no" or options["lora_r"]:  # an adapter is small
        checkpoints = 0
    state = size.parameters * (1 if options["save_only_model"] else 3) * bytes_of(options["dtype"])
    return saved + checkpoints * state + _TARGET


@functools.cache
def memory_of_imports() -> int:
    """Memory of a process that has imported torch and transformers, measured: builds differ by half a GiB.

    0 where Linux does not report it.
    """
    code = f"{_IMPORTS}; print(open('/proc/self/status').read())"
    status = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    return int(1024 * 1.03 * int(found[1])) if found else 0


def gpu_of(name: str) -> tuple[float, int]:
    """Peak FLOPs per second and memory in bytes of a GPU; raises InputError for an unknown one."""
    if name.lower() not in GPUS:
        raise InputError(f"gpu for plan: expected one of {', '.join(GPUS)}, got {name!r}. Use the nearest.")
    flops, gib = GPUS[name.lower()]
    return flops, gib << 30
