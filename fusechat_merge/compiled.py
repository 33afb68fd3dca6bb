"""The passes of a merge over tensors in a processor's memory, compiled by numba.

Each pass goes through its piece in blocks of BLOCK elements: the block of every tensor becomes a float32 row in the
innermost cache, whatever its storage dtype, and the whole step is done there, so memory is read once in a pass and
nothing but the result is written. Task vectors, majority and result are float32; squares and variances are float64,
where those of no float32 number over- or underflow. Sums run in a fixed order: neither the number of threads nor the
size of the pieces changes a bit. Compiled on first use (seconds) and kept on disk by numba for the next.

Shape letters: M targets, n elements of a tensor.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numba import carray, njit, types
from numba.extending import intrinsic
from torch import Tensor

from fusechat_merge.chunks import pieces, spread

BLOCK = 1024  # here and not imported: numba's cache looks at the date of this file
CHUNK = 1 << 18  # elements of a piece: large beside Python's cost of a call
FLOAT32, BFLOAT16, FLOAT16 = range(3)
KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
LANES = 64  # running sums of squares side by side: what a processor adds at once, a few times over
_TINY = np.finfo(np.float32).tiny
_ALL = np.empty(0, np.uint8)


def serves(tensors: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether these tensors can be read, and a result of this dtype written, here."""
    return dtype in KINDS and all(tensor.device.type == "cpu" and tensor.dtype in KINDS for tensor in tensors)


def _compile(function):
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no directory can be written to
        return njit(**options)(function)


@intrinsic
def _pointer(context, address, like):
    """The address as a pointer to numbers of the type of `like`."""

    def generate(backend, builder, signature, arguments):
        return builder.inttoptr(arguments[0], backend.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(address, like), generate


@_compile
def _read(address, kind, start, count, room):
    """Elements [start, start + count) of a tensor as float32: where they are stored, or converted in `room`."""
    if kind == FLOAT32:
        return carray(_pointer(address + 4 * start, np.float32), (count,))
    stored = carray(_pointer(address + 2 * start, np.uint16), (count,))
    bits = room.view(np.uint32)
    if kind == BFLOAT16:
        for i in range(count):
            bits[i] = np.uint32(stored[i]) << np.uint32(16)
        return room[:count]
    for i in range(count):
        half = np.uint32(stored[i])
        magnitude = (half & np.uint32(0x7FFF)) << np.uint32(13)
        beyond = np.uint32(0x70000000) if magnitude >= np.uint32(0x0F800000) else np.uint32(0)  # NaN and infinity
        bits[i] = ((half & np.uint32(0x8000)) << np.uint32(16)) | (magnitude + beyond)
    for i in range(count):
        room[i] *= np.float32(2.0**112)  # float16's exponent begins 112 above float32's
    return room[:count]


@_compile
def _write(address, kind, start, row, count):
    """Stores the float32 `row` at elements [start, start + count), rounded to nearest even."""
    if kind == FLOAT32:
        stored = carray(_pointer(address + 4 * start, np.float32), (count,))
        for i in range(count):
            stored[i] = row[i]
        return
    halves = carray(_pointer(address + 2 * start, np.uint16), (count,))
    bits = row.view(np.uint32)
    if kind == BFLOAT16:
        for i in range(count):
            b = bits[i]
            halves[i] = np.uint16((b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
        return
    for i in range(count):
        sign = (bits[i] >> np.uint32(16)) & np.uint32(0x8000)
        b = bits[i] & np.uint32(0x7FFFFFFF)
        if b < np.uint32(0x38800000):  # below float16's normal numbers: half a unit holds just their digits
            row[i] = abs(row[i]) + np.float32(0.5)
            half = bits[i] - np.uint32(0x3F000000)
        else:
            half = (b + np.uint32(0xFFF) + ((b >> np.uint32(13)) & np.uint32(1)) - np.uint32(0x38000000)) >> np.uint32(
                13
            )
        halves[i] = np.uint16(sign | min(half, np.uint32(0x7C00)))


@_compile
def _fill_mask(keep, start, count, mask):
    """1 where an element is kept and 0 where not to `mask`, which is all 1 where everything is (`keep` is empty)."""
    if len(keep):
        kept = keep[start : start + count]
        for i in range(count):
            mask[i] = kept[i]


@_compile
def _square_sums(addresses, kinds, keep, start, stop, sums):
    """sum(d_j^2) of every block to `sums` [M, blocks]."""
    base_room, room, mask = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.ones(BLOCK, np.float32)
    lanes = np.empty(LANES, np.float64)
    for block in range(start, stop, BLOCK):
        count = min(BLOCK, stop - block)
        whole = count // LANES
        shape, cut = (whole, LANES), whole * LANES
        _fill_mask(keep, block, count, mask)
        base = _read(addresses[0], kinds[0], block, count, base_room)
        for j in range(len(sums)):
            row = _read(addresses[j + 1], kinds[j + 1], block, count, room)
            rows, bases, masks = row[:cut].reshape(shape), base[:cut].reshape(shape), mask[:cut].reshape(shape)
            lanes[:] = 0
            for i in range(whole):
                for k in range(LANES):
                    d = np.float64((rows[i, k] - bases[i, k]) * masks[i, k])  # NaN and infinity stay NaN at mask 0
                    lanes[k] += d * d
            for i in range(cut, count):
                d = np.float64((row[i] - base[i]) * mask[i])
                lanes[i - cut] += d * d
            total = 0.0
            for k in range(LANES):
                total += lanes[k]
            sums[j, block // BLOCK] = total


@_compile
def _erase(addresses, kinds, keep, coefficients, start, stop, out, out_kind):
    """merged = pivot + s sum_j eta_j (s d_j)^+ / sum_j eta_j [s d_j > 0], s = the majority's sign."""
    targets, zero = len(coefficients), np.float32(0)
    base_room, room, mask = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.ones(BLOCK, np.float32)
    sign, update, divisor = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    rows = np.empty((targets, BLOCK), np.float32)
    for block in range(start, stop, BLOCK):
        count = min(BLOCK, stop - block)
        _fill_mask(keep, block, count, mask)
        base = _read(addresses[0], kinds[0], block, count, base_room)
        sign[:] = 0
        for j in range(targets):
            row, d = _read(addresses[j + 1], kinds[j + 1], block, count, room), rows[j]
            for i in range(count):
                d[i] = (row[i] - base[i]) * mask[i]
                sign[i] += d[i]
        for i in range(count):
            sign[i] = np.float32(1) if sign[i] >= zero else np.float32(-1)
            update[i] = 0
            divisor[i] = 0
        for j in range(targets):
            d, eta = rows[j], coefficients[j]
            for i in range(count):
                agreeing = d[i] * sign[i]
                update[i] += eta * (agreeing if agreeing > zero else zero)
                divisor[i] += eta if agreeing > zero else zero
        for i in range(count):
            weight = divisor[i] if divisor[i] > _TINY else _TINY
            update[i] = base[i] + sign[i] * update[i] / weight
        _write(out, out_kind, block, update, count)


@_compile
def _weigh(addresses, kinds, ratios, start, stop, out, out_kind):
    """merged = pivot + sum_j W_j d_j."""
    base_room, room, update = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for block in range(start, stop, BLOCK):
        count = min(BLOCK, stop - block)
        base = _read(addresses[0], kinds[0], block, count, base_room)
        update[:] = 0
        for j in range(len(ratios)):
            row, ratio = _read(addresses[j + 1], kinds[j + 1], block, count, room), ratios[j]
            for i in range(count):
                update[i] += ratio * (row[i] - base[i])
        for i in range(count):
            update[i] += base[i]
        _write(out, out_kind, block, update, count)


@_compile
def _weigh_elements(addresses, kinds, priors, start, stop, out, out_kind):
    """merged = pivot + sum_j w_j d_j^3 / sum_j w_j d_j^2, and the pivot where that is 0 / 0; float64 inside."""
    base_room, room, merged = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    update, divisor = np.empty(BLOCK, np.float64), np.empty(BLOCK, np.float64)
    for block in range(start, stop, BLOCK):
        count = min(BLOCK, stop - block)
        base = _read(addresses[0], kinds[0], block, count, base_room)
        update[:] = 0
        divisor[:] = 0
        for j in range(len(priors)):
            row, prior = _read(addresses[j + 1], kinds[j + 1], block, count, room), priors[j]
            for i in range(count):
                d = np.float64(row[i]) - np.float64(base[i])
                square = prior * d * d
                update[i] += square * d
                divisor[i] += square
        for i in range(count):
            change = update[i] / divisor[i] if divisor[i] > 0 else 0.0
            merged[i] = np.float32(np.float64(base[i]) + change)
        _write(out, out_kind, block, merged, count)


@_compile
def _classify(addresses, kinds, low, high, start, stop, classes):
    """By M times the variance of the targets: 1 above `high`, 2 in (low, high], else 0, to `classes` [n]. Returns the
    numbers of elements that differ, that are above, and whose variance is not finite."""
    differing, above, odd = 0, 0, 0
    targets = len(addresses) - 1
    first_room, room = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    total, square = np.empty(BLOCK, np.float64), np.empty(BLOCK, np.float64)
    for block in range(start, stop, BLOCK):
        count = min(BLOCK, stop - block)
        first = _read(addresses[1], kinds[1], block, count, first_room)
        total[:] = 0
        square[:] = 0
        for j in range(2, targets + 1):
            row = _read(addresses[j], kinds[j], block, count, room)
            for i in range(count):
                e = np.float64(row[i]) - np.float64(first[i])
                total[i] += e
                square[i] += e * e
        part = classes[block : block + count]
        for i in range(count):
            variance = square[i] - total[i] * total[i] / targets
            part[i] = np.uint8(1 if variance > high else 2 if variance > low else 0)
            above += variance > high
            differing += square[i] > 0
            odd += not square[i] < np.inf
    return differing, above, odd


class Compiled:
    """The pivot and the targets of one merged tensor, in a processor's memory.

    Args:
        pivot: float32, bfloat16 or float16; borrowed.
        targets: M tensors of the pivot's shape, of any of these dtypes; borrowed.
    """

    largest_mean_square = 2.0**90  # beyond, products of float32 task vectors may leave float32

    def __init__(self, pivot: Tensor, targets: Sequence[Tensor]):
        self.pivot = pivot.detach().reshape(-1).contiguous()
        self.targets = [target.detach().reshape(-1).contiguous() for target in targets]
        self.numel, self.device = self.pivot.numel(), self.pivot.device
        tensors = (self.pivot, *self.targets)
        self._addresses = np.array([tensor.data_ptr() for tensor in tensors])
        self._kinds = np.array([KINDS[tensor.dtype] for tensor in tensors])

    def square_sums(self, keep: Tensor | None) -> Tensor:
        """sum(d_j^2) over the kept elements, float64 [M]; NaN where a tensor is not finite."""
        sums = np.zeros((len(self.targets), math.ceil(self.numel / BLOCK)))
        self._run(_square_sums, _numpy(keep), last=(sums,))
        return torch.from_numpy(sums.sum(1))

    def classify(self, low: float, high: float, classes: Tensor) -> tuple[int, int]:
        """Of M times the variances: 1 above `high`, 2 in (low, high], else 0, to `classes`, uint8 [n]. Returns the
        numbers of elements that differ and that are above. FloatingPointError: a variance is not finite."""
        counts = self._run(_classify, low, high, last=(classes.numpy(),))
        differing, above, odd = np.array(counts or [(0, 0, 0)]).sum(0).tolist()
        if odd:
            raise FloatingPointError
        return differing, above

    def erase(self, coefficients: Tensor, keep: Tensor | None, out: Tensor) -> None:
        """Steps 3 and 4 of SCE, to `out`."""
        scaled = (coefficients * 2.0**40).numpy()  # keeps small products normal; cancels in the quotient
        self._run(_erase, _numpy(keep), scaled.astype(np.float32), last=_target(out))

    def weigh(self, ratios: Tensor, out: Tensor) -> None:
        """pivot + sum_j W_j d_j, to `out`."""
        self._run(_weigh, ratios.numpy().astype(np.float32), last=_target(out))

    def weigh_elements(self, priors: Sequence[float], out: Tensor) -> None:
        """pivot + sum_j w_j d_j^3 / sum_j w_j d_j^2, to `out`."""
        self._run(_weigh_elements, np.array(priors, np.float64), last=_target(out))

    def room(self, dtype: torch.dtype) -> Tensor:
        """An empty result [n]. numpy asks for huge pages, which the system hands out five times as fast."""
        return torch.from_numpy(np.empty(self.numel * dtype.itemsize, np.uint8)).view(dtype)

    def _run(self, function, *options, last: tuple) -> list:
        run = lambda piece: function(self._addresses, self._kinds, *options, *piece, *last)  # noqa: E731
        return spread(run, pieces(self.numel, CHUNK), self.device)


def _numpy(keep: Tensor | None) -> np.ndarray:
    return _ALL if keep is None else keep.numpy()


def _target(out: Tensor) -> tuple[int, int]:
    return out.data_ptr(), KINDS[out.dtype]
