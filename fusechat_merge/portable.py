"""The passes of a merge in PyTorch's own operations and float64: accelerators, and what `compiled` does not read.

Same steps as `compiled.Compiled`; a chunk at a time, so the extra memory does not grow with the tensor.

Shape letters: M targets, n elements of a tensor, c of a chunk, C of a chunk with zeros up to whole blocks.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fusechat_merge.chunks import map_threads, split

BLOCK = 1024  # elements whose squares are added first
CPU_CHUNK, ACCELERATOR_CHUNK = 1 << 14, 1 << 22  # elements of a chunk, a few hundred bytes each while in work

Result = TypeVar("Result")


class Portable:
    """The pivot and the targets of one merged tensor, on any device with float64 (see `passes.Passes`).

    Args:
        pivot: floating point; borrowed.
        targets: M tensors of the pivot's shape; borrowed.
    """

    largest_mean_square = float("inf")

    def __init__(self, pivot: Tensor, targets: Sequence[Tensor]):
        self.pivot = pivot.detach().reshape(-1)
        self.targets = [target.detach().reshape(-1) for target in targets]
        self.numel, self.device = self.pivot.numel(), self.pivot.device

    def square_sums(self, keep: Tensor | None) -> Tensor:
        def step(chunk: slice) -> Tensor:
            _, rows = self._task_vectors(chunk, keep)
            return rows.square_().view(len(rows), -1, BLOCK).sum(-1).cpu()  # [M, C / BLOCK]

        sums = self._run(step) or [torch.zeros(len(self.targets), 0)]
        return torch.from_numpy(np.sum(torch.cat(sums, 1).double().numpy(), 1))  # PyTorch's depends on the threads

    def classify(self, low: float, high: float, classes: Tensor) -> tuple[int, int] | None:
        def step(chunk: slice) -> tuple[int, int, bool]:
            rows = self._differences(chunk, self.targets[1:], self.targets[0][chunk].double())
            variance, square = variance_and_square(rows)
            above = variance > high
            classes[chunk] = 2 * (variance > low).byte() - above.byte()
            return int(torch.count_nonzero(square)), int(above.sum()), bool(torch.isfinite(square).all())

        differing, above, finite = zip(*(self._run(step) or [(0, 0, True)]))
        return (sum(differing), sum(above)) if all(finite) else None

    def erase_and_merge(self, coefficients: Tensor, keep: Tensor | None, out: Tensor) -> None:
        eta, merged = self._column(coefficients), out.view(-1)

        def step(chunk: slice) -> None:
            base, rows = self._task_vectors(chunk, keep)
            sign = torch.where(rows.sum(0) >= 0, 1.0, -1.0).double()
            agreeing = rows.mul_(sign).relu_()
            update = (agreeing * eta).sum(0).mul_(sign)
            divisor = agreeing.sign_().mul_(eta).sum(0).clamp_(min=torch.finfo(torch.float64).tiny)
            merged[chunk] = (base + update.div_(divisor)[: len(base)]).to(out.dtype)

        self._run(step)

    def varm_matrix(self, ratios: Tensor, out: Tensor) -> None:
        column, merged = self._column(ratios), out.view(-1)

        def step(chunk: slice) -> None:
            base, rows = self._task_vectors(chunk)
            merged[chunk] = (base + rows.mul_(column).sum(0)[: len(base)]).to(out.dtype)

        self._run(step)

    def varm_element(self, priors: Sequence[float], out: Tensor) -> None:
        column, merged = self._column(torch.tensor(priors, dtype=torch.float64)), out.view(-1)

        def step(chunk: slice) -> None:
            base, rows = self._task_vectors(chunk)
            squares = rows.square().mul_(column)
            shares = squares.div_(squares.sum(0).clamp_(min=torch.finfo(torch.float64).tiny))
            merged[chunk] = (base + rows.mul_(shares).sum(0)[: len(base)]).to(out.dtype)

        self._run(step)

    def empty(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.numel, dtype=dtype, device=self.device)

    def _task_vectors(self, chunk: slice, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(pivot [c], d [M, C]) of a chunk, d zero where `keep` leaves an element out (NaN stays NaN)."""
        base = self.pivot[chunk].double()
        width = math.ceil(len(base) / BLOCK) * BLOCK
        rows = self._differences(chunk, self.targets, base, width)
        if keep is not None:
            rows[:, : len(base)] *= keep[chunk]
        return base, rows

    def _differences(self, chunk: slice, minuends: Sequence[Tensor], base: Tensor, width: int | None = None) -> Tensor:
        """Rows minuend_j - base, float64 [len(minuends), width], zero past the base's length."""
        rows = base.new_zeros(len(minuends), width or len(base))
        for row, minuend in zip(rows, minuends):
            row[: len(base)] = minuend[chunk]
            row[: len(base)] -= base
        return rows

    def _column(self, values: Tensor) -> Tensor:
        return values.to(self.device, torch.float64).unsqueeze(1)

    def _run(self, step: Callable[[slice], Result]) -> list[Result]:
        size = CPU_CHUNK if self.device.type == "cpu" else ACCELERATOR_CHUNK
        return map_threads(step, split(self.numel, size), self.device)


def variance_and_square(rows: Tensor) -> tuple[Tensor, Tensor]:
    """For M numbers, the first being 0 and the others e_j = `rows` [M - 1, C]: M times their variance, sum(e_j^2) -
    sum(e_j)^2 / M, and sum(e_j^2), both [C]."""
    total, square = rows.sum(0), rows.square().sum(0)
    return square - total * total / (len(rows) + 1), square
