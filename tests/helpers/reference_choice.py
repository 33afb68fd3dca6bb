"""The choice of what is fused, written from its definitions: loops over Python floats, no code of the library."""

import math
import statistics
from fractions import Fraction
from itertools import pairwise


def distribution(ids, probs):
    out = {}
    for u, p in zip(ids.tolist(), probs.tolist()):
        if u >= 0:
            out[u] = out.get(u, 0.0) + p
    return out


def reference_choice(row, choice, unit, temperature, fallback="pivot", slice_weight=0.0):
    """Per predicted token {id: probability}, in plain Python floats."""
    pivot, source = [], []
    for p in range(len(row["predicted"])):
        weights = [math.exp(float(x) / temperature) for x in row["topk_logprobs"][p]]
        pivot.append({int(u): w / sum(weights) for u, w in zip(row["topk_ids"][p], weights)})
        pairs = [(int(u), float(x)) for u, x in zip(row["source_ids"][p], row["source_probs"][p]) if u >= 0]
        mass, total = sum(x for _, x in pairs), sum(x ** (1 / temperature) for _, x in pairs)
        source.append({u: mass * x ** (1 / temperature) / total for u, x in pairs})
    labels = [{int(row["input_ids"][t]): 1.0} for t in row["predicted"]]
    otherwise = pivot if fallback == "pivot" else labels
    pivot_ce, source_ce = sum(map(float, row["ce"])) / len(pivot), row["source_ce"]
    if unit == "byte":
        pivot_ce *= len(pivot) / sum(int(e - s) for s, e in zip(row["start"], row["end"]))
        source_ce *= row["source_tokens"] / row["source_bytes"]
    taken = {"source": True, "min_ce": source_ce < pivot_ce, "min_ce_slice": slice_weight > 0}
    if choice in taken:
        return source if taken[choice] else otherwise
    if choice == "min_ce_token":
        better = [s < c and m > 0 for s, c, m in zip(row["source_token_ce"], row["ce"], row["mapped_mass"])]
        return [s if b else o for b, s, o in zip(better, source, otherwise)]
    if choice == "avg_ce_slice" and not slice_weight:
        return otherwise
    weight = math.exp(-source_ce) / (math.exp(-source_ce) + math.exp(-pivot_ce))
    weight = slice_weight if choice == "avg_ce_slice" else weight
    return [{u: weight * s.get(u, 0.0) + (1 - weight) * p.get(u, 0.0) for u in {*s, *p}} for s, p in zip(source, pivot)]


def reference_sign_test(better, worse):
    """The share of all 2^n ways to toss n coins whose rarer side comes up at most as often as here, of either side."""
    n = better + worse
    pascal = [1]
    for _ in range(n):
        pascal = [1, *(a + b for a, b in pairwise(pascal)), 1]
    return min(Fraction(1), Fraction(2 * sum(pascal[: min(better, worse) + 1]), 2**n))


def reference_slice_models(slices, ces):
    """slice -> (index of its model, whether it decided for itself); CEs by model and conversation."""

    def of(numbers):
        columns = [[ces[m][n] if math.isfinite(ces[m][n]) else math.inf for n in numbers] for m in range(len(ces))]
        medians = [statistics.median(column) for column in columns]
        best, source = medians.index(min(medians)), 1 + medians[1:].index(min(medians[1:]))
        better = sum(s < p for s, p in zip(columns[source], columns[0]))
        worse = sum(s > p for s, p in zip(columns[source], columns[0]))
        told = reference_sign_test(better, worse) < Fraction(5, 100)
        return best, told and (best > 0 if better > worse else best == 0)

    whole = of(range(len(slices)))[0]
    found = {name: of([n for n, own in enumerate(slices) if own == name]) for name in set(slices) - {""}}
    return {"": (whole, True)} | {name: (best if told else whole, told) for name, (best, told) in found.items()}
