"""Slices: named parts of the data, and the model selected for each.

    model of a slice = the one whose CE has the lowest median over the slice's conversations   (a tie: the first)

The median, and one answer for the whole slice: a conversation with a wrong answer is served by the model that knows
better as well, where a choice by conversation would take the one that agrees with the mistake.

A slice decides for itself where its conversations can tell the models apart: by a sign test of the best source against
the pivot (`sign_test`) below SIGNIFICANT, in the direction of the medians. Else it takes the choice of all data.

Slices are named by the rows' own column, by a regular expression on their ids, or found: clusters of the prompts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fusechat_fuse.errors import InputError

if TYPE_CHECKING:
    from fusechat_fuse.store.shards import Representation

SIGNIFICANT = 0.05
FEW = 20  # conversations without a tie below which an undecided slice is called too few, from which on too even
AUTO = "auto"


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
        column: slice (the one stored with the rows) or auto (clusters of the prompts; needs scikit-learn).
        pattern: a regular expression on the ids instead; its first group, or else the whole match, is the name.

    Raises: InputError for an unknown column, a pattern that is none or matches no id, or without scikit-learn.
    """
    if pattern is not None:
        return _by_pattern(data, pattern)
    if column == "slice":
        return [name or "" for name in data.column("slice")]
    if column == AUTO:
        return cluster(prompts(data))
    raise InputError(f"value for slice_column: expected slice or {AUTO}, got {column!r}. Use one of them.")


def _by_pattern(data: Representation, pattern: str) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(
            f"value for slice_pattern: expected a regular expression, got {pattern!r} ({error})."
        ) from error
    found = [compiled.search(name) for name in data.ids]
    if not any(found):
        raise InputError(
            f"value for slice_pattern: expected one that matches ids of {data.path}, got {pattern!r}. "
            f"The first id is {data.ids[0]!r}."
        )
    return [(match[1] if compiled.groups else match[0]) or "" if match else "" for match in found]


def prompts(data: Representation) -> list[str]:
    """The text before the first answer of every conversation, as the pivot's template shows it."""
    from fusechat_fuse.store.tokenizers import read_tokenizer

    tokenizer = read_tokenizer(data)
    ids = [row["input_ids"][: row["predicted"][0]].tolist() for row in data]
    return tokenizer.decode_batch(ids, skip_special_tokens=True)


def cluster(texts: Sequence[str], *, least: int = 40, most: int = 12, seed: int = 0) -> list[str]:
    """Texts of one kind get one name: k-means on 32 directions of TF-IDF over character 2- to 4-grams.

    Args:
        texts: [N]. least: texts per cluster on average. most: clusters. seed: of the decomposition and k-means.
    Returns: a name for each text: a number and the commonest words that tell its cluster from the others.
    Raises: InputError without scikit-learn.
    """
    try:
        from sklearn.cluster import KMeans
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import Normalizer
    except ImportError as error:
        raise InputError(
            "clusters of the prompts for slice_column auto: expected scikit-learn, got no such package. "
            "Run pip install 'fusechat[slices]'."
        ) from error
    k = min(most, len(texts) // least)
    if k < 2:
        return [""] * len(texts)
    features = TfidfVectorizer(analyzer="char", ngram_range=(2, 4), min_df=2, sublinear_tf=True).fit_transform(texts)
    width = min(32, min(features.shape) - 1)
    if width < 2:
        return [""] * len(texts)
    points = make_pipeline(TruncatedSVD(width, random_state=seed), Normalizer(copy=False)).fit_transform(features)
    labels = KMeans(k, n_init=10, random_state=seed).fit_predict(points)  # pyright: ignore[reportArgumentType]
    names = {label: f"{n} {words}" for n, (label, words) in enumerate(_described(texts, labels), start=1)}
    return [names[label] for label in labels]


def _described(texts: Sequence[str], labels: np.ndarray) -> list[tuple[int, str]]:
    """(label, its three words of the largest lift) of every cluster, the largest cluster first."""
    words = [set(re.findall(r"\w+", text.lower())) for text in texts]
    overall = Counter(word for several in words for word in several)
    found = []
    for label, size in Counter(labels.tolist()).most_common():
        inside = Counter(word for several, of in zip(words, labels) if of == label for word in several)
        score = {word: count / size * (1 - overall[word] / len(texts)) for word, count in inside.items()}
        top = sorted(score, key=lambda word: (-score[word], word))[:3]
        found.append((label, " ".join(top)))
    return found
