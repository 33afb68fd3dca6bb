"""Scaling and capping of logits after lm_head by model family, for capture and training.

Some forwards scale the head's output z, some cap it:

    z -> scale z / divisor, then z -> cap tanh(z / cap)

`transform_of` goes by class, for the families whose forward is decoder -> lm_head -> transform and nothing else: the
meaning of a number in a configuration differs between families (Cohere multiplies by `logit_scale`, Granite divides by
`logits_scaling`). For any other model `possible_transforms` lists what its configuration may mean; comparing with the
model's own logits decides.

Arithmetic is done in the order and the dtype of the models' own forwards, so results are theirs bit by bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SCALE_NAMES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")  # in configurations


@dataclass(frozen=True)
class LogitTransform:
    """z -> scale z / divisor, then cap tanh(z / cap); as it stands, the identity."""

    scale: float = 1.0
    divisor: float = 1.0
    cap: float | None = None

    def __call__(self, z: Tensor) -> Tensor:
        """The transformed logits; `z`, of any shape, is borrowed."""
        if self.scale != 1:
            z = z * self.scale
        if self.divisor != 1:
            z = z / self.divisor
        return z if self.cap is None else (z / self.cap).tanh() * self.cap

    def apply_(self, z: Tensor) -> Tensor:
        """The same in place."""
        if self.scale != 1:
            z.mul_(self.scale)
        if self.divisor != 1:
            z.div_(self.divisor)
        if self.cap is not None:
            z.div_(self.cap).tanh_().mul_(self.cap)
        return z

    def slope(self, transformed: Tensor) -> Tensor | float | None:
        """d transformed / d z from the transformed logits; a number where it is one for all, None where that is 1."""
        factor = self.scale / self.divisor
        if self.cap is None:
            return None if factor == 1 else factor
        slope = 1 - (transformed / self.cap) ** 2
        return slope if factor == 1 else slope * factor


FAMILIES: dict[
    str, dict[str, str]
] = {  # by the class of the model: parts of its transform -> their names in the configuration
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {},
    "MixtralForCausalLM": {},
    "GemmaForCausalLM": {},
    "Gemma2ForCausalLM": {"cap": "final_logit_softcapping"},
    "Phi3ForCausalLM": {},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {},
    "CohereForCausalLM": {"scale": "logit_scale"},
    "GraniteForCausalLM": {"divisor": "logits_scaling"},
}


def transform_of(model) -> LogitTransform | None:
    """The transform of a causal language model of a known family; None where the class is not one of transformers'."""
    kind = type(model)
    if not kind.__module__.startswith("transformers.models.") or kind.__name__ not in FAMILIES:
        return None
    return LogitTransform(**{part: getattr(model.config, name) for part, name in FAMILIES[kind.__name__].items()})


def possible_transforms(config) -> list[LogitTransform]:
    """The transforms that the numbers in a configuration may stand for, the identity last."""
    found = []
    if cap := getattr(config, "final_logit_softcapping", None):
        found.append(LogitTransform(cap=cap))
    for name in SCALE_NAMES:
        number = getattr(config, name, None)
        if isinstance(number, int | float) and number != 1:
            found += [LogitTransform(scale=number), LogitTransform(divisor=number)]
    return [*found, LogitTransform()]
