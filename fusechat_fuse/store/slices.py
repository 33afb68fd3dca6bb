"""Slices: named parts of the data, and the model selected for each.

    model of a slice = the one whose CE has the lowest median over the slice's conversations   (a tie: the first)

The median, and one answer for the whole slice: a conversation with a wrong answer is served by the model that knows
better as well, where a choice by conversation would take the one that agrees with the mistake.

A slice decides for itself where its conversations can tell the models apart: by a sign test of the best source against
the pivot (`sign_test`) below SIGNIFICANT, in the direction of the medians. Else it takes the choice of all data.

Slices are named by the rows' own column or by a regular expression on their ids; else they are found: clusters of the
prompts (`prompt_clusters.py`).
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fusechat_fuse.errors import InputError
from fusechat_fuse.store.prompt_clusters import PER_CLUSTER, cluster, prompts

if TYPE_CHECKING:
    from fusechat_fuse.store.shards import Representation

SIGNIFICANT = 0.05
FEW = 20  # conversations without a tie below which an undecided slice is called too few, from which on too even
COLUMNS = ("slice", "auto", "none")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SliceChoice:
    """Which of M models serves which slice; model 0 is the pivot, the others are sources.

    Attributes:
        table: slice -> {conversations, medians [M], better, worse, decides, best}, the whole data set under "" (all).
            better, worse: conversations for which the source of the lowest median has a lower, a higher CE than the
            pivot; decides: whether the slice decides for itself; best: the index of its model.
    """

    table: dict[str, dict]

    def of(self, name: str) -> int:
        """The model of a slice; of one that was not there, the whole data set's."""
        return self.table.get(name, self.table[""])["best"]

    def medians(self, name: str) -> list[float]:
        """The medians [M] that decide for a slice: its own, or the whole data set's."""
        entry = self.table.get(name)
        return (entry if entry and entry["decides"] else self.table[""])["medians"]


def choose_by_slice(slices: Sequence[str], ces: np.ndarray) -> SliceChoice:
    """The model of every slice.

    Args:
        slices: name of each conversation's slice [N], "" where it has none.
        ces: float [M, N], CE of the pivot and each source on each conversation, in one unit; what is no number loses.

    Source: this project (docs/method.md, "Choice", `slices`).
    """
    ces = np.where(np.isfinite(ces), ces, np.inf)
    names = np.array(slices, dtype=object)
    whole = _entry(ces) | {"decides": True}
    table = {"": whole}
    for name in sorted(set(slices) - {""}):
        entry = _entry(ces[:, names == name])
        table[name] = entry if entry["decides"] else entry | {"best": whole["best"]}
    return SliceChoice(table)


def _entry(ces: np.ndarray) -> dict:
    """The table's entry of a slice that decides for itself, from CEs [M, N]."""
    medians = np.median(ces, axis=1)  # [M]
    best, source = int(medians.argmin()), 1 + int(medians[1:].argmin())
    better, worse = int((ces[source] < ces[0]).sum()), int((ces[source] > ces[0]).sum())
    return {
        "conversations": ces.shape[1],
        "medians": medians.tolist(),
        "better": better,
        "worse": worse,
        "decides": sign_test(better, worse) < SIGNIFICANT and (best > 0) == (better > worse),
        "best": best,
    }


def sign_test(better: int, worse: int) -> float:
    """How probable a majority as clear as this or clearer would be, of either side, if both were equally likely.

    p = min(1, 2 sum_{i <= k} C(n, i) / 2^n),   n = better + worse,  k = min(better, worse)

    Precision: float64, by logarithms.
    """
    n, k = better + worse, min(better, worse)
    i = np.arange(1, k + 1)
    log_counts = np.concatenate([[0.0], np.cumsum(np.log((n - i + 1) / i))])  # log C(n, i), i = 0..k
    return min(1.0, 2 * float(np.exp(log_counts - n * np.log(2)).sum()))


def undecided_lines(table: dict[str, dict]) -> list[str]:
    """A sentence for each slice of a choice's table that takes the choice of all data."""
    lines = []
    for name, entry in table.items():
        if not entry["decides"]:
            compared = entry["better"] + entry["worse"]
            why = "few" if compared < FEW else "even"
            lines.append(
                f"slice {name} ({entry['conversations']} conversations, {entry['better']} of {compared} better): too "
                f"{why} to tell, takes the choice of all data"
            )
    return lines


def name_slices(data: Representation, *, column: str = "slice", pattern: str | None = None) -> list[str]:
    """The slice of every conversation of a store, "" where it has none.

    Args:
        data: what represent, align or combine wrote.
        column: slice (the one stored with the rows; auto if no row names one), auto (clusters of the prompts) or none
            (no slices: the whole data set decides).
        pattern: a regular expression on the ids instead; its first group, or else the whole match, is the name.

    Raises: InputError for an unknown column, or a pattern that is none or matches no id.
    """
    if pattern is not None:
        return names_by_pattern(data.ids, pattern, str(data.path))
    if column == "none":
        return [""] * len(data)
    if column == "slice" and any(names := own_slices(data)):
        return names
    if column not in COLUMNS:
        raise InputError(
            f"value for slice_column: expected one of {', '.join(COLUMNS)}, got {column!r}. Use one of them."
        )
    if len(data) < 2 * PER_CLUSTER:
        return [""] * len(data)
    names = cluster(prompts(data))
    found = Counter(names)
    if len(found) > 1:
        listed = ", ".join(f"{name} ({count})" for name, count in found.most_common())
        logger.info("%s: no slices are named; these were found among the prompts: %s", data.path, listed)
    return names


def own_slices(data: Representation) -> list[str]:
    """The slice that each row of a store names, "" where it names none."""
    return [name or "" for name in data.column("slice")]


def names_by_pattern(ids: Sequence[str], pattern: str, where: str | None = None) -> list[str]:
    """The first group, or else the whole match, of a regular expression in each id; "" where it does not match.

    Raises: InputError for a pattern that is none, or, which says where the ids are of, one that matches no id.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(
            f"value for slice_pattern: expected a regular expression, got {pattern!r} ({error})."
        ) from error
    found = [compiled.search(name) for name in ids]
    if where is not None and not any(found):
        raise InputError(
            f"value for slice_pattern: expected one that matches ids of {where}, got {pattern!r}. "
            f"The first id is {ids[0]!r}."
        )
    return [(match[1] if compiled.groups else match[0]) or "" if match else "" for match in found]
