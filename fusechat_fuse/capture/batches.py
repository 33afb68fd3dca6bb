"""Encoded conversations through the model, in batches under a token budget that shrinks where memory runs out."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from fusechat_fuse.errors import InputError
from fusechat_fuse.text.batches import plan_batches
from fusechat_fuse.text.chat import Encoded

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TopK:
    """Per predicted token: ids int32 [P, K], logprobs float32 [P, K] descending, ce float32 [P]."""

    ids: np.ndarray
    logprobs: np.ndarray
    ce: np.ndarray


def _is_out_of_memory(error: BaseException) -> bool:
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


class BatchRunner:
    """Runs encoded conversations through the model; a token budget that was halved stays so.

    Args:
        head: `PredictionHead`: (sequences, predicted positions, top_k) -> a TopK for each sequence.
        top_k: entries per predicted token. tokens_per_batch: rows x longest row of a forward pass.
        vocab_size: ids are below it. boundary: as `plan_batches` takes it.
    """

    def __init__(self, head, top_k: int, tokens_per_batch: int, vocab_size: int, boundary: int | None):
        self.head, self.top_k, self.budget, self.boundary = head, top_k, tokens_per_batch, boundary
        self.padded = 0  # tokens run, padding included
        self.vocab_size = vocab_size

    def __call__(self, encoded: list[Encoded], progress) -> list[TopK]:
        """A TopK for each conversation, in order; `progress.update` is called for each batch."""
        import torch

        highest = max((int(one.input_ids[one.predicted].max()) for one in encoded), default=0)
        if highest >= self.head.vocab_size:  # which may be below that of the embedding
            raise InputError(
                f"tokenizer for the model: expected predicted ids below its {self.head.vocab_size} output rows, got "
                f"{highest}. Give the tokenizer that belongs to the model."
            )
        lengths = np.array([len(one.input_ids) for one in encoded], dtype=np.int64)
        results: list = [None] * len(encoded)
        queue = plan_batches(lengths, self.budget, self.boundary)
        while queue:
            batch = queue.pop(0)
            parts, size = [encoded[i] for i in batch], len(batch) * int(lengths[batch].max())
            try:
                found = self.head([one.input_ids for one in parts], [one.predicted for one in parts], self.top_k)
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
                if len(batch) == 1:
                    raise InputError(
                        f"memory for a conversation of {size} tokens: expected it to fit alone, got {error}. Give a "
                        "smaller max_length, a smaller dtype, or a device_map over more devices."
                    ) from error
                found = None
            if found is None:  # the memory of the failed pass is free again
                self.budget = size // 2
                logger.warning("Out of memory at %d tokens per batch; going on with %d.", size, self.budget)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                left = np.concatenate([batch, *queue])
                queue = [left[part] for part in plan_batches(lengths[left], self.budget, self.boundary)]
                continue
            for i, one in zip(batch, found):
                results[i] = one
            self.padded += size
            progress.update(len(batch))
        return results
