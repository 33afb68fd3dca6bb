"""SCE and VaRM on single tensors: select, calculate, erase; variation-ratio merging.

Task vectors d_j = target_j - pivot, each tensor on its own; the rules are those of docs/method.md, "Merging". Nothing
here knows mergekit: tensors in, tensor out. All arithmetic is float32 or better whatever the storage dtype, and the
squares behind the coefficients are float64. `compiled.Compiled` makes the passes over memory on a CPU; `passes.Passes`
makes them on an accelerator, for float64 storage and for numbers whose products would leave float32. Results are
reproducible bit for bit (see `chunks`).

Shape letters: M targets.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusechat_merge.passes import Passes
from fusechat_merge.selection import select

SELECT_SCOPES = ("all", "coefficients")
GRANULARITIES = ("matrix", "element")
LARGEST_RATIO = 1e100  # of two weights: their products with squares of float32 stay within float64
_STORAGE = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class NonFiniteError(ValueError):
    """A tensor holds NaN or infinity. `index` is its place among the targets, or None for the pivot."""

    def __init__(self, index: int | None):
        self.index = index
        super().__init__(
            f"weights for {'the pivot' if index is None else f'target {index}'}: expected finite numbers, "
            "got NaN or inf. Repair or leave out that model."
        )


def sce_merge(
    pivot: Tensor,
    targets: Sequence[Tensor],
    *,
    select_topk: float = 1.0,
    select_scope: str = "all",
    weights: Sequence[float] | None = None,
) -> Tensor:
    """Merge targets into their pivot by SCE.

    1. select: keep the floor(tau n) elements of largest variance over j of d_j (n = elements whose d_j are not all
       equal, ties lowest index first), zero the others; tau = 1 keeps all, tau = 0 none
    2. calculate: eta_j = w_j sum(d_j^2) / sum_j w_j sum(d_j^2); all zero gives the pivot
    3. erase: s = +1 where sum_j d_j >= 0, else -1; a d_j whose sign is not s is left out
    4. merged = pivot + sum_j eta_j d_j [kept] / sum_j eta_j [kept], and the pivot where none is kept

    Args:
        pivot: any shape, float32/float16/bfloat16/float64; borrowed.
        targets: M >= 1 tensors of the pivot's shape and device, any of these dtypes; borrowed.
        select_topk: tau, in [0, 1]; 0 gives the pivot.
        select_scope: "all"; or "coefficients": step 1 serves step 2 only (as in the authors' FuseChat-7B-v2.0 code).
        weights: M priors w_j >= 0, of which the ratios matter; None is 1 each, all zero gives the pivot. A target of
            weight 0 still counts in steps 1 and 3.

    Returns:
        A new tensor with the pivot's shape, dtype and device.

    Raises:
        NonFiniteError: a tensor holds NaN or infinity.
        ValueError: wrong shapes, devices, dtypes or options.

    Source: arXiv 2408.07990, section 3.3. Differs from mergekit 0.1.5's `sce`, which replaces eta by 1/M wherever the
    summed mean square is below 1e-6 (every tensor of a usual fine-tuning) and computes in the storage dtype.
    Precision: float32, coefficients in float64.
    """
    return sce(pivot, targets, select_topk=select_topk, select_scope=select_scope, weights=weights).merged


def sce_coefficients(
    pivot: Tensor, targets: Sequence[Tensor], *, select_topk: float = 1.0, weights: Sequence[float] | None = None
) -> Tensor:
    """The SCE coefficients eta_j = w_j sum(d_j^2) / sum_j w_j sum(d_j^2) over the selected elements.

    Args: as for `sce_merge`.

    Returns:
        float64 [M], on the CPU, adding up to 1; all zero where every selected d_j is zero.
    """
    return _calculate(pivot, targets, select_topk, weights)[-1]


def varm_merge(
    pivot: Tensor, targets: Sequence[Tensor], *, granularity: str = "matrix", weights: Sequence[float] | None = None
) -> Tensor:
    """Merge targets by the ratios of their variation from the pivot (VaRM).

    merged = sum_j W_j target_j, W_j = w_j mean(d_j^2) / sum_j w_j mean(d_j^2), with the mean over the whole tensor
    (`matrix`) or for every element by itself (`element`); the pivot where all d_j are zero.

    Args:
        pivot, targets, weights: as for `sce_merge`.
        granularity: "matrix" or "element".

    Returns:
        A new tensor with the pivot's shape, dtype and device.

    Raises: as `sce_merge`.

    Source: arXiv 2402.16107, section 3.4. Computed as pivot + sum_j W_j d_j, which loses no digits of a small d_j.
    """
    return varm(pivot, targets, granularity=granularity, weights=weights).merged


@dataclass(frozen=True)
class Merge:
    """One merged tensor and the figures that its computation yields.

    Attributes:
        merged: the result.
        coefficients: eta or W, float64 [M]; with granularity "element" the matrix-level ratios, for information.
        square_sums: sum(d_j^2) over the selected elements, float64 [M].
        selected: share of all elements that were selected, in [0, 1].
        keep: uint8 [elements], 0 where an element of every task vector was left out of the result; None: nowhere.
    """

    merged: Tensor
    coefficients: Tensor
    square_sums: Tensor
    selected: float
    keep: Tensor | None


def sce(
    pivot: Tensor,
    targets: Sequence[Tensor],
    *,
    select_topk: float = 1.0,
    select_scope: str = "all",
    weights: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
) -> Merge:
    """`sce_merge` with the coefficients beside the result, in `dtype` (None: the pivot's)."""
    _check_choice("select_scope", select_scope, SELECT_SCOPES)
    passes, keep, selected, sums, eta = _calculate(pivot, targets, select_topk, weights, dtype)
    keep = keep if select_scope == "all" else None
    merged = _merged(pivot, passes, eta, dtype, lambda out: passes.erase_and_merge(eta, keep, out))
    return Merge(merged, eta, sums, selected, keep)


def varm(
    pivot: Tensor,
    targets: Sequence[Tensor],
    *,
    granularity: str = "matrix",
    weights: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
) -> Merge:
    """`varm_merge` with the ratios beside the result, in `dtype` (None: the pivot's)."""
    _check_choice("granularity", granularity, GRANULARITIES)
    passes, _, selected, sums, ratios = _calculate(pivot, targets, 1.0, weights, dtype)

    def write(out: Tensor) -> None:
        if granularity == "matrix":
            passes.varm_matrix(ratios, out)
        else:
            passes.varm_element([weight / max(weights) for weight in weights] if weights else [1.0] * len(targets), out)

    return Merge(_merged(pivot, passes, ratios, dtype, write), ratios, sums, selected, None)


def _merged(
    pivot: Tensor, passes: Passes, coefficients: Tensor, dtype: torch.dtype | None, write: Callable[[Tensor], None]
) -> Tensor:
    """The merged tensor, by `write` where it is not simply the pivot or the one target."""
    dtype = dtype or pivot.dtype
    if not bool(coefficients.any()):  # no target differs where it counts: the pivot
        merged = passes.pivot.to(dtype, copy=True)
    elif len(passes.targets) == 1:  # nothing to weigh, nothing to erase: the target, not rounded through d
        merged = passes.targets[0].to(dtype, copy=True)
    else:
        merged = passes.empty(dtype)
        write(merged)
    return merged.view(pivot.shape)


def _calculate(
    pivot: Tensor,
    targets: Sequence[Tensor],
    tau: float,
    weights: Sequence[float] | None,
    dtype: torch.dtype | None = None,
) -> tuple[Passes, Tensor | None, float, Tensor, Tensor]:
    """Steps 1 and 2: (the fastest passes whose range these numbers are in, kept elements or None for all, their share,
    sum(d_j^2) over them, eta)."""
    _check(pivot, targets, tau, weights)
    for passes in available_passes(pivot, targets, dtype or pivot.dtype):
        selection = select(passes, tau) if tau < 1 else (None, passes.numel)
        if selection is not None:
            keep, kept = selection
            sums = passes.square_sums(keep)
            largest = float(sums.max())  # NaN where any is
            eta = _shares(sums, weights)
            within = math.isfinite(largest) and largest <= passes.largest_mean_square * max(1, passes.numel)
            if within and not bool(((eta > 0) & (eta < passes.smallest_coefficient)).any()):
                return passes, keep, kept / passes.numel if passes.numel else 1.0, sums, eta
        _check_finite(pivot, targets)  # NaN and infinity defeat all passes
    raise ValueError(
        "task vectors for a merge: expected squares within float64, got larger ones. Repair or leave out that model."
    )


def available_passes(pivot: Tensor, targets: Sequence[Tensor], dtype: torch.dtype) -> Iterator[Passes]:
    """The passes that can merge these tensors into a result of this dtype, the fastest first."""
    if pivot.device.type == "cpu":
        from fusechat_merge import compiled  # numba takes half a second to load

        if compiled.supports((pivot, *targets), dtype):
            yield compiled.Compiled(pivot, targets)
    yield Passes(pivot, targets)


def _shares(sums: Tensor, weights: Sequence[float] | None) -> Tensor:
    """w_j sums_j / sum_j w_j sums_j, float64 [M]; all zero where all products are.

    Mantissas and exponents are multiplied apart and the largest exponent is subtracted: no product over- or underflows.
    """
    sizes = [math.frexp(size) for size in sums.tolist()]
    priors = [math.frexp(weight) for weight in weights or [1.0] * len(sizes)]
    products = [(m * n, d + e) for (m, d), (n, e) in zip(sizes, priors)]
    largest = max((exponent for mantissa, exponent in products if mantissa), default=0)
    weighted = torch.tensor([math.ldexp(m, e - largest) if m else 0.0 for m, e in products], dtype=torch.float64)
    total = weighted.sum()
    return weighted / total if total > 0 else weighted


# --- checks ------------------------------------------------------------------------------------------------------


def _check(pivot: Tensor, targets: Sequence[Tensor], tau: float, weights: Sequence[float] | None) -> None:
    if not 0 <= tau <= 1:
        raise ValueError(
            f"select_topk for sce: expected a number in [0, 1], got {tau}. Use 1.0 to select all elements."
        )
    if not targets:
        raise ValueError("targets for a merge: expected at least one tensor, got none. Pass the targets.")
    for index, tensor in enumerate((pivot, *targets)):
        name = f"target {index - 1}" if index else "the pivot"
        if tensor.dtype not in _STORAGE:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(
                f"dtype for {name}: expected float32, float16, bfloat16 or float64, got {dtype}. "
                "Convert the model first (8-bit weights need their scales for that)."
            )
        if tensor.shape != pivot.shape or tensor.device != pivot.device:
            raise ValueError(
                f"tensor for {name}: expected shape {tuple(pivot.shape)} on {pivot.device} as the pivot, "
                f"got {tuple(tensor.shape)} on {tensor.device}. Pass tensors of one weight."
            )
    if weights is None:
        return
    if len(weights) != len(targets):
        raise ValueError(
            f"weights for the targets: expected {len(targets)}, got {len(weights)}. Give one for each target."
        )
    positive = [float(weight) for weight in weights if weight]
    if not all(0 < weight < math.inf for weight in positive):
        raise ValueError(
            f"weights for the targets: expected numbers >= 0, got {list(weights)}. "
            "To leave a target out, remove it from the list."
        )
    if positive and max(positive) / LARGEST_RATIO > min(positive):
        raise ValueError(
            f"weights for the targets: expected ratios up to {LARGEST_RATIO:g}, got {list(weights)}. "
            "Use 0 for a target that is not to move the result."
        )


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected {' or '.join(choices)}, got {value!r}. Use one of these.")


def _check_finite(pivot: Tensor, targets: Sequence[Tensor]) -> None:
    """Names the tensor that holds NaN or infinity; returns where all are finite (a square has left float32's range)."""
    for index, tensor in enumerate((pivot, *targets)):
        if any(not bool(torch.isfinite(chunk).all()) for chunk in tensor.detach().reshape(-1).split(1 << 22)):
            raise NonFiniteError(index - 1 if index else None)
