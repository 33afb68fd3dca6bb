"""Tiny Llama checkpoints written by hand: a pivot and targets with task vectors as small as a fine-tuning leaves."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

VOCAB, HIDDEN, MLP, LAYERS = 32, 16, 24, 2


def llama_shapes(layers: int = LAYERS) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a tiny Llama."""
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name in ("q", "k", "v", "o"):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (HIDDEN, HIDDEN)
        shapes[f"{prefix}mlp.gate_proj.weight"] = shapes[f"{prefix}mlp.up_proj.weight"] = (MLP, HIDDEN)
        shapes[f"{prefix}mlp.down_proj.weight"] = (HIDDEN, MLP)
        shapes[f"{prefix}input_layernorm.weight"] = shapes[f"{prefix}post_attention_layernorm.weight"] = (HIDDEN,)
    return shapes


def write_llama(directory: Path, tensors: dict[str, torch.Tensor], layers: int = LAYERS) -> Path:
    """A checkpoint directory that mergekit reads."""
    directory.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "torch_dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch."),
    }
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def write_family(
    directory: Path, scales=(3e-5, 1e-4, 3e-4), dtype: torch.dtype = torch.float32, layers: int = LAYERS
) -> tuple[Path, list[Path]]:
    """A pivot and one target for each scale (standard deviation of its task vectors): (pivot, targets)."""
    generator = torch.Generator().manual_seed(11)
    shapes = llama_shapes(layers)
    pivot = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    targets = []
    for index, scale in enumerate(scales):
        moved = {name: (t + scale * torch.randn(t.shape, generator=generator)).to(dtype) for name, t in pivot.items()}
        targets.append(write_llama(directory / f"target{index}", moved, layers))
    pivot_path = write_llama(directory / "pivot", {name: t.to(dtype) for name, t in pivot.items()}, layers)
    return pivot_path, targets


def read(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint directory."""
    return {name: t for shard in sorted(Path(directory).glob("*.safetensors")) for name, t in load_file(shard).items()}


def recipe(pivot: Path, targets: list[Path], method: str = "sce", **parameters) -> dict:
    """A mergekit configuration."""
    config = {
        "merge_method": method,
        "base_model": str(pivot),
        "models": [{"model": str(target)} for target in targets],
        "dtype": "float32",
    }
    if parameters:
        config["parameters"] = parameters
    return config
