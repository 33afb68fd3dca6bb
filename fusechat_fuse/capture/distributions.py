"""Next-token distributions of a causal model at chosen positions, without ever holding all logits.

The backbone gives hidden states [B, T, D]; only the predicted positions go through the output head, a chunk of rows at
a time, so the largest temporary is chunk x V. Log-softmax, top-k and the cross-entropy of the actual token are taken
there in float32. Some families scale or cap their logits after the head (`logit_transform`). That head and transform
reproduce the model's own logits is checked once against its forward; for a family not known by its class, every meaning
that its configuration may have is tried. A model whose logits none of them reproduces goes through its own forward,
restricted to the predicted positions.
"""

from __future__ import annotations

import logging

import numpy as np
import torch

from fusechat_fuse.capture.batches import TopK
from fusechat_fuse.models.logit_transform import LogitTransform, possible_transforms, transform_of

logger = logging.getLogger(__name__)
CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}


def _log_softmax_top_k(logits: torch.Tensor, actual: torch.Tensor, top_k: int) -> tuple[torch.Tensor, ...]:
    """logits [N, V] (used up), actual [N] -> ids [N, K], log-probabilities [N, K], ce [N], in float32."""
    logits = logits.float()
    top, ids = torch.topk(logits, top_k, dim=-1)
    own = logits.gather(1, actual[:, None])
    highest = top[:, :1]
    normalizer = highest + logits.sub_(highest).exp_().sum(-1, keepdim=True).log()  # in place: no second [N, V]
    return ids, top - normalizer, (normalizer - own).squeeze(1)


class PredictionHead:
    """A causal model, split into backbone and head where these reproduce its own logits.

    Args:
        model: transformers causal language model in eval mode; borrowed.
        probe_ids: a few token ids [n] on which backbone and head are compared with the whole model.
        chunk_bytes: largest float32 temporary of the head (default 128 MiB on a CPU, 1 GiB on a GPU).
    """

    def __init__(self, model, probe_ids, chunk_bytes: int | None = None):
        self.model = model
        device = model.get_input_embeddings().weight.device
        self.device = torch.device("cpu") if device.type == "meta" else device  # offloaded: hooks move what comes in
        self.chunk_bytes = chunk_bytes or CHUNK_BYTES.get(self.device.type, 1 << 30)
        self.vocab_size = int(model.get_input_embeddings().weight.shape[0])
        self.after: LogitTransform | None = None
        self._choose_form(torch.tensor(np.asarray(probe_ids, np.int64)[None], device=self.device))

    @torch.inference_mode()
    def _choose_form(self, probe: torch.Tensor) -> None:
        whole = self.model(input_ids=probe, use_cache=False).logits[0].float()
        head = self.model.get_output_embeddings()
        self.vocab_size = whole.shape[-1]
        if head is None or getattr(self.model, "base_model", self.model) is self.model:
            return
        try:
            hidden = self._backbone(probe)[0]
            raw = head(hidden)
        except (RuntimeError, TypeError, AttributeError, ValueError):
            return
        if raw.shape != whole.shape:
            return
        tolerance = 1e-4 if raw.dtype == torch.float32 else 2e-2
        known = transform_of(self.model)
        transforms = possible_transforms(self.model.config) if known is None else [known]
        errors = [float((transform(raw).float() - whole).abs().max()) for transform in transforms]
        error, transform = min(zip(errors, transforms), key=lambda entry: entry[0])
        if error <= tolerance * max(1.0, float(whole.abs().max())):
            self.after = transform
            logger.debug("logits after the head: %s (checked, largest difference %.1e)", transform, error)

    def _backbone(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state

    @torch.inference_mode()
    def __call__(self, sequences: list[np.ndarray], predicted: list[np.ndarray], top_k: int) -> list[TopK]:
        """Distributions at t - 1 for each predicted index t.

        Args:
            sequences: token ids [T_b] each; padded here on the right (a causal model does not look there).
            predicted: indices > 0 into each sequence.
            top_k: K.
        Returns: one TopK per sequence.
        """
        ids = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.int64)
        for row, sequence in zip(ids, sequences):
            row[: len(sequence)] = torch.from_numpy(sequence.astype(np.int64))
        rows = torch.from_numpy(np.repeat(np.arange(len(predicted)), [len(p) for p in predicted]))
        columns = torch.from_numpy(np.concatenate(predicted).astype(np.int64))
        actual = ids[rows, columns]
        found = self._run(ids.to(self.device), rows, columns - 1, actual, top_k)
        top_ids, logprobs, ce = (torch.cat(parts).cpu().numpy() for parts in zip(*found))
        ends = np.cumsum([len(p) for p in predicted])
        return [TopK(top_ids[a:b].astype(np.int32), logprobs[a:b], ce[a:b]) for a, b in zip([0, *ends[:-1]], ends)]

    def _run(self, ids, rows, columns, actual, top_k: int) -> list[tuple[torch.Tensor, ...]]:
        chunk, found = max(1, self.chunk_bytes // (4 * self.vocab_size)), []
        head = self.model.get_output_embeddings()
        if self.after is None:
            keep = torch.zeros(ids.shape, dtype=torch.bool)
            keep[rows, columns] = True
            states = self._own_logits(ids, keep.to(ids.device))  # [N, V]
        else:
            hidden = self._backbone(ids)
            states = hidden[rows.to(hidden.device), columns.to(hidden.device)]  # [N, D]
        for n in range(0, len(actual), chunk):
            logits = states[n : n + chunk]
            if self.after is not None:
                logits = self.after(head(logits))  # in the model's dtype, as in its own forward
            found.append(_log_softmax_top_k(logits, actual[n : n + chunk].to(logits.device), top_k))
        return found

    def _own_logits(self, ids: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """[N, V] by the model's own forward; of all positions where it takes no `logits_to_keep`."""
        try:
            logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits
        except (TypeError, IndexError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            logits = self.model(input_ids=ids, use_cache=False).logits
        if logits.dim() == 3:
            logits = logits[keep.to(logits.device)]
        return logits
