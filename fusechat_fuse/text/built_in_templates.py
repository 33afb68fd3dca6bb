"""The chat templates of the supported families, for tokenizers that have none.

Written from the families' published formats; `bos_token` is their only variable. Each names the text of its BOS (""
where the family uses none) and of the token that ends a turn, so that a model of another family can use its own
instead. Where a family has no system role (Mistral, Gemma) the system text opens the first user message; where a family
trims contents, so does the template, and byte offsets stay those of the untrimmed content (see `chat.py`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BuiltIn:
    """Jinja source, BOS text and end-of-turn text of one family, and the tokens by which its tokenizers are known."""

    source: str
    bos: str
    end_of_turn: str
    known_by: tuple[str, ...] = ()


_OPENCHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ 'GPT4 Correct ' + message['role'].title() + ': ' + message['content'] + '<|end_of_turn|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'GPT4 Correct Assistant:' }}{% endif %}"
)
_FOLD_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}" + _FOLD_SYSTEM + "{% for message in rest %}"
    "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + '</s>' }}{% endif %}{% endfor %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}" + _FOLD_SYSTEM + "{% for message in rest %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{{ (system if loop.first else '') + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_PHI3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
_TURNS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_QWEN = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}" + _TURNS
)

BUILT_IN: dict[str, BuiltIn] = {
    "openchat_3.5": BuiltIn(_OPENCHAT, "<s>", "<|end_of_turn|>", ("<|end_of_turn|>",)),
    "mistral": BuiltIn(_MISTRAL, "<s>", "</s>", ("[INST]", "[/INST]")),
    "llama-3": BuiltIn(_LLAMA3, "<|begin_of_text|>", "<|eot_id|>", ("<|eot_id|>", "<|start_header_id|>")),
    "gemma": BuiltIn(_GEMMA, "<bos>", "<end_of_turn>", ("<start_of_turn>", "<end_of_turn>")),
    "phi-3": BuiltIn(_PHI3, "<s>", "<|end|>", ("<|end|>", "<|assistant|>")),
    "internlm2": BuiltIn("{{ bos_token }}" + _TURNS, "<s>", "<|im_end|>", ("<|im_start|>", "<|im_end|>", "<s>")),
    "yi": BuiltIn(_TURNS, "", "<|im_end|>", ("<|im_start|>", "<|im_end|>", "<|startoftext|>")),
    "qwen": BuiltIn(_QWEN, "", "<|im_end|>", ("<|im_start|>", "<|im_end|>")),
}


def family_of(added_tokens: set[str]) -> str | None:
    """The family whose added tokens a tokenizer has, or None if none fits."""
    for name, family in BUILT_IN.items():
        if set(family.known_by) <= added_tokens:
            return name
    return None
