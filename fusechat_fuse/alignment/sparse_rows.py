"""Sparse distributions, one a row: ids int [P, C] (-1: no entry) beside probabilities float [P, C]."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Mapped:
    """The source's prediction at each pivot token: P sparse distributions over the pivot's vocabulary.

    label_tail is for `fusion_tail label`: 0, the actual token was among the kept ones (or no answer); 1 + m, the label
    stands for the tail, m of its probability from kept candidates; -1, the label alone stands (the row is conditional
    on the bytes read of the token, or it is an end of turn that the source did not keep).
    """

    ids: np.ndarray  # int32 [P, C], -1: no entry
    probs: np.ndarray  # float64 [P, C]
    log_actual: np.ndarray  # float64 [P], log of the source's probability of the actual pivot token; -inf: no answer
    answered: np.ndarray  # bool [P]
    mass: np.ndarray  # float64 [P], the source's probability mass that was mapped
    kind: np.ndarray  # uint8 [P] as in Correspondence, NONE where not answered
    label_tail: np.ndarray  # float64 [P]
    exact_actual: bool = False  # whether a row's probability of the actual token is the source's own, however small

    @classmethod
    def empty(cls, P: int, C: int) -> Mapped:
        """P rows without an answer, with room for C entries each."""
        return cls(
            ids=np.full((P, C), -1, np.int32),
            probs=np.zeros((P, C)),
            log_actual=np.full(P, -np.inf),
            answered=np.zeros(P, bool),
            mass=np.zeros(P),
            kind=np.zeros(P, np.uint8),
            label_tail=np.zeros(P),
        )

    def leave_out(self, rows: np.ndarray, one_hot: np.ndarray | None = None) -> None:
        """Remove the answer from some rows (bool [P]): no entry, or probability 1 on the id in `one_hot` (int [P])."""
        self.ids[rows], self.probs[rows] = -1, 0
        self.log_actual[rows], self.mass[rows], self.label_tail[rows] = -np.inf, 0, 0
        self.answered[rows], self.kind[rows] = False, 0
        if one_hot is not None:
            self.ids[rows, 0], self.probs[rows, 0] = one_hot[rows], 1.0


def row_sums(values: np.ndarray) -> np.ndarray:
    """Sums along the short axis, as a matrix product, which is several times faster than a reduction."""
    return values @ np.ones(values.shape[1])


def add_up_equal_ids(ids: np.ndarray, probs: np.ndarray) -> None:
    """Within each row, add the probability of entries with one id to the first of them, in place ([P, C] each)."""
    ordered = np.sort(ids, axis=1)
    rows = np.flatnonzero(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1))
    if not len(rows):
        return
    some, value = ids[rows], probs[rows]
    at = np.arange(len(rows))
    for k in range(1, ids.shape[1]):
        same = (some[:, :k] == some[:, k : k + 1]) & (some[:, k : k + 1] >= 0)
        hit = same.any(1)
        first = same.argmax(1)
        value[at[hit], first[hit]] += value[hit, k]
        some[hit, k], value[hit, k] = -1, 0
    ids[rows], probs[rows] = some, value
