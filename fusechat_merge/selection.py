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

from fusechat_merge.chunks import Chunks, Piece

SAMPLE = 1 << 16  # elements whose variances tell the band; no more elements than that: the band is everything
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
        low, high = _band(chunks, tau, deviations)
        differing, above, places, ranks = _classify(chunks, low, high, keep)
        kept = math.floor(tau * differing)
        if kept == 0:
            keep.zero_()
        if kept == 0 or _settle(chunks, keep, places, ranks, kept - above, low, high):
            return Selection(keep, kept, differing)
    raise FloatingPointError


def _rounding(chunks: Chunks) -> float:
    """Bound of the relative error of a variance in the working precision."""
    return 16 * len(chunks.targets) * torch.finfo(chunks.dtype).eps


def _band(chunks: Chunks, tau: float, deviations: float) -> tuple[float, float]:
    """Variances (low, high) that the threshold lies between, but for an error of so many standard deviations."""
    if chunks.numel <= SAMPLE or deviations == math.inf:
        return 0.0, math.inf
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(chunks.numel, (SAMPLE,), generator=generator).to(chunks.device)
    first, *others = [target[places].to(chunks.dtype) for target in chunks.targets]
    rows = torch.stack([other - first for other in others]) if others else first.new_zeros(1, SAMPLE)
    variance = _spread(rows, rows.sum(0) / len(chunks.targets), torch.empty_like(first), out=torch.empty_like(first))
    variance = variance.sort(descending=True).values
    differing = int(torch.count_nonzero(rows.abs().sum(0)))
    rank = tau * differing
    error = math.sqrt(rank * (1 - rank / SAMPLE)) + tau * math.sqrt(differing * (1 - differing / SAMPLE))
    margin = math.ceil(deviations * (error + 1))
    first_place, last_place = math.floor(rank) - margin, math.ceil(rank) + margin
    high = float(variance[first_place]) * (1 + 2 * _rounding(chunks)) if first_place >= 0 else math.inf
    low = float(variance[last_place]) * (1 - 2 * _rounding(chunks)) if last_place < SAMPLE else 0.0
    return (0.0 if low < TRUSTED_VARIANCE else low), (math.inf if high < TRUSTED_VARIANCE else high)


def _spread(rows: Tensor, mean: Tensor, square: Tensor, out: Tensor) -> Tensor:
    """M times the variance of M numbers, the first being 0 and the others `rows` [M - 1, C], to `out` [C]."""
    torch.mul(mean, mean, out=out)
    for row in rows:
        torch.sub(row, mean, out=square)
        out.add_(square.mul_(square))
    return out


def _classify(chunks: Chunks, low: float, high: float, keep: Tensor) -> tuple[int, int, Tensor, Tensor]:
    """One pass: `keep` becomes True above the band, else False. Returns the number of elements that differ, the number
    above the band, and the places [c] and exact ranks [c] of those inside."""
    first, others = chunks.targets[0], chunks.targets[1:]

    def step(piece: Piece) -> tuple[int, int, Tensor, Tensor]:
        rows = piece.differences(others, piece.working(first))[:, : piece.length]
        mean, variance, square = piece.scratch[:, : piece.length]
        mean.zero_()
        for row in rows:
            mean.add_(row)
        _spread(rows, mean.div_(len(chunks.targets)), square, out=variance)
        square.copy_(variance).sub_(TRUSTED_VARIANCE).sign_().relu_()
        differing = float(square.sum())
        if math.isnan(differing):
            raise FloatingPointError
        if differing < piece.length:  # squares that vanished: any difference counts
            rows.abs_()
            mean.zero_()
            for row in rows:
                mean.add_(row)
            differing = int(torch.count_nonzero(mean))
        # 0/1 in the working precision: comparisons to booleans are several times slower
        above = torch.sub(variance, high, out=mean).sign_().relu_() if high < math.inf else mean.zero_()
        inside = variance.sub_(low).sign_().relu_().sub_(above) if low else variance.zero_().add_(1).sub_(above)
        places = torch.nonzero(inside.bool()).flatten() + piece.start
        keep[piece.start : piece.stop].copy_(above)
        return int(differing), int(above.sum()), places, _ranks(chunks, places)

    empty = [(0, 0, torch.empty(0, dtype=torch.int64, device=chunks.device), torch.empty(0, device=chunks.device))]
    differing, above, places, ranks = zip(*(chunks.each(step, scratch=3) or empty))
    return sum(differing), sum(above), torch.cat(places), torch.cat(ranks)


def _ranks(chunks: Chunks, places: Tensor) -> Tensor:
    """M sum_j e_j^2 - (sum_j e_j)^2 at these places, e_j = target_j - target_0: M^2 times the variance, in float64,
    rounded to 41 bits so that equal variances are equal numbers."""
    first = chunks.targets[0][places].double()
    total, square = torch.zeros_like(first), torch.zeros_like(first)
    for target in chunks.targets[1:]:
        difference = target[places].double() - first
        total += difference
        square += difference * difference
    exact = len(chunks.targets) * square - total * total
    large = exact * (2.0**12 + 1)
    return large - (large - exact)


def _settle(chunks: Chunks, keep: Tensor, places: Tensor, ranks: Tensor, wanted: int, low: float, high: float) -> bool:
    """Keep the `wanted` elements of largest rank among those in the band, ties by index. False where the threshold is
    not in the band, or so near an edge that rounding may have put an element on the wrong side of it."""
    if not 1 <= wanted <= len(ranks):
        return False
    last = torch.kthvalue(ranks, len(ranks) - wanted + 1).values
    variance = float(last) / len(chunks.targets)
    if not low * (1 + _rounding(chunks)) <= variance <= high * (1 - _rounding(chunks)):
        return False
    larger = ranks > last
    keep[places[larger]] = True
    keep[places[torch.nonzero(ranks == last).flatten()[: wanted - int(torch.count_nonzero(larger))]]] = True
    return True
