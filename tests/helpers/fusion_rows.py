"""Random aligned rows of the documented shapes, and directories of them, for the training tests."""

import numpy as np


def aligned_row(seed: int, *, vocab_size=50, tokens=20, predicted=8, k=4, source_k=5, mass=None, source_better=None):
    """A conversation as `align` describes it; `mass` None: a random mass per token, with some positions unanswered."""
    rng = np.random.default_rng(seed)
    input_ids = rng.integers(3, vocab_size, tokens).astype(np.int32)
    at = np.sort(rng.choice(np.arange(1, tokens), predicted, replace=False)).astype(np.int32)
    logprobs = -np.sort(rng.exponential(2.0, (predicted, k)), axis=1) - 0.05
    logprobs -= np.maximum(np.log(np.exp(logprobs).sum(1, keepdims=True)), 0)  # a mass of 1 at most
    source_ids = np.stack([rng.permutation(vocab_size)[:source_k] for _ in range(predicted)]).astype(np.int32)
    probs = rng.random((predicted, source_k)) + 1e-3
    total = np.full((predicted, 1), mass) if mass else rng.uniform(0.2, 0.95, (predicted, 1))
    probs = total * probs / probs.sum(1, keepdims=True)
    if mass is None and predicted > 2:
        source_ids[1], probs[1] = -1, 0
    ce = rng.exponential(1.0, predicted).astype(np.float32)
    shift = {None: rng.normal(0, 0.3), True: -0.5, False: 0.5}[source_better]
    end = np.cumsum(rng.integers(1, 6, predicted)).astype(np.int32)
    mapped = probs.sum(1)
    return {
        "id": f"c{seed}",
        "content_hash": f"{seed:04x}",
        "input_ids": input_ids,
        "predicted": at,
        "message": np.ones(predicted, np.int16),
        "start": np.concatenate([[0], end[:-1]]).astype(np.int32),
        "end": end,
        "topk_ids": np.stack([rng.permutation(vocab_size)[:k] for _ in range(predicted)]).astype(np.int32),
        "topk_logprobs": logprobs.astype(np.float16),
        "ce": ce,
        "source_ids": source_ids,
        "source_probs": probs.astype(np.float32),
        "source_ce": float(np.float32(ce.mean() + shift)),
        "source_token_ce": (ce + rng.normal(0, 0.5, predicted)).astype(np.float32),
        "source_bytes": int(end[-1]),
        "source_tokens": int(predicted),
        "mapped_mass": mapped.astype(np.float16),
        "label_tail": ((mapped > 0) & ~(source_ids == input_ids[at][:, None]).any(1)).astype(np.float16),
    }


def aligned_rows(count: int, seed: int = 0, **options) -> list[dict]:
    rng = np.random.default_rng(seed)
    rows = []
    for n in range(count):
        tokens = int(rng.integers(10, 30))
        sizes = {"tokens": tokens, "predicted": int(rng.integers(3, 9))}
        rows.append(aligned_row(1000 * seed + n, **{**sizes, **options}))
    return rows
