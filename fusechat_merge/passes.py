"""The passes that a merge makes over its tensors, in PyTorch's own operations and float64.

A pass reads the pivot and every target once, a chunk at a time, so the extra memory does not grow with the tensor.
`compiled.Compiled` overrides `Passes` with compiled loops; `Passes` itself runs on accelerators, and on a CPU for the
dtypes and numbers that the loops do not take.

Shape letters: M targets, n elements of a tensor, c of a chunk, C of a chunk padded with zeros to whole blocks; d_j =
target_j - pivot.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fusechat_merge.chunks import map_chunks

BLOCK = 1024  # elements whose squares are added first

Result = TypeVar("Result")


class Passes:
    """The pivot and the targets of one merged tensor, and what can be computed from them.

    Args:
        pivot: floating point, any shape and device; borrowed.
        targets: M tensors of the pivot's shape; borrowed.

    Attributes:
        pivot: [n]; a view of what was given.
        targets: M tensors [n]; views of what was given.
        numel: n.
        device: where all of them are.
        largest_mean_square: largest sum(d_j^2) / n whose merge is exact here.
        smallest_coefficient: smallest eta or W above 0 that keeps its meaning here.
        cpu_chunk, accelerator_chunk: elements of a chunk, a few hundred bytes each while in work.
    """

    largest_mean_square = math.inf
    smallest_coefficient = 0.0
    cpu_chunk, accelerator_chunk = 1 << 14, 1 << 22

    def __init__(self, pivot: Tensor, targets: Sequence[Tensor]):
        self.pivot = pivot.detach().reshape(-1)
        self.targets = [target.detach().reshape(-1) for target in targets]
        self.numel, self.device = self.pivot.numel(), self.pivot.device

    def square_sums(self, keep: Tensor | None) -> Tensor:
        """sum(d_j^2) over the kept elements.

        Args:
            keep: uint8 [n], 0 where an element is left out; None: nowhere.

        Returns:
            float64 [M], on the CPU; not finite where a tensor is not, or a square is not.
        """

        def step(chunk: slice) -> Tensor:
            _, rows = self._task_vectors(chunk, keep)
            return rows.square_().view(len(rows), -1, BLOCK).sum(-1).cpu()  # [M, C / BLOCK]

        sums = torch.cat(self._run(step), 1).double()
        return torch.from_numpy(np.sum(sums.numpy(), 1))  # PyTorch's depends on the threads

    def classify(self, low: float, high: float, classes: Tensor) -> tuple[int, int] | None:
        """Sort the elements by M times their variances v over the targets.

        Args:
            low, high: the edges of the band.
            classes: uint8 [n]; written: 1 where v > high, 2 where low < v <= high, else 0.

        Returns:
            (number of elements that are not equal in all targets, number of elements with v > high); None where a
            square is not finite and this was seen (what was not shows in `square_sums`).
        """

        def step(chunk: slice) -> tuple[int, int, bool]:
            rows = self._differences(chunk, self.targets[1:], self.targets[0][chunk].double())
            variance, square = variance_and_square(rows)
            above = variance > high
            classes[chunk] = 2 * (variance > low).byte() - above.byte()
            return int(torch.count_nonzero(square)), int(above.sum()), bool(torch.isfinite(square).all())

        differing, above, finite = zip(*self._run(step))
        return (sum(differing), sum(above)) if all(finite) else None

    def erase_and_merge(self, coefficients: Tensor, keep: Tensor | None, out: Tensor) -> None:
        """Steps 3 and 4 of SCE: merged = pivot + s sum_j eta_j (s d_j)^+ / sum_j eta_j [s d_j > 0], s = the majority.

        Args:
            coefficients: eta, float64 [M], on the CPU.
            keep: see `square_sums`; d_j counts as 0 where an element is left out.
            out: [n]; written.
        """
        eta = self._column(coefficients)

        def update(rows: Tensor) -> Tensor:
            sign = torch.where(rows.sum(0) >= 0, 1.0, -1.0).double()
            agreeing = rows.mul_(sign).relu_()
            weighted = (agreeing * eta).sum(0).mul_(sign)
            return weighted.div_(agreeing.sign_().mul_(eta).sum(0).clamp_(min=torch.finfo(torch.float64).tiny))

        self._write(out, update, keep)

    def varm_matrix(self, ratios: Tensor, out: Tensor) -> None:
        """VaRM with one ratio W_j for the tensor: merged = pivot + sum_j W_j d_j.

        Args:
            ratios: W, float64 [M], on the CPU.
            out: [n]; written.
        """

        column = self._column(ratios)
        self._write(out, lambda rows: rows.mul_(column).sum(0))

    def varm_element(self, priors: Sequence[float], out: Tensor) -> None:
        """VaRM with ratios for every element: merged = pivot + sum_j w_j d_j^3 / sum_j w_j d_j^2, the pivot for 0 / 0.

        Args:
            priors: M numbers w_j, the largest 1.
            out: [n]; written.
        """

        column = self._column(torch.tensor(priors, dtype=torch.float64))

        def update(rows: Tensor) -> Tensor:
            squares = rows.square().mul_(column)
            shares = squares.div_(squares.sum(0).clamp_(min=torch.finfo(torch.float64).tiny))
            return rows.mul_(shares).sum(0)

        self._write(out, update)

    def empty(self, dtype: torch.dtype) -> Tensor:
        """A result [n] to be written."""
        return torch.empty(self.numel, dtype=dtype, device=self.device)

    def _write(self, out: Tensor, update: Callable[[Tensor], Tensor], keep: Tensor | None = None) -> None:
        """Write pivot + update [C] of the task vectors [M, C], chunk by chunk."""

        def step(chunk: slice) -> None:
            base, rows = self._task_vectors(chunk, keep)
            out[chunk] = (base + update(rows)[: len(base)]).to(out.dtype)

        self._run(step)

    def _task_vectors(self, chunk: slice, keep: Tensor | None) -> tuple[Tensor, Tensor]:
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
        size = self.cpu_chunk if self.device.type == "cpu" else self.accelerator_chunk
        return map_chunks(step, self.numel, size, self.device)


def variance_and_square(rows: Tensor) -> tuple[Tensor, Tensor]:
    """For M numbers, the first being 0 and the others e_j = `rows` [M - 1, C]: M times their variance, sum(e_j^2) -
    sum(e_j)^2 / M, and sum(e_j^2), both [C]."""
    total, square = rows.sum(0), rows.square().sum(0)
    return square - total * total / (len(rows) + 1), square
