"""Which result is best on held-out conversations by one measure (bits per byte, say), every slice counting the same.

    mean of a model           = mean over slices of the mean over the slice's conversations
    difference of two models  = the same of their paired differences d
    variance of a difference  = sum over the S slices of var(d) / (n S^2), n conversations in a slice; its 95 % interval
                                is Student's t's, with Welch's degrees of freedom

A result is clear of another where the whole interval of their difference is on the better side of 0. Of several
measures the first decides, and in a tie the next; the others stand beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Difference(NamedTuple):
    """A paired difference and the half width of its 95 % interval (NaN: of one conversation alone)."""

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


class Measure(NamedTuple):
    """Numbers by which models are ranked, one for each model and conversation.

    Attributes:
        name: in sentences and tables. slices: of the conversations [N]. values: [M, N]. higher: whether more is better.
    """

    name: str
    slices: list[str]
    values: np.ndarray
    higher: bool = False

    def by_slice(self) -> dict[str, np.ndarray]:
        """Mean of every model [M] in each slice."""
        names = np.array(self.slices, dtype=object)
        return {name: self.values[:, names == name].mean(axis=1) for name in sorted(set(self.slices))}

    def difference(self, model: int, other: int) -> Difference:
        """The difference of two models."""
        return paired_difference(self.slices, self.values[model] - self.values[other])

    def is_clear(self, model: int, other: int) -> bool:
        """Whether a model is better than another by the whole interval of their difference."""
        mean, half_width = self.difference(model, other)
        return (half_width - mean if self.higher else mean + half_width) < 0


def rank(names: Sequence[str], measures: Sequence[Measure], baseline: int) -> dict:
    """Rank the results of one pivot.

    Args:
        names: of the models [M], the pivot first. measures: one or more; the first decides.
        baseline: the model that the others are compared to (plain fine-tuning; the pivot where there is none).
    Returns:
        baseline: its name. measures: of each its name, higher_is_better, slices: slice -> {conversations, models: name
        -> {mean}} and models: name -> {mean, to_baseline}. best: the first result that is neither pivot nor baseline;
        next: the second; to_next: the difference of both; clear: the results that are clear of the baseline; all four
        by the first measure. A difference is [mean, half width]. Without a result best, next and to_next are null.
        table: the models' rows below a head, the best first. summary: of it, in lines.
    """
    means = [np.mean([*measure.by_slice().values()], axis=0) for measure in measures]  # [M] each
    costs = np.array([-mean if measure.higher else mean for mean, measure in zip(means, measures)])
    order: list[int] = np.lexsort(costs[::-1]).tolist()
    first = measures[0]
    results = [m for m in order if m not in (0, baseline)]
    figures = [_figures(names, measure, mean, baseline) for measure, mean in zip(measures, means)]
    found = {
        "baseline": names[baseline],
        "measures": figures,
        "best": None,
        "next": None,
        "to_next": None,
        "clear": [names[m] for m in results if first.is_clear(m, baseline)],
        "table": _table(figures, [names[m] for m in order], names[baseline]),
    }
    if results:
        found["best"] = names[results[0]]
    if len(results) > 1:
        found |= {"next": names[results[1]], "to_next": list(first.difference(*results[:2]))}
    return found | {"summary": _lines(found, len(results) > 1 and first.is_clear(*results[:2]))}


def _figures(names: Sequence[str], measure: Measure, means: np.ndarray, baseline: int) -> dict:
    """The figures of one measure; means: of the models [M]."""
    sizes, models = Counter(measure.slices), {}
    slices = {
        name: {
            "conversations": sizes[name],
            "models": {m: {"mean": v} for m, v in zip(names, of.tolist(), strict=True)},
        }
        for name, of in measure.by_slice().items()
    }
    for m, name in enumerate(names):
        models[name] = {"mean": float(means[m]), "to_baseline": list(measure.difference(m, baseline))}
    return {"name": measure.name, "higher_is_better": measure.higher, "slices": slices, "models": models}


def _table(measures: list[dict], order: list[str], baseline: str) -> list[list[str]]:
    head, rows = ["result"], [[model] for model in order]
    for measure in measures:
        head += [measure["name"], f"less {baseline}"]
        for row in rows:
            of = measure["models"][row[0]]
            row += [f"{of['mean']:.4f}", "" if row[0] == baseline else str(Difference(*of["to_baseline"]))]
    return [head, *rows]


def _lines(ranking: dict, clear_of_next: bool) -> list[str]:
    """The best result in sentences, with its differences."""
    if ranking["best"] is None:
        return []
    baseline, best = ranking["baseline"], ranking["best"]
    decisive, *others = ranking["measures"]
    count = len(decisive["slices"])
    slices = "the held-out data" if count == 1 else f"mean over {count} slices"
    first = f"Best result: {best}, {_mean_of(decisive, best)} ({slices}), {_against(decisive, best, baseline)}"
    if ranking["next"] is not None:
        first += f", {Difference(*ranking['to_next'])} against the next, {ranking['next']}"
    lines = [f"{first} (95 % intervals, paired)."]
    if not ranking["clear"]:
        lines.append(f"No result is clear of {baseline}: these conversations cannot tell them apart.")
    elif best not in ranking["clear"]:
        lines.append(f"It is not clear of {baseline}; {', '.join(ranking['clear'])} would be.")
    elif ranking["next"] is not None and not clear_of_next:
        lines.append(f"It is clear of {baseline}, and not of {ranking['next']}.")
    lines += [f"It has {_mean_of(measure, best)}, {_against(measure, best, baseline)}." for measure in others]
    return lines


def _mean_of(measure: dict, model: str) -> str:
    return f"{measure['models'][model]['mean']:.4f} {measure['name']}"


def _against(measure: dict, model: str, baseline: str) -> str:
    return f"{Difference(*measure['models'][model]['to_baseline'])} against {baseline}"
