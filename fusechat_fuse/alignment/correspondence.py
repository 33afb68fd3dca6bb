"""Which source prediction answers which pivot prediction: two pointers over byte offsets, O(n + m).

Two predictions are comparable when they are made after the same text, so what counts is where tokens *start*. All
positions lie on one line: every message of every conversation of a batch has a stretch of its own, far from the
others, so that one sorted search serves the whole batch. Shape letters: P pivot tokens, Q source tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

NONE, EXACT, INSIDE = 0, 1, 2
_MESSAGE_BITS, _BYTE_BITS = 15, 31


def line_up(conversation: np.ndarray, message: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Places on the common line: int64, ascending by conversation, then message, then byte.

    Args:
        conversation, message, position: integers of one shape; conversation < 2**17, message < 2**15, byte < 2**31.
    """
    key = (np.asarray(conversation, np.int64) << _MESSAGE_BITS) + np.asarray(message, np.int64)
    return (key << _BYTE_BITS) + np.asarray(position, np.int64)


def message_of(place: np.ndarray | int):
    """Which message of which conversation a place lies in: one number for all places of a message, ascending."""
    return place >> _BYTE_BITS


@dataclass(frozen=True)
class Correspondence:
    """How each pivot token starts (NONE, EXACT: where a source token starts, INSIDE: within one), and in which."""

    kind: np.ndarray  # uint8 [P]
    source: np.ndarray  # int64 [P], the index of that source token, -1 where none


def correspond(
    pivot_start: np.ndarray, pivot_end: np.ndarray, source_start: np.ndarray, source_end: np.ndarray
) -> Correspondence:
    """For each pivot token p the source token q with start_q <= start_p < end_q.

    EXACT if they start at the same byte, INSIDE if p starts within q, NONE where no source token covers the place (a
    hole: trimmed or truncated text) or p is empty.

    Args:
        pivot_start, pivot_end: int64 [P], places on one line (`line_up`), starts non-decreasing; borrowed.
        source_start, source_end: int64 [Q], likewise.

    Source: `docs/method.md`, "Positions".
    Differs from the released code, which aligns by dynamic time warping over decoded tokens.
    """
    if not len(source_start):
        return Correspondence(np.zeros(len(pivot_start), np.uint8), np.full(len(pivot_start), -1))
    q = np.searchsorted(source_start, pivot_start, side="right") - 1  # the last source token that starts at or before
    at = np.maximum(q, 0)
    covered = (q >= 0) & (pivot_start < source_end[at]) & (pivot_start < pivot_end)
    kind = np.where(source_start[at] == pivot_start, EXACT, INSIDE)
    kind = np.where(covered, kind, NONE).astype(np.uint8)
    return Correspondence(kind, np.where(covered, at, -1))


def joined_bytes(vocabulary: list[bytes | None]) -> np.ndarray:
    """bool [256, 256]: whether some token has these two bytes next to each other.

    Where the bytes around a start are joined in no token of either vocabulary, no token could have run across it.
    """
    pairs = {pair for piece in vocabulary if piece for pair in pairwise(piece)}
    joined = np.zeros((256, 256), bool)
    joined[tuple(np.array(list(pairs), np.int64).reshape(-1, 2).T)] = True
    return joined


def safe_starts(
    correspondence: Correspondence,
    start: np.ndarray,
    first_byte: np.ndarray,
    byte_before: np.ndarray,
    after_header: np.ndarray,
    joined: np.ndarray,
) -> np.ndarray:
    """Which common starts are free of tokenization bias: no token of either vocabulary could span them.

    How the text before was cut leaks what cannot come next. Where the two bytes around the start stand side by side
    in no token, every tokenization has a boundary there; so it is one of both pre-tokenizers too.

    Args:
        correspondence: of P pivot tokens.
        start: [P] byte in the message.
        first_byte, byte_before: integers [P], bytes of the text at and before the start (-1: end of turn, special).
        after_header: bool [P], the token also holds bytes of the header before the message.
        joined: bool [256, 256], `joined_bytes` of both vocabularies, or-ed.

    Returns:
        bool [P], a subset of the EXACT ones.

    Source: tokenization bias, arXiv 2406.16829 and 2410.09303.
    """
    inside_text = (first_byte >= 0) & (byte_before >= 0) & (np.asarray(start) > 0)
    spanned = joined[np.maximum(byte_before, 0), np.maximum(first_byte, 0)] & inside_text
    return (correspondence.kind == EXACT) & ~spanned & ~after_header
