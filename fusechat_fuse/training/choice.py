"""The choice: which distribution the predicted tokens of a conversation are trained on.

Two distributions stand at every predicted token: the pivot's own (top-k log-probabilities) and the aligned source's
(probabilities of mass m <= 1). With temperature T (it rescales the shape and keeps the mass)

    q_pivot = softmax(log p / T)            q_source = m p^(1/T) / sum p^(1/T)

    min_ce        the source's where its CE over the conversation is lower, else the pivot's (a tie: the pivot's)
    avg_ce        both, with weights proportional to exp(-CE)
    min_ce_token  the same choice as min_ce for each predicted token by -log P(actual token)
    min_ce_slice  one choice for each slice of the data, by the median CE over its conversations (`slice_choice.py`)
    avg_ce_slice  the same choice; where the source serves the slice both, with weights proportional to
                  exp(-b median CE), b = 1 per token, 4 per byte (the default)
    source        always the source's

Where a choice does not take the source, the *fallback* stands: `pivot` (the paper) the pivot's own distribution,
`label` the label with probability 1, so that the label carries the whole weight, as in plain fine-tuning.

The kept entries of a distribution leave out its tail, of mass t. With the *tail* `drop` (the paper) a label in it is
all but denied; with `label` the label y stands for it,

    q'_y = t / (t + e) + (what the kept candidates give y)        where the actual token was not among the kept ones

and the others as they are, unnormalised. e is the *label noise*: of labels in the tail, about t / (t + e) are the
source's own where a share e of all labels is wrong. With e = 0 the label's weight is 1 at any t (0 too, where the kept
entries add up to 1 by rounding), and where labels are drawn from p, the mean of q' is p itself. At
a position inside a source token, whose row is conditional on what was read of it, q' is the label alone there, for the
same end; so it is at an end of turn that the source did not keep, as else it would teach the pivot not to stop.

CE is per token of each model's own tokenizer (the paper), or per byte of assistant text, which is comparable between
tokenizers. Shape letters: P predicted tokens, K entries of a distribution. See docs/method.md, "Choice".
"""

from functools import partial
from typing import NamedTuple

import numpy as np

from fusechat_fuse.errors import InputError
from fusechat_fuse.store.cross_entropy import pivot_cross_entropy, source_cross_entropy

_PIVOT, _SOURCE = ("topk_ids", "topk_logprobs", "ce"), ("source_ids", "source_probs")
TAILS = ("label", "drop")
CHOICES = {  # name -> the columns that it reads
    "min_ce": (*_PIVOT, *_SOURCE, "source_ce"),
    "avg_ce": (*_PIVOT, *_SOURCE, "source_ce"),
    "min_ce_token": (*_PIVOT, *_SOURCE, "source_token_ce", "mapped_mass"),
    "min_ce_slice": (*_PIVOT, *_SOURCE, "source_ce"),
    "avg_ce_slice": (*_PIVOT, *_SOURCE, "source_ce"),
    "source": _SOURCE,
}
BY_SLICE = ("min_ce_slice", "avg_ce_slice")  # which need `slice_weight`
FALLBACKS = ("pivot", "label")


Sparse = tuple[np.ndarray, np.ndarray]  # ids [P, K] (-1: no entry), probabilities [P, K]


class FusionDistribution(NamedTuple):
    """`ids` int32 [P, K] padded -1, `probs` float32 [P, K] padded 0, `source_share` in [0, 1]: the source's part."""

    ids: np.ndarray
    probs: np.ndarray
    source_share: float


def fusion_distribution(
    row: dict,
    *,
    choice: str = "min_ce",
    ce_unit: str = "token",
    fuse_temperature: float = 1.0,
    fallback: str = "pivot",
    tail: str = "drop",
    label_noise: float = 0.0,
    slice_weight: float = 0.0,
) -> FusionDistribution:
    """The fusion distribution q of every predicted token of one conversation.

    Args:
        row: an aligned row (documented names, numpy arrays), borrowed.
        choice: one of CHOICES.
        ce_unit: what a conversation's CE is a mean over: token or byte. min_ce_token compares tokens as they are.
        fuse_temperature: T > 0.
        fallback: pivot or label; avg_ce and source have none.
        tail: drop, or label: what stands for the entries that were not kept.
        label_noise: e >= 0, for tail label.
        slice_weight: for those of BY_SLICE, the source's weight in the slice of this conversation; 0: it is not taken.

    Returns:
        FusionDistribution, of mass at most 1 (under tail label at most 2); an unanswered position of the source has no
        entries (or, in the paper's mappings, a one-hot one).

    Raises:
        InputError: the row lacks a column that the choice needs.

    Source: FuseChat (arXiv 2408.07990) for MinCE, FuseLLM (arXiv 2401.10491) for AvgCE.
    Differs from the released code: CE is compared in full precision (there bfloat16, where near values tie).
    """
    require_columns(row, *CHOICES[choice])
    noise = None if tail == "drop" else label_noise
    source = _source(row, fuse_temperature, noise)
    otherwise = partial(_fallback, row, fallback, fuse_temperature, noise)
    if choice == "min_ce_token":
        taken = (row["source_token_ce"] < row["ce"]) & (np.asarray(row["mapped_mass"]) > 0)  # [P]
        return _choose_per_token(taken, source, otherwise())
    taken, share = slice_weight > 0 or choice == "source", slice_weight
    if choice in ("min_ce", "avg_ce"):
        pivot_ce, source_ce = pivot_cross_entropy(row, ce_unit), source_cross_entropy(row, ce_unit)
        taken = source_ce < pivot_ce  # False where either is not a number
        share = 1 / (1 + np.exp(np.clip(source_ce - pivot_ce, -700, 700))) if np.isfinite(source_ce) else 0.0
    if choice == "avg_ce" or (choice == "avg_ce_slice" and taken):
        return _mix(_pivot(row, fuse_temperature, noise), source, float(share))
    return FusionDistribution(*source, 1.0) if taken else FusionDistribution(*otherwise(), 0.0)


def require_columns(row: dict, *columns: str) -> None:
    """Raise InputError naming the first column that a row lacks."""
    for column in columns:
        if row.get(column) is None:
            raise InputError(
                f"column {column!r} for conversation {row.get('id')!r}: expected an aligned row, got one without it. "
                "Pass a directory that align or combine wrote."
            )


def _labels(row: dict) -> np.ndarray:
    return row["input_ids"][row["predicted"]]  # [P]


def _fallback(row: dict, fallback: str, temperature: float, noise: float | None) -> Sparse:
    if fallback == "pivot":
        return _pivot(row, temperature, noise)
    labels = _labels(row)[:, None]  # [P, 1]
    return labels, np.ones(labels.shape, np.float32)


def _pivot(row: dict, temperature: float, noise: float | None) -> Sparse:
    ids, logprobs = row["topk_ids"], row["topk_logprobs"].astype(np.float32)
    scaled = logprobs / np.float32(temperature)
    weights = np.exp(scaled - scaled.max(1, keepdims=True, initial=-np.inf))
    probs = weights / weights.sum(1, keepdims=True)
    if noise is None:
        return ids, probs
    probs *= np.minimum(np.exp(logprobs).sum(1, keepdims=True), 1)  # the kept mass, which the paper's rule makes 1
    return _label_stands_for_tail(ids, probs, _labels(row), ~(ids == _labels(row)[:, None]).any(1) * 1.0, noise)


def _source(row: dict, temperature: float, noise: float | None) -> Sparse:
    ids, probs = row["source_ids"], row["source_probs"]
    if temperature != 1.0 and probs.shape[1]:
        mass = probs.sum(1, keepdims=True)
        top = np.maximum(probs.max(1, keepdims=True), np.finfo(np.float32).tiny)
        weights = (probs / top) ** np.float32(1 / temperature)
        total = np.maximum(weights.sum(1, keepdims=True), np.finfo(np.float32).tiny)
        probs = mass * weights / total
    if noise is None:
        return ids, probs
    if row.get("label_tail") is None:
        raise InputError(
            f"column 'label_tail' for conversation {row.get('id')!r}: expected for --fusion_tail label, got a row "
            "without it (an average, or aligned by an earlier version). Align again or use --fusion_tail drop."
        )
    require_columns(row, "mapped_mass")
    mapped, mass = row["mapped_mass"].astype(np.float32), probs.sum(1)  # [P]; the paper's mappings made 1 of it
    scale = np.where((mapped > 0) & (mapped < 0.999 * mass), mapped / np.maximum(mass, 1e-30), 1).astype(np.float32)
    marks = row["label_tail"].astype(np.float32)
    return _label_stands_for_tail(ids, probs * scale[:, None], _labels(row), marks, noise)


def _label_stands_for_tail(
    ids: np.ndarray, probs: np.ndarray, labels: np.ndarray, marks: np.ndarray, noise: float
) -> Sparse:
    """Let the label stand for the tail where `marks` ([P], as `label_tail`) is not 0: see the module's text."""
    marked, alone = (marks != 0)[:, None], (marks < 0)[:, None]  # [P, 1]
    probs = np.where((ids == labels[:, None]) & marked | alone, 0, probs)
    of_kept = np.maximum(marks - 1, 0)  # [P]
    tail = np.clip(1 - probs.sum(1) - of_kept, 0, 1)
    trusted = tail / (tail + noise) if noise else 1.0
    stands = np.where(marks < 0, 1, trusted + of_kept) * (marks != 0)
    ids = np.concatenate([np.where(probs > 0, ids, -1), np.where(marked, labels[:, None], -1)], axis=1)
    return ids, np.concatenate([probs, stands[:, None]], axis=1).astype(np.float32)


def _pad(ids: np.ndarray, probs: np.ndarray, K: int) -> Sparse:
    more = K - ids.shape[1]
    return np.pad(ids, ((0, 0), (0, more)), constant_values=-1), np.pad(probs, ((0, 0), (0, more)))


def _choose_per_token(taken: np.ndarray, source: Sparse, otherwise: Sparse) -> FusionDistribution:
    K = max(otherwise[0].shape[1], source[0].shape[1])
    (other_ids, other_probs), (source_ids, source_probs) = _pad(*otherwise, K), _pad(*source, K)
    ids = np.where(taken[:, None], source_ids, other_ids)
    probs = np.where(taken[:, None], source_probs, other_probs)
    return FusionDistribution(ids, probs, float(taken.mean()) if len(taken) else 0.0)


def _mix(pivot: Sparse, source: Sparse, share: float) -> FusionDistribution:
    """share * source + (1 - share) * pivot; where both name an id, the source's entry moves into the pivot's."""
    (pivot_ids, pivot_probs), (source_ids, source_probs) = pivot, source
    source_probs = np.float32(share) * source_probs
    same = (pivot_ids[:, :, None] == source_ids[:, None, :]) & (source_ids >= 0)[:, None, :]  # [P, K, K']
    mixed = np.float32(1 - share) * pivot_probs + (same * source_probs[:, None, :]).sum(2)
    left = ~same.any(1) & (source_ids >= 0)
    ids = np.concatenate([pivot_ids, np.where(left, source_ids, -1)], axis=1)
    return FusionDistribution(ids, np.concatenate([mixed, np.where(left, source_probs, 0)], axis=1), share)
