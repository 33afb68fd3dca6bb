"""Toy chat models with exactly checkable skills: questions, tokenizers, training from scratch, and a test.

No test question occurs in any training data. `quickstart.py` and `paper_in_miniature.py` build their models from this.
"""

from __future__ import annotations

import logging
import os
import random
import zlib
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, set_seed

WORDS = "sun tree red cat moon fish blue stone river bird green door lamp wind gold milk rain leaf star boat".split()
NUMBER_SKILLS, WORD_SKILLS = ("add", "successor", "larger"), ("reverse", "last", "capitals")
SKILLS = NUMBER_SKILLS + WORD_SKILLS


def question(skill: str, rng: random.Random) -> tuple[str, str]:
    """A prompt of a skill and its only right answer."""
    if skill == "add":
        a, b = rng.randrange(20), rng.randrange(20)
        return f"What is {a} plus {b}?", str(a + b)
    if skill == "successor":
        n = rng.randrange(200)
        return f"Which number comes after {n}?", str(n + 1)
    if skill == "larger":
        a, b = rng.sample(range(100), 2)
        return f"Which is larger, {a} or {b}?", str(max(a, b))
    words = rng.sample(WORDS, 2 if skill == "capitals" else 3)
    if skill == "reverse":
        return f"Reverse the words: {' '.join(words)}", " ".join(reversed(words))
    if skill == "last":
        return f"What is the last word of: {' '.join(words)}", words[-1]
    return f"Write in capitals: {' '.join(words)}", " ".join(words).upper()


def is_test(prompt: str) -> bool:
    """Whether a prompt is held out: a fifth of all prompts, chosen by checksum, occurs in no training data."""
    return zlib.crc32(prompt.encode()) % 5 == 0


def conversations(skills, count: int, seed: int, wrong: float = 0.0) -> list[dict]:
    """`count` conversations in ShareGPT format; a share `wrong` of them has the answer of another question."""
    rng = random.Random(seed)
    rows = []
    while len(rows) < count:
        skill = rng.choice(skills)
        prompt, answer = question(skill, rng)
        if is_test(prompt):
            continue
        if rng.random() < wrong:
            answer = question(skill, rng)[1]
        turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]
        rows.append({"id": f"{skill}-{len(rows)}", "conversations": turns})
    return rows


def test_questions(per_skill: int, seed: int) -> dict[str, list[tuple[str, str]]]:
    """Distinct held-out questions of each skill."""
    rng = random.Random(seed)
    found = {}
    for skill in SKILLS:
        drawn = (question(skill, rng) for _ in range(200 * per_skill))
        found[skill] = list({prompt: (prompt, answer) for prompt, answer in drawn if is_test(prompt)}.values())
        found[skill] = found[skill][:per_skill]
    return found


def chat_tokenizer(
    tokenizer: Tokenizer, specials: dict[str, str], user: str, assistant: str
) -> PreTrainedTokenizerFast:
    """A trained tokenizer with its own role markers and chat template, like those of released chat models."""
    template = (
        "{{ bos_token }}{% for m in messages %}"
        "{{ (USER if m['role'] == 'user' else ASSISTANT) + m['content'] + eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}{{ ASSISTANT }}{% endif %}"
    )
    template = template.replace("USER", repr(user)).replace("ASSISTANT", repr(assistant))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, clean_up_tokenization_spaces=False, **specials
    )


def byte_level_tokenizer(texts: list[str], size: int, bos: str, eos: str, user: str, assistant: str):
    """Byte-level BPE, as in GPT-2, Llama-3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[bos, eos, "<|pad|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return chat_tokenizer(tokenizer, {"bos_token": bos, "eos_token": eos, "pad_token": "<|pad|>"}, user, assistant)


def unigram_tokenizer(texts: list[str], size: int, bos: str, eos: str, user: str, assistant: str):
    """SentencePiece-style Unigram with '▁' for spaces, as in T5."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=size,
        special_tokens=["<unk>", bos, eos, "<pad>", user, assistant],
        unk_token="<unk>",
        initial_alphabet=sorted({c for text in texts for c in text if not c.isspace()}),
        show_progress=False,
    )
    # The trainer considers only strings that occur in two different words: so each word is repeated with punctuation.
    tokenizer.train_from_iterator(
        [*texts, *(f"{word}{mark}" for text in texts for word in text.split() for mark in ".,")], trainer
    )
    names = {"unk_token": "<unk>", "bos_token": bos, "eos_token": eos, "pad_token": "<pad>"}
    return chat_tokenizer(tokenizer, names, user, assistant)


@dataclass
class ModelSpec:
    """How a model is made: tokenizer, architecture, size, the skills it is trained on, and training steps."""

    tokenizer: PreTrainedTokenizerFast
    config: type
    hidden: int
    layers: int
    skills: tuple[str, ...]
    steps: int


def pretrain(spec: ModelSpec, output: Path, seed: int, batch: int = 16, rate: float = 3e-3) -> int:
    """Train a model from scratch on its skills (loss on the answers only), save it, return its number of parameters."""
    set_seed(seed)
    rows = conversations(spec.skills, 8000, seed + zlib.crc32(output.name.encode()))
    tok = spec.tokenizer
    config = spec.config(
        vocab_size=len(tok),
        hidden_size=spec.hidden,
        intermediate_size=2 * spec.hidden,
        num_hidden_layers=spec.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    examples = []
    for row in rows:
        prompt, answer = (turn["value"] for turn in row["conversations"])
        messages = [{"role": "user", "content": prompt}]
        head = tok.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        head = tok(head, add_special_tokens=False).input_ids
        whole = tok.apply_chat_template([*messages, {"role": "assistant", "content": answer}], tokenize=False)
        examples.append((tok(whole, add_special_tokens=False).input_ids, len(head)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=spec.steps, pct_start=0.1)
    rng = random.Random(seed)
    for _ in range(spec.steps):
        drawn = [examples[rng.randrange(len(examples))] for _ in range(batch)]
        longest = max(len(ids) for ids, _ in drawn)
        ids = torch.tensor([ids + [tok.pad_token_id] * (longest - len(ids)) for ids, _ in drawn])
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in drawn])
        position = torch.arange(longest)
        answer = (position >= torch.tensor([[start] for _, start in drawn])) & mask.bool()
        model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(~answer, -100)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(output)
    tok.save_pretrained(output)
    return model.num_parameters()


@torch.inference_mode()
def exact_match(directory: Path, questions: dict[str, list[tuple[str, str]]]) -> dict[str, float]:
    """Share of held-out questions answered exactly, per skill and overall, by greedy decoding."""
    tok = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    scores = {}
    for skill, pairs in questions.items():
        chats = [[{"role": "user", "content": prompt}] for prompt, _ in pairs]
        texts = tok.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
        batch = tok(texts, return_tensors="pt", padding=True, add_special_tokens=False, return_token_type_ids=False)
        output = model.generate(**batch, max_new_tokens=16, do_sample=False, pad_token_id=tok.pad_token_id)
        replies = tok.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        scores[skill] = sum(r.strip() == answer for r, (_, answer) in zip(replies, pairs)) / len(pairs)
    scores["overall"] = sum(scores.values()) / len(scores)
    return scores


def quiet() -> None:
    """Set up a process: one thread (steps take a millisecond, a second thread would only wait), errors alone logged."""
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
