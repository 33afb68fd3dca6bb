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
CPU_CHUNK = 1 << 16  # elements of a piece: large beside Python's cost of a call, small beside the processor's cache
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
        for row, minuend in zip(rows, minuends):
            piece, head = minuend[self.start : self.stop], row[: self.length]
            if piece.dtype == self._chunks.dtype:
                torch.sub(piece, subtrahend, out=head)
            else:
                head.copy_(piece).sub_(subtrahend)
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
        starts = list(range(0, self.numel, self.size))
        threads = min(torch.get_num_threads(), len(starts)) if self.device.type == "cpu" else 1
        results = [None] * len(starts)
        places = iter(range(len(starts)))  # shared: next() on it is atomic

        def work(single: bool) -> None:
            if single:
                torch.set_num_threads(1)  # for this thread: it is the unit of parallel work
            rows = torch.empty(len(self.targets), self.size, dtype=self.dtype, device=self.device)
            spare = torch.empty(scratch + 1, self.size, dtype=self.dtype, device=self.device)
            for place in places:
                results[place] = step(Piece(self, rows, spare, starts[place]))

        if threads <= 1:
            work(single=False)
            return results
        with ThreadPoolExecutor(threads) as pool:
            futures = [pool.submit(work, True) for _ in range(threads)]
        torch.set_num_threads(torch.get_num_threads())  # what later threads inherit
        for future in futures:
            future.result()
        return results
