"""Paths: the pivot tokens that spell a source token's bytes in mid-text, as a ragged table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class PathTable:
    """Ragged table of pivot paths, one row per source id, with more rows added on the way.

    flat int32 [N], offset int64 [R], length int32 [R], first int32 [R] (-1 for an empty path).
    """

    def __init__(self, paths: Sequence[Sequence[int]]):
        self.length = np.array([len(path) for path in paths], np.int32)
        self.flat = np.array([i for path in paths for i in path], np.int32)
        self.offset = np.cumsum(self.length, dtype=np.int64) - self.length
        self.index_first()

    def index_first(self) -> None:
        """Set `first` from the other arrays."""
        padded = np.append(self.flat, -1)
        self.first = np.where(self.length > 0, padded[np.minimum(self.offset, len(self.flat))], -1).astype(np.int32)

    def __len__(self) -> int:
        return len(self.length)

    def path(self, row: int) -> list[int]:
        """One row as a list."""
        return self.flat[self.offset[row] : self.offset[row] + self.length[row]].tolist()

    def extend(self, paths: Sequence[Sequence[int]]) -> int:
        """Add rows; returns the number of the first one."""
        more, first = PathTable(paths), len(self)
        self.offset = np.concatenate([self.offset, more.offset + len(self.flat)])
        self.length = np.concatenate([self.length, more.length])
        self.flat = np.concatenate([self.flat, more.flat])
        self.index_first()
        return first

    def at(self, rows: np.ndarray, c: int) -> np.ndarray:
        """The c-th token of each path, -1 past its end; same shape as `rows`."""
        if c == 0:
            return self.first[rows]
        padded = np.append(self.flat, -1)
        return np.where(self.length[rows] > c, padded[np.minimum(self.offset[rows] + c, len(self.flat))], -1)
