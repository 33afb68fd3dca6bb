"""Losses of the labelled positions from hidden states on, chunk by chunk, with the gradient taken on the way.

Shape letters: N labelled positions, V vocabulary, D hidden, K entries of a distribution.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from fusechat_fuse.training.loss import check_ids, exp_to_gradient_, picked_terms, row_chunks, row_sums

_LEAST_ROWS = 256  # of a chunk: d weight is read and written once a chunk


@dataclass
class FusionOutput(ModelOutput):
    """Sums over labelled positions: `loss` = lambda lm_loss + (1 - lambda) fusion_loss carries the gradient."""

    loss: Tensor | None = None
    lm_loss: Tensor | None = None
    fusion_loss: Tensor | None = None


class LabelledRows:
    """Labels and targets of the labelled positions; an opaque object, which wrappers neither cast nor split."""

    def __init__(self, labels_N, ids_NK, probs_NK, lm_loss_weight, kind, transform):
        self.labels, self.ids, self.probs = labels_N, ids_NK, probs_NK
        self.lm_loss_weight, self.kind, self.transform = lm_loss_weight, kind, transform

    def total(self, sums):
        """lambda L_LM + (1 - lambda) L_fusion; a term of weight 0 is left out, as 0 times infinity would be NaN."""
        return sum(w * term for w, term in zip((self.lm_loss_weight, 1 - self.lm_loss_weight), sums) if w)

    def losses(self, hidden, weight, bias):
        """(loss, lm_loss, fusion_loss) sums, with the gradient taken now."""
        check_ids(self.labels, self.ids, weight.shape[0])
        return _GradientInForward.apply(hidden, weight, bias, self, torch.is_grad_enabled())

    def recomputed(self, lm_head, hidden, chunks: int) -> FusionOutput:
        """The same through `chunks` calls of lm_head, each made again in backward."""

        def sums(hidden, labels, ids, probs):
            return torch.stack(row_sums(self.transform(lm_head(hidden)), labels, ids, probs, self.kind))

        size = max(-(-len(hidden) // chunks), 1)
        total = 0
        for n in range(chunks):
            part = slice(n * size, (n + 1) * size)
            arguments = hidden[part], self.labels[part], self.ids[part], self.probs[part]
            if torch.is_grad_enabled():
                total = total + checkpoint(sums, *arguments, use_reentrant=False, determinism_check="none")
            else:
                total = total + sums(*arguments)
        return FusionOutput(self.total(total), *total.detach())


class _GradientInForward(torch.autograd.Function):
    """hidden [N, D], weight [V, D] -> sums of the losses; d hidden and d weight are taken chunk by chunk on the way.

    Gradients are kept unnormalised (entries up to 1, so nothing underflows in half precision) and scaled in backward.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, rows, with_gradient):
        device = hidden.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        with torch.autocast(device, enabled=False), torch.no_grad():
            work = _Chunks(hidden, weight, bias, autocast or weight.dtype)
            work.prepare_gradients([with_gradient and need for need in ctx.needs_input_grad[:3]])
            sums = work.run(rows)
        ctx.gradients = work.gradients
        lm_sum, fusion_sum = sums.unbind()
        ctx.mark_non_differentiable(lm_sum, fusion_sum)
        return rows.total(sums.clone()), lm_sum, fusion_sum

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the lean head's gradient can be taken once; set lean_head=False to go through it again")
        return *(None if g is None else g.mul_(grad) for g in gradients), None, None


class _Chunks:
    """The chunk loop of `_GradientInForward`, over buffers that are allocated once."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        self.hidden, self.weight, self.bias, self.dtype = hidden, weight, bias, dtype
        self.exact = torch.promote_types(dtype, torch.float32)  # of losses and sums
        self.gradients: list[Tensor | None] = [None, None, None]
        self.parts = row_chunks(len(hidden), weight.shape[0], hidden.device, _LEAST_ROWS)

    def prepare_gradients(self, needed: list[bool]) -> None:
        shapes = self.hidden.shape, self.weight.shape, (self.weight.shape[0],)
        for n, (need, shape) in enumerate(zip(needed, shapes)):
            if need:
                self.gradients[n] = torch.zeros(shape, dtype=self.exact, device=self.hidden.device)

    def run(self, targets: LabelledRows) -> Tensor:
        sums = torch.zeros(2, dtype=self.exact, device=self.hidden.device)
        hidden, weight, probs = self.hidden.to(self.dtype), self.weight.to(self.dtype), targets.probs.to(self.exact)
        rows = max((b - a for a, b in self.parts), default=0)
        low = torch.empty(rows, weight.shape[0], dtype=self.dtype, device=hidden.device)
        buffer = low if self.dtype == self.exact else torch.empty_like(low, dtype=self.exact)
        for a, b in self.parts:
            z = buffer[: b - a]
            torch.mm(hidden[a:b], weight.t(), out=low[: b - a])
            if buffer is not low:
                z.copy_(low[: b - a])
            if self.bias is not None:
                z.add_(self.bias)
            targets.transform.apply_(z)
            slope = targets.transform.slope(z)
            chunk = targets.labels[a:b], targets.ids[a:b], probs[a:b]
            total, lm_sum, fusion_sum = _exp_and_terms_(z, *chunk, targets.kind)
            sums += torch.stack([lm_sum, fusion_sum])
            if any(g is not None for g in self.gradients):
                exp_to_gradient_(z, total, *chunk, targets.lm_loss_weight, 1 - targets.lm_loss_weight)
                if slope is not None:
                    z.mul_(slope)
                self._accumulate(z, low[: b - a], hidden[a:b], weight, a, b)
        self.gradients = [
            None if g is None else g.to(own.dtype)
            for g, own in zip(self.gradients, (self.hidden, self.weight, self.bias))
        ]
        return sums

    def _accumulate(self, dz, low, hidden, weight, a, b) -> None:
        d_hidden, d_weight, d_bias = self.gradients
        if d_bias is not None:
            d_bias += dz.sum(0)
        if low.dtype != dz.dtype:
            dz = low.copy_(dz)
        if d_hidden is not None:
            d_hidden[a:b] = dz @ weight
        if d_weight is not None:
            if d_weight.dtype == dz.dtype:
                d_weight.addmm_(dz.t(), hidden)
            else:
                d_weight += dz.t() @ hidden


def _exp_and_terms_(z: Tensor, labels, ids, probs, kind):
    """(sums of exp, sum of L_LM, sum of L_fusion) of the rows `z`, which are replaced by exp(z - max)."""
    top = z.amax(1, keepdim=True) if z.numel() else z[:, :1]
    at_labels, at_ids = z.gather(1, labels[:, None]), z.gather(1, ids.clamp(min=0))  # before z is overwritten
    total = z.sub_(top).exp_().sum(1, keepdim=True)
    lse = (top + total.log())[:, 0]
    return total, *picked_terms(at_labels[:, 0], at_ids, lse, probs, kind)
