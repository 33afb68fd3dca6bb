"""The released code's alignment rules, re-enacted from their description for comparison (slow, by nature).

Dynamic time warping over decoded tokens with edit-distance cost; a pivot position that one source position is warped to
takes that one's row if one decoded string ends with the other, else the one-hot row of its next token. A candidate
becomes the identical piece (word mark swapped) or the one its statistics chose; of two on one id the first is kept.
"""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np


def warp(source: list[str], base: list[str]) -> list[list[int]]:
    """Source positions of each base position on the cheapest monotone path (ties: diagonal, base back, source back)."""
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    cost = cdist(source, base, scorer=Levenshtein.distance, dtype=np.int32).tolist()
    n, m = len(source), len(base)
    total = [[0.0] * m for _ in range(n)]
    for i in range(n):
        for j in range(m):
            before = []
            if i and j:
                before.append(total[i - 1][j - 1])
            if j:
                before.append(total[i][j - 1])
            if i:
                before.append(total[i - 1][j])
            total[i][j] = cost[i][j] + (min(before) if before else 0)
    found: list[list[int]] = [[] for _ in base]
    i, j = n - 1, m - 1
    found[j].append(i)
    while i or j:
        steps = []
        if i and j:
            steps.append((total[i - 1][j - 1], 0, i - 1, j - 1))
        if j:
            steps.append((total[i][j - 1], 1, i, j - 1))
        if i:
            steps.append((total[i - 1][j], 2, i - 1, j))
        _, _, i, j = min(steps)
        found[j].append(i)
    return [sorted(positions) for positions in found]


def statistics_choice(counts: dict, source_pieces: list, base_pieces: list, marks: tuple[str, str]) -> dict[int, int]:
    """Per source id the aligned base id of least (edit distance, a tenth if contained) x sigmoid(count)."""
    from rapidfuzz.distance import Levenshtein

    options = defaultdict(list)
    for (s, b), count in counts.items():
        options[s].append((b, count))
    chosen = {}
    for s, several in options.items():
        own = (source_pieces[s] or "").replace(marks[0], "")
        scored = []
        for b, count in several:
            other = (base_pieces[b] or "").replace(marks[1], "")
            distance = Levenshtein.distance(own, other)
            if own in other or other in own:
                distance *= 0.1
            scored.append((distance / (1 + math.exp(-count)), b))
        chosen[s] = min(scored)[1]
    return chosen


def rows(base, source, warped, base_decoded, source_decoded, topk_ids, topk_logprobs, same_piece, chosen):
    """[{pivot id: P} or None for one-hot] of the prediction after each base position.

    Args:
        base, source: ids. warped: `warp`. topk_*: [Q, K] of the prediction *after* each source position.
        same_piece: source id -> base id of the identical piece. chosen: `statistics_choice`.
    """
    made = []
    for i in range(len(base)):
        made.append(None)
        if len(warped[i]) != 1:
            continue
        j = warped[i][0]
        a, b = base_decoded[i], source_decoded[j]
        if not (a.endswith(b) or b.endswith(a)):
            continue
        row = {}
        for candidate, logprob in zip(topk_ids[j].tolist(), topk_logprobs[j].tolist()):
            target = same_piece.get(candidate, chosen.get(candidate))
            if target is not None and target not in row:
                row[target] = math.exp(logprob)
        total = sum(row.values())
        if total > 0:
            made[-1] = {target: p / total for target, p in row.items()}
    return made
