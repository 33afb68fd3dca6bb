"""Changes to mergekit's planner for merge methods with `reads_as_stored`.

mergekit casts every input to the recipe's `dtype` when it reads it. With `dtype: bfloat16` the float32 weights of a
target are rounded before its task vector is taken, and a task vector of a fine-tuning is smaller than that rounding.
Here the inputs are read as they are stored, and the result is rounded once, to `out_dtype` or, without one, `dtype`.
For `dtype: float64` the cast stays: there it adds digits. Vocabulary tensors that a tokenizer section averages or pads
are widened to float32 first, as mergekit averages in the dtype that it is given.

A plan that would write no layers, or leave out tensors of the pivot that its model needs (biases that mergekit's table
of the architecture lacks, experts behind dense first layers), is refused.
"""

import functools
import logging
from collections.abc import Iterable
from typing import Any

import torch
from mergekit.common import get_auto_cls
from mergekit.io.tasks import GatherTensors, LoaderCache
from mergekit.tokenizer import PermutedVocabulary
from torch import Tensor, bfloat16, float16
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.initialization import no_init_weights

logger = logging.getLogger(__name__)


class GatherWide(GatherTensors, frozen=True):  # pyright: ignore[reportGeneralTypeIssues]: it is, by pydantic
    """Gathers the inputs of one tensor, 16-bit ones as float32 (which holds all their values)."""

    def execute(self, **loaded: Any) -> dict[Any, Tensor]:
        gathered = super().execute(**loaded)
        return {model: t.float() if t.dtype in (bfloat16, float16) else t for model, t in gathered.items()}


def patch(plan: Any) -> None:
    """Wrap two methods of the planner in `mergekit.plan`, the module; calling it again changes nothing."""
    planner = plan.MergePlanner
    if getattr(planner, "patched_by_fusechat", False):
        return
    plan_tensor, plan_all = planner.plan_tensor, planner._plan

    @functools.wraps(plan_tensor)
    def plan_tensor_as_stored(self, *args, **kwargs):
        planned = len(self._tensors)
        plan_tensor(self, *args, **kwargs)
        if getattr(self._method, "reads_as_stored", False):
            added = [(weight, as_stored(weight, task, self.config)) for weight, task in self._tensors[planned:]]
            self._tensors[planned:] = added

    @functools.wraps(plan_all)
    def plan_and_check(self):
        plan_all(self)
        if getattr(self._method, "reads_as_stored", False):
            check_layers(self)
            check_nothing_lost(self)

    planner.plan_tensor, planner._plan = plan_tensor_as_stored, plan_and_check
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


def check_layers(planner: Any) -> None:
    """Raises ValueError where the layer ranges of a recipe select no layers, or run backwards."""
    pivot = planner.config.base_model.config(trust_remote_code=planner.options.trust_remote_code)
    for name, module in planner.config.modules.items():
        ranges = [source.layer_range for part in module.slices for source in part.sources]
        of_all = planner.arch_info.modules[name].architecture.num_layers(pivot)
        backwards = next((r for r in ranges if r[0] < 0 or r[1] < r[0]), None)
        if backwards or (of_all and not any(end > start for start, end in ranges)):
            raise ValueError(
                f"layer_range in module {name} for {planner._method.spec.name}: expected [FIRST, LAST + 1], got "
                f"{list(backwards or ranges[0])}, which selects no layers. Write [0, {of_all}] for all."
            )


def check_nothing_lost(planner: Any) -> None:
    """Raises ValueError where the merged model would lack tensors that its class needs and the pivot has."""
    pivot, config = planner.config.base_model, planner.out_model_config
    try:
        with torch.device("meta"), no_init_weights():
            build = get_auto_cls(config.architectures[0]).from_config
            needed = build(config, trust_remote_code=planner.options.trust_remote_code).state_dict()
    except Exception as error:
        logger.info(
            "whether the merge of %s is complete is not checked, as its model cannot be built: %s", pivot, error
        )
        return
    written = _loadable(config.model_type, [weight.name for weight, _ in planner._tensors])
    there = _loadable(config.model_type, LoaderCache().get(pivot).index.tensor_paths)
    lost = [name for name in needed if name in there and name not in written]
    if lost:
        raise ValueError(
            f"tensors for {planner._method.spec.name}: expected all {len(needed)} of {pivot} in the merged model, got "
            f"none for {len(lost)} ({lost[0]}, ...), which mergekit leaves out of {config.architectures[0]}. Merge its "
            "tensors by `merge_state_dicts` in Python."
        )


def _loadable(model_type: str, names: Iterable[str]) -> set[str]:
    """The names of the parameters that transformers loads from tensors of these names."""
    found = set(names)
    for transform in get_checkpoint_conversion_mapping(model_type) or ():
        for name in list(found):
            renamed, pattern = transform.rename_source_key(name)
            if pattern is not None:
                first = transform.target_patterns[0]
                found |= {renamed, *(renamed.replace(first, target) for target in transform.target_patterns)}
    return found
