"""Tiny causal language models with random weights, one per family, and batches to train them on."""

import torch
import transformers

from fusechat_fuse.training.collator import FusionCollator
from tests.helpers.fusion_rows import aligned_rows

VOCAB = 50
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
FAMILIES = {
    "Llama": {},
    "Llama-tied": {"tie_word_embeddings": True},
    "Mistral": {"sliding_window": None},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"},
    "Gemma": {},
    "Gemma2": {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "Phi3": {"pad_token_id": 0},
    "Qwen2": {},
    "Qwen3": {},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0},
}


def tiny_model(family: str = "Llama", seed: int = 0, dtype=torch.float32, **changes):
    name = family.split("-")[0]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **FAMILIES.get(family, {}), **changes})
    return getattr(transformers, f"{name}ForCausalLM")(config).to(dtype)


def batch_of(count: int = 3, seed: int = 0, dtype=torch.float32, **options) -> dict:
    batch = FusionCollator(preset="paper", vocab_size=VOCAB, **options)(aligned_rows(count, seed=seed))
    batch["target_probs"] = batch["target_probs"].to(dtype)
    return batch
