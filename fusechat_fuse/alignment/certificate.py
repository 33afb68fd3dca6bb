"""The certificate of an alignment: coverage, and the bits-per-byte gap between source and aligned distributions.

    gap = bits the aligned distribution needs for the actual pivot tokens / bytes
        - bits the source needs for its actual tokens / bytes            over the covered stretches

A stretch runs from one place where tokens of both start (or end) together to the next; it is covered if neither side
has a hole in it and every pivot token in it has an answer. A perfect alignment has gap 0. Where an answered row leaves
the actual token out, it is charged FLOOR and counted (`without_actual`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from fusechat_fuse.alignment.candidates import SourceStream, Stream
from fusechat_fuse.alignment.correspondence import EXACT, INSIDE, Correspondence
from fusechat_fuse.alignment.sparse_rows import Mapped, row_sums
from fusechat_fuse.alignment.streams import Batch

FLOOR = 1e-6
WORST = 10  # conversations listed by id


class CoverageError(RuntimeError):
    """Fewer of the pivot's predicted tokens have an answer than `fail_under_coverage` asks for."""


def stretches(pivot: Stream, source: Stream, match: Correspondence, answered: np.ndarray):
    """Covered stretches: (stretch of each pivot token, of each source token, covered [S]); -1 before the first.

    Both sides number the same common starts, so stretch s is the same text on either.
    """
    exact = match.kind == EXACT
    heads_p, heads_q = np.flatnonzero(exact), match.source[exact]
    S = len(heads_p)
    of_p = np.cumsum(exact) - 1
    of_q = np.searchsorted(heads_q, np.arange(len(source)), side="right") - 1
    covered = np.ones(S, bool)
    for of, stream in ((of_p, pivot), (of_q, source)):
        broken = (stream.start[1:] != stream.end[:-1]) & (of[1:] == of[:-1]) & (of[1:] >= 0)
        covered[of[1:][broken]] = False
    covered[of_p[(of_p >= 0) & ~answered]] = False
    last_p = np.append(heads_p[1:], len(pivot)) - 1
    last_q = np.append(heads_q[1:], len(source)) - 1
    covered &= pivot.end[last_p] == source.end[last_q]
    return of_p, of_q, covered


def tally(batch: Batch, mapped: Mapped) -> dict[str, np.ndarray]:
    """The counted quantities of each conversation: name -> float64 [conversations].

    `predicted` counts tokens of no bytes too, which are in no batch; bits and bytes are those of covered stretches.
    """
    pivot, source, match, conversation = batch.pivot, batch.source, batch.match, batch.conversation
    conversations = len(batch.predicted)

    def per_conversation(weights, where: Any = slice(None)) -> np.ndarray:
        return np.bincount(conversation[where], weights[where].astype(np.float64), conversations)

    answered = mapped.answered
    with np.errstate(divide="ignore"):
        log_actual = np.log(row_sums(mapped.probs * (mapped.ids == pivot.ids[:, None])))  # -inf: the row leaves it out
    of_p, of_q, covered = stretches(pivot, source, match, answered)
    floor = -np.inf if mapped.exact_actual else np.log(FLOOR)  # the source's own tiny probabilities count as they are
    bits = -np.log2(np.e) * np.maximum(log_actual, floor)
    inside = (of_p >= 0) & np.append(covered, False)[of_p]
    inside_q = (of_q >= 0) & np.append(covered, False)[of_q]
    heads = np.flatnonzero(match.kind == EXACT)
    source_bits = np.bincount(of_q[inside_q], source.ce[inside_q].astype(np.float64), len(covered)) / np.log(2)
    source_of = np.bincount(conversation[heads], source_bits, conversations) if len(heads) else np.zeros(conversations)
    aligned_of, bytes_of = per_conversation(bits, inside), per_conversation(pivot.end - pivot.start, inside)
    return {
        "predicted": batch.predicted.astype(np.float64),
        "answered": per_conversation(answered),
        "exact": per_conversation(answered & (mapped.kind == EXACT)),
        "inside": per_conversation(answered & (mapped.kind == INSIDE)),
        "safe": per_conversation(answered & batch.safe),
        "one_hot": per_conversation(~answered & (mapped.ids >= 0).any(1)),
        "mass": per_conversation(np.minimum(mapped.mass, 1), answered),
        "kept": per_conversation(kept_mass(source, match, mapped), answered),
        "without_actual": per_conversation(answered & np.isneginf(log_actual)),
        "covered_tokens": per_conversation(inside),
        "covered_bytes": bytes_of,
        "source_bits": source_of,
        "aligned_bits": aligned_of,
        "abs_gap": np.abs(aligned_of - source_of) / np.maximum(bytes_of, 1),
        "with_gap": (bytes_of > 0).astype(np.float64),
    }


def kept_mass(source: SourceStream, match: Correspondence, mapped: Mapped) -> np.ndarray:
    """The source's known probability mass at each answered pivot token (float64 [P]): 1 minus its tail.

    At a common start the sum over the kept candidates, and the actual token where the mapping knows its probability;
    inside a source token 1, as the row is relative to the candidates that are alive.
    """
    kept = row_sums(np.where(source.topk_ids >= 0, np.exp(source.topk_logprobs.astype(np.float64)), 0.0))  # [Q]
    if mapped.exact_actual:
        absent = ~(source.topk_ids == source.ids[:, None]).any(1)
        kept = kept + np.where(absent, np.exp(-source.ce.astype(np.float64)), 0.0)
    at_start = np.append(np.minimum(kept, 1), 1.0)[match.source]
    return np.where(mapped.kind == EXACT, at_start, 1.0)


def certificate(counted: Mapping[str, float]) -> dict[str, float | int | None]:
    """The figures from the sums over conversations of what `tally` counts; None where the divisor is 0.

    In mean_abs_gap_bits_per_byte, the mean over conversations, errors of opposite sign do not cancel.
    """

    def share(name: str, of: str) -> float | None:
        return counted[name] / counted[of] if counted[of] else None

    source, aligned = share("source_bits", "covered_bytes"), share("aligned_bits", "covered_bytes")
    return {
        "predicted_tokens": int(counted["predicted"]),
        "coverage": share("answered", "predicted"),
        "exact": share("exact", "answered"),
        "inside": share("inside", "answered"),
        "safe": share("safe", "answered"),
        "mean_mapped_mass": share("mass", "answered"),
        "mean_kept_mass": share("kept", "answered"),
        "without_actual": share("without_actual", "answered"),
        "one_hot": share("one_hot", "predicted"),
        "covered_tokens": share("covered_tokens", "predicted"),
        "covered_bytes": int(counted["covered_bytes"]),
        "source_bits_per_byte": source,
        "aligned_bits_per_byte": aligned,
        "gap_bits_per_byte": None if source is None or aligned is None else aligned - source,
        "mean_abs_gap_bits_per_byte": share("abs_gap", "with_gap"),
    }


def add_counts(info: dict, pivot_rows: list[dict], counted: dict[str, np.ndarray]) -> None:
    """Add a batch's counts (`tally`) to a shard's: `sums`, slice -> name -> count, and `worst`, the largest gaps."""
    names = np.array([row.get("slice") or "" for row in pivot_rows])
    for name in np.unique(names).tolist():
        sums = {key: float(values[names == name].sum()) for key, values in counted.items()}
        info["sums"].setdefault(name, Counter()).update(sums)
    with np.errstate(invalid="ignore", divide="ignore"):
        gap = (counted["aligned_bits"] - counted["source_bits"]) / counted["covered_bytes"]
    worst = [
        {
            "id": pivot_rows[n]["id"],
            "gap_bits_per_byte": float(gap[n]),
            "coverage": float(counted["answered"][n] / counted["predicted"][n]),
            "predicted_tokens": int(counted["predicted"][n]),
        }
        for n in np.flatnonzero(np.isfinite(gap))
    ]
    info["worst"] = _largest(info["worst"] + worst)


def _largest(rows: list[dict]) -> list[dict]:
    return sorted(rows, key=lambda row: (-abs(row["gap_bits_per_byte"]), row["id"]))[:WORST]


def figures_of(infos: list[dict]) -> dict:
    """The certificate of all shards: `all`, per slice where the data names slices, the conversations of largest gap."""
    slices, whole = defaultdict(Counter), Counter()
    for info in infos:
        for name, sums in info["sums"].items():
            slices[name].update(sums)
    for part in slices.values():
        whole.update(part)
    figures = {"all": certificate(whole), "worst": _largest([row for info in infos for row in info["worst"]])}
    if set(slices) - {""}:
        figures["slices"] = {name or "(none)": certificate(part) for name, part in sorted(slices.items())}
    return figures


def summary_lines(figures: dict) -> list[str]:
    """The certificate as lines of text, with its slices and the conversations of largest gap."""

    def percent(value) -> str:
        return "none" if value is None else f"{100 * value:.2f} %"

    def bits(value) -> str:
        return "none" if value is None else f"{value:.4f}".replace("-0.0000", "0.0000")

    whole = figures["all"]
    lines = [
        f"coverage {percent(whole['coverage'])} of {whole['predicted_tokens']} predicted tokens "
        f"(exact {percent(whole['exact'])}, inside {percent(whole['inside'])}, safe {percent(whole['safe'])})",
        f"mean mapped mass {percent(whole['mean_mapped_mass'])} of {percent(whole['mean_kept_mass'])} that the source "
        f"kept, one-hot {percent(whole['one_hot'])}, actual token missing {percent(whole['without_actual'])}",
        f"bits per byte: source {bits(whole['source_bits_per_byte'])}, aligned {bits(whole['aligned_bits_per_byte'])}, "
        f"gap {bits(whole['gap_bits_per_byte'])} (mean of its size per conversation "
        f"{bits(whole['mean_abs_gap_bits_per_byte'])}) over {percent(whole['covered_tokens'])} of the tokens",
    ]
    for name, part in sorted(figures.get("slices", {}).items()):
        lines.append(
            f"slice {name}: coverage {percent(part['coverage'])}, gap {bits(part['gap_bits_per_byte'])}, "
            f"{part['predicted_tokens']} tokens"
        )
    if worst := [row for row in figures["worst"] if abs(row["gap_bits_per_byte"]) >= 5e-5]:  # else 0
        shown = ", ".join(f"{row['id']} {bits(row['gap_bits_per_byte'])}" for row in worst)
        lines.append(f"largest gaps: {shown}")
    return lines
