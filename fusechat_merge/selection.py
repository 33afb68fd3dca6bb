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

import torch
from torch import Tensor

from fusechat_merge.chunks import Chunks, Piece, spread

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
        self._keep = keep.view(torch.uint8)  # bytes 0 and 1 convert faster than booleans do
        self.kept, self.differing = kept, differing

    def mask(self, piece: Piece, out: Tensor) -> Tensor:
        """1 where an element of the piece is kept, else 0, written to the front of `out` [C]; the rest is zero."""
        out[: piece.length].copy_(self._keep[piece.start : piece.stop])
        out[piece.length :] = 0
        return out


def select(chunks: Chunks, tau: float) -> Selection:
    """The floor(tau * n) elements of largest variance.

    Args:
        chunks: the tensors.
        tau: `select_topk`, in (0, 1).

    Raises:
        FloatingPointError: a difference of two targets is not finite.
    """
    keep = torch.empty(chunks.numel, dtype=torch.bool, device=chunks.device)
    for deviations in (6.0, 60.0, math.inf):
        ((low, high),) = spread(lambda: lambda width: _band(chunks, tau, width), [deviations], chunks.device)
        differing, above, places = _classify(chunks, low, high, keep)
        kept = math.floor(tau * differing)
        if kept == 0:
            keep.zero_()
        if kept == 0 or _settle(chunks, keep, places, kept - above, low, high):
            return Selection(keep, kept, differing)
    raise FloatingPointError


def _rounding(chunks: Chunks) -> float:
    """Bound of the relative error of a variance in the working precision."""
    return 16 * len(chunks.targets) * torch.finfo(chunks.dtype).eps


def _band(chunks: Chunks, tau: float, deviations: float) -> tuple[float, float]:
    """Variances (low, high) that the threshold lies between, but for an error of so many standard deviations."""
    if chunks.numel <= RANK_ALL or deviations == math.inf:
        return 0.0, math.inf
    count = min(SAMPLE, chunks.numel // 64)
    places = torch.randint(chunks.numel, (count,), generator=torch.Generator().manual_seed(0)).to(chunks.device)
    first, *others = [target[places].to(chunks.dtype) for target in chunks.targets]
    rows = torch.stack([other - first for other in others]) if others else first.new_zeros(1, count)
    differing = int(torch.count_nonzero(rows.abs().sum(0)))
    variance = _spread(rows, torch.empty_like(first), out=torch.empty_like(first)).sort(descending=True).values
    rank = tau * differing
    error = math.sqrt(rank * (1 - rank / count)) + tau * math.sqrt(differing * (1 - differing / count))
    margin = math.ceil(deviations * (error + 1))
    first_place, last_place = math.floor(rank) - margin, math.ceil(rank) + margin
    high = float(variance[first_place]) * (1 + 2 * _rounding(chunks)) if first_place >= 0 else math.inf
    low = float(variance[last_place]) * (1 - 2 * _rounding(chunks)) if last_place < count else 0.0
    return (0.0 if low < TRUSTED_VARIANCE else low), (math.inf if high < TRUSTED_VARIANCE else high)


def _spread(rows: Tensor, mean: Tensor, out: Tensor) -> Tensor:
    """M times the variance of M numbers, the first being 0 and the others `rows` [M - 1, C], to `out` [C]. Overwrites
    the rows and leaves the mean in `mean` [C]."""
    torch.sum(rows, 0, out=mean).div_(len(rows) + 1)
    rows.sub_(mean).mul_(rows)
    torch.sum(rows, 0, out=out)
    return out.add_(mean.mul_(mean))


def _classify(chunks: Chunks, low: float, high: float, keep: Tensor) -> tuple[int, int, Tensor]:
    """One pass: `keep` becomes True above the band, else False. Returns the number of elements that differ, the number
    above the band, and the places [c] of those inside."""
    first, others = chunks.targets[0], chunks.targets[1:]

    def step(piece: Piece) -> tuple[int, int, Tensor]:
        rows = piece.differences(others, piece.working(first))[:, : piece.length]
        mean, variance, square = piece.scratch[:, : piece.length]
        _spread(rows, mean, out=variance)
        square.copy_(variance).sub_(TRUSTED_VARIANCE).sign_().relu_()
        differing = float(square.sum())
        if math.isnan(differing):
            raise FloatingPointError
        if differing < piece.length:  # squares that vanished: any difference counts
            rows = piece.differences(others, piece.working(first))[:, : piece.length]
            differing = int(torch.count_nonzero(torch.sum(rows.abs_(), 0, out=square)))
        # 0/1 in the working precision: comparisons to booleans are several times slower
        above = torch.sub(variance, high, out=mean).sign_().relu_() if high < math.inf else mean.zero_()
        inside = variance.sub_(low).sign_().relu_().sub_(above) if low else variance.zero_().add_(1).sub_(above)
        places = torch.nonzero(inside.bool()).flatten() + piece.start
        keep[piece.start : piece.stop].copy_(above)
        return int(differing), int(above.sum()), places

    nothing = (0, 0, torch.empty(0, dtype=torch.int64, device=chunks.device))
    differing, above, places = zip(*(chunks.each(step, scratch=3) or [nothing]))
    return sum(differing), sum(above), torch.cat(places)


def _ranks(chunks: Chunks, places: Tensor) -> Tensor:
    """M sum_j e_j^2 - (sum_j e_j)^2 at these places, e_j = target_j - target_0: M^2 times the variance, on the CPU in
    float64, rounded to 41 bits so that equal variances are equal numbers."""
    first = chunks.targets[0][places].cpu().double()
    total, square = torch.zeros_like(first), torch.zeros_like(first)
    for target in chunks.targets[1:]:
        difference = target[places].cpu().double() - first
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
