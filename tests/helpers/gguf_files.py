"""A tiny GGUF file, written by the `gguf` package: Qwen2's architecture, whose weights stand in it as they are."""

import json
from pathlib import Path

import gguf
import torch

from tests.helpers.real_tokenizers import tiny_bpe
from tests.helpers.tiny_models import tiny_model

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_file(path: Path, seed: int = 0) -> torch.nn.Module:
    """Write PATH; returns the model whose weights are in it, all of them float32."""
    tokenizer = tiny_bpe()
    pieces = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    model = tiny_model("Qwen2", seed=seed, vocab_size=len(tokenizer), bos_token_id=None)
    writer, config = gguf.GGUFWriter(path, "qwen2"), model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    added = {entry.content for entry in tokenizer.added_tokens_decoder.values()}
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in added else 1 for token in tokens])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in pieces["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    for name, tensor in model.state_dict().items():
        stem, _, kind = name.removeprefix("model.layers.").rpartition(".")
        layer, _, rest = stem.partition(".")
        place = f"blk.{layer}.{NAMES[rest]}" if layer.isdigit() else NAMES[stem]
        writer.add_tensor(f"{place}.{kind}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
