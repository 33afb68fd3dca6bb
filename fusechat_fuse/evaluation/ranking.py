"""Which result is best on held-out conversations: fewest bits per byte, every slice counting the same.

    score of a model          = mean over slices of the mean over the slice's conversations of bits per byte
    difference of two models  = the same of their paired differences d
    variance of a difference  = sum over the S slices of var(d) / (n S^2), n conversations in a slice; its 95 % interval
                                is Student's t's, with Welch's degrees of freedom

A result is clear of another where the whole interval of their difference is below 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Difference(NamedTuple):
    """A paired difference in bits per byte and the half width of its 95 % interval (NaN: of one conversation alone)."""

    mean: float
    half_width: float

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.half_width:.4f}"


def paired_difference(slices: Sequence[str], differences: np.ndarray) -> Difference:
    """The mean over slices of paired differences, and its interval.

    Args:
        slices: name of each conversation's slice [N]. differences: float [N]. A slice of one conversation takes the
            variance of all.
    """
    names = np.array(slices, dtype=object)
    parts = [differences[names == name] for name in sorted(set(slices))]
    whole = float(np.var(differences, ddof=1)) if len(differences) > 1 else float("nan")
    sizes = np.array([len(part) for part in parts])
    variances = np.array([np.var(part, ddof=1) if len(part) > 1 else whole for part in parts])
    shares = variances / (sizes * len(parts) ** 2)  # of the mean's variance
    total = float(shares.sum())
    mean = float(np.mean([part.mean() for part in parts]))
    if not total > 0:  # all equal, or unknown
        return Difference(mean, total)
    from scipy.special import stdtrit

    freedom = total**2 / float((shares**2 / np.maximum(sizes - 1, 1)).sum())
    return Difference(mean, float(stdtrit(freedom, 0.975)) * total**0.5)


def rank(names: Sequence[str], slices: Sequence[str], bits: np.ndarray, baseline: int) -> dict:
    """Rank the results of one pivot.

    Args:
        names: of the models [M], the pivot first. slices: of the conversations [N]. bits: bits per byte [M, N].
        baseline: the model that the others are compared to (plain fine-tuning; the pivot where there is none).
    Returns:
        baseline: its name. slices: their number. models: those of the lowest score first: name -> score, to_baseline.
        best: the first result that is neither pivot nor baseline; next: the second; to_next: the difference of both;
        clear: the results that are clear of the baseline. A difference is [mean, half width]. Without a result best,
        next and to_next are null. summary: of it, in lines.
    """
    names_of_slices = np.array(slices, dtype=object)
    of_slice = [bits[:, names_of_slices == name].mean(axis=1) for name in sorted(set(slices))]  # S of [M]
    scores = np.mean(of_slice, axis=0)  # [M]
    order = np.argsort(scores, kind="stable").tolist()
    to_baseline = {m: paired_difference(slices, bits[m] - bits[baseline]) for m in order}
    results = [m for m in order if m not in (0, baseline)]
    best, following = [*results, None, None][:2]
    found = {
        "baseline": names[baseline],
        "slices": len(of_slice),
        "models": {names[m]: {"score": float(scores[m]), "to_baseline": list(to_baseline[m])} for m in order},
        "best": None if best is None else names[best],
        "next": None if following is None else names[following],
        "to_next": None,
        "clear": [names[m] for m in results if sum(to_baseline[m]) < 0],
    }
    if following is not None:
        found["to_next"] = list(paired_difference(slices, bits[best] - bits[following]))
    return found | {"summary": _lines(found)}


def _lines(ranking: dict) -> list[str]:
    """The best result in sentences, with its differences."""
    if ranking["best"] is None:
        return []
    baseline, best = ranking["baseline"], ranking["best"]
    of_best = ranking["models"][best]
    to_baseline = Difference(*of_best["to_baseline"])
    slices = "the held-out data" if ranking["slices"] == 1 else f"mean over {ranking['slices']} slices"
    first = f"Best result: {best}, {of_best['score']:.4f} bits per byte ({slices}), {to_baseline} against {baseline}"
    if ranking["next"] is not None:
        first += f", {Difference(*ranking['to_next'])} against the next, {ranking['next']}"
    lines = [f"{first} (95 % intervals, paired)."]
    if not ranking["clear"]:
        lines.append(f"No result is clear of {baseline}: these conversations cannot tell them apart.")
    elif best not in ranking["clear"]:
        lines.append(f"It is not clear of {baseline}; {', '.join(ranking['clear'])} would be.")
    elif ranking["next"] is not None and not sum(ranking["to_next"]) < 0:
        lines.append(f"It is clear of {baseline}, and not of {ranking['next']}.")
    return lines
