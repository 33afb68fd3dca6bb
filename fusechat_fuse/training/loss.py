"""The loss of pairwise fusion, sparse: one logsumexp serves the language-model term and the fusion term.

Per labelled position, with z the logits, y the label and q a distribution over a few vocabulary entries u_k with mass
m = sum_k q_k (at most 1; up to 2 where the label stands for the tail):

    L_LM     = lse(z) - z_y
    L_fusion = m lse(z) - sum_k q_k z_{u_k}                      (kind "ce")
             = the same + sum_k q_k log q_k                      (kind "kl", KL(q || softmax z))
    d/dz [a L_LM + b L_fusion] = (a + b m) softmax(z) - a e_y - b q

A dense [B, T, V] distribution is never built, and the gradient is written into one buffer. Shape letters: B batch,
T tokens, V vocabulary, K entries of a distribution, N labelled positions (rows). Arithmetic is float32 whatever the
logits' dtype (float64 for float64 logits).
"""

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusechat_fuse.errors import InputError
from fusechat_fuse.presets import LOSS_KINDS, PRESETS

IGNORED = -100
Number = TypeVar("Number", float, Tensor)
_ROW_BUDGET = {"cpu": 1 << 23, "other": 1 << 27}  # logits held in float32 at a time


class FusionLoss(NamedTuple):
    """`loss` = lm_loss_weight * `lm_loss` + (1 - lm_loss_weight) * `fusion_loss`; 0-d tensors, all differentiable."""

    loss: Tensor
    lm_loss: Tensor
    fusion_loss: Tensor


def fusion_loss(
    logits: Tensor,
    labels: Tensor,
    target_ids: Tensor,
    target_probs: Tensor,
    *,
    lm_loss_weight: float = PRESETS["fusechat"]["lm_loss_weight"],
    kind: str = "ce",
    num_items: int | float | Tensor | None = None,
) -> FusionLoss:
    """Pairwise fusion loss lambda mean(L_LM) + (1 - lambda) mean(L_fusion) over the labelled positions.

    Args:
        logits: [B, T, V] floating point, borrowed.
        labels: [B, T] int64, already shifted (`labels[b, t]` is what `logits[b, t]` predicts), -100 = ignored.
        target_ids: [B, T, K] int64 vocabulary entries, padding -1. K may be 0. An id may occur twice (its
            probabilities add up), except under "kl", whose entropy is taken per entry.
        target_probs: [B, T, K] probabilities of these entries; each labelled position sums to m, of any size.
        lm_loss_weight: lambda in [0, 1]; default: FusionConfig's 0.5 (the paper: 0.9).
        kind: "ce" or "kl".
        num_items: what the sums are divided by; None: the number of labelled positions here (at least 1).

    Returns:
        `FusionLoss` of 0-d tensors in float32 (float64 for float64 logits). Nothing labelled: 0, with a gradient
        of zeros.

    Raises:
        InputError (a ValueError): shapes that do not fit, an unknown `kind`, a weight outside [0, 1], ids outside the
            vocabulary (checked on the CPU; elsewhere the device's own assertion).

    Source: FuseChat (arXiv 2408.07990), pairwise fusion; the gradient with m < 1 follows from the same formula.
    Differs from the released trainer: distributions are not rounded to bfloat16; means run over `num_items`, so that
    gradient accumulation and data parallelism do not change the loss; no labelled position is 0, not 0/0.
    """
    check_loss_options(lm_loss_weight, kind)
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise InputError(
            f"shape for labels: expected [B, T] of logits [B, T, V] = {tuple(logits.shape)}, got {tuple(labels.shape)}."
            " Pass labels that are already shifted, one for each logits row."
        )
    if target_ids.shape != target_probs.shape or target_ids.dim() != 3 or target_ids.shape[:2] != labels.shape:
        raise InputError(
            f"shape for target_ids and target_probs: expected [B, T, K] with [B, T] = {tuple(labels.shape)}, got "
            f"{tuple(target_ids.shape)} and {tuple(target_probs.shape)}. Pad each position to K entries."
        )
    rows = (labels.reshape(-1) != IGNORED).nonzero(as_tuple=True)[0]  # [N]
    chosen = labels.reshape(-1)[rows], target_ids.flatten(0, 1)[rows], target_probs.flatten(0, 1)[rows]
    check_ids(*chosen[:2], vocab_size=logits.shape[-1])
    lm_sum, fusion_sum = row_sums(logits.flatten(0, 1), *chosen, kind, rows)
    num_items = max(len(rows), 1) if num_items is None else num_items
    lm, fusion = lm_sum / num_items, fusion_sum / num_items
    return FusionLoss(weighted_loss(lm, fusion, lm_loss_weight), lm, fusion)


def weighted_loss(lm: Number, fusion: Number, lm_loss_weight: float) -> Number:
    """lambda lm + (1 - lambda) fusion; a term of weight 0 is left out, as 0 times infinity would be NaN."""
    if lm_loss_weight == 1:
        return lm
    if lm_loss_weight == 0:
        return fusion
    return lm_loss_weight * lm + (1 - lm_loss_weight) * fusion


def check_loss_options(lm_loss_weight: float, kind: str) -> None:
    """Raise InputError for a weight outside [0, 1], by which one term would be unlearned, or an unknown kind."""
    if not 0 <= lm_loss_weight <= 1:
        raise InputError(f"value for lm_loss_weight: expected [0, 1], got {lm_loss_weight}. The paper uses 0.9.")
    if kind not in LOSS_KINDS:
        raise InputError(
            f"value for the fusion loss type: expected one of {', '.join(LOSS_KINDS)}, got {kind!r}. The paper uses ce."
        )


def check_ids(labels_N: Tensor, ids_NK: Tensor, vocab_size: int) -> None:
    """Raise InputError where a label or an id of q is outside the vocabulary (CPU tensors only: no device sync)."""
    if labels_N.device.type != "cpu" or labels_N.numel() == 0:
        return
    for name, ids, low in (("labels", labels_N, 0), ("target_ids", ids_NK, -1)):
        if ids.numel() and (int(ids.min()) < low or int(ids.max()) >= vocab_size):
            raise InputError(
                f"ids for {name}: expected {low} to {vocab_size - 1}, got {int(ids.min())} to {int(ids.max())}. "
                "Use data that was aligned to this model's tokenizer."
            )


def row_sums(logits_MV: Tensor, labels_N: Tensor, ids_NK: Tensor, probs_NK: Tensor, kind: str, rows_N=None):
    """(sum of L_LM, sum of L_fusion) over the rows `rows_N` of `logits_MV` (None: all M = N rows), differentiable."""
    dtype = torch.promote_types(logits_MV.dtype, torch.float32)
    return _RowSums.apply(logits_MV, labels_N, ids_NK, probs_NK.to(dtype), kind, rows_N)


class _RowSums(torch.autograd.Function):
    """Sums over rows; saves the logits themselves and one logsumexp per row, and no softmax."""

    @staticmethod
    def forward(ctx, logits, labels, ids, probs, kind, rows):
        lm_sum = torch.zeros((), dtype=probs.dtype, device=logits.device)
        fusion_sum = lm_sum.clone()
        lse = torch.empty(len(labels), dtype=probs.dtype, device=logits.device)
        for a, b in row_chunks(len(labels), logits.shape[-1], logits.device):
            z = logits[a:b] if rows is None else logits[rows[a:b]]
            z = z.to(probs.dtype)
            lse[a:b] = torch.logsumexp(z, -1)
            at_labels, at_ids = z.gather(1, labels[a:b, None])[:, 0], z.gather(1, ids[a:b].clamp(min=0))
            lm, fusion = picked_terms(at_labels, at_ids, lse[a:b], probs[a:b], kind)
            lm_sum += lm
            fusion_sum += fusion
        ctx.save_for_backward(logits, labels, ids, probs, lse, rows)
        return lm_sum, fusion_sum

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        lm_grad, fusion_grad = grads
        logits, labels, ids, probs, lse, rows = ctx.saved_tensors
        grad = torch.empty_like(logits) if rows is None else torch.zeros_like(logits)
        for a, b in row_chunks(len(labels), logits.shape[-1], logits.device):
            z = logits[a:b] if rows is None else logits[rows[a:b]]
            p = z.to(probs.dtype, copy=True).sub_(lse[a:b, None]).exp_()
            exp_to_gradient_(p, 1, labels[a:b], ids[a:b], probs[a:b], lm_grad, fusion_grad)
            if rows is None:
                grad[a:b] = p
            else:
                grad[rows[a:b]] = p.to(grad.dtype)
        return grad, None, None, None, None, None


def picked_terms(at_label_N: Tensor, at_ids_NK: Tensor, lse_N: Tensor, probs_NK: Tensor, kind: str):
    """(sum of L_LM, sum of L_fusion), given the logits at the labels and at the entries of q, and the logsumexp."""
    at_ids_NK = at_ids_NK.masked_fill(probs_NK == 0, 0)  # 0 * -inf is no evidence
    fusion = (probs_NK.sum(1) * lse_N).sum() - (probs_NK * at_ids_NK).sum()
    if kind == "kl":
        fusion = fusion + torch.xlogy(probs_NK, probs_NK).sum()
    return (lse_N - at_label_N).sum(), fusion


def exp_to_gradient_(e_NV: Tensor, total_N1, labels_N, ids_NK, probs_NK, lm_weight, fusion_weight) -> Tensor:
    """In place: exp(z - c) -> (a + b m) softmax(z) - a e_y - b q, with a = `lm_weight`, b = `fusion_weight`.

    `total_N1` are the sums of `e_NV` over the vocabulary, or 1 where it is the softmax already.
    """
    e_NV.mul_((lm_weight + fusion_weight * probs_NK.sum(1, keepdim=True)) / total_N1)
    minus_a = -torch.as_tensor(lm_weight, dtype=e_NV.dtype, device=e_NV.device)
    e_NV.scatter_add_(1, labels_N[:, None], minus_a.expand(len(labels_N), 1))
    return e_NV.scatter_add_(1, ids_NK.clamp(min=0), probs_NK * -fusion_weight)  # padding adds 0 to entry 0


def row_chunks(rows: int, vocab_size: int, device: torch.device, least: int = 1):
    """Row ranges whose float32 logits stay within a fixed budget (32 MiB on a CPU, 512 MiB elsewhere), or `least`."""
    budget = _ROW_BUDGET.get(device.type, _ROW_BUDGET["other"])
    size = max(least, budget // max(vocab_size, 1))
    return [(a, min(a + size, rows)) for a in range(0, rows, size)]
