"""Slices: named parts of the data, and the model selected for each.

    model of a slice = the one whose CE has the lowest median over the slice's conversations   (a tie: the first)

The median, and one answer for the whole slice: a conversation with a wrong answer is served by the model that knows
better as well, where a choice by conversation would take the one that agrees with the mistake. A slice of fewer than
LEAST conversations takes the answer of the whole data set.

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

LEAST = 20
AUTO = "auto"


@dataclass(frozen=True)
class SliceChoice:
    """Which of M models serves which slice.

    Attributes:
        best: slice -> index of its model.
        table: slice -> {conversations, medians [M], best}, for manifests and people; under "" (all) the whole data set.
    """

    best: dict[str, int]
    table: dict[str, dict]

    def of(self, name: str) -> int:
        """The model of a slice; of one that was not there, the whole data set's."""
        return self.best.get(name, self.best[""])

    def medians(self, name: str) -> list[float]:
        """The medians [M] that decide for a slice: its own, or the whole data set's."""
        return self.table[name if name in self.best else ""]["medians"]


def choose_by_slice(slices: Sequence[str], ces: np.ndarray) -> SliceChoice:
    """The best model of every slice.

    Args:
        slices: name of each conversation's slice [N], "" where it has none.
        ces: float [M, N], CE of each model on each conversation, in one unit; one that is not a number loses.
    """
    ces = np.where(np.isfinite(ces), ces, np.inf)
    names = np.array(slices, dtype=object)
    whole = np.median(ces, axis=1)  # [M]
    best, table = {"": int(whole.argmin())}, {}
    for name, count in [("", len(slices)), *sorted(Counter(slices).items())]:
        if name in table:
            continue
        medians = whole if not name else np.median(ces[:, names == name], axis=1)
        if count >= LEAST and name:
            best[name] = int(medians.argmin())
        chosen = best.get(name, best[""])
        table[name] = {"conversations": count, "medians": [float(m) for m in medians], "best": chosen}
    return SliceChoice(best, table)


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


def cluster(texts: Sequence[str], *, least: int = 2 * LEAST, most: int = 12, seed: int = 0) -> list[str]:
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
