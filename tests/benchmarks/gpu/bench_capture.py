"""`represent` on a 7B-shaped Mistral on the GPU: predicted tokens a second, and its share of the bare forward's rate.

    python -m tests.benchmarks.gpu.bench_capture [--save FOLDER]

Random weights, bfloat16, 32k and 152k entries, 2,048 conversations of about 400 tokens, half of them prompts. The bare
forward runs the same length-sorted batches, all logits of every position, tokens ready and no top-k taken. `represent`
tokenizes, templates, hashes and writes. Cross-entropies are compared on the first batch.
"""

import argparse
import tempfile
import time

import numpy as np
import torch

from tests.benchmarks import bench_represent, bench_train
from tests.benchmarks.gpu import card
from tests.helpers import real_tokenizers

BUDGET = 16_384


def bare(model, tokenizer, rows) -> dict:
    from fusechat_fuse.text.batches import plan_batches

    encoded = bench_represent.encode_all(tokenizer, rows)
    lengths = np.array([len(one.input_ids) for one in encoded])
    batches = []
    for batch in plan_batches(lengths, BUDGET):
        ids = torch.zeros(len(batch), int(lengths[batch].max()), dtype=torch.int64)
        for row, i in zip(ids, batch):
            row[: lengths[i]] = torch.from_numpy(encoded[i].input_ids.astype(np.int64))
        batches.append(ids.to(card.device()))

    @torch.inference_mode()
    def step():
        for ids in batches:
            model(input_ids=ids, use_cache=False)

    found = card.measure(step, turns=1)
    one = encoded[0]
    with torch.inference_mode():
        logits = model(input_ids=torch.from_numpy(one.input_ids.astype(np.int64))[None].to(card.device())).logits[0]
    at = torch.from_numpy(one.predicted.astype(np.int64)).to(card.device())
    actual = torch.from_numpy(one.input_ids.astype(np.int64)).to(card.device())[at]
    ce = torch.nn.functional.cross_entropy(logits[at - 1].float(), actual)
    return {**found, "ce": float(ce)}


def ours(model, tokenizer, rows) -> dict:
    from fusechat_fuse.capture.run import represent

    with tempfile.TemporaryDirectory() as folder:
        options = {"tokenizer": tokenizer, "template": "openchat_3.5", "tokens_per_batch": BUDGET}
        stored = {}

        def step():
            stored["r"] = represent(model, rows, f"{folder}/{time.monotonic_ns()}", **options)

        found = card.measure(step, turns=1)
        first = next(row for row in stored["r"] if row["id"] == rows[0]["id"])
        predicted = stored["r"].manifest["counts"]["predicted_tokens"]
        return {**found, "ce": float(first["ce"].mean(dtype=np.float64)), "predicted": predicted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", metavar="FOLDER")
    options = parser.parse_args()
    on_gpu = card.device().type == "cuda"
    base = bench_train.SHAPES["mistral-7b" if on_gpu else "smoke"]
    tokenizer = real_tokenizers.tiny_bpe()
    lines = []
    print(f"{card.describe()}\n     V attention     predicted/s  of bare  peak GiB beyond weights (bare)")
    for V in (32_000, 151_936) if on_gpu else (1000,):
        model = bench_train.build({**base, "vocab": V}, card.device().type).eval()
        rows = bench_represent.make_conversations(2048 if on_gpu else 8)
        for attention in ("sdpa", "flash_attention_2") if V < 100_000 else ("sdpa",):
            try:
                model.set_attn_implementation(attention)
            except (ImportError, ValueError) as error:
                print(f"{attention}: {str(error).splitlines()[0]}")
                continue
            a, b = bare(model, tokenizer, rows), ours(model, tokenizer, rows)
            if abs(a["ce"] - b["ce"]) > 2e-2 * a["ce"]:
                raise AssertionError(f"cross-entropy {b['ce']} of represent, {a['ce']} of the model's own forward")
            line = {"V": V, "attention": attention, "bare": a, "represent": b, "share": a["seconds"] / b["seconds"]}
            lines.append(line)
            rate, peaks = b["predicted"] / b["seconds"], [one["peak"] / 2**30 for one in (b, a)]
            print(f"{V:6} {attention:10}{rate:15,.0f}{line['share']:9.3f}{peaks[0]:10.2f} ({peaks[1]:.2f})", flush=True)
        del model
    card.save("capture", lines, options.save)


if __name__ == "__main__":
    main()
