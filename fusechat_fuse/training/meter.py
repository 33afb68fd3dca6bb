"""Figures of a training or evaluation stretch, summed on the device and read (over all processes) only when logged."""

import contextlib
import math
import time

import torch

from fusechat_fuse.training.collator import STATS


def search_objective(metrics: dict[str, float]) -> float:
    """The mean lm_loss of the evaluation data: unlike eval_loss it means the same whatever the fusion options are."""
    found = [value for name, value in metrics.items() if name.endswith("_lm_loss")]
    return sum(found) / len(found) if found else metrics["eval_loss"]  # none: compute_loss is the user's


class FusionMeter:
    """Sums of losses and of what the fusion function chose; of several `sources` the share of each."""

    def __init__(self, sources: list[str]):
        self.sources = sources
        self.reset()

    def reset(self) -> None:
        self._sums = self._loss = None
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def paused(self):
        """Stop the clock (evaluation within training); evaluation of several sets is paused in a pause."""
        start, paused = self._start, time.perf_counter()
        try:
            yield
        finally:
            self._start = start + time.perf_counter() - paused

    def add(self, lm_sum, fusion_sum, labelled, tokens, stats) -> None:
        """Add a batch: sums of L_LM and L_fusion, labelled and all tokens (0-d), conversation_stats [B, C, 5]."""
        stats = _exact(stats.reshape(-1, len(STATS)))
        losses = torch.stack([x.detach().to(stats) for x in (lm_sum, fusion_sum, labelled, tokens)])
        index = stats[:, 0].long().clamp(-1, len(self.sources) - 1) + 1  # row 0: several sources mixed
        # per source: conversations, those that took it, mapped mass, predicted tokens, tokens cut off
        values = torch.cat([torch.ones_like(stats[:, :1]), stats[:, 1:]], 1)
        choices = stats.new_zeros(len(self.sources) + 1, values.shape[1]).index_add_(0, index, values)
        sums = torch.cat([losses, choices.flatten()])
        self._sums = sums if self._sums is None else self._sums + sums

    def add_loss(self, loss, labelled) -> None:
        """Add what compute_loss returned for a batch of an evaluation, a mean over its labelled tokens."""
        count = _exact(labelled)
        pair = torch.stack([torch.where(count > 0, loss.detach().mean() * count, 0), count])
        self._loss = pair if self._loss is None else self._loss + pair

    def read(self, accelerator, prefix: str = "") -> dict[str, float]:
        """Means since the last reset, over all processes, with loss and conversations of an evaluation; resets."""
        seconds = time.perf_counter() - self._start
        figures: dict[str, float] = {}
        if self._loss is not None:
            total, labelled = accelerator.reduce(self._loss, "sum").tolist()
            figures["loss"] = total / max(labelled, 1)
        if self._sums is not None:  # None: compute_loss is the user's own
            figures |= self._fusion_figures(accelerator, seconds)
        if not prefix:
            figures.pop("conversations", None)
        self.reset()
        return {prefix + name: value for name, value in figures.items()}

    def _fusion_figures(self, accelerator, seconds: float) -> dict[str, float]:
        flat = accelerator.reduce(self._sums, "sum").tolist()
        (lm, fusion, labelled, tokens), table = flat[:4], torch.tensor(flat[4:]).view(len(self.sources) + 1, -1)
        lm, fusion = (x / max(labelled, 1) for x in (lm, fusion))
        conversations, taken, mass, predicted, cut = table.sum(0).tolist()
        figures = {
            "lm_loss": lm,
            "fusion_loss": fusion,
            "source_share": taken / max(conversations, 1),
            "mapped_mass": mass / max(predicted, 1),
            "tokens_per_second": tokens / seconds,
            "conversations": round(conversations),
        }
        if cut:
            figures["cut_tokens"] = cut
        if len(self.sources) > 1:
            for name, row in zip(self.sources, table[1:].tolist()):
                figures[f"source_share/{name}"] = row[1] / max(conversations, 1)
        if math.isnan(mass):  # rows without mapped_mass
            del figures["mapped_mass"]
        return figures


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)
