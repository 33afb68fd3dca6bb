"""What some model families do with their logits after lm_head."""

from dataclasses import dataclass

import torch
from torch import Tensor


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
