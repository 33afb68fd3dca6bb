"""The passes that a merge makes over its tensors, whoever makes them: `compiled.Compiled` or `portable.Portable`.

A pass reads the pivot and every target once. Shape letters: M targets, n elements of a tensor; d_j = target_j - pivot.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Passes(Protocol):
    """The pivot and the targets of one merged tensor, and what can be computed from them.

    Attributes:
        pivot: [n]; a view of what was given.
        targets: M tensors [n]; views of what was given.
        numel: n.
        device: where all of them are.
        largest_mean_square: largest sum(d_j^2) / n whose merge is exact here.
    """

    pivot: Tensor
    targets: list[Tensor]
    numel: int
    device: torch.device
    largest_mean_square: float

    def square_sums(self, keep: Tensor | None) -> Tensor:
        """sum(d_j^2) over the kept elements.

        Args:
            keep: uint8 [n], 0 where an element is left out; None: nowhere.

        Returns:
            float64 [M], on the CPU; not finite where a tensor is not, or a square is not.
        """
        ...

    def classify(self, low: float, high: float, classes: Tensor) -> tuple[int, int] | None:
        """Sort the elements by M times their variances v over the targets.

        Args:
            low, high: the edges of the band.
            classes: uint8 [n]; written: 1 where v > high, 2 where low < v <= high, else 0.

        Returns:
            (number of elements that are not equal in all targets, number of elements with v > high); None where a
            square is not finite and this was seen (what was not shows in `square_sums`).
        """
        ...

    def erase_and_merge(self, coefficients: Tensor, keep: Tensor | None, out: Tensor) -> None:
        """Steps 3 and 4 of SCE: merged = pivot + s sum_j eta_j (s d_j)^+ / sum_j eta_j [s d_j > 0], s = the majority.

        Args:
            coefficients: eta, float64 [M], on the CPU.
            keep: see `square_sums`; d_j counts as 0 where an element is left out.
            out: [n]; written.
        """
        ...

    def varm_matrix(self, ratios: Tensor, out: Tensor) -> None:
        """VaRM with one ratio W_j for the tensor: merged = pivot + sum_j W_j d_j.

        Args:
            ratios: W, float64 [M], on the CPU.
            out: [n]; written.
        """
        ...

    def varm_element(self, priors: Sequence[float], out: Tensor) -> None:
        """VaRM with ratios for every element: merged = pivot + sum_j w_j d_j^3 / sum_j w_j d_j^2, the pivot for 0 / 0.

        Args:
            priors: M numbers w_j, the largest 1.
            out: [n]; written.
        """
        ...

    def empty(self, dtype: torch.dtype) -> Tensor:
        """A result [n] to be written."""
        ...
