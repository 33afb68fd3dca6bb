"""The passes of a merge over tensors in a processor's memory, compiled by numba.

Each pass is one loop over the elements that reads every tensor as it is stored, does the whole step in registers and
writes nothing but the result. Task vectors, majority and result are float32; squares and variances are float64, where
those of no float32 number over- or underflow. Sums run in a fixed order: neither the number of threads nor the size of
the pieces changes a bit.

A pass is compiled when it first meets a number of targets with their dtypes (a second or two) and kept on disk by numba
for later processes. The targets are a tuple of arrays; what is done for each is a function that calls itself with one
array less, which the compiler unrolls; such a function is empty in Python, its bodies for compiled code are in the
`overload` below it. Arrays of float32 hold float32, of uint16 bfloat16, of int16 float16.

Shape letters: M targets, n elements of a tensor.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numba import njit, types
from numba.extending import overload
from torch import Tensor

from fusechat_merge.chunks import pieces, spread

BLOCK = 1024  # elements whose squares are added first; here and not imported: numba looks at the date of this file only
CHUNK = 1 << 18  # elements of a piece: large beside Python's cost of a call
MOST_TARGETS = 16  # beyond, the compiler gives up on doing several elements at once
STORED = {torch.float32: torch.float32, torch.bfloat16: torch.uint16, torch.float16: torch.int16}
_TINY = np.finfo(np.float32).tiny


def serves(tensors: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether these tensors can be read, and a result of this dtype written, here."""
    here = all(tensor.device.type == "cpu" and tensor.dtype in STORED for tensor in tensors)
    return here and dtype in STORED and len(tensors) <= 1 + MOST_TARGETS


def _compile(function, **options):
    options |= {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no directory can be written to
        return njit(**options)(function)


# --- one element ---------------------------------------------------------------------------------------------------


def _read(x): ...


@overload(_read)
def _(x):
    """A stored number as float32."""

    def bfloat16(x):
        return np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)

    def float16(x):
        half = np.uint32(np.uint16(x))
        magnitude = np.uint32((half & np.uint32(0x7FFF)) << np.uint32(13))
        beyond = np.uint32(0x70000000) if magnitude >= np.uint32(0x0F800000) else np.uint32(0)  # NaN and infinity
        bits = np.uint32(((half & np.uint32(0x8000)) << np.uint32(16)) | (magnitude + beyond))
        return bits.view(np.float32) * np.float32(2.0**112)  # float16's exponent begins 112 above float32's

    return {types.float32: lambda x: x, types.uint16: bfloat16, types.int16: float16}[x]


def _stored(x, out): ...


@overload(_stored)
def _(x, out):
    """A float32 as a number of the array `out`, rounded to nearest even."""

    def bfloat16(x, out):
        bits = np.float32(x).view(np.uint32)
        return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

    def float16(x, out):
        bits = np.float32(x).view(np.uint32)
        magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
        # below float16's normal numbers: beside a half, float32 has just their digits
        small = np.float32(magnitude.view(np.float32) + np.float32(0.5)).view(np.uint32) - np.uint32(0x3F000000)
        odd = (magnitude >> np.uint32(13)) & np.uint32(1)
        large = (magnitude + np.uint32(0xFFF) + odd - np.uint32(0x38000000)) >> np.uint32(13)
        half = small if magnitude < np.uint32(0x38800000) else min(large, np.uint32(0x7C00))
        return np.int16(np.uint16(((bits >> np.uint32(16)) & np.uint32(0x8000)) | half))

    return {types.float32: lambda x, out: x, types.uint16: bfloat16, types.int16: float16}[out.dtype]


def _task_vector(row, base, keep, i): ...


@overload(_task_vector)
def _(row, base, keep, i):
    """d of one target, 0 where `keep` (None: everything) leaves the element out; NaN and infinity stay NaN there."""
    if isinstance(keep, types.NoneType):
        return lambda row, base, keep, i: _read(row[i]) - base
    return lambda row, base, keep, i: (_read(row[i]) - base) * np.float32(keep[i])


# --- the targets of one element, each function by itself with one target less ---------------------------------------


def _sum(rows, base, keep, i): ...


@overload(_sum)
def _(rows, base, keep, i):
    """sum_j d_j."""
    if not len(rows):
        return lambda rows, base, keep, i: np.float32(0)
    return lambda rows, base, keep, i: _sum(rows[:-1], base, keep, i) + _task_vector(rows[-1], base, keep, i)


def _agreeing(rows, base, keep, i, sign, coefficients): ...


@overload(_agreeing)
def _(rows, base, keep, i, sign, coefficients):
    """(sum_j eta_j (s d_j)^+, sum_j eta_j [s d_j > 0])."""
    if not len(rows):
        return lambda rows, base, keep, i, sign, coefficients: (np.float32(0), np.float32(0))
    last = len(rows) - 1

    def add(rows, base, keep, i, sign, coefficients):
        update, divisor = _agreeing(rows[:-1], base, keep, i, sign, coefficients)
        d, eta = _task_vector(rows[-1], base, keep, i) * sign, coefficients[last]
        zero = np.float32(0)  # and no branch, which would be taken element by element
        return update + (eta * d if d > zero else zero), divisor + (eta if d > zero else zero)

    return add


def _weighed(rows, base, i, ratios): ...


@overload(_weighed)
def _(rows, base, i, ratios):
    """sum_j W_j d_j."""
    if not len(rows):
        return lambda rows, base, i, ratios: np.float32(0)
    last = len(rows) - 1
    return lambda rows, base, i, ratios: (
        _weighed(rows[:-1], base, i, ratios) + ratios[last] * _task_vector(rows[-1], base, None, i)
    )


def _cubes(rows, base, i, priors): ...


@overload(_cubes)
def _(rows, base, i, priors):
    """(sum_j w_j d_j^3, sum_j w_j d_j^2), float64."""
    if not len(rows):
        return lambda rows, base, i, priors: (0.0, 0.0)
    last = len(rows) - 1

    def add(rows, base, i, priors):
        cubes, squares = _cubes(rows[:-1], base, i, priors)
        d = np.float64(_read(rows[-1][i])) - np.float64(base)
        square = priors[last] * d * d
        return cubes + square * d, squares + square

    return add


def _moments(rows, first, i): ...


@overload(_moments)
def _(rows, first, i):
    """(sum_j e_j, sum_j e_j^2) of e_j = target_j - `first`, float64."""
    if not len(rows):
        return lambda rows, first, i: (0.0, 0.0)

    def add(rows, first, i):
        total, square = _moments(rows[:-1], first, i)
        e = np.float64(_read(rows[-1][i])) - np.float64(first)
        return total + e, square + e * e

    return add


def _squares(sums, rows, base, keep, i): ...


@overload(_squares, jit_options={"fastmath": {"reassoc"}})
def _(sums, rows, base, keep, i):
    """The tuple `sums` with d_j^2 added, float64."""
    if not len(rows):
        return lambda sums, rows, base, keep, i: ()

    def add(sums, rows, base, keep, i):
        d = np.float64(_task_vector(rows[0], base, keep, i))
        return (sums[0] + d * d, *_squares(sums[1:], rows[1:], base, keep, i))

    return add


# --- passes --------------------------------------------------------------------------------------------------------


def _square_sums(pivot, rows, keep, zeros, sums):
    for block in range(sums.shape[1]):
        added, start = zeros, np.uint64(block * BLOCK)
        for k in range(min(BLOCK, len(pivot) - block * BLOCK)):
            i = start + np.uint64(k)  # unsigned: numba would look whether it counts from the end
            added = _squares(added, rows, _read(pivot[i]), keep, i)
        for j in range(len(added)):
            sums[j, block] = added[j]


def _erase(pivot, rows, keep, coefficients, out):
    for i in range(len(out)):
        base = _read(pivot[i])
        sign = np.float32(1) if _sum(rows, base, keep, i) >= np.float32(0) else np.float32(-1)
        update, divisor = _agreeing(rows, base, keep, i, sign, coefficients)
        out[i] = _stored(base + sign * update / (divisor if divisor > _TINY else _TINY), out)


def _weigh(pivot, rows, ratios, out):
    for i in range(len(out)):
        base = _read(pivot[i])
        out[i] = _stored(base + _weighed(rows, base, i, ratios), out)


def _weigh_elements(pivot, rows, priors, out):
    for i in range(len(out)):
        base = _read(pivot[i])
        cubes, squares = _cubes(rows, base, i, priors)
        out[i] = _stored(np.float32(np.float64(base) + (cubes / squares if squares > 0 else 0.0)), out)


def _classify(first, others, low, high, classes):
    differing, above, targets = 0, 0, np.float64(len(others) + 1)
    for i in range(len(classes)):
        total, square = _moments(others, _read(first[i]), i)
        variance = square - total * total / targets
        classes[i] = 2 * np.uint8(variance > low) - np.uint8(variance > high)
        above += np.int64(variance > high)
        differing += np.int64(square > 0)
    return differing, above


_square_sums = _compile(_square_sums, fastmath={"reassoc"})  # sums of one block in whatever order the processor likes
_erase, _weigh, _weigh_elements, _classify = (_compile(f) for f in (_erase, _weigh, _weigh_elements, _classify))


class Compiled:
    """The pivot and the targets of one merged tensor, in a processor's memory.

    Args:
        pivot: float32, bfloat16 or float16; borrowed.
        targets: M tensors of the pivot's shape, of any of these dtypes; borrowed.
    """

    largest_mean_square = 2.0**90  # beyond, products of float32 task vectors may leave float32

    def __init__(self, pivot: Tensor, targets: Sequence[Tensor]):
        self.pivot = pivot.detach().reshape(-1)
        self.targets = [target.detach().reshape(-1) for target in targets]
        self.numel, self.device = self.pivot.numel(), self.pivot.device
        self._base, *self._rows = [_array(tensor.contiguous()) for tensor in (self.pivot, *self.targets)]

    def square_sums(self, keep: Tensor | None) -> Tensor:
        """sum(d_j^2) over the kept elements, float64 [M]; NaN where a tensor is not finite."""
        sums = np.zeros((len(self.targets), math.ceil(self.numel / BLOCK)))
        zeros = (0.0,) * len(self.targets)

        def step(piece: slice) -> None:
            blocks = slice(piece.start // BLOCK, math.ceil(piece.stop / BLOCK))
            _square_sums(self._base[piece], self._of(piece), _part(keep, piece), zeros, sums[:, blocks])

        self._run(step)
        return torch.from_numpy(sums.sum(1))

    def classify(self, low: float, high: float, classes: Tensor) -> tuple[int, int]:
        """Of M times the variances: 1 above `high`, 2 in (low, high], else 0, to `classes`, uint8 [n]. Returns the
        numbers of elements that differ and that are above. NaN and infinity are left to `square_sums`."""

        def step(piece: slice) -> tuple[int, int]:
            first, *others = self._of(piece)
            return _classify(first, tuple(others), low, high, classes.numpy()[piece])

        differing, above = zip(*(self._run(step) or [(0, 0)]))
        return sum(differing), sum(above)

    def erase(self, coefficients: Tensor, keep: Tensor | None, out: Tensor) -> None:
        """Steps 3 and 4 of SCE: merged = pivot + s sum_j eta_j (s d_j)^+ / sum_j eta_j [s d_j > 0], to `out`."""
        scaled = (coefficients * 2.0**40).numpy().astype(np.float32)  # keeps products normal; cancels in the quotient
        self._run(
            lambda piece: _erase(self._base[piece], self._of(piece), _part(keep, piece), scaled, _array(out)[piece])
        )

    def weigh(self, ratios: Tensor, out: Tensor) -> None:
        """merged = pivot + sum_j W_j d_j, to `out`."""
        rounded = ratios.numpy().astype(np.float32)
        self._run(lambda piece: _weigh(self._base[piece], self._of(piece), rounded, _array(out)[piece]))

    def weigh_elements(self, priors: Sequence[float], out: Tensor) -> None:
        """merged = pivot + sum_j w_j d_j^3 / sum_j w_j d_j^2 (the pivot where that is 0 / 0), to `out`."""
        priors = np.array(priors, np.float64)
        self._run(lambda piece: _weigh_elements(self._base[piece], self._of(piece), priors, _array(out)[piece]))

    def room(self, dtype: torch.dtype) -> Tensor:
        """An empty result [n]. numpy asks for huge pages, which the system hands out five times as fast."""
        return torch.from_numpy(np.empty(self.numel * dtype.itemsize, np.uint8)).view(dtype)

    def _of(self, piece: slice) -> tuple[np.ndarray, ...]:
        return tuple(row[piece] for row in self._rows)

    def _run(self, step: Callable[[slice], object]) -> list:
        return spread(lambda ends: step(slice(*ends)), pieces(self.numel, CHUNK), self.device)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.view(STORED[tensor.dtype]).numpy()


def _part(keep: Tensor | None, piece: slice) -> np.ndarray | None:
    return None if keep is None else keep.numpy()[piece]
