"""Select: the elements on which the targets differ most (step 1 of SCE).

v = population variance over j of the task vectors d_j, elementwise. The pivot drops out of a variance, so it is
computed from the targets' differences to the first target: those are exact where the targets are close, and an element
counts as "all equal" exactly when the stored numbers are. Kept are the floor(tau * n) elements of largest v, n = number
of elements not all equal, ties at the threshold by lowest index.

One pass over the targets decides nearly every element: a sample of the elements gives a band of variances that the
threshold must lie in; above the band an element is kept, below it is not. The few elements inside are ranked by their
variance rounded to 41 bits, which for 16-bit storage is exact, so rounding decides no tie. Should the threshold prove
to lie outside, the pass is repeated with a wider band. Memory: one byte for each element, and 16 for each in the band.
"""

import math

import numpy as np
import torch
from torch import Tensor

from fusechat_merge.chunks import map_chunks
from fusechat_merge.passes import Passes, variance_and_square

SAMPLE = 1 << 16  # elements whose variances give the band: at most so many, and at most one in 64
RANK_ALL = 1 << 14  # in a tensor of no more elements the band covers all variances
RANKED_AT_ONCE = 1 << 15
SEARCHED_AT_ONCE = 1 << 18


def select(passes: Passes, tau: float) -> tuple[Tensor, int] | None:
    """The floor(tau * n) elements of largest variance.

    Args:
        passes: the pivot and the targets.
        tau: `select_topk`, in [0, 1).

    Returns:
        (uint8 [n], 1 where an element is kept, else 0; the number of kept elements). None where a number, or the square
        of a difference, is not finite (not all such are found here).
    """
    keep = torch.empty(passes.numel, dtype=torch.uint8, device=passes.device)
    for deviations in (4.0, 40.0, math.inf):
        low, high = _band(passes, tau, deviations)
        counts = passes.classify(low, high, keep)
        if counts is None:
            return None
        differing, above = counts
        kept = math.floor(tau * differing)
        if kept == 0:
            return keep.zero_(), 0
        if keep_largest_of_band(passes, keep, kept - above, low, high):
            return keep, kept
    return None  # no threshold among all variances: one of them is NaN


def _rounding(passes: Passes) -> float:
    """Bound of the relative error of a variance in float64, whose second term is at most M times it, and of a rank."""
    return 4 * (len(passes.targets) + 1) ** 2 * torch.finfo(torch.float64).eps + 2.0**-40


def _band(passes: Passes, tau: float, deviations: float) -> tuple[float, float]:
    """Variances (low, high) that the threshold lies between, but for an error of so many standard deviations."""
    if passes.numel <= RANK_ALL or deviations == math.inf:
        return -math.inf, math.inf
    count = min(SAMPLE, passes.numel // 64)
    places = torch.randint(passes.numel, (count,), generator=torch.Generator().manual_seed(0)).to(passes.device)
    first, *others = [target[places].double() for target in passes.targets]
    rows = torch.stack([other - first for other in others]) if others else first.new_zeros(1, count)
    variance, square = (values.cpu().numpy() for values in variance_and_square(rows))
    differing = np.count_nonzero(square)
    variance[::-1].sort()  # descending
    rank = tau * differing
    error = math.sqrt(rank * (1 - rank / count)) + tau * math.sqrt(differing * (1 - differing / count))
    margin = math.ceil(deviations * (error + 1))
    first_place, last_place = math.floor(rank) - margin, math.ceil(rank) + margin
    high = float(variance[first_place]) * (1 + 2 * _rounding(passes)) if first_place >= 0 else math.inf
    low = float(variance[last_place]) * (1 - 2 * _rounding(passes)) if last_place < count else -math.inf
    return low, high


def _ranks(passes: Passes, places: Tensor) -> Tensor:
    """M sum_j e_j^2 - (sum_j e_j)^2 at these places, e_j = target_j - target_0: M^2 times the variance, on the CPU in
    float64, rounded to 41 bits so that equal variances are equal numbers."""
    first = torch.index_select(passes.targets[0], 0, places).cpu().double()
    total, square = torch.zeros_like(first), torch.zeros_like(first)
    for target in passes.targets[1:]:
        difference = torch.index_select(target, 0, places).cpu().double().sub_(first)
        total += difference
        square += difference * difference
    exact = len(passes.targets) * square - total * total
    large = exact * (2.0**12 + 1)
    return large - (large - exact)


def keep_largest_of_band(passes: Passes, keep: Tensor, wanted: int, low: float, high: float) -> bool:
    """Keep the `wanted` elements of largest rank among those in the band (2 in `keep`), ties by index. False where the
    threshold is not in the band, or so near an edge that rounding may have put an element on the wrong side of it."""

    def inside(chunk: slice) -> np.ndarray:
        return chunk.start + np.flatnonzero(keep[chunk].cpu().numpy() == 2)

    found = map_chunks(inside, passes.numel, SEARCHED_AT_ONCE, passes.device)
    places = torch.from_numpy(np.concatenate(found)).to(passes.device)
    if not 1 <= wanted <= len(places):
        return False
    parts = map_chunks(lambda c: _ranks(passes, places[c]), len(places), RANKED_AT_ONCE, passes.device)
    ranks = torch.cat(parts)
    last = torch.kthvalue(ranks, len(ranks) - wanted + 1).values
    variance = float(last) / len(passes.targets)
    if not low * (1 + _rounding(passes)) <= variance <= high * (1 - _rounding(passes)):
        return False
    chosen = ranks > last
    ties = torch.nonzero(ranks == last).flatten()
    chosen[ties[: wanted - int(torch.count_nonzero(chosen))]] = True
    keep[places] = chosen.byte().to(passes.device)
    return True
