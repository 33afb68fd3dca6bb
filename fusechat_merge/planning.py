"""Changes to mergekit's planner for merge methods with `reads_as_stored`.

mergekit casts every input to the recipe's `dtype` when it reads it. With `dtype: bfloat16` the float32 weights of a
target are rounded before its task vector is taken, and a task vector of a fine-tuning is smaller than that rounding.
Here the inputs are read as they are stored, and the result is rounded once, to `out_dtype` or, without one, `dtype`.
For `dtype: float64` the cast stays: there it adds digits. Vocabulary tensors that a tokenizer section averages or pads
are widened to float32 first, as mergekit averages in the dtype that it is given.
"""

import functools
from typing import Any

from mergekit.io.tasks import GatherTensors
from mergekit.tokenizer import PermutedVocabulary
from torch import Tensor, bfloat16, float16


class GatherWide(GatherTensors, frozen=True):  # pyright: ignore[reportGeneralTypeIssues]: it is, by pydantic
    """Gathers the inputs of one tensor, 16-bit ones as float32 (which holds all their values)."""

    def execute(self, **loaded: Any) -> dict[Any, Tensor]:
        gathered = super().execute(**loaded)
        return {model: t.float() if t.dtype in (bfloat16, float16) else t for model, t in gathered.items()}


def patch(plan: Any) -> None:
    """Wrap `plan_tensor` of the planner in `mergekit.plan`, the module; calling it again changes nothing."""
    planner = plan.MergePlanner
    if getattr(planner, "patched_by_fusechat", False):
        return
    plan_tensor = planner.plan_tensor

    @functools.wraps(plan_tensor)
    def plan_tensor_as_stored(self, *args, **kwargs):
        planned = len(self._tensors)
        plan_tensor(self, *args, **kwargs)
        if getattr(self._method, "reads_as_stored", False):
            added = [(weight, as_stored(weight, task, self.config)) for weight, task in self._tensors[planned:]]
            self._tensors[planned:] = added

    planner.plan_tensor = plan_tensor_as_stored
    planner.patched_by_fusechat = True


def as_stored(weight: Any, task: Any, config: Any) -> Any:
    """The task of one merged tensor, its inputs not cast and its result in the recipe's dtype."""
    out_dtype = config.out_dtype or config.dtype
    if weight.force_dtype or not out_dtype:
        return task
    keep_cast = (config.dtype or "").removeprefix("torch.") == "float64"
    inputs = task.gather_tensors if keep_cast else _without_cast(task.gather_tensors)
    return task.model_copy(update={"gather_tensors": inputs, "out_dtype": out_dtype})


def _without_cast(inputs: Any) -> Any:
    if isinstance(inputs, GatherTensors):
        return inputs.model_copy(update={"dtype": None})
    gathered = _without_cast(inputs.gather_tensors)  # vocabulary tasks
    if isinstance(inputs, PermutedVocabulary):
        gathered = GatherWide(weight_info=gathered.weight_info, device=gathered.device)
    return inputs.model_copy(update={"gather_tensors": gathered})
