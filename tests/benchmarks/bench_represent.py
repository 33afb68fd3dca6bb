"""What a representation costs: against the bare forward pass, against the released procedure, on disk, and under kills.

    python -m tests.benchmarks.bench_represent [--vocab 32k 152k] [--conversations 16] [--repeats 3] [--threads 2]

1. `represent` (tokenizing, templates, hashing, writing included) over the bare forward passes of the same model on the
   same length-sorted batches, padded to their longest and without an attention mask, tokens ready: time and peak
   memory, each in a process of its own, alternating. About 100M parameters besides the head, prompts half the tokens.
2. The released procedure re-enacted on the same model and conversations: every row padded to 2048, all logits as
   float16 to the CPU, top-k of every position, Python lists into Arrow.
3. Bytes per predicted token and reading speed of both encodings, on the representation of part 1 (random weights: ids
   are as incompressible as they can be), about 400 predicted tokens a conversation.
4. Twenty SIGKILLs at random moments, then the same files as an uninterrupted run.
Every run is checked: cross-entropies of represent equal those of the bare forward within 1e-4.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from tests.helpers import real_tokenizers

TOKENIZERS = {"32k": "openchat", "152k": "qwen"}
MIB = 1 << 20


def make_model(vocabulary: int, layers: int = 12, width: int = 768):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": width, "intermediate_size": width * 8 // 3, "num_hidden_layers": layers}
    config = LlamaConfig(vocab_size=vocabulary, num_attention_heads=12, num_key_value_heads=12, **shape)
    config.tie_word_embeddings = True
    return LlamaForCausalLM(config).eval()


def make_conversations(count: int, words: int = 130) -> list[dict]:
    """Question and answer of about the same length, log-normally distributed, of text that comes with Python."""
    rng = np.random.default_rng(0)
    pool = [word for line in real_tokenizers.tiny_corpus()[:2000] for word in line.split(" ")]

    def text(n: int) -> str:
        first = rng.integers(0, len(pool) - n)
        return " ".join(pool[first : first + n]).replace("<", "")

    lengths = np.clip(rng.lognormal(np.log(words / 2), 0.5, count).astype(int), 8, 700)
    return [
        {"id": str(i), "messages": [{"role": "user", "content": text(n)}, {"role": "assistant", "content": text(n)}]}
        for i, n in enumerate(lengths)
    ]


def encode_all(tokenizer, rows):
    from fusechat_fuse.text.chat import ConversationEncoder

    encoder = ConversationEncoder(tokenizer, "openchat_3.5")
    return [encoder.encode(row["messages"]) for row in rows]


def run_bare(model, tokenizer, rows, budget: int) -> dict:
    from fusechat_fuse.text.batches import plan_batches

    encoded = encode_all(tokenizer, rows)
    lengths = np.array([len(one.input_ids) for one in encoded])
    batches = []
    for batch in plan_batches(lengths, budget):
        ids = torch.zeros(len(batch), int(lengths[batch].max()), dtype=torch.int64)
        for row, i in zip(ids, batch):
            row[: lengths[i]] = torch.from_numpy(encoded[i].input_ids.astype(np.int64))
        batches.append((batch, ids))
    ce, wall, cpu = 0.0, 0.0, 0.0
    for batch, ids in batches:
        clocks = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits
        wall, cpu = wall + time.perf_counter() - clocks[0], cpu + time.process_time() - clocks[1]
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # before the check below adds to it
        for row, i in enumerate(batch):
            at = torch.from_numpy(encoded[i].predicted.astype(np.int64))
            logprobs = torch.log_softmax(logits[row, at - 1].float(), -1)
            ce -= float(logprobs.gather(1, ids[row, at][:, None]).sum())
        del logits
    return {"wall": wall, "cpu": cpu, "memory": memory * 1024, "ce": ce, "tokens": int(lengths.sum())}


def run_represent(model, tokenizer, rows, budget: int) -> dict:
    from fusechat_fuse.capture.run import represent

    with tempfile.TemporaryDirectory() as folder:
        clocks = time.perf_counter(), time.process_time()
        stored = represent(
            model, rows, f"{folder}/r", tokenizer=tokenizer, template="openchat_3.5", tokens_per_batch=budget
        )
        wall, cpu = time.perf_counter() - clocks[0], time.process_time() - clocks[1]
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        counts = stored.manifest["counts"]
        ce = sum(float(row["ce"].sum(dtype=np.float64)) for row in stored)
    return {
        "wall": wall,
        "cpu": cpu,
        "memory": memory,
        "ce": ce,
        "predicted": counts["predicted_tokens"],
        "bytes": counts["bytes"],
        "padding": counts["padding_share"],
    }


def run_released(model, tokenizer, rows, budget: int, longest: int = 2048) -> dict:
    """What the released script does per row, re-enacted from its description: the whole padded row, prompts too."""
    from datasets import Dataset

    encoded = encode_all(tokenizer, rows)
    clocks = time.perf_counter(), time.process_time()
    columns = {"input_ids": [], "per_step_logits": [], "per_step_indices": []}
    for one in encoded:
        ids = torch.zeros(1, longest, dtype=torch.int64)
        ids[0, : len(one.input_ids)] = torch.from_numpy(one.input_ids.astype(np.int64))
        mask = (torch.arange(longest) < len(one.input_ids)).long()[None]
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.to(torch.float16).cpu()
        top = torch.topk(logits[0].float(), 10, dim=-1)
        columns["input_ids"].append(ids[0].tolist())
        columns["per_step_logits"].append(top.values.tolist())
        columns["per_step_indices"].append(top.indices.tolist())
    with tempfile.TemporaryDirectory() as folder:
        Dataset.from_dict(columns).save_to_disk(folder)
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    wall, cpu = time.perf_counter() - clocks[0], time.process_time() - clocks[1]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"wall": wall, "cpu": cpu, "memory": memory, "bytes": size}


def child(arguments) -> None:
    torch.set_num_threads(arguments.threads)
    tokenizer = getattr(real_tokenizers, TOKENIZERS[arguments.vocab[0]])()
    model = make_model(len(tokenizer))
    run = {"bare": run_bare, "represent": run_represent, "released": run_released}[arguments.child]
    print(json.dumps(run(model, tokenizer, make_conversations(arguments.conversations), arguments.budget)))


def measure(kind: str, vocabulary: str, arguments, conversations: int) -> dict:
    command = [
        sys.executable,
        "-m",
        __spec__.name,
        "--child",
        kind,
        "--vocab",
        vocabulary,
        "--threads",
        str(arguments.threads),
    ]
    command += ["--conversations", str(conversations), "--budget", str(arguments.budget)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(ran.stdout.strip().splitlines()[-1])


def against_forward(vocabulary: str, arguments) -> dict:
    runs = {"bare": [], "represent": []}
    for _ in range(arguments.repeats):
        for kind, found in runs.items():
            found.append(measure(kind, vocabulary, arguments, arguments.conversations))
    bare, ours = runs["bare"], runs["represent"]
    difference = max(abs(a["ce"] - b["ce"]) / ours[0]["predicted"] for a, b in zip(bare, ours))
    assert difference < 1e-4, f"mean cross-entropies differ by {difference}"
    middle = {(k, m): median(r[m] for r in found) for k, found in runs.items() for m in ("wall", "cpu", "memory")}
    released = measure("released", vocabulary, arguments, 2)
    few = measure("represent", vocabulary, arguments, 2)
    figures = {
        "vocabulary": vocabulary,
        "tokens": bare[0]["tokens"],
        "predicted_share": round(ours[0]["predicted"] / bare[0]["tokens"], 3),
        "padding_share": ours[0]["padding"],
        "bare_wall_s": round(middle["bare", "wall"], 2),
        "represent_wall_s": round(middle["represent", "wall"], 2),
        "wall_ratio": round(middle["represent", "wall"] / middle["bare", "wall"], 3),
        "cpu_ratio": round(middle["represent", "cpu"] / middle["bare", "cpu"], 3),
        "memory_ratio": round(middle["represent", "memory"] / middle["bare", "memory"], 3),
        "represent_peak_mib": round(middle["represent", "memory"] / MIB),
        "mean_ce_difference": float(f"{difference:.1e}"),
        "released_over_represent_time": round(released["wall"] / few["wall"], 1),
        "released_over_represent_bytes": round(released["bytes"] / few["bytes"], 1),
        "bytes_per_predicted_token": round(ours[0]["bytes"] / ours[0]["predicted"], 1),
    }
    return figures


def on_disk() -> dict:
    """Bytes and reading speed at k = 10 for a small model of 152k ids."""
    from fusechat_fuse.capture.run import represent

    tokenizer = real_tokenizers.qwen()
    model, rows = make_model(len(tokenizer), layers=1, width=96), make_conversations(32, words=500)
    figures = {}
    for encoding in ("plain", "compact"):
        with tempfile.TemporaryDirectory() as folder:
            stored = represent(
                model, rows, f"{folder}/r", tokenizer=tokenizer, template="openchat_3.5", encoding=encoding
            )
            times = []
            for _ in range(7):
                began = time.perf_counter()
                predicted = sum(len(row["ce"]) for row in stored)
                times.append(time.perf_counter() - began)
            files = sum(f.stat().st_size for f in Path(folder).rglob("shard-*") if f.is_file())
            figures[f"{encoding}_bytes_per_predicted_token"] = round(files / predicted, 1)
            figures[f"{encoding}_million_tokens_per_s"] = round(predicted / median(times) / 1e6, 2)
    return figures


def under_kills(kills: int = 20) -> dict:
    """A tiny model; each child process is killed at a random moment after its first new shard."""
    from fusechat_fuse.capture.run import represent

    tokenizer = real_tokenizers.tiny_bpe()
    torch.set_num_threads(1)
    model, rows, rng = make_model(len(tokenizer), layers=1, width=96), make_conversations(160), random.Random(0)
    options = {"tokenizer": tokenizer, "shard_size": 4}
    with tempfile.TemporaryDirectory() as folder:
        killed, whole, died = Path(folder, "killed"), Path(folder, "whole"), 0
        while True:
            process = os.fork()
            if process == 0:
                represent(model, rows, killed, **options)
                os._exit(0)
            before, ended = len(list(killed.glob("shard-*.json"))), 0
            while not ended and (died >= kills or len(list(killed.glob("shard-*.json"))) <= before):
                ended, status = os.waitpid(process, os.WNOHANG)
                time.sleep(0.0005)
            if not ended:
                time.sleep(rng.random() * 0.05)
                os.kill(process, signal.SIGKILL)
                _, status = os.waitpid(process, 0)
            died += os.WIFSIGNALED(status)
            if not os.WIFSIGNALED(status):
                assert status == 0
                break
        represent(model, rows, whole, **options)
        contents = [
            {f.relative_to(root): f.read_bytes() for f in root.rglob("*") if f.is_file()} for root in (killed, whole)
        ]
        assert contents[0] == contents[1], "files differ"
    return {"kills": died, "files_identical": True, "files": len(contents[0])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", nargs="+", default=list(TOKENIZERS), choices=list(TOKENIZERS))
    parser.add_argument("--conversations", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments)
    figures = {"kills": under_kills(), "disk": on_disk()}
    figures |= {vocabulary: against_forward(vocabulary, arguments) for vocabulary in arguments.vocab}
    for part, values in figures.items():
        print(f"\n{part}")
        for name, value in values.items():
            print(f"  {name:36} {value}")
    print(json.dumps({"benchmark": "represent", **figures}))


if __name__ == "__main__":
    main()
