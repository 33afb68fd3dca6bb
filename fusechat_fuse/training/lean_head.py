"""The lean head: lm_head and loss for labelled positions only and in chunks; logits of a whole sequence never exist.

`install_lean_head(model)` puts a forward in front of the model's own. Called with the fusion columns it runs the
decoder, picks the hidden states of the labelled positions and takes them through lm_head chunk by chunk; called without
them (generate, evaluation of logits) it is the original forward. It is installed before any wrapping.

Two ways through lm_head:
- a plain Linear: its own forward gets a second form, hidden states and targets in, losses out. The gradient with
  respect to logits is known in closed form (`loss.py`), so it is taken right there and nothing but d hidden and
  d weight is kept: three matrix products, as in plain training, over the labelled rows only. lm_head is called once as
  a module on every rank whatever its labels, so FSDP and ZeRO-3 gather and free its weight around it as usual.
- any other head (adapters, quantized, hooked): it is called as it is, chunk by chunk, and again in backward. The number
  of calls is fixed, or collective operations inside would wait forever; a chunk may be empty.

Shape letters: B batch, T tokens, N labelled positions, V vocabulary, D hidden, K entries of a distribution.
"""

import functools
import inspect
from dataclasses import dataclass
from types import MethodType

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from fusechat_fuse.training.loss import IGNORED, check_ids, exp_to_gradient_, picked_terms, row_chunks, row_sums

_LEAST_ROWS = 256  # of a chunk: d weight is read and written once a chunk


@dataclass
class FusionOutput(ModelOutput):
    """Sums over labelled positions: `loss` = lambda lm_loss + (1 - lambda) fusion_loss carries the gradient."""

    loss: Tensor | None = None
    lm_loss: Tensor | None = None
    fusion_loss: Tensor | None = None


@dataclass(frozen=True)
class LogitTransform:
    """What a family does after lm_head: z -> cap tanh(scale z / cap)."""

    scale: float | None = None
    cap: float | None = None

    def apply_(self, z: Tensor) -> Tensor:
        if self.scale is not None:
            z.mul_(self.scale)
        if self.cap is not None:
            z.div_(self.cap).tanh_().mul_(self.cap)
        return z

    def __call__(self, z: Tensor) -> Tensor:
        if self.scale is not None:
            z = z * self.scale
        return z if self.cap is None else torch.tanh(z / self.cap) * self.cap

    def slope(self, transformed: Tensor) -> Tensor | None:
        """d transformed / d z, from the transformed logits; None where it is 1."""
        if self.cap is None:
            return None if self.scale is None else torch.full_like(transformed[:1, :1], self.scale)
        return (1 - (transformed / self.cap) ** 2) * (1.0 if self.scale is None else self.scale)


def _none(config):
    return LogitTransform()


# Families whose forward is decoder -> lm_head -> transform, and nothing else. By class: the meaning of a scale differs.
FAMILIES = {
    "LlamaForCausalLM": _none,
    "MistralForCausalLM": _none,
    "MixtralForCausalLM": _none,
    "GemmaForCausalLM": _none,
    "Gemma2ForCausalLM": lambda config: LogitTransform(cap=config.final_logit_softcapping),
    "Phi3ForCausalLM": _none,
    "Qwen2ForCausalLM": _none,
    "Qwen3ForCausalLM": _none,
    "CohereForCausalLM": lambda config: LogitTransform(scale=config.logit_scale),
    "GraniteForCausalLM": lambda config: LogitTransform(scale=1 / config.logits_scaling),
}


def causal_model(model: nn.Module) -> nn.Module:
    """The causal language model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def why_not_lean(model: nn.Module) -> str | None:
    """The reason why the lean head cannot serve this model, or None."""
    inner = causal_model(model)
    name = type(inner).__name__
    if not type(inner).__module__.startswith("transformers.models.") or name not in FAMILIES:
        return f"{name} is not among the families whose head is known ({', '.join(FAMILIES)})"
    if getattr(inner.config, "output_router_logits", False):
        return "output_router_logits adds a loss of its own"
    if (getattr(inner, "_tp_size", None) or 1) > 1:
        return "tensor parallelism splits the head's weight"
    return None


def takes_kept_logits(model: nn.Module) -> bool:
    """Whether the model's own forward can compute logits for a boolean [B, T] mask of positions only."""
    forward = type(causal_model(model)).forward
    try:
        return "slice_logits_to_keep" in inspect.getsource(forward)
    except (OSError, TypeError):
        return False


def install_lean_head(model: nn.Module, *, chunks: int = 8) -> None:
    """Put the lean forward in front of the model's own (once); see the module's text.

    Args:
        model: a causal language model of a known family (`why_not_lean` is None), or a PEFT model around one; changed.
        chunks: calls of lm_head where it is not a plain Linear.

    The installed forward takes, beside the model's own arguments: `shift_labels` [B, T], `target_ids` and
    `target_probs` [B, T, K], `lm_loss_weight`, `fusion_loss_type`; and then returns a `FusionOutput` of sums.
    """
    inner = causal_model(model)
    if "_forward_before_lean" in vars(inner):
        return
    if is_plain_linear(inner.lm_head):
        _bind(inner.lm_head, _linear_forward)
    inner._lean_head = FAMILIES[type(inner).__name__](inner.config), chunks
    _bind(inner, _causal_forward)


def is_plain_linear(lm_head: nn.Module) -> bool:
    """Whether lm_head(x) is x W^T (+ bias) and nothing listens to its calls or stands in for them."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    own = type(lm_head) is nn.Linear and "forward" not in vars(lm_head)
    return own and not any(getattr(lm_head, hook) for hook in hooks)


def _bind(module: nn.Module, forward) -> None:
    """Make `forward` the module's own; a bound method, so that a deep copy of the module is bound to the copy."""
    module._forward_before_lean = before = module.forward

    @functools.wraps(getattr(before, "__func__", before))
    def bound(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    module.forward = MethodType(bound, module)


def _causal_forward(self, *args, shift_labels=None, target_ids=None, target_probs=None, **kwargs):
    if target_ids is None:
        if shift_labels is not None:
            kwargs["shift_labels"] = shift_labels
        return self._forward_before_lean(*args, **kwargs)
    weight, kind = kwargs.pop("lm_loss_weight"), kwargs.pop("fusion_loss_type")
    hidden = self.model(*args, **{"use_cache": False, **kwargs}).last_hidden_state  # [B, T, D]
    return _head_loss(self.lm_head, *self._lean_head, hidden, shift_labels, target_ids, target_probs, weight, kind)


def _linear_forward(self, hidden, rows=None):
    if rows is None:
        return self._forward_before_lean(hidden)
    return rows.losses(hidden, self.weight, self.bias)


@torch.compiler.disable
def _head_loss(lm_head, transform, chunks, hidden_BTD, labels, ids, probs, lm_loss_weight, kind) -> FusionOutput:
    at = (labels.reshape(-1) != IGNORED).nonzero(as_tuple=True)[0]  # [N]
    hidden = hidden_BTD.flatten(0, 1).index_select(0, at.to(hidden_BTD.device))  # [N, D]
    chosen = labels.reshape(-1)[at], ids.flatten(0, 1)[at], probs.flatten(0, 1)[at]
    on_head = (x.to(hidden.device) for x in chosen)  # a model over several devices ends on another than it began
    rows = _Rows(*on_head, lm_loss_weight, kind, transform)
    inner = getattr(lm_head, "_fsdp_wrapped_module", lm_head)
    if "_forward_before_lean" in vars(inner):
        return FusionOutput(*lm_head(hidden, rows=rows))
    return rows.recomputed(lm_head, hidden, chunks)


class _Rows:
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

    def run(self, targets: _Rows) -> Tensor:
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
