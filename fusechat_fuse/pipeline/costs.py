"""What a stage needs, from a model's configuration and counts of tokens alone. Sizes in bytes, arithmetic in FLOPs.

FLOPs      forward: 2 a token and weight that it meets (the head: predicted tokens only); training 3 times that,
           4 with activation checkpointing, 2 for adapters
training   weights, gradients and Adam's two moments, 16 bytes a float32 weight; bfloat16's copy of the weights
           under autocast; activations
activations, per layer and token: 12 hidden + 4 intermediate sizes (a gated MLP with both norms, without attention
           scores); under checkpointing one layer's, and one hidden size of each other
seconds    FLOPs / (the GPU's peak x UTILIZATION)
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

GPUS = {  # dense bfloat16 FLOPs a second, GiB (the vendor's data sheets)
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
BASE = {"align": 140 << 20, "combine": 130 << 20, "compare": 110 << 20}  # of a process on a CPU without torch, measured
_IMPORTS = "import torch, datasets; from transformers import AutoModelForCausalLM, Trainer"
_HEAD_CHUNK = {"represent": {"cpu": 128 << 20, "gpu": 1 << 30}, "train": {"cpu": 32 << 20, "gpu": 512 << 20}}
_QUANTIZED = {"load_in_4bit": 0.56, "load_in_8bit": 1.03}  # bytes of a weight, with its scales
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelSize:
    """Numbers of weights: all, those that a token meets below the head, the head's, the largest tensor's."""

    parameters: int
    met: int
    head: int
    largest: int
    hidden: int
    intermediate: int
    layers: int
    vocab_size: int
    stored_bytes: int  # of a weight in the checkpoint

    def forward_flops(self, tokens: float, predicted: float) -> float:
        """Of one pass over so many tokens, padding included."""
        return 2 * (self.met * tokens + self.head * predicted)

    def layer_elements(self) -> int:
        """Activations that one layer keeps of one token for its backward pass."""
        return 12 * self.hidden + 4 * self.intermediate


def size_of(model, *, trust_remote_code: bool = False) -> ModelSize:
    """Build a model without weights and count.

    Raises: InputError where transformers cannot build it from its configuration.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(model, trust_remote_code=trust_remote_code)
    try:
        with torch.device("meta"):
            return _counted(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code), config)
    except Exception as error:  # whatever code of a model raises, or a configuration lacks
        raise InputError(f"model for {model}: expected one that can be counted, got {first_line(error)}.") from error


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
    stored = getattr(config, "dtype", None) or torch.float32
    hidden = int(text.hidden_size)
    return ModelSize(
        parameters=sum(counted.values()),
        met=int(sum(counted.values()) - outside - experts * (1 - share)),
        head=embedding.numel() if head is None else head.weight.numel(),
        largest=max(counted.values()),
        hidden=hidden,
        intermediate=int(int(getattr(text, "intermediate_size", None) or 4 * hidden) * max(1, of * share)),
        layers=int(text.num_hidden_layers),
        vocab_size=len(embedding),
        stored_bytes=torch.empty(0, dtype=stored).element_size(),
    )


def bytes_of(dtype: str) -> int:
    """Of a weight in a dtype; raises InputError for one that is none."""
    if dtype not in BYTES:
        raise InputError(f"dtype of weights: expected one of {', '.join(BYTES)}, got {dtype!r}. Use one.")
    return BYTES[dtype]


def represent_memory(size: ModelSize, options: dict[str, Any], tokens: int, predicted: int, device: str) -> int:
    """Weights, a layer's activations of the largest batch, logits of a chunk.

    Args:
        tokens, predicted: of the largest batch. device: cpu or gpu.
    """
    of_weight = BYTES.get(options["dtype"], size.stored_bytes)
    activations = tokens * (6 * size.hidden + 3 * size.intermediate) * of_weight
    logits = min(_HEAD_CHUNK["represent"][device], 4 * predicted * size.vocab_size)
    return _held(size, options, of_weight) + activations + 2 * logits


def _held(size: ModelSize, options: dict[str, Any], of_weight: int) -> int:
    """Bytes of the weights, those of the layers quantised where the options say so."""
    of_layer = next((_QUANTIZED[name] for name in _QUANTIZED if options.get(name)), of_weight)
    return int((size.parameters - size.head) * of_layer) + size.head * of_weight


def train_memory(size: ModelSize, options: dict[str, Any], tokens: int, device: str, shards: int = 1) -> int:
    """Of one rank: its part of the training state, activations of its batch, logits of a chunk.

    Args:
        tokens: of the largest batch, padding included. shards: ranks that share the training state (FSDP, ZeRO-3).
    """
    of_weight, bf16 = bytes_of(options["dtype"]), device == "gpu" and options["bf16"] is not False
    trained = 0 if options["lora_r"] else size.parameters
    state = (
        _held(size, options, of_weight) + 3 * trained * of_weight + (2 * size.parameters if bf16 and shards == 1 else 0)
    )
    kept = size.layers * size.layer_elements()
    if _checkpoints(options):
        kept = size.layers * size.hidden + size.layer_elements()
    activations = tokens * kept * (2 if bf16 else of_weight)
    head = 2 * min(_HEAD_CHUNK["train"][device], 4 * tokens * size.vocab_size) + 4 * size.head
    return state // shards + activations + head


def train_factor(options: dict[str, Any]) -> int:
    """Forward passes that a training step costs as much as."""
    if options["lora_r"]:
        return 2
    return 4 if _checkpoints(options) else 3


def _checkpoints(options: dict[str, Any]) -> bool:
    return bool(options.get("activation_checkpointing") or options.get("gradient_checkpointing"))


@functools.cache
def base_of_models() -> int:
    """Of a process on a CPU with torch and transformers, from one that has loaded them: builds differ by half a GiB.

    0 where Linux does not say.
    """
    code = f"{_IMPORTS}; print(open('/proc/self/status').read())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout
    found = re.search(r"VmHWM:\s*(\d+) kB", said)
    return int(1024 * 1.03 * int(found[1])) if found else 0


def gpu_of(name: str) -> tuple[float, int]:
    """FLOPs a second and bytes of a GPU.

    Raises: InputError for one that is not known.
    """
    if name.lower() not in GPUS:
        raise InputError(f"gpu for plan: expected one of {', '.join(GPUS)}, got {name!r}. Use the nearest.")
    flops, gib = GPUS[name.lower()]
    return flops, gib << 30
