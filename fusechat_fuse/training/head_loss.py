"""Losses of the labelled positions from hidden states on, chunk by chunk: the arithmetic of the lean head.

`LabelledRows.losses` knows lm_head's weight: the gradient with respect to logits has a closed form (`loss.py`), so it
is taken in forward, carried on to d hidden and d weight, and no logits are kept. `LabelledRows.recomputed` knows
lm_head only as a module: it is called for each chunk, and again in backward.

Shape letters: N labelled positions, V vocabulary, D hidden, K entries of a distribution.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers.utils.generic import ModelOutput

from fusechat_fuse.models.logit_transform import LogitTransform
from fusechat_fuse.training.loss import check_ids, exp_to_gradient_, picked_terms, row_chunks, row_sums, weighted_loss

_LEAST_ROWS = 256  # of a chunk: d weight is read and written once a chunk


@dataclass
class FusionOutput(ModelOutput):
    """Sums over labelled positions: `loss` = lambda lm_loss + (1 - lambda) fusion_loss carries the gradient."""

    # ModelOutput asks for defaults; none of the three is ever missing
    loss: Tensor = None  # pyright: ignore[reportAssignmentType]
    lm_loss: Tensor = None  # pyright: ignore[reportAssignmentType]
    fusion_loss: Tensor = None  # pyright: ignore[reportAssignmentType]


class LabelledRows:
    """Labels [N] and distributions (ids and probabilities [N, K]) of the labelled positions, and what becomes of them.

    An opaque object: a wrapper around lm_head (FSDP, mixed precision) neither casts nor splits what is in it.
    """

    def __init__(self, labels: Tensor, ids: Tensor, probs: Tensor, weight: float, kind: str, transform: LogitTransform):
        self.labels, self.ids, self.probs = labels, ids, probs
        self.lm_loss_weight, self.kind, self.transform = weight, kind, transform

    def losses(self, hidden: Tensor, weight: Tensor, bias: Tensor | None):
        """(loss, lm_loss, fusion_loss) sums, with the gradient taken now."""
        check_ids(self.labels, self.ids, weight.shape[0])
        return _GradientInForward.apply(hidden, weight, bias, self, torch.is_grad_enabled())

    def recomputed(self, lm_head: nn.Module, hidden: Tensor, chunks: int) -> FusionOutput:
        """The same through `chunks` calls of lm_head, each made again in backward."""

        def sums(hidden, labels, ids, probs):
            return torch.stack(row_sums(self.transform(lm_head(hidden)), labels, ids, probs, self.kind))

        size = max(-(-len(hidden) // chunks), 1)
        total = hidden.new_zeros(2, dtype=torch.promote_types(hidden.dtype, torch.float32))
        for n in range(chunks):
            part = slice(n * size, (n + 1) * size)
            arguments = hidden[part], self.labels[part], self.ids[part], self.probs[part]
            if torch.is_grad_enabled():
                total = total + checkpoint(sums, *arguments, use_reentrant=False, determinism_check="none")
            else:
                total = total + sums(*arguments)
        lm_sum, fusion_sum = total.unbind()
        loss = weighted_loss(lm_sum, fusion_sum, self.lm_loss_weight)
        return FusionOutput(loss, lm_sum.detach(), fusion_sum.detach())


class _GradientInForward(torch.autograd.Function):
    """hidden [N, D], weight [V, D] -> sums of the losses; d hidden and d weight are taken chunk by chunk on the way.

    Gradients are kept unnormalised (entries up to 1, so nothing underflows in half precision) and scaled in backward.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, rows, with_gradient):
        device = hidden.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        with torch.autocast(device, enabled=False), torch.no_grad():
            needed = [with_gradient and need for need in ctx.needs_input_grad[:3]]
            sums, ctx.gradients = _sums_and_gradients(hidden, weight, bias, rows, autocast or weight.dtype, needed)
        lm_sum, fusion_sum = sums.unbind()
        ctx.mark_non_differentiable(lm_sum, fusion_sum)
        return weighted_loss(lm_sum, fusion_sum, rows.lm_loss_weight).clone(), lm_sum, fusion_sum

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the lean head's gradient can be taken once; set lean_head=False to go through it again")
        return *(None if g is None else g.mul_(grads[0]) for g in gradients), None, None


def _sums_and_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: LabelledRows, dtype, needed):
    """Sums of L_LM and L_fusion, [2], and their gradients with respect to hidden, weight and bias (None: not needed);
    products in `dtype`, chunk by chunk, in buffers that are allocated once."""
    exact = torch.promote_types(dtype, torch.float32)  # of losses, sums and gradients
    given, device, V = (hidden, weight, bias), hidden.device, weight.shape[0]
    gradients = [torch.zeros_like(x, dtype=exact) if need and x is not None else None for x, need in zip(given, needed)]
    d_hidden, d_weight, d_bias = gradients
    sums = torch.zeros(2, dtype=exact, device=device)
    hidden, weight, probs = hidden.to(dtype), weight.to(dtype), rows.probs.to(exact)
    parts = row_chunks(len(hidden), V, device, _LEAST_ROWS)
    low = torch.empty(max((b - a for a, b in parts), default=0), V, dtype=dtype, device=device)
    buffer = low if dtype == exact else torch.empty_like(low, dtype=exact)
    for a, b in parts:
        product = torch.mm(hidden[a:b], weight.t(), out=low[: b - a])
        z = product if dtype == exact else buffer[: b - a].copy_(product)
        z = rows.transform.apply_(z if bias is None else z.add_(bias))
        slope = rows.transform.slope(z)
        chunk = rows.labels[a:b], rows.ids[a:b], probs[a:b]
        total, lm_sum, fusion_sum = _exp_and_terms_(z, *chunk, rows.kind)
        sums += torch.stack([lm_sum, fusion_sum])
        if not any(needed):
            continue
        exp_to_gradient_(z, total, *chunk, rows.lm_loss_weight, 1 - rows.lm_loss_weight)
        if slope is not None:
            z.mul_(slope)
        if d_bias is not None:
            d_bias += z.sum(0)
        dz = z if dtype == exact else low[: b - a].copy_(z)
        if d_hidden is not None:
            d_hidden[a:b] = dz @ weight
        if d_weight is not None and dtype == exact:
            d_weight.addmm_(dz.t(), hidden[a:b])
        elif d_weight is not None:
            d_weight += dz.t() @ hidden[a:b]
    return sums, [None if g is None or x is None else g.to(x.dtype) for g, x in zip(gradients, given)]


def _exp_and_terms_(z: Tensor, labels, ids, probs, kind):
    """(sums of exp, sum of L_LM, sum of L_fusion) of the rows `z`, which are replaced by exp(z - max)."""
    top = z.amax(1, keepdim=True) if z.numel() else z[:, :1]
    at_labels, at_ids = z.gather(1, labels[:, None]), z.gather(1, ids.clamp(min=0))  # before z is overwritten
    total = z.sub_(top).exp_().sum(1, keepdim=True)
    lse = (top + total.log())[:, 0]
    return total, *picked_terms(at_labels[:, 0], at_ids, lse, probs, kind)
