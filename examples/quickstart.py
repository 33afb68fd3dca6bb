"""Fuse two tiny chat models into a third of another size, architecture and tokenizer, then merge: the whole method.

Everything is built on the spot, without a download (`toy_models.py`): chat data with six skills, three tokenizers, a
pivot and two sources. Each source was trained well on three of the skills; the pivot has seen all six, briefly. The
fusion data are few and partly wrong, as chat data are; what the sources know beyond them is in their distributions.
Then the public commands run, as they would for 7B models:

    represent x3  ->  align x2  ->  combine  ->  train (plain, targets, multi)  ->  mergekit-yaml (SCE)  ->  evaluation

Fusion is done twice, with the paper's settings and with ours, so that the table shows what the settings do. Then the
sources answer the prompts of the data themselves (assign, answer), and one more `multi` is trained on these answers.

    python examples/quickstart.py [--output DIR] [--seed N] [--fast]

The output directory keeps every stage, `results.json`, `results.png`, a page that shows an alignment (`inspect.html`),
and in `logs` every command as it would be typed, with what it prints. The commands run in this process, since starting
Python with torch takes longer than a stage here.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # of transformers: noise in logs
sys.path.insert(0, str(Path(__file__).resolve().parent))

from screen import Screen, print_into
from toy_models import (
    NUMBER_SKILLS,
    SKILLS,
    WORD_SKILLS,
    ModelSpec,
    byte_level_tokenizer,
    conversations,
    exact_match,
    pretrain,
    quiet,
    test_questions,
    unigram_tokenizer,
)
from transformers import LlamaConfig, MistralConfig, Phi3Config

from fusechat_fuse.flags import as_flags

MERGES = Path(__file__).resolve().parents[1] / "mergekit_configs"
WRONG_ANSWERS = 0.3  # share of the fusion data with the answer of another question
SLICES = {"slice_pattern": "^([a-z]+)-"}  # the skill, with which ids begin; without it slices are found
MODELS = ("pivot", "source-numbers", "source-words")
ANSWER = {"max_new_tokens": 32, "batch_size": 64}
REPRESENT = {"template": "native", "dtype": "float32"}


def teach(output: Path, seed: int, scale: float, pool: ProcessPoolExecutor, done: Callable) -> dict[str, int]:
    """Train the pivot and the two sources from scratch, with their tokenizers; return the parameters of each."""
    texts = [turn["value"] for row in conversations(SKILLS, 3000, seed) for turn in row["conversations"]]
    pivot = byte_level_tokenizer(texts, 420, "<|bos|>", "<|end_of_turn|>", "User:\n", "Assistant:\n")
    numbers = unigram_tokenizer(texts, 400, "<s>", "<|end|>", "<|user|>", "<|assistant|>")
    words = byte_level_tokenizer(texts, 600, "<|begin|>", "<|eot|>", "### Human\n", "### Bot\n")
    specs = {
        "source-numbers": ModelSpec(numbers, Phi3Config, 96, 2, NUMBER_SKILLS, round(2400 * scale)),
        "pivot": ModelSpec(pivot, LlamaConfig, 96, 2, SKILLS, round(450 * max(scale, 0.6))),
        "source-words": ModelSpec(words, MistralConfig, 80, 2, WORD_SKILLS, round(2000 * scale)),
    }
    trained = {name: pool.submit(pretrain, spec, output / "models" / name, seed) for name, spec in specs.items()}
    for future in trained.values():
        future.add_done_callback(done)
    return {name: future.result() for name, future in trained.items()}


def fuse(*arguments) -> None:
    """Run `fusechat-fuse ARGUMENTS` in this process."""
    from fusechat_fuse.cli import main

    arguments = [str(argument) for argument in arguments]
    print("$ fusechat-fuse " + shlex.join(arguments), flush=True)
    if code := main(arguments):
        sys.exit(code)


def fuse_in_pool(log: Path, *arguments) -> None:
    """The same in a process of the pool, with a log of its own."""
    print_into(log)
    fuse(*arguments)


def train_options(seed: int, epochs: float) -> dict:
    """Flags of every training here."""
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
    """The stages with our settings as a recipe, for `fusechat-fuse plan` and `run`, and one with answers by sources."""
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
    answers = {"output_dir": output / "run-answers", "answers": "sources", "answer": ANSWER}
    for name, entries in (("recipe.yml", recipe), ("recipe-answers.yml", {**recipe, **answers})):
        (output / name).write_text(json.dumps(entries, indent=1, default=str))  # JSON is YAML


def write_questions(output: Path, questions: dict[str, list[tuple[str, str]]]) -> None:
    """The held-out questions as chat data, for the recipe and for `lm_eval` with `examples/lm_eval/quickstart.yaml`."""
    rows = []
    for skill, pairs in questions.items():
        for question, answer in pairs:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            rows.append({"slice": skill, "question": question, "answer": answer, "messages": messages})
    (output / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Pipeline:
    """The stages by the public commands, below the output directory."""

    def __init__(self, output: Path, train: dict, pool: ProcessPoolExecutor, screen: Screen):
        self.output, self.train, self.pool, self.screen = output, train, pool, screen
        self.trainings: list = []

    def run(self) -> None:
        """Represent, compare, align, combine, train, merge; and the same on answers by the sources."""
        with self.screen.stage("represent, align, combine", 10) as done:
            self.represent_and_align([self.output / "conversations.json"], self.output, done, ("paper", "fusechat"))
            fuse("compare", *(self.output / "representations" / name for name in MODELS), *as_flags(SLICES))
            done()
            self.combine(self.output)
            done()
            page = self.output / "inspect.html"
            fuse("inspect", self.output / "aligned" / "fusechat-numbers", "--row", 0, "--html", page)
            done()
        self.start_trainings()
        answers = self.output / "answers"
        with self.screen.stage("answers by the sources, represented, aligned", 9) as done:
            self.represent_and_align(self.answer(answers, done), answers, done)
            self.combine(answers)
            done()
        self.start_training("multi-answers", answers / "aligned" / "multi", as_flags(SLICES))
        with self.screen.stage("train 7 models, since the stage before", len(self.trainings)) as done:
            for training in self.trainings:
                training.add_done_callback(done)
            for training in self.trainings:
                training.result()
        with self.screen.stage("merge (mergekit-yaml)", 2) as done:
            self.merge(done)

    def represent_and_align(self, data: list[Path], folder: Path, done: Callable, presets=("fusechat",)) -> None:
        """Represent data by pivot and sources, and align both sources, below a folder."""
        for name in MODELS:
            flags = ("--output_dir", folder / "representations" / name, *as_flags(REPRESENT))
            fuse("represent", "--model_name_or_path", self.output / "models" / name, "--data_path", *data, *flags)
            done()
        for preset in presets:
            for name in ("numbers", "words"):
                pair = ("--pivot_representation", folder / "representations" / "pivot")
                pair += ("--source_representation", folder / "representations" / f"source-{name}")
                fuse("align", *pair, "--output_dir", folder / "aligned" / f"{preset}-{name}", "--preset", preset)
                done()

    def combine(self, folder: Path) -> None:
        """Both aligned sources as one data set: the better of each slice."""
        both = [folder / "aligned" / f"fusechat-{name}" for name in ("numbers", "words")]
        fuse("combine", "--aligned", *both, "--output_dir", folder / "aligned" / "multi", *as_flags(SLICES))

    def answer(self, folder: Path, done: Callable) -> list[Path]:
        """Let the source that is selected for each slice answer its prompts; return the files of the answered data."""
        assigned, data = folder / "assigned", self.output / "conversations.json"
        representations = [self.output / "representations" / name for name in MODELS]
        fuse("assign", *representations, "--data_path", data, "--output_dir", assigned, *as_flags(SLICES))
        done()
        files = [assigned / "pivot.jsonl"]  # keeps the data's answers
        for name in MODELS[1:]:
            files.append(folder / f"{name}.jsonl")
            paths = ("--questions", assigned / f"{name}.jsonl", "--output", files[-1])
            paths += ("--pivot_name_or_path", self.output / "models" / "pivot", *as_flags(ANSWER))
            fuse("answer", "--benchmark", "data", "--model", self.output / "models" / name, *paths)
            done()
        return files

    def start_trainings(self) -> None:
        """All but the one on the sources' answers, two at a time."""
        runs = {
            "plain": ("fusechat-numbers", ("--lm_loss_weight", 1.0)),
            **{f"paper-{name}": (f"paper-{name}", ("--preset", "paper")) for name in ("numbers", "words")},
            **{f"target-{name}": (f"fusechat-{name}", as_flags(SLICES)) for name in ("numbers", "words")},
            "multi": ("multi", as_flags(SLICES)),
        }
        for name, (aligned, more) in runs.items():
            self.start_training(name, self.output / "aligned" / aligned, more)

    def start_training(self, name: str, aligned: Path, more) -> None:
        """Train the pivot into the model of this name, in the pool."""
        paths = ("--model_name_or_path", self.output / "models" / "pivot", "--data_path", aligned)
        arguments = ("train", *paths, "--output_dir", self.output / "models" / name, *more, *as_flags(self.train))
        self.trainings.append(self.pool.submit(fuse_in_pool, self.output / "logs" / f"train-{name}.log", *arguments))

    def merge(self, done: Callable) -> None:
        """The targets of both settings by mergekit-yaml."""
        merge = str(Path(sysconfig.get_path("scripts")) / "mergekit-yaml")
        for config, merged in (("quickstart-sce-paper.yml", "paper-merged"), ("quickstart-sce.yml", "merged")):
            command = [merge, str(MERGES / config), merged, "--no-write-model-card"]
            print("$ " + shlex.join(command), flush=True)
            subprocess.run(command, cwd=self.output / "models", check=True)
            done()


def draw(scores: dict[str, dict[str, float]], path: Path) -> None:
    """The table as a heat map: one row per model, one column per skill, darker is better."""
    try:
        import matplotlib
    except ImportError:
        print("no heat map: run pip install 'fusechat[plot]' for results.png")
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


def table(scores: dict[str, dict[str, float]]) -> str:
    """The table of exact matches, and what it says."""
    columns = [*SKILLS, "overall"]
    lines = ["", f"{'held-out exact match, %':24}" + "".join(f"{column:>11}" for column in columns)]
    lines += [
        f"{name:24}" + "".join(f"{100 * row[column]:11.1f}" for column in columns) for name, row in scores.items()
    ]
    lines += [
        "",
        "plain: fine-tuning on the data, three of ten answers wrong. target-*: taught by one source; merged: by SCE.",
    ]
    lines += [
        "multi: one training, each task taught by the source that is better at it. paper-merged: the paper's settings."
    ]
    lines += [
        "multi-answers: the same, after that source has answered the prompts of its tasks itself (answers: sources)."
    ]
    return "\n".join([*lines, ""])


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

    (output / "logs").mkdir()
    screen = Screen(output / "logs" / "commands.log")
    try:
        fuse_all(output, options.seed, options.fast, screen)
    except BaseException as error:
        screen.line(f"quickstart: {type(error).__name__}: {error}. What the commands printed is in {output / 'logs'}.")
        raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 1) from error


def fuse_all(output: Path, seed: int, fast: bool, screen: Screen) -> None:
    """All stages, the table, and the files of results."""
    rows = conversations(SKILLS, 400 if fast else 1000, seed + 10, wrong=WRONG_ANSWERS)
    (output / "conversations.json").write_text(json.dumps(rows, indent=1))
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=quiet) as pool:
        with screen.stage("teach the pivot and two sources", 3) as done:
            sizes = teach(output, seed, 0.3 if fast else 1.0, pool, done)
        train = train_options(seed, 6.0 if fast else 13.0)
        write_recipe(output, train)
        questions = test_questions(60 if fast else 100, seed + 11)
        write_questions(output, questions)
        Pipeline(output, train, pool, screen).run()
        names = ("pivot", "source-numbers", "source-words", "plain", "paper-merged")
        names += ("target-numbers", "target-words", "merged", "multi", "multi-answers")
        with screen.stage(f"ask {sum(map(len, questions.values()))} questions of every model", len(names)) as done:
            tested = {name: pool.submit(exact_match, output / "models" / name, questions) for name in names}
            for future in tested.values():
                future.add_done_callback(done)
            scores = {name: future.result() for name, future in tested.items()}
    screen.line(table(scores))
    results = {
        "seed": seed,
        "fast": fast,
        "seconds": round(time.monotonic() - screen.start, 1),
        "parameters": sizes,
        "test_questions": {skill: len(pairs) for skill, pairs in questions.items()},
        "exact_match": scores,
    }
    (output / "results.json").write_text(json.dumps(results, indent=1))
    draw(scores, output / "results.png")
    screen.line(f"{results['seconds']:.0f} s. The tokens of one conversation, side by side: {output / 'inspect.html'}")
    screen.line("The same as one recipe, with a report: fusechat-fuse run " + shlex.quote(str(output / "recipe.yml")))


if __name__ == "__main__":
    main()
