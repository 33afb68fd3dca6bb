"""Step time and memory of fusion beside plain fine-tuning, the input pipeline, and the dense way of the released code.

    python -m tests.benchmarks.bench_train                 # CPU: about 100M parameters, 32k and 152k vocabulary
    python -m tests.benchmarks.bench_train --device cuda   # 7B-shaped random Mistral, 4 x 2048, bf16, checkpointing

Plain fine-tuning is transformers' own Trainer on the same model and the same batches. For times the ways take turns in
one process (medians); for peaks each has a process of its own. Prints tables, then one JSON line.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

SHAPES = {
    "cpu-32k": {"vocab": 32_000, "hidden": 768, "inner": 2048, "layers": 8, "tied": False, "batch": 2, "tokens": 256},
    "cpu-152k": {"vocab": 151_936, "hidden": 512, "inner": 1536, "layers": 6, "tied": True, "batch": 2, "tokens": 256},
    "mistral-7b": {
        "vocab": 32_002,
        "hidden": 4096,
        "inner": 14_336,
        "layers": 32,
        "tied": False,
        "batch": 4,
        "tokens": 2048,
    },
    "smoke": {"vocab": 500, "hidden": 32, "inner": 64, "layers": 1, "tied": False, "batch": 2, "tokens": 64},
}


def build(shape: dict, device: str):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["inner"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=max(shape["hidden"] // 128, 1),
        num_key_value_heads=max(shape["hidden"] // 512, 1),
        tie_word_embeddings=shape["tied"],
        max_position_embeddings=4096,
        sliding_window=None,
        pad_token_id=0,
    )
    with torch.device(device):
        model = MistralForCausalLM(config)
    return model.to(torch.bfloat16) if device == "cuda" else model


def rows_of(shape: dict, count: int) -> list[dict]:
    """Conversations of the full length, the second half of each predicted."""
    from tests.helpers.fusion_rows import aligned_row

    T, rows = shape["tokens"], []
    for n in range(count):
        row = aligned_row(n, vocab_size=shape["vocab"], tokens=T, predicted=T // 2, k=10, source_k=11)
        row["predicted"] = np.arange(T // 2, T, dtype=np.int32)
        rows.append(row)
    return rows


def peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def trainer_of(way: str, model, shape: dict, device: str, folder: str):
    """The trainer of a way: transformers' own, or ours through the lean head or full logits."""
    from transformers import Trainer, TrainingArguments

    from fusechat_fuse.training.config import FusionConfig
    from fusechat_fuse.training.trainer import FusionTrainer

    options = {"use_cpu": device == "cpu", "disable_tqdm": True, "save_strategy": "no", "bf16": device == "cuda"}
    if way in ("lean", "full"):
        return FusionTrainer(model, FusionConfig(folder, lean_head=way == "lean", total_batch_size=1, **options))
    return Trainer(model, TrainingArguments(folder, remove_unused_columns=False, **options))


def measure_steps(ways: list[str], shape: dict, device: str, steps: int) -> dict:
    """Times of forward and backward of each way, taking turns in one process; peak memory of the process; losses.

    Ways: plain (Trainer, full logits), lean (FusionTrainer), full (FusionTrainer, full logits), dense (full logits and
    the released way of building distributions), none (decoder only).
    """
    from fusechat_fuse.training.collator import FusionCollator

    model = build(shape, device)
    if device == "cuda":
        model.gradient_checkpointing_enable()
    rows = rows_of(shape, shape["batch"])
    with tempfile.TemporaryDirectory() as folder:
        trainers = {way: trainer_of(way, model, shape, device, folder) for way in ways}
    batch = next(iter(trainers.values()))._prepare_inputs(FusionCollator(preset="paper")(rows))
    count = (batch["labels"] != -100).sum()
    found = {way: {"seconds": [], "lm_loss": None} for way in ways}
    for _ in range(steps):
        for way, trainer in trainers.items():
            trainer.current_gradient_accumulation_steps = 1
            model.zero_grad()
            started = time.perf_counter()
            loss = one_step(way, trainer, model, rows, dict(batch), count, shape["vocab"])
            if device == "cuda":
                torch.cuda.synchronize()
            found[way]["seconds"].append(time.perf_counter() - started)
            if way in ("lean", "full"):
                loss = trainer.meters["train"].read(trainer.accelerator)["lm_loss"]
            found[way]["lm_loss"] = loss
    for one in found.values():
        one["seconds"] = statistics.median(one["seconds"][1:] or one["seconds"])
    return {**found, "peak": peak_bytes(device)}


def one_step(way: str, trainer, model, rows, batch: dict, count, V: int) -> float:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if way == "none":
        hidden = model.model(**inputs, use_cache=False).last_hidden_state
        hidden.float().square().mean().backward()
        return 0.0
    if way == "dense":
        dense, rewards = dense_distributions(rows, V)
        dense, rewards = [one.to(count.device) for one in dense], rewards.to(count.device)
        loss = dense_loss(model(**inputs, use_cache=False).logits, batch["shift_labels"], dense, rewards)
        loss.backward()
        return loss.item()
    if way == "plain":
        batch = {**inputs, "labels": batch["labels"]}
    return trainer.training_step(model, batch, num_items_in_batch=count).item()


def measure_input(shape: dict) -> dict:
    """Reading and collating from disk by the default choice, source and pivot mixed in every conversation, one core:
    predicted tokens a second and seconds a batch."""
    from fusechat_fuse.store.shard_writer import ShardWriter
    from fusechat_fuse.store.shards import load_representation
    from fusechat_fuse.training.collator import FusionCollator

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        writer = ShardWriter(Path(folder) / "data", {}, kind="aligned")
        rows = rows_of(shape, 32)
        writer.write(0, rows)
        writer.finish(1, {"tokenizer": {"sha256": "0"}})
        data, size = load_representation(Path(folder) / "data"), shape["batch"]
        defaults = {"fusion_function": "avg_ce_slice", "fusion_fallback": "label", "fusion_tail": "label"}
        collate = FusionCollator(**defaults, ce_unit="byte", label_noise=0.05, slice_choice=lambda row: 0.9)
        collate([data[i] for i in range(size)])
        times = []
        for start in range(0, len(rows) - size + 1, size):
            started = time.perf_counter()
            collate([data[i] for i in range(start, start + size)])
            times.append(time.perf_counter() - started)
    seconds = statistics.median(times)
    return {"seconds": seconds, "tokens_per_second": size * (shape["tokens"] // 2) / seconds}


def dense_distributions(rows: list[dict], V: int) -> tuple:
    """Distributions the dense way: [B, T, V] in bfloat16 for both models, filled position by position."""
    T = max(len(row["input_ids"]) for row in rows)
    dense = [torch.zeros(len(rows), T, V, dtype=torch.bfloat16) for _ in range(2)]
    for b, row in enumerate(rows):
        probs = torch.softmax(torch.from_numpy(row["topk_logprobs"].astype(np.float32)), -1)
        for p, t in enumerate(row["predicted"]):
            dense[0][b, t - 1, torch.from_numpy(row["topk_ids"][p]).long()] = probs[p].bfloat16()
            kept = row["source_ids"][p] >= 0
            ids = torch.from_numpy(row["source_ids"][p][kept]).long()
            dense[1][b, t - 1, ids] = torch.from_numpy(row["source_probs"][p][kept]).bfloat16()
    rewards = torch.tensor([[1 / np.exp(row["ce"].mean()), 1 / np.exp(row["source_ce"])] for row in rows])
    return dense, rewards


def dense_loss(logits, labels, dense, rewards, weight: float = 0.9):
    """The loss the dense way: both stacked, an argmax of rewards at every entry, softmax over everything."""
    B, T, V = logits.shape
    stacked = torch.stack(dense, -1)  # [B, T, V, 2]
    best = rewards.bfloat16()[:, None, None].expand(B, T, V, 2).contiguous().argmax(-1, keepdim=True)
    q = stacked.gather(-1, best)[..., 0]
    losses = -(q.float() * torch.log_softmax(logits.float(), -1)).sum(-1)
    mask = labels != -100
    lm = torch.nn.functional.cross_entropy(logits.float().view(-1, V), labels.reshape(-1), ignore_index=-100)
    return weight * lm + (1 - weight) * (losses * mask).sum() / mask.sum()


def measure_loss(way: str, batch: int, tokens: int, V: int) -> dict:
    """Collator and loss (forward and backward from logits on) the sparse or the dense way."""
    from fusechat_fuse.training.collator import FusionCollator
    from fusechat_fuse.training.loss import fusion_loss

    rows = rows_of({"vocab": V, "tokens": tokens}, batch)
    collated = FusionCollator(preset="paper")(rows)
    logits = torch.randn(batch, tokens, V, generator=torch.Generator().manual_seed(0)).requires_grad_()
    before, started = peak_bytes("cpu"), time.perf_counter()
    if way == "sparse":
        again = FusionCollator(preset="paper")(rows)
        middle = time.perf_counter()
        loss = fusion_loss(logits, *(again[name] for name in ("shift_labels", "target_ids", "target_probs"))).loss
    else:
        dense, rewards = dense_distributions(rows, V)
        middle = time.perf_counter()
        loss = dense_loss(logits, collated["shift_labels"], dense, rewards)
    loss.backward()
    ended = time.perf_counter()
    extra = peak_bytes("cpu") - before
    return {"collate": middle - started, "loss": ended - middle, "extra": extra, "value": loss.item()}


def alone(function: str, *arguments) -> dict:
    """Run one measurement in a fresh process."""
    call = f"b.{function}(*{arguments!r})"
    code = f"import json; from tests.benchmarks import bench_train as b; print('@' + json.dumps({call}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("@"))[1:])


def step_table(name: str, device: str, steps: int) -> dict:
    shape = SHAPES[name]
    more = ["dense"] if device == "cuda" or name == "smoke" else []  # needs 8 GiB beside a CPU model of 100M
    ways = ["none", "plain", "lean", "full", *more]
    found = alone("measure_steps", ways, shape, device, steps)
    losses = [found[way]["lm_loss"] for way in ("plain", "lean", "full")]
    if max(losses) - min(losses) > (2e-2 if device == "cuda" else 1e-4) * losses[0]:
        raise AssertionError(f"the language-model losses disagree: {losses}")
    # on a CPU one layer and more tokens: the head's memory does not depend on depth, and a step takes seconds
    shallow = shape if device == "cuda" else {**shape, "layers": 1, "tokens": 4 * shape["tokens"]}
    peaks = {way: alone("measure_steps", [way], shallow, device, 1)["peak"] for way in ways}
    of_plain = peaks["plain"] - peaks["none"]
    print(f"\n{name}: {shape['batch']} x {shape['tokens']} tokens, half of them prompts, {device}")
    print(f"memory: {shallow['layers']} layers, {shallow['batch']} x {shallow['tokens']} tokens, one step")
    print("way      s/step  of plain   peak MiB  above no head  of plain")
    for way in ways:
        one = found[way]
        one |= {"time_ratio": one["seconds"] / found["plain"]["seconds"], "peak": peaks[way]}
        one |= {"head": one["peak"] - peaks["none"], "head_ratio": (one["peak"] - peaks["none"]) / of_plain}
        print(
            f"{way:7}{one['seconds']:8.2f}{one['time_ratio']:10.2f}{one['peak'] / 2**20:11.0f}"
            f"{one['head'] / 2**20:15.0f}{one['head_ratio']:10.2f}",
            flush=True,
        )
    return found


def loss_table() -> dict:
    found = {}
    print("\nCollator and loss from logits on, float32, 32002 entries, CPU")
    print("way     batch       collate s   loss s   extra MiB")
    for way, batch, tokens in (("dense", 1, 512), ("sparse", 1, 512), ("dense", 4, 2048), ("sparse", 4, 2048)):
        one = found[f"{way} {batch} x {tokens}"] = alone("measure_loss", way, batch, tokens, 32_002)
        print(f"{way:8}{batch} x {tokens:<8}{one['collate']:9.3f}{one['loss']:10.2f}{one['extra'] / 2**20:10.0f}")
    for size in ("1 x 512", "4 x 2048"):
        a, b = found[f"dense {size}"]["value"], found[f"sparse {size}"]["value"]
        if abs(a - b) > 5e-3 * a:  # the dense distributions are rounded to bfloat16
            raise AssertionError(f"dense and sparse disagree: {a} and {b}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shapes", nargs="*", default=None, choices=list(SHAPES))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--steps_only", action="store_true")
    options = parser.parse_args()
    shapes = options.shapes or (["mistral-7b"] if options.device == "cuda" else ["cpu-32k", "cpu-152k"])
    result = {"device": options.device, "torch": torch.__version__, "threads": torch.get_num_threads()}
    for name in shapes:
        result[name] = step_table(name, options.device, options.steps)
        reading = result[f"{name} input"] = alone("measure_input", SHAPES[name])
        reading["of_step"] = reading["seconds"] / result[name]["lean"]["seconds"]
        print(
            f"read + collate, one core: {reading['tokens_per_second']:,.0f} predicted tokens/s, "
            f"{100 * reading['of_step']:.2f} % of a step"
        )
    if not options.steps_only:
        result["collate and loss"] = loss_table()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
