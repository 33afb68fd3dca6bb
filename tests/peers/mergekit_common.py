"""What mergekit's tests import from `tests.common`, which its source distribution leaves out: written anew from how
the tests use it. `mergekit_suite.py` puts this file there."""

import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from mergekit.config import MergeConfiguration
from mergekit.io import LazyTensorLoader
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}


def _save(model: transformers.PreTrainedModel, path) -> str:
    model.save_pretrained(path, safe_serialization=True)
    return str(path)


def make_picollama(path, vocab_size: int = 64) -> str:
    """A Llama with two layers, random weights; returns the path."""
    return _save(transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=vocab_size, **SMALL)), path)


def make_picogranite(path, vocab_size: int = 64) -> str:
    """A Granite with two layers."""
    return _save(transformers.GraniteForCausalLM(transformers.GraniteConfig(vocab_size=vocab_size, **SMALL)), path)


def make_gpt2size(path, vocab_size: int = 64) -> str:
    """A GPT-2 with GPT-2's twelve layers, narrow."""
    config = transformers.GPT2Config(n_ctx=128, n_embd=32, n_head=4, n_layer=12, vocab_size=vocab_size)
    return _save(transformers.GPT2LMHeadModel(config), path)


def make_picoLlaVa(path) -> str:
    """A LLaVA of a two-layer CLIP and a two-layer Llama."""
    vision = transformers.CLIPVisionConfig(image_size=28, patch_size=14, projection_dim=32, **SMALL)
    text = transformers.LlamaConfig(vocab_size=64, **SMALL)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=63)
    return _save(transformers.LlavaForConditionalGeneration(config), path)


def run_and_check_merge(
    config: MergeConfiguration, validate: Callable[[str], None] | None = None, auto_arch: bool = False
) -> None:
    """Run the merge; its output is whole, has no NaN, and passes `validate(path)`."""
    with tempfile.TemporaryDirectory() as directory:
        out = str(Path(directory) / "out")
        run_merge(config, out, MergeOptions(quiet=True))
        assert (Path(out) / "config.json").is_file()
        loader = LazyTensorLoader.from_disk(out)
        assert loader.index.tensor_paths
        for name in loader.index.tensor_paths:
            tensor = loader.get_tensor(name)
            assert math.prod(tensor.shape) == tensor.numel() > 0
            assert not torch.isnan(tensor).any(), name
        if validate is not None:
            validate(out)
