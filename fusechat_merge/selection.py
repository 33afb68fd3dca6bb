"""Select: the elements on which the targets differ most (step 1 of SCE).

v = population variance over j of the task vectors d_j, elementwise. The pivot drops out of a variance, so it is
computed from the targets' differences to the first target: those are exact where the targets are close, and an element
counts as "all equal" exactly when the stored numbers are. Kept are the floor(tau * n) elements of largest v, n = number
of elements not all equal, ties at the threshold by lowest index.

One pass over the targets decides nearly every element: a sample of the elements tells a band of variances that the
threshold must lie in; above the band an element is kept, below it is not. The few elements inside are ranked by their
variance in float64, which for 16-bit storage is exact, so rounding decides no tie. Should the threshold prove to lie
outside, the pass is repeated with a wider band. Memory: one byte for each element, and 16 for each element in the band.
"""

import math

import numpy as np
import torch
from torch import Tensor

from fusechat_merge.chunks import Chunks, Piece, on_cpu, spread

SAMPLE = 1 << 16  # at most so many elements, and at most one in 64, tell the band by their variances
RANK_ALL = 1 << 14  # in a tensor of no more elements than that the band is everything
RANKED_AT_ONCE = 1 << 15
TRUSTED_VARIANCE = 2.0**-100  # below, float32 squares lose digits or vanish


class Selection:
    """The kept elements of one tensor.

    Attributes:
        kept: number of kept elements, floor(tau * n).
        differing: n, the number of elements whose task vectors are not all equal.
    """

    def __init__(self, keep: Tensor, kept: int, differing: int):
        self._keep, self.kept, self.differing = keep, kept, differing

    def places(self, piece: Piece) -> Tensor:
        """Where in the piece the kept elements are, int64 [c], ascending."""
        return _flatnonzero(piece.of(self._keep))


def select(chunks: Chunks, tau: float) -> Selection:
    """The floor(tau * n) elements of largest variance.

    Args:
        chunks: the tensors.
        tau: `select_topk`, in (0, 1).

    Raises:
        FloatingPointError: a difference of two targets is not finite.
    """
    keep = torch.empty(chunks.numel, dtype=torch.bool, device=chunks.device)
    for deviations in (4.0, 40.0, math.inf):
        ((low, high),) = spread(lambda: lambda width: _band(chunks, tau, width), [deviations], chunks.device)
        differing, above, places = _classify(chunks, low, high, keep)
        kept = math.floor(tau * differing)
        if kept == 0:
            keep.zero_()
        if kept == 0 or _settle(chunks, keep, places, kept - above, low, high):
            return Selection(keep, kept, differing)
    raise FloatingPointError


def _rounding(chunks: Chunks) -> float:
    """Bound of the relative error of `_spread` in the working precision: its second term is at most M times it."""
    return 4 * (len(chunks.targets) + 1) ** 2 * torch.finfo(chunks.dtype).eps


def _band(chunks: Chunks, tau: float, deviations: float) -> tuple[float, float]:
    """Variances (low, high) that the threshold lies between, but for an error of so many standard deviations."""
    if chunks.numel <= RANK_ALL or deviations == math.inf:
        return -math.inf, math.inf
    count = min(SAMPLE, chunks.numel // 64)
    places = torch.randint(chunks.numel, (count,), generator=torch.Generator().manual_seed(0)).to(chunks.device)
    first, *others = [target[places].to(chunks.dtype) for target in chunks.targets]
    rows = torch.stack([other - first for other in others]) if others else first.new_zeros(1, count)
    differing = int(torch.count_nonzero(rows.abs().sum(0)))
    variance = _spread(rows, torch.empty_like(first), out=torch.empty_like(first)).cpu().numpy()
    variance[::-1].sort()  # descending
    rank = tau * differing
    error = math.sqrt(rank * (1 - rank / count)) + tau * math.sqrt(differing * (1 - differing / count))
    margin = math.ceil(deviations * (error + 1))
    first_place, last_place = math.floor(rank) - margin, math.ceil(rank) + margin
    high = float(variance[first_place]) * (1 + 2 * _rounding(chunks)) if first_place >= 0 else math.inf
    low = float(variance[last_place]) * (1 - 2 * _rounding(chunks)) if last_place < count else -math.inf
    return (-math.inf if low < TRUSTED_VARIANCE else low), (math.inf if high < TRUSTED_VARIANCE else high)


def _spread(rows: Tensor, total: Tensor, out: Tensor) -> Tensor:
    """M times the variance of M numbers, the first being 0 and the others e_j = `rows` [M - 1, C]: sum(e_j^2) -
    sum(e_j)^2 / M, to `out` [C]. Overwrites the rows; leaves sum(e_j) in `total` [C]."""
    torch.sum(rows, 0, out=total)
    torch.sum(rows.mul_(rows), 0, out=out)
    return out.addcmul_(total, total, value=-1 / (len(rows) + 1))


def _classify(chunks: Chunks, low: float, high: float, keep: Tensor) -> tuple[int, int, Tensor]:
    """One pass: `keep` becomes True above the band, else False. Returns the number of elements that differ, the number
    above the band, and the places [c] of those inside."""
    first, others = chunks.targets[0], chunks.targets[1:]

    def step(piece: Piece) -> tuple[int, int, Tensor]:
        rows = piece.differences(others, piece.working(first))[:, : piece.length]
        total, variance = piece.scratch(2, piece.length)
        _spread(rows, total, out=variance)
        above = _greater(variance, high, out=piece.of(keep))
        inside = total.view(torch.bool)[: piece.length]
        places = _flatnonzero(_greater(variance, low, out=inside).bitwise_xor_(above)) + piece.start
        least, differing = float(variance.amin()), piece.length
        if math.isnan(least):
            raise FloatingPointError
        if least < TRUSTED_VARIANCE:  # squares that vanished: any difference counts
            rows = piece.differences(others, piece.working(first))[:, : piece.length]
            differing = int(torch.count_nonzero(torch.sum(rows.abs_(), 0, out=total)))
        return differing, int(torch.count_nonzero(above)), places

    nothing = (0, 0, torch.empty(0, dtype=torch.int64, device=chunks.device))
    differing, above, places = zip(*(chunks.each(step) or [nothing]))
    return sum(differing), sum(above), torch.cat(places)


def _greater(values: Tensor, bound: float, out: Tensor) -> Tensor:
    """values > bound to the booleans `out`; on a CPU by numpy, whose comparison is six times as fast."""
    if on_cpu(values):
        np.greater(values.numpy(), bound, out=out.numpy())
        return out
    return torch.gt(values, bound, out=out)


def _flatnonzero(flags: Tensor) -> Tensor:
    """Places where a flat boolean tensor is True, int64; on a CPU by numpy, likewise."""
    if on_cpu(flags):
        return torch.from_numpy(np.flatnonzero(flags.numpy()))
    return torch.nonzero(flags).flatten()


def _ranks(chunks: Chunks, places: Tensor) -> Tensor:
    """M sum_j e_j^2 - (sum_j e_j)^2 at these places, e_j = target_j - target_0: M^2 times the variance, on the CPU in
    float64, rounded to 41 bits so that equal variances are equal numbers."""
    first = torch.index_select(chunks.targets[0], 0, places).cpu().double()
    total, square = torch.zeros_like(first), torch.zeros_like(first)
    for target in chunks.targets[1:]:
        difference = torch.index_select(target, 0, places).cpu().double().sub_(first)
        total += difference
        square += difference * difference
    exact = len(chunks.targets) * square - total * total
    large = exact * (2.0**12 + 1)
    return large - (large - exact)


def _settle(chunks: Chunks, keep: Tensor, places: Tensor, wanted: int, low: float, high: float) -> bool:
    """Keep the `wanted` elements of largest rank among those in the band, ties by index. False where the threshold is
    not in the band, or so near an edge that rounding may have put an element on the wrong side of it."""
    if not 1 <= wanted <= len(places):
        return False
    ranks = spread(lambda: lambda part: _ranks(chunks, part), places.split(RANKED_AT_ONCE), places.device)
    ranks = torch.cat(ranks)
    last = torch.kthvalue(ranks, len(ranks) - wanted + 1).values
    variance = float(last) / len(chunks.targets)
    if not low * (1 + _rounding(chunks)) <= variance <= high * (1 - _rounding(chunks)):
        return False
    chosen = ranks > last
    ties = torch.nonzero(ranks == last).flatten()
    chosen[ties[: wanted - int(torch.count_nonzero(chosen))]] = True
    keep[places[chosen.to(places.device)]] = True
    return True
