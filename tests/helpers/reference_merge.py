"""SCE and VaRM in float64, one Python number at a time, straight from the equations; no code of the library."""

import math

import torch


def task_vectors(pivot, targets):
    """d_j = target_j - pivot as lists of floats."""
    flat = pivot.double().flatten().tolist()
    return flat, [[x - y for x, y in zip(t.double().flatten().tolist(), flat)] for t in targets]


def variances(deltas):
    """The population variance over the targets for each element, times one common factor, as exact integers."""
    ratios = [[x.as_integer_ratio() for x in d] for d in deltas]
    scale = max((denominator for d in ratios for _, denominator in d), default=1)
    whole = [[numerator * (scale // denominator) for numerator, denominator in d] for d in ratios]
    return [len(column) * sum(x * x for x in column) - sum(column) ** 2 for column in zip(*whole)]


def selected(deltas, tau):
    """The elements kept by step 1, as a list of booleans."""
    if tau >= 1:
        return [True] * len(deltas[0])
    values = variances(deltas)
    differing = sum(any(x != column[0] for x in column) for column in zip(*deltas))
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    kept = set(order[: math.floor(tau * differing)])
    return [i in kept for i in range(len(values))]


def coefficients(deltas, keep, weights):
    """eta_j over the kept elements."""
    sums = [w * math.fsum(x * x for x, k in zip(d, keep) if k) for d, w in zip(deltas, weights)]
    total = math.fsum(sums)
    return [s / total if total > 0 else 0.0 for s in sums]


def sce(pivot, targets, tau=1.0, scope="all", weights=None):
    """(merged float64, eta) by steps 1 to 4 of SCE."""
    flat, deltas = task_vectors(pivot, targets)
    weights = weights or [1.0] * len(targets)
    keep = selected(deltas, tau)
    eta = coefficients(deltas, keep, weights)
    merged = []
    for i, base in enumerate(flat):
        column = [d[i] if keep[i] or scope == "coefficients" else 0.0 for d in deltas]
        sign = 1 if math.fsum(column) >= 0 else -1
        agreeing = [j for j, x in enumerate(column) if x * sign > 0]
        divisor = math.fsum(eta[j] for j in agreeing)
        update = math.fsum(eta[j] * column[j] for j in agreeing) / divisor if divisor > 0 else 0.0
        merged.append(base + update)
    return torch.tensor(merged, dtype=torch.float64).reshape(pivot.shape), eta


def varm(pivot, targets, granularity="matrix", weights=None):
    """merged = sum_j W_j target_j, W_j proportional to w_j mean(d_j^2)."""
    flat, deltas = task_vectors(pivot, targets)
    weights = weights or [1.0] * len(targets)
    whole = coefficients(deltas, [True] * len(flat), weights)
    merged = []
    for i, base in enumerate(flat):
        column = [d[i] for d in deltas]
        ratios = whole if granularity == "matrix" else coefficients([[x] for x in column], [True], weights)
        merged.append(base + math.fsum(r * x for r, x in zip(ratios, column)))
    return torch.tensor(merged, dtype=torch.float64).reshape(pivot.shape), whole
