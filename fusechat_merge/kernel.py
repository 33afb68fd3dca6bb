"""SCE and VaRM on single tensors: select, calculate, erase; variation-ratio merging.

Task vectors d_j = target_j - pivot, each tensor on its own. Nothing here knows mergekit: tensors in, tensor out. All
arithmetic is float32 or better whatever the storage dtype, the squares behind the coefficients are added in float64,
and a tensor whose squares leave the range of float32 is done again in float64. See `chunks` for the memory and the
bit-for-bit reproducibility.

Shape letters: M targets, C elements of a piece.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusechat_merge.chunks import BLOCK, Chunks, Piece, blocks, sums_of_blocks
from fusechat_merge.selection import Selection, select

SELECT_SCOPES = ("all", "coefficients")
GRANULARITIES = ("matrix", "element")
Watch = Callable[[int, Tensor, Tensor | None], None]
_STORAGE = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# sums of squares outside this range, per element, may have lost digits of float32 squares on the way
_SMALLEST_MEAN_SQUARE, _LARGEST_MEAN_SQUARE = 2.0**-90, 2.0**90


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
       equal, ties lowest index first), zero the others; tau = 1 keeps all
    2. calculate: eta_j = w_j sum(d_j^2) / sum_j w_j sum(d_j^2); all zero gives the pivot
    3. erase: s = +1 where sum_j d_j >= 0, else -1; a d_j whose sign is not s is left out
    4. merged = pivot + sum_j eta_j d_j [kept] / sum_j eta_j [kept], and the pivot where none is kept

    Args:
        pivot: any shape, float32/float16/bfloat16/float64; borrowed.
        targets: M >= 1 tensors of the pivot's shape and device, any of these dtypes; borrowed.
        select_topk: tau, in (0, 1].
        select_scope: "all"; or "coefficients": step 1 serves step 2 only (as in the authors' FuseChat-7B-v2.0 code).
        weights: M priors w_j >= 0, not all zero; None is 1 each.

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
    _check(pivot, targets, weights)
    _check_tau(select_topk)
    return _calculate(pivot, targets, select_topk, weights).coefficients


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
    """One merged tensor and what is known about it for free.

    Attributes:
        merged: the result, or None where only coefficients were asked for.
        coefficients: eta or W, float64 [M]; with granularity "element" the matrix-level ratios, for information.
        square_sums: sum(d_j^2) over the selected elements, float64 [M].
        selected: share of all elements that were selected, in [0, 1].
    """

    merged: Tensor | None
    coefficients: Tensor
    square_sums: Tensor
    selected: float


def sce(
    pivot: Tensor,
    targets: Sequence[Tensor],
    *,
    select_topk: float = 1.0,
    select_scope: str = "all",
    weights: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    watch: Watch | None = None,
) -> Merge:
    """`sce_merge` with the coefficients beside the result, in `dtype` (None: the pivot's).

    `watch(place, task_vectors [M, C], sign [C])` sees each piece before the erasing, from several threads at once."""
    _check(pivot, targets, weights)
    _check_tau(select_topk)
    _check_choice("select_scope", select_scope, SELECT_SCOPES)
    plan = _calculate(pivot, targets, select_topk, weights)
    if not bool(plan.coefficients.any()):
        merged = pivot.detach().to(dtype or pivot.dtype, copy=True)
    elif len(targets) == 1:  # nothing to weigh, nothing to erase: no rounding through the difference
        merged = targets[0].detach().to(dtype or pivot.dtype, copy=True)
    else:
        selection = plan.selection if select_scope == "all" else None
        merged = _erase_and_add(plan, selection, _like(pivot, dtype), watch)
    return plan.result(merged)


def varm(
    pivot: Tensor,
    targets: Sequence[Tensor],
    *,
    granularity: str = "matrix",
    weights: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    watch: Watch | None = None,
) -> Merge:
    """`varm_merge` with the ratios beside the result, in `dtype` (None: the pivot's)."""
    _check(pivot, targets, weights)
    _check_choice("granularity", granularity, GRANULARITIES)
    plan = _calculate(pivot, targets, 1.0, weights)
    if not bool(plan.coefficients.any()):
        merged = pivot.detach().to(dtype or pivot.dtype, copy=True)
    elif len(targets) == 1:
        merged = targets[0].detach().to(dtype or pivot.dtype, copy=True)
    elif granularity == "matrix":
        merged = _add_weighted(plan, _like(pivot, dtype), watch)
    else:
        merged = _add_by_element(plan, [1.0] * len(targets) if weights is None else weights, _like(pivot, dtype), watch)
    return plan.result(merged)


def _like(pivot: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Room for the result."""
    return torch.empty(pivot.shape, dtype=dtype or pivot.dtype, device=pivot.device)


# --- calculate ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    chunks: Chunks
    selection: Selection | None
    square_sums: Tensor
    coefficients: Tensor

    def result(self, merged: Tensor | None) -> Merge:
        total = self.chunks.numel
        selected = self.selection.kept / total if self.selection and total else 1.0
        return Merge(merged, self.coefficients, self.square_sums, selected)


def _calculate(pivot: Tensor, targets: Sequence[Tensor], tau: float, weights: Sequence[float] | None) -> _Plan:
    """Steps 1 and 2, in float32 where its range suffices, else in float64."""
    wide = any(tensor.dtype == torch.float64 for tensor in (pivot, *targets))
    for dtype in (torch.float64,) if wide else (torch.float32, torch.float64):
        chunks = Chunks(pivot, targets, dtype)
        try:
            selection = select(chunks, tau) if tau < 1 else None
        except FloatingPointError:
            _check_finite(pivot, targets)
            continue
        sums = _square_sums(chunks, selection)
        if not bool(torch.isfinite(sums).all()):
            _check_finite(pivot, targets)
        elif dtype == torch.float64 or _within_float32(sums, chunks):
            break
    else:
        raise ValueError(
            "task vectors for a merge: expected squares within float64, got larger ones. "
            "Repair or leave out that model."
        )
    prior = torch.ones_like(sums) if weights is None else torch.tensor([float(w) for w in weights], dtype=sums.dtype)
    weighted = prior * sums
    denominator = weighted.sum()
    return _Plan(chunks, selection, sums, weighted / denominator if denominator > 0 else torch.zeros_like(sums))


def _square_sums(chunks: Chunks, selection: Selection | None) -> Tensor:
    """sum(d_j^2) over the selected elements, float64 [M], on the CPU; not finite where the pivot is not."""
    partial = torch.zeros(len(chunks.targets), blocks(chunks.numel), dtype=chunks.dtype, device=chunks.device)

    def step(piece: Piece) -> bool:
        places = selection.places(piece) if selection else None
        base, rows = piece.task_vectors(places)
        first = piece.start // BLOCK
        sums = partial[:, first : first + blocks(piece.length)]
        if places is None:
            torch.sum(torch.mul(rows, rows, out=rows).view(len(rows), -1, BLOCK), -1, out=sums)
            return True  # NaN and inf show in the sums
        squares = torch.mul(rows, rows, out=rows)[:, : len(base)]
        sums.copy_(sums_of_blocks(squares, places, sums.shape[1]))
        return all(math.isfinite(extreme) for extreme in torch.aminmax(piece.of(chunks.pivot)))

    finite = all(chunks.each(step))
    return partial.cpu().double().sum(1) if finite else torch.full((len(chunks.targets),), math.nan)


def _within_float32(sums: Tensor, chunks: Chunks) -> bool:
    """Whether float32 squares have kept the digits of these sums: neither underflow nor overflow nearby."""
    mean_squares = sums / max(1, chunks.numel)
    suspicious = (mean_squares < _SMALLEST_MEAN_SQUARE) | (mean_squares > _LARGEST_MEAN_SQUARE)
    return not any(
        mean_squares[index] > 0 or not torch.equal(chunks.targets[index], chunks.pivot)
        for index in torch.nonzero(suspicious).flatten().tolist()
    )


# --- erase and add -----------------------------------------------------------------------------------------------


def _erase_and_add(plan: _Plan, selection: Selection | None, out: Tensor, watch: Watch | None) -> Tensor:
    """Steps 3 and 4: merged = pivot + s * sum_j eta_j (s d_j)^+ / sum_j eta_j [s d_j > 0]."""
    chunks = plan.chunks
    coefficients = _column(plan.coefficients * 2.0**40, chunks)  # keeps small products normal; cancels in the quotient
    merged = out.view(-1)

    def step(piece: Piece) -> None:
        places = selection.places(piece) if selection else None
        base, rows = piece.task_vectors(places)  # [c], [M, C]
        sign, update, divisor = piece.scratch(3, rows.shape[1])
        majority_sign(rows, out=sign)
        if watch:
            watch(piece.start // chunks.size, rows[:, : len(base)], sign[: len(base)])
        rows.mul_(sign).relu_()  # (s d_j)^+: what agrees with the majority
        torch.sum(rows.mul_(coefficients), 0, out=update)  # no matrix product: its precision is a setting of torch's
        torch.sum(rows.sign_().mul_(coefficients), 0, out=divisor)
        divisor.clamp_(min=torch.finfo(chunks.dtype).tiny)
        update, divisor = update.mul_(sign)[: len(base)], divisor[: len(base)]
        changed = torch.addcdiv(base, update, divisor, out=update)
        if places is None:
            piece.of(merged).copy_(changed)
        else:
            piece.of(merged).copy_(piece.of(chunks.pivot)).index_copy_(0, places, changed.to(merged.dtype))

    chunks.each(step)
    return out


def majority_sign(rows: Tensor, out: Tensor) -> Tensor:
    """s = +1 where the rows [M, C] add up to >= 0, else -1, written to `out` [C] (a sum is -0 only where all are 0)."""
    return torch.copysign(out.new_ones(1), torch.sum(rows, 0, out=out), out=out)


def _column(coefficients: Tensor, chunks: Chunks) -> Tensor:
    """Coefficients [M, 1] in the working precision."""
    return coefficients.to(chunks.device, chunks.dtype).unsqueeze(1)


# --- VaRM --------------------------------------------------------------------------------------------------------


def _add_weighted(plan: _Plan, out: Tensor, watch: Watch | None) -> Tensor:
    """merged = pivot + sum_j W_j d_j."""
    chunks, ratios = plan.chunks, _column(plan.coefficients, plan.chunks)
    merged = out.view(-1)

    def step(piece: Piece) -> None:
        base, rows = piece.task_vectors()
        if watch:
            watch(piece.start // chunks.size, rows[:, : piece.length], None)
        (update,) = piece.scratch(1, rows.shape[1])
        torch.sum(rows.mul_(ratios), 0, out=update)
        piece.of(merged).copy_(update[: piece.length].add_(base))

    chunks.each(step)
    return out


def _add_by_element(plan: _Plan, weights: Sequence[float], out: Tensor, watch: Watch | None) -> Tensor:
    """merged = pivot + m sum_j w_j r_j^3 / sum_j w_j r_j^2, r_j = d_j / m, m = max_j |d_j|: squares stay in range."""
    chunks = plan.chunks
    tiny = torch.finfo(chunks.dtype).tiny
    merged = out.view(-1)
    priors = [weight / max(weights) for weight in weights]

    def step(piece: Piece) -> None:
        base, rows = piece.task_vectors()
        if watch:
            watch(piece.start // chunks.size, rows[:, : piece.length], None)
        largest, square, update, divisor = piece.scratch(4, rows.shape[1])
        for row in (largest, update, divisor):
            row.zero_()
        for row, prior in zip(rows, priors):
            if prior:
                torch.maximum(largest, torch.abs(row, out=square), out=largest)
        largest.clamp_(min=tiny)
        for row, prior in zip(rows, priors):
            if prior:
                row.div_(largest)
                torch.mul(row, row, out=square).mul_(prior)
                divisor.add_(square)
                update.add_(square.mul_(row))
        update.div_(divisor.clamp_(min=tiny)).mul_(largest)
        piece.of(merged).copy_(update[: piece.length].add_(base))

    chunks.each(step)
    return out


# --- checks ------------------------------------------------------------------------------------------------------


def _check(pivot: Tensor, targets: Sequence[Tensor], weights: Sequence[float] | None) -> None:
    if not targets:
        raise ValueError("targets for a merge: expected at least one tensor, got none. Pass the targets.")
    for index, tensor in enumerate((pivot, *targets)):
        name = f"target {index - 1}" if index else "the pivot"
        if tensor.dtype not in _STORAGE:
            raise ValueError(
                f"dtype for {name}: expected float32, float16, bfloat16 or float64, got {str(tensor.dtype)[6:]}. "
                "Convert the model first (8-bit weights need their scales for that)."
            )
        if tensor.shape != pivot.shape or tensor.device != pivot.device:
            raise ValueError(
                f"tensor for {name}: expected shape {tuple(pivot.shape)} on {pivot.device} as the pivot, "
                f"got {tuple(tensor.shape)} on {tensor.device}. Pass tensors of one weight."
            )
    if weights is not None:
        check_weights(weights, len(targets))


def check_weights(weights: Sequence[float], count: int) -> None:
    """Raises ValueError unless these are `count` finite numbers >= 0 and not all are zero."""
    if len(weights) != count:
        raise ValueError(f"weights for the targets: expected {count}, got {len(weights)}. Give one for each target.")
    if not all(0 <= float(weight) < float("inf") for weight in weights):
        raise ValueError(
            f"weights for the targets: expected numbers >= 0, got {list(weights)}. Use 0 to leave one out."
        )
    if not any(weights):
        raise ValueError("weights for the targets: expected at least one above 0, got all zero. Raise one.")


def _check_tau(select_topk: float) -> None:
    if not 0 < select_topk <= 1:
        raise ValueError(
            f"select_topk for sce: expected a number in (0, 1], got {select_topk}. Use 1.0 to select all elements."
        )


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected {' or '.join(choices)}, got {value!r}. Use one of these.")


def _check_finite(pivot: Tensor, targets: Sequence[Tensor]) -> None:
    """Names the tensor that holds NaN or infinity; returns where all are finite (a square has left float32's range)."""
    for index, tensor in enumerate((pivot, *targets)):
        if any(not bool(torch.isfinite(piece).all()) for piece in tensor.detach().reshape(-1).split(1 << 22)):
            raise NonFiniteError(index - 1 if index else None)
