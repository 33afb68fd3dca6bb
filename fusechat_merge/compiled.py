"""The passes of a merge over tensors in a CPU's memory, compiled by numba.

Each pass is one loop over the elements that reads every tensor as it is stored, does the whole step in registers and
writes nothing but the result. Task vectors, majority and result are float32; squares and variances are float64, where
those of no float32 number over- or underflow. Sums run in a fixed order: neither the number of threads nor the size of
the chunks changes a bit.

A pass is compiled when it first meets a number of targets with their dtypes (a second or two) and kept on disk by numba
for later processes. The targets are a tuple of arrays, `rows`; what is done for each is a function that calls itself
with one array less, which the compiler unrolls (see `by_types`). Arrays of float32 hold float32, of uint16 bfloat16, of
int16 float16.

Worked example: for two bfloat16 targets and no selection, `erase_and_merge_loop` is compiled as

    for i in range(len(out)):
        base = read_bfloat16(pivot[i])
        d0 = read_bfloat16(rows[0][i]) - base
        d1 = read_bfloat16(rows[1][i]) - base
        sign = 1 if (0 + d0) + d1 >= 0 else -1
        e0, e1 = d0 * sign, d1 * sign
        update = (0 + (coefficients[0] * e0 if e0 > 0 else 0)) + (coefficients[1] * e1 if e1 > 0 else 0)
        divisor = (0 + (coefficients[0] if e0 > 0 else 0)) + (coefficients[1] if e1 > 0 else 0)
        out[i] = round_to_bfloat16(base + sign * update / max(divisor, TINY))

Shape letters: M targets, n elements of a tensor.
"""

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numba import config, njit, types
from numba.extending import overload
from torch import Tensor

from fusechat_merge.once import warn_once
from fusechat_merge.passes import Passes

logger = logging.getLogger(__name__)
BLOCK = 1024  # elements whose squares are added first; defined here: numba checks the date of this file only
MOST_TARGETS = 16  # beyond, the compiler no longer vectorises
STORED = {torch.float32: torch.float32, torch.bfloat16: torch.uint16, torch.float16: torch.int16}
TINY = np.finfo(np.float32).tiny


def supports(tensors: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether the loops can read these tensors and write a result of this dtype."""
    compiles = not config.DISABLE_JIT  # pyright: ignore[reportAttributeAccessIssue]  # NUMBA_DISABLE_JIT=1
    here = all(tensor.device.type == "cpu" and tensor.dtype in STORED for tensor in tensors)
    return compiles and here and dtype in STORED and len(tensors) <= 1 + MOST_TARGETS


class Loop:
    """`function` compiled by numba and kept on disk, or compiled without the disk where that fails.

    A cache file that is cut off, a full disk or a directory that cannot be written is no reason to stop a merge: a call
    that fails is made again by a loop compiled for this process alone. It writes the same elements again.
    """

    def __init__(self, function: Callable, **options):
        options |= {"nogil": True, "error_model": "numpy"}
        self._uncached = njit(**options)(function)
        self._call = self._uncached
        try:
            self._call = njit(cache=True, **options)(function)
        except (RuntimeError, OSError) as error:  # no directory can be written to
            logger.debug("loops are compiled for this process alone: %r", error)

    def __call__(self, *arguments):
        call = self._call
        try:
            return call(*arguments)
        except Exception as error:
            if call is self._uncached:
                raise
            result = self._uncached(*arguments)
            self._call = self._uncached
            warn_once(
                logger,
                f"numba's cache in {call.stats.cache_path} cannot be used ({error!r}): the loops are compiled "
                "again in every process. Delete it, free space, or name another directory in NUMBA_CACHE_DIR.",
            )
            return result


def by_types(choose: Callable, **options) -> Any:
    """A function for the loops: the compiler puts in its place what `choose` returns for the types of its arguments."""

    def call(*arguments): ...

    call.__name__ = choose.__name__
    overload(call, **options)(choose)
    return call


# --- one element ---------------------------------------------------------------------------------------------------


@by_types
def read(x):
    """A stored number as float32."""

    def read_float32(x):
        return x

    def read_bfloat16(x):
        return np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)

    def read_float16(x):
        half = np.uint32(np.uint16(x))
        magnitude = np.uint32((half & np.uint32(0x7FFF)) << np.uint32(13))
        beyond = np.uint32(0x70000000) if magnitude >= np.uint32(0x0F800000) else np.uint32(0)  # NaN and infinity
        bits = np.uint32(((half & np.uint32(0x8000)) << np.uint32(16)) | (magnitude + beyond))
        return bits.view(np.float32) * np.float32(2.0**112)  # float16's exponent begins 112 above float32's

    return {types.float32: read_float32, types.uint16: read_bfloat16, types.int16: read_float16}[x]


@by_types
def round_to(x, out):
    """A float32 as a number of the array `out`, rounded to nearest even."""

    def round_to_float32(x, out):
        return x

    def round_to_bfloat16(x, out):
        bits = np.float32(x).view(np.uint32)
        return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

    def round_to_float16(x, out):
        bits = np.float32(x).view(np.uint32)
        magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
        # below float16's normal numbers: beside a half, float32 has just their digits
        small = np.float32(magnitude.view(np.float32) + np.float32(0.5)).view(np.uint32) - np.uint32(0x3F000000)
        odd = (magnitude >> np.uint32(13)) & np.uint32(1)
        large = (magnitude + np.uint32(0xFFF) + odd - np.uint32(0x38000000)) >> np.uint32(13)
        half = small if magnitude < np.uint32(0x38800000) else min(large, np.uint32(0x7C00))
        return np.int16(np.uint16(((bits >> np.uint32(16)) & np.uint32(0x8000)) | half))

    return {types.float32: round_to_float32, types.uint16: round_to_bfloat16, types.int16: round_to_float16}[out.dtype]


@by_types
def task_vector(row, base, keep, i):
    """d of one target, 0 where `keep` (None: everything) leaves the element out; NaN and infinity stay NaN there."""

    def task_vector_everywhere(row, base, keep, i):
        return read(row[i]) - base

    def task_vector_where_kept(row, base, keep, i):
        return (read(row[i]) - base) * np.float32(keep[i])

    return task_vector_everywhere if isinstance(keep, types.NoneType) else task_vector_where_kept


# --- the targets of one element, each function by itself with one target less ---------------------------------------


@by_types
def sum_task_vectors(rows, base, keep, i):
    """sum_j d_j."""
    if not len(rows):
        return lambda rows, base, keep, i: np.float32(0)

    def sum_with_last(rows, base, keep, i):
        return sum_task_vectors(rows[:-1], base, keep, i) + task_vector(rows[-1], base, keep, i)

    return sum_with_last


@by_types
def agreeing_update_and_divisor(rows, base, keep, i, sign, coefficients):
    """(sum_j eta_j (s d_j)^+, sum_j eta_j [s d_j > 0])."""
    if not len(rows):
        return lambda rows, base, keep, i, sign, coefficients: (np.float32(0), np.float32(0))

    def agreeing_with_last(rows, base, keep, i, sign, coefficients):
        update, divisor = agreeing_update_and_divisor(rows[:-1], base, keep, i, sign, coefficients)
        d, eta = task_vector(rows[-1], base, keep, i) * sign, coefficients[len(rows) - 1]
        zero = np.float32(0)  # and no branch, which would be taken element by element
        return update + (eta * d if d > zero else zero), divisor + (eta if d > zero else zero)

    return agreeing_with_last


@by_types
def weighted_sum(rows, base, i, ratios):
    """sum_j W_j d_j."""
    if not len(rows):
        return lambda rows, base, i, ratios: np.float32(0)

    def weighted_sum_with_last(rows, base, i, ratios):
        return weighted_sum(rows[:-1], base, i, ratios) + ratios[len(rows) - 1] * task_vector(rows[-1], base, None, i)

    return weighted_sum_with_last


@by_types
def cubes_and_squares(rows, base, i, priors):
    """(sum_j w_j d_j^3, sum_j w_j d_j^2), float64."""
    if not len(rows):
        return lambda rows, base, i, priors: (0.0, 0.0)

    def cubes_with_last(rows, base, i, priors):
        cubes, squares = cubes_and_squares(rows[:-1], base, i, priors)
        d = np.float64(read(rows[-1][i])) - np.float64(base)
        square = priors[len(rows) - 1] * d * d
        return cubes + square * d, squares + square

    return cubes_with_last


@by_types
def sum_and_square(rows, first, i):
    """(sum_j e_j, sum_j e_j^2) of e_j = target_j - `first`, float64."""
    if not len(rows):
        return lambda rows, first, i: (0.0, 0.0)

    def sum_and_square_with_last(rows, first, i):
        total, square = sum_and_square(rows[:-1], first, i)
        e = np.float64(read(rows[-1][i])) - np.float64(first)
        return total + e, square + e * e

    return sum_and_square_with_last


@partial(by_types, jit_options={"fastmath": {"reassoc"}})
def add_squares(sums, rows, base, keep, i):
    """The tuple `sums` with d_j^2 added, float64."""
    if not len(rows):
        return lambda sums, rows, base, keep, i: ()

    def squares_with_first(sums, rows, base, keep, i):
        d = np.float64(task_vector(rows[0], base, keep, i))
        return (sums[0] + d * d, *add_squares(sums[1:], rows[1:], base, keep, i))

    return squares_with_first


# --- loops over the elements of a chunk ----------------------------------------------------------------------------


@partial(Loop, fastmath={"reassoc"})  # sums of one block in whatever order the processor likes
def square_sums_loop(pivot, rows, keep, zeros, sums):
    for block in range(sums.shape[1]):
        added, start = zeros, np.uint64(block * BLOCK)
        for k in range(min(BLOCK, len(pivot) - block * BLOCK)):
            i = start + np.uint64(k)  # unsigned: else numba checks for a negative index
            added = add_squares(added, rows, read(pivot[i]), keep, i)
        for j in range(len(added)):
            sums[j, block] = added[j]


@Loop
def classify_loop(first, others, low, high, classes):
    differing, above, targets = 0, 0, np.float64(len(others) + 1)
    for i in range(len(classes)):
        total, square = sum_and_square(others, read(first[i]), i)
        variance = square - total * total / targets
        classes[i] = 2 * np.uint8(variance > low) - np.uint8(variance > high)
        above += np.int64(variance > high)
        differing += np.int64(square > 0)
    return differing, above


@Loop
def erase_and_merge_loop(pivot, rows, keep, coefficients, out):
    for i in range(len(out)):
        base = read(pivot[i])
        sign = np.float32(1) if sum_task_vectors(rows, base, keep, i) >= np.float32(0) else np.float32(-1)
        update, divisor = agreeing_update_and_divisor(rows, base, keep, i, sign, coefficients)
        out[i] = round_to(base + sign * update / (divisor if divisor > TINY else TINY), out)


@Loop
def varm_matrix_loop(pivot, rows, ratios, out):
    for i in range(len(out)):
        base = read(pivot[i])
        out[i] = round_to(base + weighted_sum(rows, base, i, ratios), out)


@Loop
def varm_element_loop(pivot, rows, priors, out):
    for i in range(len(out)):
        base = read(pivot[i])
        cubes, squares = cubes_and_squares(rows, base, i, priors)
        out[i] = round_to(np.float32(np.float64(base) + (cubes / squares if squares > 0 else 0.0)), out)


class Compiled(Passes):
    """The passes as compiled loops, over float32, bfloat16 and float16 tensors in a CPU's memory (see `supports`)."""

    largest_mean_square = 2.0**90  # beyond, products of float32 task vectors may leave float32
    smallest_coefficient = float(TINY)
    cpu_chunk = 1 << 18  # large beside Python's cost of a call

    def __init__(self, pivot: Tensor, targets: Sequence[Tensor]):
        super().__init__(pivot, targets)
        self._base, *self._rows = [_array(tensor.contiguous()) for tensor in (self.pivot, *self.targets)]

    def square_sums(self, keep: Tensor | None) -> Tensor:
        sums = np.zeros((len(self.targets), math.ceil(self.numel / BLOCK)))
        zeros = (0.0,) * len(self.targets)

        def step(chunk: slice) -> None:
            blocks = slice(chunk.start // BLOCK, math.ceil(chunk.stop / BLOCK))
            square_sums_loop(*self._inputs(chunk), _part(keep, chunk), zeros, sums[:, blocks])

        self._run(step)
        return torch.from_numpy(sums.sum(1))

    def classify(self, low: float, high: float, classes: Tensor) -> tuple[int, int]:
        def step(chunk: slice) -> tuple[int, int]:
            _, (first, *others) = self._inputs(chunk)
            return classify_loop(first, tuple(others), low, high, classes.numpy()[chunk])

        differing, above = zip(*self._run(step))
        return sum(differing), sum(above)

    def erase_and_merge(self, coefficients: Tensor, keep: Tensor | None, out: Tensor) -> None:
        scaled = (coefficients * 2.0**40).numpy().astype(np.float32)  # keeps products normal; cancels in the quotient
        merged = _array(out)
        self._run(lambda c: erase_and_merge_loop(*self._inputs(c), _part(keep, c), scaled, merged[c]))

    def varm_matrix(self, ratios: Tensor, out: Tensor) -> None:
        rounded, merged = ratios.numpy().astype(np.float32), _array(out)
        self._run(lambda c: varm_matrix_loop(*self._inputs(c), rounded, merged[c]))

    def varm_element(self, priors: Sequence[float], out: Tensor) -> None:
        weights, merged = np.array(priors, np.float64), _array(out)
        self._run(lambda c: varm_element_loop(*self._inputs(c), weights, merged[c]))

    def empty(self, dtype: torch.dtype) -> Tensor:
        """From numpy, which asks for huge pages: the system hands those out five times as fast."""
        return torch.from_numpy(np.empty(self.numel * dtype.itemsize, np.uint8)).view(dtype)

    def _inputs(self, chunk: slice) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        return self._base[chunk], tuple(row[chunk] for row in self._rows)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.view(STORED[tensor.dtype]).numpy()


def _part(keep: Tensor | None, chunk: slice) -> np.ndarray | None:
    return None if keep is None else keep.numpy()[chunk]
