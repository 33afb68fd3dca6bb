"""SCE and VaRM as mergekit merge methods: parameters checked while mergekit plans, errors that name the model.

`sce` and `varm` below are mergekit `MergeMethod` objects. mergekit resolves filters and gradients of the YAML
parameters and calls them tensor by tensor; the numbers are `kernel`'s. Inputs of different dtypes are read as they are
stored, so no converted copy of a whole tensor is made.
"""

import logging
import re
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Annotated, Any

import torch
from mergekit.common import ModelReference
from mergekit.merge_methods.base import (
    BasePolicy,
    InputContract,
    MergeMethod,
    MergeMethodSpec,
    OptionalTensorPolicy,
    ParameterScope,
    ParameterSpec,
    TensorEntry,
    TensorGroup,
)
from mergekit.merge_methods.dtype import align_dtype, promoted_dtype
from pydantic import PlainValidator
from pydantic_core import PydanticCustomError

from fusechat_merge import _autoload, checkpoint, kernel
from fusechat_merge.once import warn_once
from fusechat_merge.reporting import reporter
from fusechat_merge.versions import versions

logger = logging.getLogger(__name__)
SLICE = re.compile(r"\.slices\[\d+\]$")  # mergekit's name of a slice that it plans
NO_EFFECT = ("int8_mask", "normalize")  # parameters of sce


def _parameter(
    name: str,
    method: str,
    expected: str,
    accept: Callable[[Any], Any],
    default: Any,
    description: str,
    remedy: str = "Use one of these.",
    scope: ParameterScope = ParameterScope.SHARED,
) -> ParameterSpec:
    """A parameter with the value that `accept` returns, or an error if it raises TypeError or ValueError."""

    def validate(value: Any) -> Any:
        try:
            return accept(value)
        except (TypeError, ValueError):
            text = f"{name} for {method}: expected {expected}, got {value!r}. {remedy}"
            raise PydanticCustomError("merge_parameter", "{text}", {"text": text}) from None

    return ParameterSpec(name, Annotated[Any, PlainValidator(validate)], scope, default, description)


def _number(value: Any, largest: float) -> float:
    """A YAML scalar as a number from 0 to `largest`."""
    if isinstance(value, bool) or not 0 <= float(value) <= largest:
        raise ValueError
    return float(value)


def _choice(name: str, method: str, choices: tuple[str, ...], description: str) -> ParameterSpec:
    def accept(value: Any) -> str:
        return choices[choices.index(value)]

    return _parameter(name, method, " or ".join(choices), accept, choices[0], description)


def _without_effect(name: str) -> ParameterSpec:
    def accept(value: Any) -> Any:
        if value:
            warn_once(
                logger,
                f"{name} has no effect on sce: its coefficients always add up to 1, and it needs no mask in int8",
            )
        return value

    return _parameter(name, "sce", "any value", accept, False, "accepted for old recipes; has no effect")


WEIGHT = _parameter(
    "weight",
    "sce and varm",
    "a number >= 0",
    lambda value: None if value is None else _number(value, sys.float_info.max),
    None,
    "prior that multiplies a target's coefficient before normalising (default 1); 0 for all gives the pivot. "
    "With sce a target of weight 0 still votes for the sign and counts in the variance",
    "To leave a target out, remove it.",
    ParameterScope.INPUT,  # the pivot's too, to refuse it
)


class PivotMerge(MergeMethod):
    """A merge of targets into the pivot (mergekit's base model), one tensor at a time."""

    reads_as_stored = True  # read by `planning`

    def __init__(self, name: str, pretty_name: str, reference_url: str, parameters: tuple[ParameterSpec, ...], compute):
        self.spec = MergeMethodSpec(
            name=name,
            pretty_name=pretty_name,
            reference_url=reference_url,
            parameters=(*parameters, WEIGHT),
            contract=InputContract(base=BasePolicy.REQUIRED),
            optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON,
        )
        self._compute = compute  # kernel.sce or kernel.varm

    def validate_inputs(
        self, input_ids: Sequence[Hashable], base_id: Hashable | None = None, *, group_name: str | None = None
    ) -> None:
        """mergekit's structural check, while it plans and before each tensor, with errors that say what to change."""
        where = f"{self.spec.name}, {group_name}" if group_name else self.spec.name
        if base_id is None:
            raise ValueError(
                f"base_model for {where}: expected the pivot, got none. Add `base_model: PIVOT` to the configuration."
            )
        if base_id not in input_ids:
            raise ValueError(
                f"inputs for {where}: expected the pivot {base_id} among them, got "
                f"{', '.join(map(str, input_ids)) or 'none'}. List the pivot among the sources (its tensor must exist)."
            )
        if len(input_ids) < 2:
            raise ValueError(
                f"inputs for {where}: expected at least one target beside the pivot {base_id}, got none. Add a target."
            )
        repeated = next((key for index, key in enumerate(input_ids) if key in input_ids[:index]), None)
        if repeated is not None:
            raise ValueError(
                f"inputs for {where}: expected each model once, got {repeated} twice. Remove one, or give it a weight."
            )
        super().validate_inputs(input_ids, base_id, group_name=group_name)
        if group_name and SLICE.search(group_name):  # mergekit plans a slice: its checkpoints can be read
            if group_name.endswith(".slices[0]"):  # once per planned output
                warn_once.cache_clear()
                ours, theirs = versions()
                logger.info("merge_method %s is served by fusechat %s on mergekit %s", self.spec.name, ours, theirs)
            models = [model for model in input_ids if isinstance(model, ModelReference)]
            checkpoint.check_distinct(where, models)
            checkpoint.check_all(self.spec.name, models, base_id)

    def _bind_per_input(self, group: TensorGroup, parameter: ParameterSpec, value: Any):
        if group.base is not None:  # from Python a weight may be given for the targets only
            targets = [entry.id for entry in group.non_base]
            if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == len(targets):
                value = dict(zip(targets, value))
            if isinstance(value, Mapping):
                value = {group.base.id: None, **value}
        return super()._bind_per_input(group, parameter, value)

    def _execute_resolved(self, groups: Sequence[TensorGroup], parameters, **options) -> tuple[torch.Tensor, ...]:
        for group in groups:
            for entry in group.entries:
                if entry.tensor.is_floating_point() and entry.tensor.itemsize == 1:
                    dtype = str(entry.tensor.dtype).removeprefix("torch.")
                    raise ValueError(
                        f"dtype for tensor {group.metadata.name} of {entry.id}: expected float32, float16 or bfloat16, "
                        f"got {dtype}, whose scales a merge does not apply. Convert that model first."
                    )
        return super()._execute_resolved(groups, parameters, **options)

    def _execute(self, groups, parameters, options, *, input_dtypes, out_dtype=None) -> tuple[torch.Tensor, ...]:
        results = []
        for group, values, dtype in zip(groups, parameters, input_dtypes):
            if dtype != promoted_dtype(group):  # the caller asked for the inputs in this precision
                group = align_dtype(group, dtype)
            results.append(self._merge(group, dict(values), out_dtype or dtype))
        return tuple(results)

    def _merge(self, group: TensorGroup, values: dict[str, Any], dtype: torch.dtype | None) -> torch.Tensor:
        pivot, targets = group.base, group.non_base
        assert pivot is not None  # `validate_inputs` refuses the group otherwise
        weights = self._target_weights(pivot, targets, values.pop("weight"))
        tensors = [entry.tensor for entry in targets]
        try:
            merge = self._compute(pivot.tensor, tensors, weights=weights, dtype=dtype, **values)
        except kernel.NonFiniteError as error:
            entry = pivot if error.index is None else targets[error.index]
            raise ValueError(
                f"weights for tensor {group.metadata.name} of {entry.id}: expected finite numbers, got NaN or inf. "
                "Repair or leave out that model."
            ) from None
        if merge.merged.dtype == torch.float16 and not bool(torch.isfinite(merge.merged).all()):
            raise ValueError(
                f"result for tensor {group.metadata.name}: expected numbers within float16 (65504), got larger ones. "
                "Write `out_dtype: bfloat16` or `out_dtype: float32`."
            )
        if isinstance(pivot.id, ModelReference):  # a run of mergekit, not a call of its Python functions
            name, names = str(group.metadata.name), [str(entry.id) for entry in targets]
            reporter.add(self.spec.name, str(pivot.id), names, name, (pivot.tensor, *tensors), merge)
        return merge.merged

    def _target_weights(
        self, pivot: TensorEntry, targets: Sequence[TensorEntry], given: Mapping[Hashable, float | None]
    ) -> list[float] | None:
        values = [given[entry.id] for entry in targets]
        pivots = given[pivot.id]
        if pivots is not None and any(value != pivots for value in values):  # all equal: one global setting
            raise ValueError(
                f"weight for the pivot {pivot.id}: expected none, got {pivots}. Give weights to the targets only."
            )
        if all(value is None for value in values):
            return None
        weights = [1.0 if value is None else value for value in values]
        if len(set(weights)) > 1:
            warn_once(
                logger,
                f"weight multiplies the coefficient that {self.spec.name} computes for a target, before they are "
                f"normalised: {', '.join(f'{entry.id} {weight:g}' for entry, weight in zip(targets, weights))} change "
                "the result. Leave weight out to merge as published (it is not the share, as in linear or ties)",
            )
        return weights


sce = PivotMerge(
    "sce",
    "SCE",
    "https://arxiv.org/abs/2408.07990",
    (
        _parameter(
            "select_topk",
            "sce",
            "a number in [0, 1]",
            lambda value: _number(value, 1.0),
            1.0,
            "share of the elements that are selected, in [0, 1]; 0 gives the pivot",
            "Use 1.0 to select all elements.",
        ),
        _choice(
            "select_scope",
            "sce",
            kernel.SELECT_SCOPES,
            "what the selection serves: all (the paper) or coefficients (the code of FuseChat-7B-v2.0)",
        ),
        *map(_without_effect, NO_EFFECT),
    ),
    lambda pivot, targets, *, int8_mask, normalize, **options: kernel.sce(pivot, targets, **options),
)

varm = PivotMerge(
    "varm",
    "VaRM",
    "https://arxiv.org/abs/2402.16107",
    (
        _choice(
            "granularity",
            "varm",
            kernel.GRANULARITIES,
            "one ratio for each tensor (matrix) or for each element (element)",
        ),
    ),
    kernel.varm,
)

_autoload.register_waiting(__name__)
