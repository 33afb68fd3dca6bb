"""The paper's experiment in miniature: does fusion help, which settings, and by how much, with intervals over seeds.

For every seed a pivot and three sources of other tokenizers, sizes and architectures are taught from scratch (six
skills that can be checked exactly, `toy_models.py`); 30 % of the fusion data's answers are wrong. Then every row of the
table is trained, merged and asked the same held-out questions: plain fine-tuning, distillation from one source, targets
and multi (one training on the best source of each slice) by the paper's settings and by ours, merges of the targets by
seven methods, the same on the answers of the selected sources (`answers: sources` of a recipe), and one change at a
time from our settings. All but the changes also where no answer is wrong. Rounds go on from `multi`: the student
answers the prompts of the slices that a source serves, at temperature 1, and learns the source's distributions at its
own samples (fusion loss alone); beside them stand as many epochs more on the data.

    python examples/paper_in_miniature.py [--output DIR] [--seeds 5] [--ablation_seeds 3] [--jobs 2] [--fast]

Every stage leaves a file: the same command continues a killed run. The results go to `--results`
(miniature.json, .md, .png): exact match in %, mean over seeds, and the paired difference to plain with its 95 %
interval (Student's t over seeds).
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from measurement import draw, facts, half_width, sentence, write
from quickstart import WRONG_ANSWERS
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
from transformers import LlamaConfig, MistralConfig, Phi3Config, StableLmConfig

SOURCES = {"numbers": NUMBER_SKILLS, "words": WORD_SKILLS, "mixed": ("larger", "capitals")}
BY_SKILL, BY_GROUP = r"^[a-z]+-([a-z]+)-", r"^([a-z]+)-"  # on ids such as words-last-17
OURS = {"preset": "fusechat", "slice_pattern": BY_SKILL}
PAPER = {"preset": "paper"}
PLAIN = {"lm_loss_weight": 1.0}
TARGETS = tuple(f"target-{name}" for name in SOURCES)
SELECT_TOPK = (0.1, 0.3, 1.0)

# name -> (aligned data, options of train); data: a source, or an entry of COMBINATIONS
MAIN = {
    "plain": ("numbers", PLAIN),
    **{f"distilled from {name}": (name, {**OURS, "fusion_function": "source"}) for name in SOURCES},
    **{f"paper target-{name}": (name, PAPER) for name in SOURCES},
    "paper multi": ("paper", PAPER),
    **{f"target-{name}": (name, OURS) for name in SOURCES},
    "multi": ("ours", OURS),
    "multi, min_ce_slice": ("ours", {**OURS, "fusion_function": "min_ce_slice"}),
}
CHANGES = {  # one change at a time from "multi"
    "choice min_ce": ("min_ce", {**OURS, "fusion_function": "min_ce"}),
    "choice min_ce_token": ("min_ce", {**OURS, "fusion_function": "min_ce_token"}),
    "choice avg_ce": ("avg_ce", {**OURS, "fusion_function": "avg_ce", "fusion_tail": "drop"}),
    "fallback pivot": ("ours", {**OURS, "fusion_fallback": "pivot"}),
    "unit token": ("token", {**OURS, "ce_unit": "token"}),
    "tail drop": ("ours", {**OURS, "fusion_tail": "drop"}),
    "tail label, label noise 0": ("ours", {**OURS, "label_noise": 0.0}),
    **{f"mapping {name}": (name, OURS) for name in ("exact", "min_edit", "statistics")},
    **{f"lambda {weight}": ("ours", {**OURS, "lm_loss_weight": weight}) for weight in (0.1, 0.7, 0.9)},
    "slices: two groups": ("two groups", OURS),
    "slices: automatic": ("automatic", OURS),
    "slices: none": ("none", OURS),
}
ON_ANSWERS = ("plain", *TARGETS, "multi")  # rows that are also trained on the sources' answers
NO_WRONG_ANSWERS = (*ON_ANSWERS, "paper multi")
ROUNDS, EPOCHS_OF_A_ROUND = 3, 4
STUDENT = {"lm_loss_weight": 0.0, "fusion_function": "source", "fusion_tail": "drop"}
COMBINATIONS = {  # options of combine; an entry with a mapping combines data aligned with that mapping
    "ours": {"slice_pattern": BY_SKILL},
    "paper": {"preset": "paper"},
    "min_ce": {"function": "min_ce"},
    "avg_ce": {"function": "avg_ce"},
    "token": {"ce_unit": "token", "slice_pattern": BY_SKILL},
    **{name: {"mapping": name, "slice_pattern": BY_SKILL} for name in ("exact", "min_edit", "statistics")},
    "two groups": {"slice_pattern": BY_GROUP},
    "automatic": {"slice_column": "auto"},
    "none": {"slice_column": "none"},
}
NATIVE = {"template": "native", "dtype": "float32"}
ANSWERING = {"benchmark": "data", "max_new_tokens": 24, "batch_size": 64}
NO_WRONG = ", no wrong answers"
ANSWERS = "answers"  # in names of aligned data: made of the sources' answers, with our pivot
METHODS = {  # merges of our targets, base the pivot
    "linear": ("linear", {"weight": 1.0}),
    "task arithmetic": ("task_arithmetic", {"weight": 0.5}),
    "ties": ("ties", {"weight": 1.0, "density": 0.5}),
    "dare": ("dare_ties", {"weight": 1.0, "density": 0.5}),
    "varm, matrix": ("varm", {"granularity": "matrix"}),
    "varm, element": ("varm", {"granularity": "element"}),
    "sce, mergekit's own": ("sce", {"select_topk": 1.0}),
    **{f"sce {share}": ("sce", {"select_topk": share}) for share in SELECT_TOPK},
}

PAIRS = (  # rows whose difference is told, too
    *(("sce 1.0", name) for name in ("linear", "paper sce", "sce, mergekit's own", "varm, element", "varm, matrix")),
    ("sce 1.0", "the best target"),
    ("multi", "paper multi"),
    ("plain, sources' answers", "multi"),
    ("multi, sources' answers", "plain, sources' answers"),
    ("sce, sources' answers", "sce 1.0"),
    ("sce, sources' answers", "sce"),
    ("multi, sources' answers", "sce, sources' answers"),
    (f"multi, round {ROUNDS}", f"multi, {ROUNDS * EPOCHS_OF_A_ROUND} epochs more"),
)


class Work:
    """The directory of one seed: models, representations, aligned data and results, each made once."""

    def __init__(self, root: Path, seed: int, fast: bool, part: str = "all"):
        self.seed, self.fast, self.part, self.path = seed, fast, part, root / f"seed-{seed}"
        self.models = self.path / "models"
        self.count = 200 if fast else 1000
        self.epochs = 2 if fast else 13
        self.questions = test_questions(10 if fast else 100, seed + 11)

    def teach(self, name: str) -> None:
        """Train one model and its tokenizer from scratch."""
        texts = [turn["value"] for row in conversations(SKILLS, 3000, self.seed) for turn in row["conversations"]]
        byte_level, unigram = byte_level_tokenizer, unigram_tokenizer
        make, size, marks, config, hidden, layers, skills, steps = {
            "pivot": (
                *(byte_level, 420, ("<|bos|>", "<|end_of_turn|>", "User:\n", "Assistant:\n")),
                *(LlamaConfig, 96, 2, SKILLS, 450),
            ),
            "source-numbers": (
                *(unigram, 400, ("<s>", "<|end|>", "<|user|>", "<|assistant|>")),
                *(Phi3Config, 96, 2, NUMBER_SKILLS, 2400),
            ),
            "source-words": (
                *(byte_level, 600, ("<|begin|>", "<|eot|>", "### Human\n", "### Bot\n")),
                *(MistralConfig, 80, 2, WORD_SKILLS, 2000),
            ),
            "source-mixed": (
                *(unigram, 500, ("<s>", "</s>", "[Q]", "[A]")),
                *(StableLmConfig, 64, 3, SOURCES["mixed"], 2000),
            ),
        }[name]
        steps = round(steps * (0.05 if self.fast else 1))
        pretrain(
            ModelSpec(make(texts, size, *marks), config, hidden, layers, skills, steps), self.models / name, self.seed
        )
        self.ask(name)

    def data(self, wrong: float) -> Path:
        return self.path / f"conversations-{wrong}.json"

    def prepare(self, wrong: float, pivot: str = "pivot") -> None:
        """All representations and aligned data of one data set, which the trainings then only read."""
        if pivot == "pivot":
            rows = conversations(SKILLS, self.count, self.seed + 10, wrong=wrong)
            for row in rows:  # ids by which slices can be named: group-skill-number
                row["id"] = f"{'numbers' if row['id'].split('-')[0] in NUMBER_SKILLS else 'words'}-{row['id']}"
            self.data(wrong).write_text(json.dumps(rows))
        whole = wrong == WRONG_ANSWERS and pivot == "pivot" and self.part == "all"
        mappings = ("prefix", "statistics", "exact", "min_edit")[: 4 if whole else 2]
        represented = self.represent([self.data(wrong)], pivot, wrong)
        self.align(represented, wrong, pivot, mappings, tuple(COMBINATIONS) if whole else ("ours", "paper"))

    def represent(self, files: list[Path], pivot: str, name) -> dict[str, Path]:
        """Data represented by a pivot and all sources: model -> directory."""
        from fusechat_fuse import represent

        found = {}
        for model in (pivot, *(f"source-{source}" for source in SOURCES)):
            found[model] = self.path / "representations" / f"{model}-{name}"
            represent(self.models / model, [str(file) for file in files], found[model], **NATIVE)
        return found

    def align(self, represented: dict[str, Path], wrong: float, pivot: str, mappings=("prefix",), combined=("ours",)):
        """Every source aligned to the pivot by every mapping, and combined."""
        from fusechat_fuse import align, combine

        pivots, *sources = represented.values()
        for mapping in mappings:
            for source, directory in zip(SOURCES, sources, strict=True):
                output = self.aligned(source, wrong, pivot, mapping)
                align(pivots, directory, output, mapping=mapping, cache_dir=self.path / "maps")
        for name in combined:
            options = dict(COMBINATIONS[name])
            mapping = options.pop("mapping", "statistics" if options.get("preset") == "paper" else "prefix")
            parts = [self.aligned(source, wrong, pivot, mapping) for source in SOURCES]
            combine(parts, self.aligned(name, wrong, pivot), **options)

    def assigned(self, wrong: float) -> dict[str, Path]:
        """The conversations of each model, as the slices' rule selects it, the pivot's first: model -> file."""
        from fusechat_fuse.evaluation.assignment import assign

        models = ("pivot", *(f"source-{source}" for source in SOURCES))
        directories = [self.path / "representations" / f"{model}-{wrong}" for model in models]
        output = self.path / "assigned" / str(wrong)
        assign(directories, [str(self.data(wrong))], output, slice_pattern=BY_SKILL)
        return {model: output / f"{model}-{wrong}.jsonl" for model in models}

    def answer(self, wrong: float) -> None:
        """Data with the answers of the source that serves each slice, represented and aligned."""
        from fusechat_fuse import answer

        own, *others = self.assigned(wrong).items()
        files = [own[1]]
        for model, questions in others:
            files.append(self.path / "answers" / f"{model}-{wrong}.jsonl")
            files[-1].parent.mkdir(exist_ok=True)
            answer(self.models / model, questions, files[-1], pivot=self.models / "pivot", dtype="float32", **ANSWERING)
        self.align(self.represent(files, "pivot", f"{ANSWERS}-{wrong}"), wrong, ANSWERS)

    def rounds(self, wrong: float) -> None:
        """From `multi`: the student's samples at temperature 1, scored by the sources, teach it, fusion loss alone."""
        from fusechat_fuse import align, combine, represent

        after = "" if wrong else NO_WRONG
        student, served = f"multi{after}", dict(list(self.assigned(wrong).items())[1:])
        for number in range(1, ROUNDS + 1):
            name = f"multi, round {number}{after}"
            home = self.path / "rounds" / name
            home.mkdir(parents=True, exist_ok=True)
            files = {
                model: self.sample(student, file, home / f"{model}.jsonl", number) for model, file in served.items()
            }
            files = {model: str(file) for model, file in files.items() if file.stat().st_size}
            if files:
                represent(self.models / student, list(files.values()), home / "student", **NATIVE)
            parts = []
            for model, file in files.items():
                represent(self.models / model, [file], home / f"represented-{model}", **NATIVE)
                parts.append(home / f"aligned-{model}")
                align(home / "student", home / f"represented-{model}", parts[-1], cache_dir=self.path / "maps")
            if len(parts) > 1:
                combine(parts, home / "data", function="min_ce")  # each conversation is in one part
                parts = [home / "data"]
            if parts:
                self.fine_tune(name, parts[0], STUDENT, student, EPOCHS_OF_A_ROUND)
            else:  # nothing was answered
                shutil.copytree(self.models / student, self.models / name, dirs_exist_ok=True)
                self.ask(name)
            student = name

    def sample(self, student: str, questions: Path, output: Path, seed: int) -> Path:
        """The student's own answers to questions, those that it ended, as chat data."""
        from fusechat_fuse import answer

        sampling = {"temperature": 1.0, "seed": self.seed + seed, "dtype": "float32", **ANSWERING}
        answer(self.models / student, questions, output, **sampling)
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        own = output.with_suffix(".own.jsonl")
        own.write_text("\n".join(json.dumps(row) for row in rows if row["answered_by"] != "data"))
        return own

    def aligned(self, data: str, wrong: float, pivot: str, mapping: str = "prefix") -> Path:
        """The path of aligned data: one source with a mapping, or a combination of all sources."""
        return self.path / "aligned" / "-".join([pivot, data, *([mapping] if data in SOURCES else []), str(wrong)])

    def train(self, name: str, data: str, options: dict, wrong: float, pivot: str = "pivot") -> None:
        """One row of the table: fine-tune the pivot, test the result; pivot: ANSWERS, or a model."""
        mapping = "statistics" if options.get("preset") == "paper" else "prefix"
        start = "pivot" if pivot == ANSWERS else pivot
        self.fine_tune(name, self.aligned(data, wrong, pivot, mapping), options, start, self.epochs)

    def go_on(self, name: str, wrong: float, start: str) -> None:
        """`multi` trained on the same data for as many epochs as the rounds have."""
        self.fine_tune(name, self.aligned("ours", wrong, "pivot"), OURS, start, ROUNDS * EPOCHS_OF_A_ROUND)

    def fine_tune(self, name: str, data: Path, options: dict, start: str, epochs: int) -> None:
        from fusechat_fuse import FusionConfig
        from fusechat_fuse.training.run import train

        config = FusionConfig(
            output_dir=str(self.models / name),
            num_train_epochs=epochs,
            per_device_train_batch_size=16,
            total_batch_size=16,
            learning_rate=1e-3,
            seed=self.seed,
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            **options,
        )
        train(self.models / start, data, config)
        self.ask(name)

    def merge(self, name: str, method: str, targets: tuple[str, ...], parameters: dict, base: str = "pivot") -> None:
        """Merge targets by plain mergekit-yaml (mergekit's own sce: without our hook), and test the result."""
        config = {"merge_method": method, "dtype": "float32", "parameters": parameters}
        config["models"] = [{"model": str(self.models / target)} for target in targets]
        if method != "linear":
            config["base_model"] = str(self.models / base)
        file = self.models / f"{name}.yml"
        file.write_text(json.dumps(config))  # JSON is YAML
        shutil.rmtree(self.models / name, ignore_errors=True)
        hook = {"FUSECHAT_MERGE_AUTOLOAD": "0"} if "own" in name else {}
        command = [str(Path(sys.executable).parent / "mergekit-yaml"), str(file), str(self.models / name)]
        done = subprocess.run(command, env={**os.environ, **hook}, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
        self.ask(name)

    def ask(self, name: str) -> None:
        """Exact match of one model on the held-out questions, into results/NAME.json."""
        scores = exact_match(self.models / name, self.questions)
        file = self.path / "results" / f"{name}.json"
        file.parent.mkdir(exist_ok=True)
        file.with_suffix(".tmp").write_text(json.dumps(scores))
        file.with_suffix(".tmp").rename(file)


def no_wrong(name: str) -> str:
    return f"{name}{NO_WRONG}"


def phases(work: Work, ablations: bool) -> list[list[tuple[str, str, tuple]]]:
    """The tasks of a seed in phases, as (result, method of Work, arguments); tasks of one phase are independent."""
    wrong, second_round = WRONG_ANSWERS, [f"second round {target}" for target in TARGETS]
    rows = {"all": MAIN | (CHANGES if ablations else {}), "answers": {name: MAIN[name] for name in ON_ANSWERS}}[
        work.part
    ]
    trainings = [(name, "train", (name, data, options, wrong)) for name, (data, options) in rows.items()]
    shares = (wrong,) if work.fast else (wrong, 0.0)
    clean = NO_WRONG_ANSWERS if work.part == "all" else ON_ANSWERS
    for name in clean if 0.0 in shares else ():
        trainings.append((no_wrong(name), "train", (no_wrong(name), *MAIN[name], 0.0)))
    answers, more = [], []
    for share in shares:
        named = str if share else no_wrong
        for name in ON_ANSWERS:
            result = named(f"{name}, sources' answers")
            answers.append((result, "train", (result, *MAIN[name], share, ANSWERS)))
        result = named(f"multi, {ROUNDS * EPOCHS_OF_A_ROUND} epochs more")
        more.append((result, "go_on", (result, share, named("multi"))))
        more.append((named(f"multi, round {ROUNDS}"), "rounds", (share,)))
    few = work.fast or work.part == "answers"
    methods = {name: METHODS[name] for name in ("linear", "sce 1.0")} if few else METHODS
    merges = [(name, "merge", (name, method, TARGETS, parameters)) for name, (method, parameters) in methods.items()]
    others = {"sce, sources' answers": [f"{target}, sources' answers" for target in TARGETS]}
    if 0.0 in shares:
        others |= {no_wrong(name): [no_wrong(target) for target in targets] for name, targets in others.items()}
        others[no_wrong("sce")] = [no_wrong(target) for target in TARGETS]
    if work.part == "all":
        others["paper sce"] = [f"paper {target}" for target in TARGETS]
    merges += [(name, "merge", (name, "sce", tuple(several), {"select_topk": 1.0})) for name, several in others.items()]
    second = [
        (name, "train", (name, source, OURS, wrong, "sce 1.0"))
        for name, source in zip(second_round, SOURCES, strict=True)
    ]
    last = (
        "second round sce",
        "merge",
        ("second round sce", "sce", tuple(second_round), {"select_topk": 1.0}, "sce 1.0"),
    )
    models = [(name, "teach", (name,)) for name in ("pivot", *(f"source-{source}" for source in SOURCES))]
    prepared = [[("", "prepare", (share,)) for share in shares], [("", "answer", (share,)) for share in shares]]
    once = [models, *prepared, trainings + answers, merges + more]
    return once + ([[("", "prepare", (wrong, "sce 1.0"))], second, [last]] if ablations else [])


def perform(work: Work, method: str, arguments: tuple) -> None:
    """Carry out one task, in a process of the pool."""
    torch.set_num_threads(1)
    for name in ("transformers", "fusechat_fuse", "accelerate", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    getattr(work, method)(*arguments)


def run(works: list[Work], ablations: int, jobs: int) -> None:
    """Carry out all tasks of all seeds, those of one phase side by side; a task with a result is not repeated."""
    start = time.monotonic()
    plans = [phases(work, work.seed < ablations) for work in works]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for number in range(max(map(len, plans))):
            tasks = {}
            for work, plan in zip(works, plans, strict=True):
                work.models.mkdir(parents=True, exist_ok=True)
                for result, method, arguments in plan[number] if number < len(plan) else ():
                    if not (result and (work.path / "results" / f"{result}.json").exists()):
                        future = pool.submit(perform, work, method, arguments)
                        tasks[future] = f"seed {work.seed}: {method} {result}"
            for done, future in enumerate(as_completed(tasks), 1):
                future.result()
                seconds = time.monotonic() - start
                print(f"[{seconds:5.0f} s] phase {number + 1}, {done} of {len(tasks)}: {tasks[future]}", flush=True)


def rows_of(task: tuple[str, str, tuple]) -> list[str]:
    """The rows of the table that a task writes: a round has a row of its own."""
    result, method, _ = task
    if method != "rounds":
        return [result] if result else []
    return [result.replace(f"round {ROUNDS}", f"round {number}") for number in range(1, ROUNDS + 1)]


def collect(works: list[Work], ablations: int) -> dict[str, list[dict]]:
    """row -> its scores, one entry per seed, in the order of the table."""
    found: dict[str, list[dict]] = {}
    for work in works:
        for phase in phases(work, work.seed < ablations):
            for name in itertools.chain.from_iterable(map(rows_of, phase)):
                scores = json.loads((work.path / "results" / f"{name}.json").read_text())
                found.setdefault(name, []).append(scores)
    return found


def rounded(value: float) -> float | None:
    """A figure for JSON: two digits, None if one seed is not enough for it."""
    return None if np.isnan(value) else round(float(value), 2)


def with_interval(mean: float, half: float | None, sign: str = "") -> str:
    return f"{mean:{sign}.1f}" + ("" if half is None else f" ± {half:.1f}")


def summary(scores: dict[str, list[dict]]) -> dict[str, dict]:
    """row -> mean, and paired differences to `plain` and `multi` on data of the same share of wrong answers, with their
    intervals (in points); "pairs" holds the differences of PAIRS."""
    overall = {name: np.array([100 * seed["overall"] for seed in several]) for name, several in scores.items()}
    found = {}
    for name, values in overall.items():
        of_data = no_wrong if NO_WRONG in name else str
        found[name] = {"seeds": values.round(2).tolist(), "mean": rounded(values.mean())}
        found[name]["interval"] = rounded(half_width(values))
        for base in ("plain", "multi"):
            difference = values - overall[of_data(base)][: len(values)]
            found[name] |= {f"to_{base}": rounded(difference.mean())}
            found[name] |= {f"to_{base}_interval": rounded(half_width(difference))}
    overall["the best target"] = np.max([overall[target] for target in TARGETS], axis=0)
    pairs = [*PAIRS, *((no_wrong(row), no_wrong(other)) for row, other in PAIRS)]
    compared = {
        f"{row} less {other}": overall[row] - overall[other]
        for row, other in pairs
        if row in overall and other in overall
    }
    found["pairs"] = {
        name: {"mean": rounded(d.mean()), "interval": rounded(half_width(d))} for name, d in compared.items()
    }
    return found


def markdown(found: dict[str, dict], about: dict) -> str:
    """The tables in Markdown."""
    lines = [
        "# The paper in miniature",
        "",
        f"Held-out exact match in %, mean of {about['seeds']} seeds ± 95 % interval, and paired differences to plain",
        "and to multi on the same data; where another number of seeds is in brackets, of those.",
        "",
        sentence(about),
        "",
        "| row | exact match | less plain | less multi |",
        "|---|---|---|---|",
    ]
    for name, row in found.items():
        if name != "pairs":
            differences = [
                ""
                if name in (base, no_wrong(base))
                else with_interval(row[f"to_{base}"], row[f"to_{base}_interval"], "+")
                for base in ("plain", "multi")
            ]
            of = len(row["seeds"])
            name += "" if of == about["seeds"] else f" ({of})"
            lines.append(f"| {name} | {with_interval(row['mean'], row['interval'])} | {' | '.join(differences)} |")
    lines += ["", "| pair | difference |", "|---|---|"]
    lines += [f"| {name} | {with_interval(d['mean'], d['interval'], '+')} |" for name, d in found["pairs"].items()]
    return "\n".join([*lines, ""])


def main() -> None:
    """Run the missing tasks, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("miniature-output"), help="new, or of an interrupted run")
    parser.add_argument("--results", type=Path, help="where the tables go (default: the output directory)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--ablation_seeds", type=int, default=3, help="seeds that also run the changes of one option")
    parser.add_argument("--part", choices=("all", "answers"), default="all", help="answers: their rows and ours alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--fast", action="store_true", help="test the script, with models that know nothing")
    options = parser.parse_args()
    root = options.output.resolve()
    root.mkdir(parents=True, exist_ok=True)
    quiet()
    works = [Work(root, seed, options.fast, options.part) for seed in range(options.seeds)]
    run(works, options.ablation_seeds, options.jobs)
    scores = collect(works, options.ablation_seeds)
    found = summary(scores)
    command = f"paper_in_miniature.py --seeds {options.seeds} --ablation_seeds {options.ablation_seeds}"
    command += "" if options.part == "all" else f" --part {options.part}"
    command += " --fast" if options.fast else ""
    about = {**facts(command, root, ("torch", "transformers", "mergekit")), "seeds": options.seeds}
    results = options.results or root
    name = "miniature" if options.part == "all" else f"miniature_{options.part}"
    write(results, name, {**about, "summary": found, "scores": scores}, markdown(found, about))
    differences = [
        (name, row["to_plain"], row["to_plain_interval"] or 0)
        for name, row in found.items()
        if name not in ("pairs", "plain", no_wrong("plain"))
    ]
    label = "exact match less plain fine-tuning, points (95 % interval over seeds)"
    draw(differences, label, results / f"{name}.png")


if __name__ == "__main__":
    main()
