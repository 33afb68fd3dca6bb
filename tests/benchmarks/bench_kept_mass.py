"""Which entries of a distribution are worth their bytes: top-k, top-p, a floor of probability, or a sample.

    fusechat-fuse represent --model_name_or_path SOURCE --data_path chats.jsonl --top_k 128 --output_dir wide
    python -m tests.benchmarks.bench_kept_mass wide [--entries 10]

From a representation of many entries, rules that keep so many a token on average:
- mean mass kept by the first k, by the fewest that reach p (top-p), and by all of at least a probability c (no rule
  with as many entries keeps more: those are the largest of all);
- mean squared distance of the training target to the source's distribution: of the first k with their tail dropped (a
  bias), with the label standing for it where labels are drawn from the source, and of N draws with their shares (arXiv
  2503.16870), where N gives so many different entries. Both of the latter are right on average. What lies beyond the
  entries of the representation counts as one more.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from fusechat_fuse import load_representation


def probabilities(path: Path) -> np.ndarray:
    """[P, K], the largest first."""
    return np.exp(np.concatenate([row["topk_logprobs"].astype(np.float64) for row in load_representation(path)]))


def kept(probs: np.ndarray, counts: np.ndarray) -> float:
    """Mean mass of the first counts[i] entries of row i."""
    return float(np.where(np.arange(probs.shape[1]) < counts[:, None], probs, 0).sum(1).mean())


def with_mean(entries: int, counts_at, low: float, high: float) -> np.ndarray:
    """Counts of the threshold, in [low, high], at which their mean is `entries`; counts grow as it falls."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if counts_at(middle).mean() > entries else (low, middle)
    return counts_at(high)


def squared_errors(probs: np.ndarray, entries: int, seed: int = 0) -> dict[str, float]:
    whole = np.append(probs, np.clip(1 - probs.sum(1, keepdims=True), 0, 1), axis=1)
    whole /= whole.sum(1, keepdims=True)
    tail, rng = whole[:, entries:], np.random.default_rng(seed)
    found = {
        f"top-{entries}, tail dropped": float((tail**2).sum(1).mean()),
        f"top-{entries}, label for the tail": float((tail * (1 - tail)).sum(1).mean()),
    }
    for draws in range(entries, 20 * entries, max(1, entries // 5)):
        counts = rng.multinomial(draws, whole)
        if (counts > 0).sum(1).mean() >= entries:
            found[f"{draws} draws"] = float(((counts / draws - whole) ** 2).sum(1).mean())
            break
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("path", type=Path, help="a representation of many entries")
    parser.add_argument("--entries", type=int, default=10)
    options = parser.parse_args()
    probs, entries = probabilities(options.path), options.entries
    total, most = probs.cumsum(1), probs.shape[1]
    by_p = with_mean(entries, lambda p: np.minimum((total < 1 - p).sum(1) + 1, most), 0.0, 1.0)
    by_floor = with_mean(entries, lambda c: np.maximum((probs >= c).sum(1), 1), 0.0, 1.0)
    mass = {"top-k": kept(probs, np.full(len(probs), entries)), "top-p": kept(probs, by_p)}
    mass |= {"floor": kept(probs, by_floor), f"all {most}": kept(probs, np.full(len(probs), most))}
    figures = {"tokens": len(probs), "entries": entries, "mean mass kept": mass}
    figures["mean squared error of the target"] = squared_errors(probs, entries)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
