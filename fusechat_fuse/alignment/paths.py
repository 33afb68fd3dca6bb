"""Paths: the pivot tokens that spell a source token's bytes in mid-text, as a ragged table by source id."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain

import numpy as np

# byte strings -> the path of pivot ids of each; shorter than the bytes where the pivot cannot spell the rest
Spell = Callable[[Sequence[bytes]], list[list[int]]]


class PathTable:
    """Ragged table of paths, one row a source id; rows can be replaced, and others added on the way.

    flat int32 [N], offset int64 [R], length int32 [R], first int32 [R] (-1 for an empty path).
    """

    def __init__(self, flat: np.ndarray, length: np.ndarray):
        """Paths that lie one after the other in `flat`; how long each is stands in `length`. Both are copied."""
        self.flat, self.length = flat.astype(np.int32), length.astype(np.int32)
        self.offset = np.cumsum(length, dtype=np.int64) - length
        self._index_first()

    @classmethod
    def of(cls, paths: Sequence[Sequence[int]]) -> PathTable:
        """A table of these paths."""
        return cls(np.fromiter(chain.from_iterable(paths), np.int32), np.array([len(path) for path in paths], np.int32))

    def _index_first(self) -> None:
        padded = np.append(self.flat, -1)
        self.first = np.where(self.length > 0, padded[np.minimum(self.offset, len(self.flat))], -1).astype(np.int32)

    def __len__(self) -> int:
        return len(self.length)

    def path(self, row: int) -> list[int]:
        """One row as a list."""
        return self.flat[self.offset[row] : self.offset[row] + self.length[row]].tolist()

    def extend(self, paths: Sequence[Sequence[int]]) -> int:
        """Add rows; returns the number of the first one."""
        more, first = PathTable.of(paths), len(self)
        self.offset = np.concatenate([self.offset, more.offset + len(self.flat)])
        self.length = np.concatenate([self.length, more.length])
        self.flat = np.concatenate([self.flat, more.flat])
        self._index_first()
        return first

    def replace(self, paths: Mapping[int, Sequence[int]]) -> None:
        """Give rows other paths: {row: path}. The rest keeps its place."""
        rows, more = list(paths), PathTable.of(list(paths.values()))
        self.offset[rows], self.length[rows] = more.offset + len(self.flat), more.length
        self.flat = np.concatenate([self.flat, more.flat])
        self._index_first()

    def at(self, rows: np.ndarray, c: int) -> np.ndarray:
        """The c-th token of each path, -1 past its end; same shape as `rows`."""
        if c == 0:
            return self.first[rows]
        padded = np.append(self.flat, -1)
        return np.where(self.length[rows] > c, padded[np.minimum(self.offset[rows] + c, len(self.flat))], -1)
