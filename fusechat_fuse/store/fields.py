"""One array as one binary field of a stored row, and back: `docs/format.md` has the same, byte by byte.

Arrow's nested lists of numbers decode at fifty thousand tokens a second; a binary field is one memory view.
"""

from __future__ import annotations

import numpy as np

_NO_ID = 0xFFFFFF
_LEVELS = 512  # steps of the compact grid per nat below |lp| = 2 and per octave above


def encode_ids(ids: np.ndarray) -> bytes:
    """Integers from -1 to 2**24 - 2 in three little-endian bytes each; -1 is all ones."""
    ids = np.ascontiguousarray(ids, dtype="<i4").reshape(-1)
    if ids.size and (ids.min() < -1 or ids.max() >= _NO_ID):
        raise ValueError(f"ids from -1 to {_NO_ID - 1} fit three bytes, got {ids.min()} to {ids.max()}")
    return ids.view(np.uint8).reshape(-1, 4)[:, :3].tobytes()


def decode_ids(data) -> np.ndarray:
    """Inverse of `encode_ids`: int32 [n]."""
    n = len(data) // 3
    if n == 0:
        return np.zeros(0, np.int32)
    padded = np.empty(3 * n + 1, np.uint8)
    padded[:-1] = np.frombuffer(data, np.uint8)
    padded[-1] = 0
    ids = np.ndarray((n,), "<u4", padded, strides=(3,)) & np.uint32(_NO_ID)
    ids = ids.view(np.int32)
    if (none := ids == _NO_ID).any():
        ids[none] = -1
    return ids


def encode_small(values: np.ndarray) -> bytes:
    """Non-negative or signed integers in the narrowest of 0, 1, 2, 4 bytes; the width follows from the length."""
    values = np.asarray(values)
    if not values.size or not values.any():
        return b""
    for dtype in ("<u1", "<u2"):
        if values.min() >= 0 and values.max() <= np.iinfo(dtype).max:
            return values.astype(dtype).tobytes()
    return values.astype("<i4").tobytes()


def decode_small(data, n: int) -> np.ndarray:
    """Inverse of `encode_small` for n integers: int32 [n]."""
    if len(data) == 0:
        return np.zeros(n, np.int32)
    return np.frombuffer(data, {1: "<u1", 2: "<u2", 4: "<i4"}[len(data) // n]).astype(np.int32)


def pack(values: np.ndarray, width: int) -> bytes:
    """The length in four little-endian bytes, then, unless it is 0, byte planes as one zstd frame.

    All lowest bytes, then all second bytes, ...: what repeats stands together for the compressor.
    """
    import pyarrow as pa

    data = np.ascontiguousarray(values, "<u4").view(np.uint8).reshape(-1, 4)[:, :width].T.tobytes()
    size = len(data).to_bytes(4, "little")
    return size + pa.compress(data, codec="zstd", asbytes=True) if data else size


def unpack(data, width: int) -> np.ndarray:
    """Inverse of `pack`: uint32 [n]."""
    import pyarrow as pa

    data = bytes(data)
    size = int.from_bytes(data[:4], "little")
    planes = pa.decompress(data[4:], decompressed_size=size, codec="zstd", asbytes=True) if size else b""
    values = np.zeros((size // width, 4), np.uint8)
    values[:, :width] = np.frombuffer(planes, np.uint8).reshape(width, -1).T
    return values.view("<u4").reshape(-1)


def to_levels(logprobs: np.ndarray) -> np.ndarray:
    """|lp| on a grid, ascending with it: steps of 2**-9 below 2, then 512 steps per octave (all float16 numbers)."""
    x = np.minimum(-np.asarray(logprobs, np.float64), 60000.0)
    octave = np.where(x < 2.0, 0.0, np.floor(np.log2(np.maximum(x, 2.0))))
    return np.rint((x / 2.0**octave + octave) * _LEVELS).astype(np.int64)


def from_levels(levels: np.ndarray) -> np.ndarray:
    """Inverse of `to_levels`: log-probabilities <= 0, float64."""
    octave = np.maximum(levels // _LEVELS - 1, 0)
    return -(levels / _LEVELS - octave) * 2.0**octave
