"""Select: the elements on which the targets differ most (step 1 of SCE).

v = population variance over j of the task vectors d_j, elementwise. The pivot drops out of a variance, so it is
computed from the targets' differences to the first target: those are exact where the targets are close, and an element
counts as "all equal" exactly when the stored numbers are. Kept are the floor(tau * n) elements of largest v, n = number
of elements not all equal, ties at the threshold by lowest index. The threshold comes from counting the bits of v,
sixteen at a time: no sort, one array of v; what rounding leaves undecided at the threshold is settled in float64.
"""

import math

import torch
from torch import Tensor

from fusechat_merge.chunks import Chunks, Piece

DIGIT = 16  # bits of a floating-point number that are counted at a time
COUNT_ELEMENTS = 1 << 20  # elements counted at a time
TRUSTED_VARIANCE = 2.0**-100  # below, float32 squares lose digits or vanish
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


class Selection:
    """The kept elements of one tensor.

    Attributes:
        kept: number of kept elements, floor(tau * n).
        differing: n, the number of elements whose task vectors are not all equal.
    """

    def __init__(self, values: Tensor, limit: float, kept: int, differing: int):
        self._values, self._limit = values, limit  # kept are the elements whose value is above the limit
        self.kept, self.differing = kept, differing

    def mask(self, piece: Piece, out: Tensor) -> Tensor:
        """1 where an element of the piece is kept, else 0, written to the front of `out` [C]; the rest is zero."""
        torch.sub(self._values[piece.start : piece.stop], self._limit, out=out[: piece.length])
        out[piece.length :] = 0
        return out.relu_().sign_()


def select(chunks: Chunks, tau: float) -> Selection | None:
    """The floor(tau * n) elements of largest variance.

    Args:
        chunks: the tensors, in a working precision.
        tau: `select_topk`, in (0, 1).

    Returns:
        The selection, or None where this working precision cannot rank the variances (float32 squares of the
        differences overflow, or the threshold lies where they underflow): repeat in float64.
    """
    variances, differing, ranked = _variances(chunks)
    kept = math.floor(tau * differing)
    if chunks.dtype == torch.float32 and (
        kept > ranked or not bool(torch.isfinite(variances.sum(dtype=torch.float64)))
    ):
        return None
    if kept == 0:
        return Selection(variances, math.inf, 0, differing)
    limit = _decide(chunks, variances, kth_largest(variances, kept)[0], kept)
    return Selection(variances, limit, kept, differing)


def _variances(chunks: Chunks) -> tuple[Tensor, int, int]:
    """M times the variance of every element; the number of elements that differ; the number with a trusted variance."""
    first, others = chunks.targets[0], chunks.targets[1:]
    variances = torch.empty(chunks.numel, dtype=chunks.dtype, device=chunks.device)

    def step(piece: Piece) -> tuple[int, int]:
        rows = piece.differences(others, piece.working(first))[:, : piece.length]
        mean, square = piece.scratch[:, : piece.length]
        variance = variances[piece.start : piece.stop]
        mean.zero_()
        for row in rows:
            mean.add_(row)
        mean.div_(len(chunks.targets))
        torch.mul(mean, mean, out=variance)  # the first target's difference to itself is 0
        for row in rows:
            torch.sub(row, mean, out=square)
            variance.add_(square.mul_(square))
        trusted = int(torch.count_nonzero(variance >= TRUSTED_VARIANCE))
        if trusted == piece.length:
            return trusted, trusted
        return trusted + int(torch.count_nonzero((rows != 0).any(0) & (variance < TRUSTED_VARIANCE))), trusted

    counts = chunks.each(step, scratch=2)
    return variances, sum(differing for differing, _ in counts), sum(ranked for _, ranked in counts)


def kth_largest(values: Tensor, k: int) -> tuple[float, int]:
    """The k-th largest of non-negative floating-point numbers, exactly, by counting their bits.

    Args:
        values: [n], float32 or float64, non-negative, contiguous; borrowed.
        k: rank in [1, n].

    Returns:
        (x, r): x is the k-th largest value, and r of the elements equal to x are among the k largest.
    """
    integer = _BITS[values.dtype]
    bits = values.view(integer)  # the order of non-negative floats is the order of their bits
    prefix, above = 0, 0
    for shift in range(8 * values.itemsize - DIGIT, -1, -DIGIT):
        counts = torch.zeros(1 << DIGIT, dtype=torch.int64, device=values.device)
        for piece in bits.split(COUNT_ELEMENTS):
            if shift < 8 * values.itemsize - DIGIT:
                piece = piece[(piece >> (shift + DIGIT)) == prefix]
            counts += torch.bincount((piece >> shift) & ((1 << DIGIT) - 1), minlength=1 << DIGIT)
        reached = above + counts.flip(0).cumsum(0)
        place = int(torch.searchsorted(reached, k))
        above = int(reached[place - 1]) if place else above
        prefix = (prefix << DIGIT) | ((1 << DIGIT) - 1 - place)
    return float(torch.tensor([prefix], dtype=integer).view(values.dtype)), k - above


def _decide(chunks: Chunks, variances: Tensor, threshold: float, kept: int) -> float:
    """Settle which elements near the threshold are kept, and return the limit above which `variances` are kept.

    Rounding may have put two equal variances in either order. All those within rounding of the threshold are computed
    again in float64 (exactly, for 16-bit storage), ranked, ties by index, and overwritten: kept ones become infinite.
    """
    reach = 8 * len(chunks.targets) * torch.finfo(chunks.dtype).eps
    low, high = threshold * (1 - reach), threshold * (1 + reach)

    def step(piece: Piece) -> tuple[int, Tensor, Tensor]:
        variance = variances[piece.start : piece.stop]
        above = variance > high
        places = torch.nonzero((variance >= low) ^ above).flatten() + piece.start
        return int(torch.count_nonzero(above)), places, _ranks(chunks, places, threshold)

    counts, places, ranks = zip(*chunks.each(step))
    places, ranks = torch.cat(places), torch.cat(ranks)
    last, ties = kth_largest(ranks, kept - sum(counts))
    chosen = ranks > last
    chosen[torch.nonzero(ranks == last).flatten()[:ties]] = True
    variances[places] = chosen.to(variances.dtype) * torch.finfo(variances.dtype).max
    return high


def _ranks(chunks: Chunks, places: Tensor, threshold: float) -> Tensor:
    """(M sum_j e_j^2 - (sum_j e_j)^2) / (M threshold) at these places, e_j = target_j - target_0, in float64, rounded to
    40 binary places: M times the variance over the threshold, equal where the variances are equal."""
    first = chunks.targets[0][places].double()
    total, square = torch.zeros_like(first), torch.zeros_like(first)
    for target in chunks.targets[1:]:
        difference = target[places].double() - first
        total += difference
        square += difference * difference
    count = len(chunks.targets)
    return torch.round((count * square - total * total) / (count * threshold) * 2.0**40)
