"""Slices of data that name none: clusters of the prompts, named by their most telling words.

features   TF-IDF of character 2- to 4-grams, the first 32 directions, normalised
clusters   k-means; their number is N / 60, at most 12
name       the three words of largest s log(s / S), none below a quarter of the largest; s: share of the cluster's
           prompts with the word, S: of all prompts
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from math import log
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from fusechat_fuse.store.shards import Representation

PER_CLUSTER = 60  # conversations, on average: of so many, the sign test sees a majority of two thirds
MAX_CLUSTERS, MAX_DIRECTIONS = 12, 32
READ = 500  # characters of a prompt that are looked at, its last
FITTED = 5000  # prompts, evenly spaced, from which features and clusters are learned
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # kana and Han, which are written without spaces
_WORD = re.compile(rf"[{_UNSPACED}]+|[^\W\d_{_UNSPACED}]{{2,}}")


def prompts(data: Representation) -> list[str]:
    """The text before the first answer of every conversation, as the template of the store's tokenizer shows it."""
    from fusechat_fuse.store.tokenizers import read_tokenizer

    tokenizer = read_tokenizer(data)
    ids = [row["input_ids"][: row["predicted"][0] if len(row["predicted"]) else None].tolist() for row in data]
    return tokenizer.decode_batch(ids, skip_special_tokens=True)


def cluster(texts: Sequence[str], *, seed: int = 0) -> list[str]:
    """The cluster's name for each text; "" for all where they are too few, or too much alike, to divide."""
    k = min(MAX_CLUSTERS, len(texts) // PER_CLUSTER)
    if k < 2:
        return [""] * len(texts)
    labels = _labels([text[-READ:] for text in texts], k, seed)
    if labels is None or len(set(labels)) < 2:
        return [""] * len(texts)
    names = _names(texts, labels)
    return [names[label] for label in labels]


def nearest(texts: Sequence[str], known: Sequence[str]) -> list[int | None]:
    """For each text the index of the most similar known one (the first of equals); None where none has anything of it.

    Similarity is the cosine of TF-IDF vectors of character 2- to 4-grams; of many known texts, FITTED are looked at.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    step = -(-len(known) // FITTED)
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(2, 4), sublinear_tf=True)
    if not texts:
        return []
    try:
        features = vectorizer.fit_transform([text[-READ:] for text in known[::step]])
    except ValueError:  # an empty vocabulary
        return [None] * len(texts)
    found: list[int | None] = []
    for n in range(0, len(texts), 1000):
        similar = (vectorizer.transform([text[-READ:] for text in texts[n : n + 1000]]) @ features.T).toarray()
        found += [step * int(row.argmax()) if row.any() else None for row in similar]
    return found


def _labels(texts: list[str], k: int, seed: int) -> list[int] | None:
    """The cluster of every text; None where no character 2-gram occurs in two of them."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer

    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(2, 4), min_df=2, sublinear_tf=True)
    try:
        features = vectorizer.fit_transform(texts[:: -(-len(texts) // FITTED)])
    except ValueError:  # an empty vocabulary
        return None
    width = min(MAX_DIRECTIONS, min(features.shape) - 1)
    if width < 2:
        return None
    k_means = KMeans(k, n_init=10, random_state=seed)  # pyright: ignore[reportArgumentType]
    model = make_pipeline(TruncatedSVD(width, random_state=seed), Normalizer(copy=False), k_means)
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):  # fewer different texts than clusters
        warnings.simplefilter("ignore", ConvergenceWarning)
        labels = model.fit_predict(features)
    if len(texts) > FITTED:
        parts = [texts[n : n + FITTED] for n in range(0, len(texts), FITTED)]
        labels = np.concatenate([model.predict(vectorizer.transform(part)) for part in parts])
    return labels.tolist()


def _names(texts: Sequence[str], labels: Sequence[int]) -> dict[int, str]:
    """The name of every cluster; of equal ones the smaller gets a number."""
    words = [_words(text[-READ:]) for text in texts]
    overall, sizes = Counter(word for several in words for word in several), Counter(labels)
    inside: dict[int, Counter] = {label: Counter() for label in sizes}
    for several, label in zip(words, labels):
        inside[label].update(several)
    names: dict[int, str] = {}
    for label, size in sizes.most_common():
        gain = {w: n / size * log(n * len(texts) / (size * overall[w])) for w, n in inside[label].items()}
        least = max(gain.values(), default=0) / 4
        telling = sorted((w for w in gain if gain[w] > 0 and gain[w] >= least), key=lambda word: (-gain[word], word))
        name = " ".join(telling[:3]) or "others"
        equal = sum(other.partition(" #")[0] == name for other in names.values())
        names[label] = f"{name} #{equal + 1}" if equal else name
    return names


def _words(text: str) -> set[str]:
    """The words of a text, small; of a script without spaces, its pairs of characters."""
    found: set[str] = set()
    for word in _WORD.findall(text.lower()):
        unspaced = re.match(f"[{_UNSPACED}]", word)
        found.update((word[n : n + 2] for n in range(max(1, len(word) - 1))) if unspaced else (word,))
    return found
