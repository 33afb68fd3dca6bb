"""Fuse two tiny chat models of other sizes, architectures and tokenizers into a third, and merge: the whole method.

Everything is built on the spot, without a download: chat data with six skills (each answer can be checked exactly, and
no test prompt occurs in any training data), three tokenizers, a pivot and two sources. Each source was taught three of
the skills well; the pivot has seen all six, briefly. The fusion data are few and partly wrong, as chat data are; what
the sources know beyond them is in their distributions. Then the public commands run, as they would for 7B models:

    represent x3  ->  align x2  ->  combine  ->  train (plain, targets, multi)  ->  mergekit-yaml (SCE)  ->  evaluation

Fusion is done twice, by the paper's settings and by ours, so that the table shows what the choice of what to fuse does.

    python examples/quickstart.py [--output DIR] [--seed N] [--fast]

The output directory keeps every stage, `results.json` and `results.png`. The commands run in this process (a start of
Python with torch costs more than a stage here); each is printed as one would type it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shlex
import subprocess
import sys
import sysconfig
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    set_seed,
)

from fusechat_fuse.flags import as_flags

WORDS = "sun tree red cat moon fish blue stone river bird green door lamp wind gold milk rain leaf star boat".split()
START = time.monotonic()
MERGES = Path(__file__).resolve().parents[1] / "mergekit_configs"
WRONG_ANSWERS = 0.3  # share of the fusion data that have another question's answer
SLICES = {"slice_pattern": "^([a-z]+)-"}  # the skill, by which ids begin; --slice_column auto finds them alone
REPRESENT = {"template": "native", "dtype": "float32"}
NUMBER_SKILLS, WORD_SKILLS = ("add", "successor", "larger"), ("reverse", "last", "capitals")
SKILLS = NUMBER_SKILLS + WORD_SKILLS


def question(skill: str, rng: random.Random) -> tuple[str, str]:
    """One prompt of a skill and its only right answer."""
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
    """A fifth of all prompts, by their checksum, is kept for the evaluation: no training data has them."""
    return zlib.crc32(prompt.encode()) % 5 == 0


def conversations(skills, count: int, seed: int, wrong: float = 0.0) -> list[dict]:
    """`count` conversations in ShareGPT format, of which the share `wrong` has another question's answer."""
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
    """A trained tokenizer with its own roles and chat template, as a released chat model has them."""
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
    """Byte-level BPE, as GPT-2, Llama-3 and Qwen have it."""
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
    """SentencePiece-style Unigram with '▁' for spaces, as T5 and Gemma's relatives have it."""
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
    # The trainer's candidates are strings that occur in two different words: so show each word with a mark as well.
    tokenizer.train_from_iterator(
        [*texts, *(f"{word}{mark}" for text in texts for word in text.split() for mark in ".,")], trainer
    )
    names = {"unk_token": "<unk>", "bos_token": bos, "eos_token": eos, "pad_token": "<pad>"}
    return chat_tokenizer(tokenizer, names, user, assistant)


@dataclass
class Recipe:
    """How one of the three models is made: tokenizer, architecture and size, what it is taught and for how long."""

    tokenizer: PreTrainedTokenizerFast
    config: type
    hidden: int
    layers: int
    skills: tuple[str, ...]
    steps: int


def pretrain(recipe: Recipe, output: Path, seed: int, batch: int = 16, rate: float = 3e-3) -> int:
    """Train a model from scratch on its skills (loss on the answers only), save it, return its number of parameters."""
    set_seed(seed)
    rows = conversations(recipe.skills, 8000, seed + zlib.crc32(output.name.encode()))
    tok = recipe.tokenizer
    config = recipe.config(
        vocab_size=len(tok),
        hidden_size=recipe.hidden,
        intermediate_size=2 * recipe.hidden,
        num_hidden_layers=recipe.layers,
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
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=recipe.steps, pct_start=0.1)
    rng = random.Random(seed)
    for _ in range(recipe.steps):
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


def teach(output: Path, seed: int, scale: float, pool: ProcessPoolExecutor) -> dict[str, int]:
    """Make tokenizers and train the pivot and the two sources from scratch; return parameters per model."""
    texts = [turn["value"] for row in conversations(SKILLS, 3000, seed) for turn in row["conversations"]]
    pivot = byte_level_tokenizer(texts, 420, "<|bos|>", "<|end_of_turn|>", "User:\n", "Assistant:\n")
    numbers = unigram_tokenizer(texts, 400, "<s>", "<|end|>", "<|user|>", "<|assistant|>")
    words = byte_level_tokenizer(texts, 600, "<|begin|>", "<|eot|>", "### Human\n", "### Bot\n")
    recipes = {
        "source-numbers": Recipe(numbers, Phi3Config, 96, 2, NUMBER_SKILLS, round(2400 * scale)),
        "pivot": Recipe(pivot, LlamaConfig, 96, 2, SKILLS, round(450 * max(scale, 0.6))),
        "source-words": Recipe(words, MistralConfig, 80, 2, WORD_SKILLS, round(2000 * scale)),
    }
    taught = {name: pool.submit(pretrain, recipe, output / "models" / name, seed) for name, recipe in recipes.items()}
    sizes = {name: future.result() for name, future in taught.items()}
    for name, recipe in recipes.items():
        say(f"{name}: {recipe.config.model_type}, {sizes[name]:,} parameters, {len(recipe.tokenizer)} tokens")
    return sizes


def fuse(*arguments) -> None:
    """Run `fusechat-fuse ARGUMENTS` in this process."""
    from fusechat_fuse.cli import main

    arguments = [str(argument) for argument in arguments]
    say("$ fusechat-fuse " + shlex.join(arguments))
    if code := main(arguments):
        sys.exit(code)


def fuse_aside(arguments: tuple, started: float) -> None:
    """The same in a process of the pool."""
    global START
    START = started
    fuse(*arguments)


def quiet() -> None:
    """Of every process: one core (steps of a millisecond: a second thread waits more than it works), few words."""
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)


def train_options(seed: int, epochs: float) -> dict:
    """Of every training here."""
    return {
        "num_train_epochs": epochs,
        "per_device_train_batch_size": 16,
        "total_batch_size": 16,
        "learning_rate": 1e-3,
        "seed": seed,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 25,
    }


def write_recipe(output: Path, train: dict) -> None:
    """Our part of this script as one recipe for `fusechat-fuse plan` and `run`."""
    models = output / "models"
    recipe = {
        "output_dir": output / "run",
        "pivot": models / "pivot",
        "sources": {name: models / f"source-{name}" for name in ("numbers", "words")},
        "data": output / "conversations.json",
        "held_out": output / "questions.jsonl",
        "represent": REPRESENT,
        "combine": SLICES,
        "train": {**train, **SLICES},
        "multi": True,
        "merge": {"sce": {"select_topk": 1.0}},
    }
    (output / "recipe.yml").write_text(json.dumps(recipe, indent=1, default=str))  # JSON is YAML


def write_questions(output: Path, questions: dict[str, list[tuple[str, str]]]) -> None:
    """The held-out questions: chat data for a recipe, and for `lm_eval` by `examples/lm_eval/quickstart.yaml`."""
    rows = []
    for skill, pairs in questions.items():
        for question, answer in pairs:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            rows.append({"slice": skill, "question": question, "answer": answer, "messages": messages})
    (output / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def pipeline(output: Path, train: dict, pool: ProcessPoolExecutor) -> None:
    """The method's stages through the public commands: represent, align, combine, train, merge."""
    models, data, representations = output / "models", output / "conversations.json", output / "representations"
    for name in ("pivot", "source-numbers", "source-words"):
        represented = ("--output_dir", representations / name, *as_flags(REPRESENT))
        fuse("represent", "--model_name_or_path", models / name, "--data_path", data, *represented)
    fuse("compare", *(representations / name for name in ("pivot", "source-numbers", "source-words")))
    for preset in ("paper", "fusechat"):
        for name in ("numbers", "words"):
            pair = ("--pivot_representation", representations / "pivot")
            pair += ("--source_representation", representations / f"source-{name}")
            fuse("align", *pair, "--output_dir", output / "aligned" / f"{preset}-{name}", "--preset", preset)
    both = [output / "aligned" / f"fusechat-{name}" for name in ("numbers", "words")]
    fuse("combine", "--aligned", *both, "--output_dir", output / "aligned" / "multi", *as_flags(SLICES))
    runs = {
        "plain": ("fusechat-numbers", ("--lm_loss_weight", 1.0)),
        **{f"paper-{name}": (f"paper-{name}", ("--preset", "paper")) for name in ("numbers", "words")},
        **{f"target-{name}": (f"fusechat-{name}", as_flags(SLICES)) for name in ("numbers", "words")},
        "multi": ("multi", as_flags(SLICES)),
    }
    trainings = []
    for name, (aligned, more) in runs.items():
        paths = ("--model_name_or_path", models / "pivot", "--data_path", output / "aligned" / aligned)
        arguments = ("train", *paths, "--output_dir", models / name, *more, *as_flags(train))
        trainings.append(pool.submit(fuse_aside, arguments, START))
    for training in trainings:
        training.result()
    merge = str(Path(sysconfig.get_path("scripts")) / "mergekit-yaml")
    merges = []
    for config, merged in (("quickstart-sce-paper.yml", "paper-merged"), ("quickstart-sce.yml", "merged")):
        command = [merge, str(MERGES / config), merged, "--no-write-model-card"]
        say("$ " + shlex.join(command))
        merges.append(
            subprocess.Popen(command, cwd=models, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        )
    for running in merges:
        told = running.communicate()[1]
        if running.returncode:
            sys.exit(f"mergekit-yaml failed: {told[-2000:]}")


def draw(scores: dict[str, dict[str, float]], path: Path) -> None:
    """A picture of the table: models down, skills across, darker is better."""
    try:
        import matplotlib
    except ImportError:
        say("no picture: pip install 'fusechat[plot]' for results.png")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = [*SKILLS, "overall"]
    table = [[100 * row[column] for column in columns] for row in scores.values()]
    figure, axes = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
    axes.imshow(table, cmap="Blues", vmin=0, vmax=120, aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(scores)), scores)
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            axes.text(x, y, f"{value:.0f}", ha="center", va="center", color="white" if value > 70 else "black")
    axes.set_title("Held-out questions answered exactly (%)")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def show(scores: dict[str, dict[str, float]]) -> None:
    """The table, on standard output."""
    columns = [*SKILLS, "overall"]
    print(f"\n{'held-out exact match, %':24}" + "".join(f"{column:>11}" for column in columns))
    for name, row in scores.items():
        print(f"{name:24}" + "".join(f"{100 * row[column]:11.1f}" for column in columns))


def say(text: str) -> None:
    print(f"[{time.monotonic() - START:5.0f} s] {text}", flush=True)


def main() -> None:
    """Build, fuse, merge, evaluate, report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("quickstart-output"), help="a new or empty directory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="under 90 seconds: shorter training, weaker models")
    options = parser.parse_args()
    if options.output.exists() and any(options.output.iterdir()):
        parser.error(f"--output {options.output}: expected a new or empty directory. Name another one or delete it.")
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    quiet()

    rows = conversations(SKILLS, 400 if options.fast else 1000, options.seed + 10, wrong=WRONG_ANSWERS)
    (output / "conversations.json").write_text(json.dumps(rows, indent=1))
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=quiet) as pool:
        sizes = teach(output, options.seed, 0.3 if options.fast else 1.0, pool)
        train = train_options(options.seed, 6.0 if options.fast else 13.0)
        write_recipe(output, train)
        pipeline(output, train, pool)
        questions = test_questions(60 if options.fast else 100, options.seed + 11)
        write_questions(output, questions)
        names = ("pivot", "source-numbers", "source-words", "plain", "paper-merged")
        names += ("target-numbers", "target-words", "merged", "multi")
        asked = {name: pool.submit(exact_match, output / "models" / name, questions) for name in names}
        scores = {name: future.result() for name, future in asked.items()}
    show(scores)
    results = {
        "seed": options.seed,
        "fast": options.fast,
        "seconds": round(time.monotonic() - START, 1),
        "parameters": sizes,
        "test_questions": {skill: len(pairs) for skill, pairs in questions.items()},
        "exact_match": scores,
    }
    (output / "results.json").write_text(json.dumps(results, indent=1))
    draw(scores, output / "results.png")
    say(f"wrote {output / 'results.json'}")


if __name__ == "__main__":
    main()
