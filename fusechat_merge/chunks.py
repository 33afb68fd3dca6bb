"""Walk over the elements of equally shaped tensors in fixed pieces, in reused buffers, on several threads.

A merge of M targets reads M + 1 tensors and writes one. Done on whole tensors it would build several float32 copies of
all of them; done piece by piece the copies stay in the processor's cache and the extra memory does not grow with the
tensor. Each thread works through pieces of its own, so a thread that loses its processor to another program delays one
piece and not every operation. Every piece starts at a multiple of BLOCK, squares are added per BLOCK first, and no
piece reads what another wrote: neither the number of elements per piece nor the number of threads can change a bit of
the result.

Shape letters: M targets, C elements of a piece (rounded up to whole blocks, the rest zero).
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

BLOCK = 1024  # elements whose squares are added in the working precision before float64 takes over
CPU_CHUNK = 1 << 17  # elements of a piece: large beside Python's cost of a call, small beside the processor's cache
ACCELERATOR_CHUNK = 1 << 23


def blocks(elements: int) -> int:
    """Number of blocks that hold `elements` elements."""
    return math.ceil(elements / BLOCK)


class Piece:
    """One piece [start, stop) of the tensors with a thread's scratch memory.

    Attributes:
        start, stop: the piece's place in the flattened tensors.
        width: C, its length rounded up to whole blocks.
        scratch: further rows [C] to work in, as many as `Chunks.each` was asked for.
    """

    def __init__(self, chunks: "Chunks", rows: Tensor, scratch: Tensor, start: int):
        self.start, self.stop = start, min(start + chunks.size, chunks.numel)
        self.length = self.stop - start
        self.width = blocks(self.length) * BLOCK
        self._chunks, self._rows = chunks, rows
        self.scratch = scratch[1:, : self.width]
        self._converted = scratch[0]

    def working(self, source: Tensor) -> Tensor:
        """The piece of a flat tensor in the working precision: a view where the dtypes agree, else one reused row."""
        piece = source[self.start : self.stop]
        return piece if piece.dtype == self._chunks.dtype else self._converted[: self.length].copy_(piece)

    def differences(self, minuends: Sequence[Tensor], subtrahend: Tensor) -> Tensor:
        """Rows minuend_j - subtrahend, [len(minuends), C], zero past the piece's end; one set of rows, reused."""
        rows = self._rows[: len(minuends), : self.width]
        heads = rows[:, : self.length]
        if all(minuend.dtype == self._chunks.dtype for minuend in minuends):
            for row, minuend in zip(heads, minuends):
                torch.sub(minuend[self.start : self.stop], subtrahend, out=row)
        else:
            for row, minuend in zip(heads, minuends):
                row.copy_(minuend[self.start : self.stop])
            heads.sub_(subtrahend)
        if self.length < self.width:
            rows[:, self.length :] = 0
        return rows

    def task_vectors(self) -> tuple[Tensor, Tensor]:
        """(pivot [length], d [M, C]) of this piece in the working precision, d_j = target_j - pivot."""
        base = self.working(self._chunks.pivot)
        return base, self.differences(self._chunks.targets, base)


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
        largest = CPU_CHUNK if self.device.type == "cpu" else ACCELERATOR_CHUNK
        self.size = min(largest, max(1, blocks(self.numel)) * BLOCK)

    def each(self, step: Callable[[Piece], object], scratch: int = 0) -> list:
        """Call `step` on every piece and return what it returned, in the order of the pieces.

        Args:
            step: may write to its own piece's places only.
            scratch: rows of scratch memory it needs.
        """

        def prepare() -> Callable[[int], object]:
            rows = torch.empty(len(self.targets), self.size, dtype=self.dtype, device=self.device)
            spare = torch.empty(scratch + 1, self.size, dtype=self.dtype, device=self.device)
            return lambda start: step(Piece(self, rows, spare, start))

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
