"""The lean head: lm_head and loss for labelled positions only and in chunks; logits of a whole sequence never exist.

`install_lean_head(model)` puts a forward in front of the model's own. Called with the fusion columns it runs the
decoder, picks the hidden states of the labelled positions and takes them through lm_head chunk by chunk; called without
them (generate, evaluation of logits) it is the original forward. It is installed before any wrapping.

Two ways through lm_head (the arithmetic of both is in `head_loss.py`):
- a plain Linear: its own forward gets a second form, hidden states and `LabelledRows` in, losses out. The gradient is
  taken right there and nothing but d hidden and d weight is kept: three matrix products, as in plain training, over the
  labelled rows only. lm_head is called once as a module on every rank whatever its labels, so FSDP and ZeRO-3 gather
  and free its weight around it as usual.
- any other head (adapters, quantized, hooked): it is called as it is, chunk by chunk, and again in backward. The number
  of calls is fixed, or collective operations inside would wait forever; a chunk may be empty.

Shape letters: B batch, T tokens, N labelled positions, V vocabulary, D hidden, K entries of a distribution.
"""

import functools
import inspect
from types import MethodType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fusechat_fuse.models.logit_transform import FAMILIES, transform_of
from fusechat_fuse.training.head_loss import FusionOutput, LabelledRows
from fusechat_fuse.training.loss import IGNORED

HEAD_CALLS = 8  # of an lm_head that is not a plain Linear, per batch: the same number on every rank


def causal_model(model) -> PreTrainedModel:
    """The causal language model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def why_not_lean(model: nn.Module) -> str | None:
    """The reason why the lean head cannot serve this model, or None."""
    inner = causal_model(model)
    if transform_of(inner) is None:
        return f"{type(inner).__name__} is not among the families whose head is known ({', '.join(FAMILIES)})"
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


def install_lean_head(model: nn.Module) -> None:
    """Put the lean forward in front of the own one of a model for which `why_not_lean` is None (once).

    The installed forward takes, beside the model's own arguments: `shift_labels` [B, T], `target_ids` and
    `target_probs` [B, T, K], `lm_loss_weight`, `fusion_loss_type`; and then returns a `FusionOutput` of sums.
    """
    inner = causal_model(model)
    if _is_bound(inner):
        return
    lm_head = inner.get_submodule("lm_head")
    if is_plain_linear(lm_head):
        _bind(lm_head, _linear_forward)
    _bind(inner, _causal_forward, _lean_head=transform_of(inner))


def is_plain_linear(lm_head: nn.Module) -> bool:
    """Whether lm_head(x) is x W^T (+ bias) and nothing listens to its calls or stands in for them."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    own = type(lm_head) is nn.Linear and "forward" not in vars(lm_head)
    return own and not any(getattr(lm_head, hook) for hook in hooks)


def _bind(module: nn.Module, forward, **attributes) -> None:
    """Make `forward` the module's own; a bound method, so that a deep copy of the module is bound to the copy."""
    before = module.forward

    @functools.wraps(getattr(before, "__func__", before))
    def bound(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    vars(module).update(attributes, _forward_before_lean=before, forward=MethodType(bound, module))


def _is_bound(module: nn.Module) -> bool:
    return "_forward_before_lean" in vars(module)


def _causal_forward(self, *args, shift_labels=None, target_ids=None, target_probs=None, **kwargs):
    if target_ids is None:
        if shift_labels is not None:
            kwargs["shift_labels"] = shift_labels
        return self._forward_before_lean(*args, **kwargs)
    weight, kind = kwargs.pop("lm_loss_weight"), kwargs.pop("fusion_loss_type")
    hidden = self.model(*args, **{"use_cache": False, **kwargs}).last_hidden_state  # [B, T, D]
    columns = shift_labels, target_ids, target_probs
    return _head_loss(self, hidden, columns, weight, kind)  # pyright: ignore[reportCallIssue]


def _linear_forward(self, hidden, rows=None):
    if rows is None:
        return self._forward_before_lean(hidden)
    return rows.losses(hidden, self.weight, self.bias)


@torch.compiler.disable
def _head_loss(model, hidden_BTD: Tensor, columns: tuple[Tensor, ...], weight: float, kind: str) -> FusionOutput:
    (labels, ids, probs), lm_head = columns, model.lm_head
    at = (labels.reshape(-1) != IGNORED).nonzero(as_tuple=True)[0]  # [N]
    hidden = hidden_BTD.flatten(0, 1).index_select(0, at.to(hidden_BTD.device))  # [N, D]
    chosen = labels.reshape(-1)[at], ids.flatten(0, 1)[at], probs.flatten(0, 1)[at]
    labels_N, ids_NK, probs_NK = (x.to(hidden.device) for x in chosen)  # a model over several devices ends elsewhere
    rows = LabelledRows(labels_N, ids_NK, probs_NK, weight, kind, model._lean_head)
    if _is_bound(getattr(lm_head, "_fsdp_wrapped_module", lm_head)):
        return FusionOutput(*lm_head(hidden, rows=rows))
    return rows.recomputed(lm_head, hidden, HEAD_CALLS)
