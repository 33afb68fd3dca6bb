"""Batches of conversations that go through a model together."""

from __future__ import annotations

import numpy as np


def plan_batches(lengths: np.ndarray, tokens_per_batch: int, boundary: int | None = None) -> list[np.ndarray]:
    """Batches of rows, longest first, with rows x longest row <= tokens_per_batch; a longer row is a batch of its own.

    A batch of an eighth of the budget or more is also closed where one more row would make more than 4 % of it padding.

    Args:
        lengths: tokens per conversation [n]. tokens_per_batch: limit per batch, padding included.
        boundary: no batch has both rows above this length and others.
    Returns: arrays of indices, one per batch.
    """
    order = np.argsort(-lengths, kind="stable")
    batches, begin, tokens = [], 0, 0
    for place, index in enumerate(order):
        rows, longest = place - begin + 1, int(lengths[order[begin]])
        full = rows * longest > tokens_per_batch
        sparse = tokens * 8 >= tokens_per_batch and tokens + lengths[index] < 0.96 * rows * longest
        across = boundary is not None and longest > boundary >= lengths[index]
        if rows > 1 and (full or sparse or across):
            batches.append(order[begin:place])
            begin, tokens = place, 0
        tokens += int(lengths[index])
    return [*batches, order[begin:]] if len(order) else []
