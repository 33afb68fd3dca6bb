"""Walk over the elements of equally shaped tensors in fixed pieces, in reused buffers, on several threads.

A merge of M targets reads M + 1 tensors and writes one. Done on whole tensors it would build several float32 copies of
all of them; done piece by piece the copies stay in the processor's cache and the extra memory does not grow with the
tensor. Each thread works through pieces of its own, so a thread that loses its processor to another program delays one
piece and not every operation. Every piece starts at a multiple of BLOCK, squares are added per BLOCK first, and no
piece reads what another wrote: neither the number of elements per piece nor the number of threads can change a bit of
the result.

Shape letters: M targets, C elements of a piece or of a choice from it (rounded up to whole blocks, the rest zero).
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

BLOCK = 1024  # elements whose squares are added in the working precision before float64 takes over
CPU_CHUNK = 1 << 18  # elements of a piece: large beside Python's cost of a call, small beside the processor's cache
CPU_MEMORY = 1 << 26  # bytes that the threads' memory may take together: with many of them their pieces are smaller
ACCELERATOR_CHUNK = 1 << 23
SCRATCH = 4  # rows of scratch memory that a step may use


def blocks(elements: int) -> int:
    """Number of blocks that hold `elements` elements."""
    return math.ceil(elements / BLOCK)


class Piece:
    """One piece [start, stop) of the tensors with a thread's scratch memory.

    Attributes:
        start, stop: the piece's place in the flattened tensors.
        length: stop - start.
    """

    def __init__(self, chunks: "Chunks", memory: Tensor, start: int):
        self.start, self.stop = start, min(start + chunks.size, chunks.numel)
        self.length = self.stop - start
        self._chunks = chunks
        self._rows, self._converted, self._scratch = memory.split([len(memory) - SCRATCH - 1, 1, SCRATCH])

    def of(self, tensor: Tensor) -> Tensor:
        """The piece of a flat tensor: a view."""
        return tensor[self.start : self.stop]

    def scratch(self, count: int, width: int) -> Tensor:
        """Further rows [count, width] to work in, at most SCRATCH."""
        return self._scratch[:count, :width]

    def working(self, source: Tensor, places: Tensor | None = None) -> Tensor:
        """The piece of a flat tensor, or its elements at `places` [c], in the working precision: a view where the
        dtypes agree and all are wanted, else one reused row."""
        piece = self.of(source)
        if places is None and piece.dtype == self._chunks.dtype:
            return piece
        return _fill(self._converted[0, : self.length if places is None else len(places)], piece, places)

    def differences(self, minuends: Sequence[Tensor], subtrahend: Tensor, places: Tensor | None = None) -> Tensor:
        """Rows minuend_j - subtrahend, [len(minuends), C], zero past the last; one set of rows, reused."""
        count = len(subtrahend)
        rows = self._rows[: len(minuends), : blocks(count) * BLOCK]
        heads = rows[:, :count]
        if places is None and all(minuend.dtype == self._chunks.dtype for minuend in minuends):
            for row, minuend in zip(heads, minuends):
                torch.sub(self.of(minuend), subtrahend, out=row)
        else:
            for row, minuend in zip(heads, minuends):
                _fill(row, self.of(minuend), places)
            heads.sub_(subtrahend)
        rows[:, count:] = 0
        return rows

    def task_vectors(self, places: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(pivot [c], d [M, C]) of this piece, or of its elements at `places` [c], in the working precision, d_j =
        target_j - pivot."""
        base = self.working(self._chunks.pivot, places)
        return base, self.differences(self._chunks.targets, base, places)


def _fill(row: Tensor, piece: Tensor, places: Tensor | None) -> Tensor:
    """Writes the piece, or its elements at `places`, to `row`, converted."""
    if places is None:
        return row.copy_(piece)
    if piece.dtype == row.dtype:
        return torch.index_select(piece, 0, places, out=row)
    return row.copy_(torch.index_select(piece, 0, places))


def on_cpu(tensor: Tensor) -> bool:
    """Whether numpy can see the tensor; elsewhere PyTorch's own, on a CPU slower, operations serve."""
    return tensor.device.type == "cpu"


def sums_of_blocks(values: Tensor, places: Tensor, count: int) -> Tensor:
    """Sums [M, count] of values [M, c] that stand at the ascending `places` [c] of a piece of `count` blocks, each
    block by itself; on a CPU by numpy, which is five times as fast."""
    edges = torch.searchsorted(places, BLOCK * torch.arange(count + 1, device=places.device))
    if not on_cpu(values):
        lengths = edges.diff().expand(len(values), -1).contiguous()
        return torch.segment_reduce(values.contiguous(), "sum", lengths=lengths, axis=1, unsafe=True)
    sums, edges = np.zeros((len(values), count), values.numpy().dtype), edges.numpy()
    filled = np.flatnonzero(np.diff(edges))
    if len(filled):
        sums[:, filled] = np.add.reduceat(values.numpy(), edges[filled], axis=1)
    return torch.from_numpy(sums)


class Chunks:
    """The pivot and the targets of one merged tensor, served piece by piece in the working precision.

    Args:
        pivot: Tensor of any shape, floating point; borrowed.
        targets: M tensors of the pivot's shape, floating point; borrowed.
        dtype: working precision, torch.float32 or torch.float64.
    """

    def __init__(self, pivot: Tensor, targets: Sequence[Tensor], dtype: torch.dtype):
        self.pivot = pivot.detach().reshape(-1)
        self.targets = [target.detach().reshape(-1) for target in targets]
        self.numel = self.pivot.numel()
        self.dtype = dtype
        self.device = pivot.device
        self._rows = len(self.targets) + 1 + SCRATCH
        fit = CPU_MEMORY // (torch.get_num_threads() * self._rows * dtype.itemsize * BLOCK) * BLOCK
        largest = max(BLOCK, min(CPU_CHUNK, fit)) if self.device.type == "cpu" else ACCELERATOR_CHUNK
        self.size = min(largest, max(1, blocks(self.numel)) * BLOCK)
        self._memory: list[Tensor] = []

    def each(self, step: Callable[[Piece], object]) -> list:
        """Call `step` on every piece and return what it returned, in the order of the pieces. `step` may write to its
        own piece's places only. The threads' memory is kept for the next call."""
        free = iter(list(self._memory))  # shared: next() on it is atomic

        def prepare() -> Callable[[int], object]:
            memory = next(free, None)
            if memory is None:
                memory = torch.empty(self._rows, self.size, dtype=self.dtype, device=self.device)
                self._memory.append(memory)
            return lambda start: step(Piece(self, memory, start))

        return spread(prepare, range(0, self.numel, self.size), self.device)


def spread(prepare: Callable[[], Callable], items: Sequence, device: torch.device) -> list:
    """Results of `prepare()(item)` for all items, in their order, from PyTorch's number of threads on a CPU.

    Each thread prepares once and takes the next item when it is free. PyTorch's own division of single operations
    between threads is off meanwhile: it waits for the slowest thread after every operation.
    """
    results = [None] * len(items)
    places = iter(range(len(items)))  # shared: next() on it is atomic
    total = torch.get_num_threads()

    def work() -> None:
        torch.set_num_threads(1)  # for this thread
        step = prepare()
        for place in places:
            results[place] = step(items[place])

    threads = min(total, len(items))
    if device.type != "cpu":
        step = prepare()
        results = [step(item) for item in items]
    elif threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            futures = [pool.submit(work) for _ in range(threads)]
        torch.set_num_threads(total)  # what later threads inherit
        for future in futures:
            future.result()
    else:
        try:
            work()
        finally:
            torch.set_num_threads(total)
    return results
