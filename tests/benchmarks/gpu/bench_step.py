"""Forward and backward of a 7B-shaped Mistral (random weights, 4 x 2048 tokens, bfloat16, activation checkpointing).

    python -m tests.benchmarks.gpu.bench_step [--save FOLDER] [--fsdp]

Ways as in bench_train: plain (transformers' own Trainer), lean (FusionTrainer), full (FusionTrainer over all logits),
dense (the released way, whose distributions are [B, T, V]), none (no head). Half the tokens are prompts. Peak: all that
is allocated, weights and gradients included. --fsdp: `accelerate launch` with this repository's fsdp.yaml and one
process over a 1B-shaped pivot, killed after a checkpoint, resumed, and compared with a run that nothing stopped.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks import bench_train
from tests.benchmarks.gpu import card

WAYS = ["none", "plain", "lean", "full", "dense"]


def steps(shape: dict) -> list[dict]:
    from fusechat_fuse.training.collator import FusionCollator

    device = card.device().type
    model = bench_train.build(shape, device)
    model.gradient_checkpointing_enable()
    rows = bench_train.rows_of(shape, shape["batch"])
    with tempfile.TemporaryDirectory() as folder:
        trainers = {way: bench_train.trainer_of(way, model, shape, device, folder) for way in WAYS}
    batch = trainers["plain"]._prepare_inputs(FusionCollator(preset="paper")(rows))
    count = (batch["labels"] != -100).sum()
    lines = []
    for way, trainer in trainers.items():
        trainer.current_gradient_accumulation_steps, losses = 1, []

        def step(way=way, trainer=trainer, losses=losses):
            losses.append(bench_train.one_step(way, trainer, model, rows, dict(batch), count, shape["vocab"]))

        held = _allocated()
        found = card.measure(step, turns=3, forget=model.zero_grad)
        if way in ("lean", "full"):
            losses.append(trainer.meters["train"].read(trainer.accelerator)["lm_loss"])
        model.zero_grad()
        tokens = shape["batch"] * shape["tokens"]
        rate = tokens / found["seconds"] if found["seconds"] else None
        peak = None if found["peak"] is None else found["peak"] + held
        lines.append({"way": way, **found, "peak": peak, "tokens_per_second": rate, "lm_loss": losses[-1]})
    of = {line["way"]: line for line in lines}
    off = abs(of["lean"]["lm_loss"] / of["plain"]["lm_loss"] - 1)
    if off > 2e-2:
        raise AssertionError(f"the language-model loss is {off:.1e} off plain's")
    return lines


def _allocated() -> int:
    import torch

    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def fsdp(shape: dict) -> dict:
    """Under FSDP: one run whole, one killed after a checkpoint and resumed; the largest difference of their weights."""
    import torch
    from safetensors.torch import load_file

    from tests.helpers.tiny_runs import aligned_directory, pivot_directory

    with tempfile.TemporaryDirectory() as folder:
        pivot_directory(Path(folder, "pivot"), **shape)
        aligned_directory(Path(folder, "aligned"), count=64)
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        if torch.cuda.is_available():
            command += ["--config_file", "examples/accelerate/fsdp.yaml", "--num_processes", "1"]
        command += ["-m", "fusechat_fuse", "train", "--model_name_or_path", f"{folder}/pivot"]
        command += ["--data_path", f"{folder}/aligned", "--total_batch_size", "4", "--max_steps", "12"]
        command += ["--save_strategy", "steps", "--save_steps", "4", "--logging_steps", "1"]
        started = time.perf_counter()
        _run([*command, "--output_dir", f"{folder}/whole"])
        seconds = time.perf_counter() - started
        _kill_after_checkpoint([*command, "--output_dir", f"{folder}/killed"], Path(folder, "killed"))
        _run([*command, "--output_dir", f"{folder}/killed"])
        whole, killed = (load_file(_weights(Path(folder, name))) for name in ("whole", "killed"))
        off = max(float((whole[key].float() - killed[key].float()).abs().max()) for key in whole)
    return {"fsdp": "12 steps, killed after 4 and resumed", "seconds": seconds, "largest_difference": off}


def _weights(folder: Path) -> Path:
    return next(path for path in sorted(folder.rglob("*.safetensors")) if "checkpoint" not in str(path))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout[-1000:] + done.stderr[-3000:])


def _kill_after_checkpoint(command: list[str], output: Path) -> None:
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and not list(output.rglob("checkpoint-4")):
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", metavar="FOLDER")
    parser.add_argument("--fsdp", action="store_true")
    options = parser.parse_args()
    on_gpu = card.device().type == "cuda"
    print(card.describe())
    lines = steps(bench_train.SHAPES["mistral-7b" if on_gpu else "smoke"])
    print("way    s/step  tokens/s  peak GiB")
    for line in lines:
        peak = card.cell(line["peak"] and line["peak"] / 2**30, "10.2f")
        seconds, rate = card.cell(line["seconds"], "7.3f"), card.cell(line["tokens_per_second"], "10.0f")
        print(f"{line['way']:6}{seconds}{rate}{peak}")
    if options.fsdp:
        large = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 12}
        lines.append(fsdp(large if on_gpu else {}))
        print(lines[-1])
    card.save("step", lines, options.save)


if __name__ == "__main__":
    main()
