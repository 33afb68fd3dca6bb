"""One conversation's arrays as a few small binary fields, and back; `docs/format.md` says the same byte by byte.

Every per-token array of a row is one binary field: ids in three bytes, log-probabilities as float16, cross-entropy as
float32, byte spans as token lengths, predicted positions and messages as runs. What a reader gets back from
`decode_row` are the names, shapes and dtypes of the documented row, whichever way they were stored.

Two encodings: `plain` (views and shifts only) and `compact` (below 40 bytes per predicted token at k = 10). The compact
one rounds: log-probabilities to a grid finer than 1e-3 max(1, |lp|), ce to 2**-13; ids and spans stay exact.

Shapes: T tokens, P predicted tokens, K top-k entries, K' entries of a mapped source distribution.
"""

from __future__ import annotations

import numpy as np

from fusechat_fuse.store.fields import (
    decode_ids,
    decode_small,
    encode_ids,
    encode_small,
    from_levels,
    pack,
    to_levels,
    unpack,
)

SOURCE_ARRAYS = {"source_token_ce": np.float32, "mapped_mass": np.float16, "label_tail": np.float16}
ENCODINGS = ("plain", "compact")


def _encode_positions(row: dict) -> dict[str, bytes]:
    predicted, message, start, end = (
        np.asarray(row[key], np.int64) for key in ("predicted", "message", "start", "end")
    )
    jump = (np.diff(predicted) != 1) | (np.diff(message) != 0)  # between runs
    heads = np.concatenate([[0], np.flatnonzero(jump) + 1]) if len(predicted) else np.zeros(0, np.int64)
    lengths = np.diff(np.append(heads, len(predicted)))
    runs = np.stack([predicted[heads], lengths, message[heads]], axis=1)
    before = np.concatenate([[0], end[:-1]])
    before[heads] = 0
    return {
        "runs": runs.astype("<i4").tobytes(),
        "gaps": encode_small(start - before),
        "widths": encode_small(end - start),
    }


def _decode_positions(row: dict, P: int) -> dict[str, np.ndarray]:
    first, length, message = np.frombuffer(row["runs"], "<i4").reshape(-1, 3).T
    heads = np.cumsum(length) - length
    predicted = np.arange(P, dtype=np.int32) + np.repeat(first - heads.astype(np.int32), length)
    gaps, widths = decode_small(row["gaps"], P), decode_small(row["widths"], P)
    ends = np.cumsum(gaps + widths, dtype=np.int32)
    if len(heads):
        before = np.where(heads > 0, ends[heads - 1], 0).astype(np.int32)
        ends = ends - np.repeat(before, length)
    return {
        "predicted": predicted,
        "message": np.repeat(message, length).astype(np.int16),
        "start": ends - widths,
        "end": ends,
    }


def _encode_table(row: dict, encoding: str) -> dict[str, bytes]:
    ids, ce = row["topk_ids"], np.maximum(row["ce"], 0)
    logprobs = np.clip(row["topk_logprobs"], -65504.0, 0)  # float16's smallest number
    if encoding == "plain":
        return {
            "input_ids": encode_ids(row["input_ids"]),
            "topk_ids": encode_ids(ids),
            "topk_logprobs": np.asarray(logprobs, "<f2").tobytes(),
            "ce": np.asarray(ce, "<f4").tobytes(),
        }
    levels = np.diff(to_levels(logprobs), axis=1, prepend=0)
    if levels.size and levels.min() < 0:
        raise ValueError(f"topk_logprobs of {row['id']!r}: expected each row descending")
    fine = np.minimum(np.rint(np.asarray(ce, np.float64) * 2**13), 2**32 - 1)
    return {
        "c_input_ids": pack(row["input_ids"], 3),
        "c_topk_ids": pack(np.asarray(ids).T.reshape(-1), 3),
        "c_topk_levels": pack(levels.T.reshape(-1), 2),
        "c_ce": pack(fine.astype(np.uint32), 4),
    }


def _decode_table(row: dict, P: int) -> dict[str, np.ndarray]:
    if "topk_ids" in row:
        return {
            "input_ids": decode_ids(row["input_ids"]),
            "topk_ids": decode_ids(row["topk_ids"]).reshape(P, -1),
            "topk_logprobs": np.frombuffer(row["topk_logprobs"], "<f2").reshape(P, -1).copy(),
            "ce": np.frombuffer(row["ce"], "<f4").copy(),
        }
    levels = unpack(row["c_topk_levels"], 2).reshape(-1, P).T.astype(np.int64)
    ids = unpack(row["c_topk_ids"], 3).reshape(-1, P).T
    return {
        "input_ids": unpack(row["c_input_ids"], 3).astype(np.int32),
        "topk_ids": np.ascontiguousarray(ids, np.int32),
        "topk_logprobs": np.ascontiguousarray(from_levels(np.cumsum(levels, axis=1)), np.float16),
        "ce": (unpack(row["c_ce"], 4) / 2**13).astype(np.float32),
    }


def _encode_source(row: dict, P: int) -> dict:
    ids, probs = np.asarray(row["source_ids"]), np.asarray(row["source_probs"])
    if ids.shape != probs.shape or ids.ndim != 2 or len(ids) != P:
        raise ValueError(f"source_ids and source_probs must both be [{P}, K'], got {ids.shape} and {probs.shape}")
    kept = ids >= 0
    fields = {
        "source_width": ids.shape[1],
        "source_counts": encode_small(kept.sum(1)),
        "source_ids": encode_ids(ids[kept]),
        "source_logprobs": _float16_logs(np.where(kept, probs, 0))[kept].tobytes(),
    }
    if row.get("source_index") is not None:
        fields["source_index"] = encode_ids(row["source_index"])
    return fields


def _float16_logs(probs: np.ndarray) -> np.ndarray:
    """Logarithms as float16 [P, K'], such that no row of probabilities adds up to more than 1 when it is read.

    A row that adds up to more than 1 is divided by its sum. Where rounding to nearest leads above 1, the entries that
    it made larger are rounded down, most likely ones first, as far as is needed.
    """
    probs = probs.astype(np.float64)
    with np.errstate(divide="ignore"):
        logs = np.log(probs)
    total = probs @ np.ones(probs.shape[1])
    over = np.flatnonzero(total > 1)
    logs[over] -= np.log(total[over])[:, None]
    nearest = logs.astype("<f2")
    read = np.exp(nearest.astype(np.float32))
    excess = read.sum(1, dtype=np.float64) - 1
    rows = np.flatnonzero(excess > 0)
    excess = excess[rows]
    larger = np.where(nearest[rows] > logs[rows] - 2e-7, read[rows], 0)  # float32's exp may make larger what is equal
    while len(rows):
        k = larger.argmax(1)
        nearest[rows, k] = lower = np.nextafter(nearest[rows, k], np.float16(-np.inf))
        excess -= np.where(larger.max(1) > 0, read[rows, k] - np.exp(lower.astype(np.float32)), np.inf)
        larger[np.arange(len(rows)), k] = 0
        on = excess > -1e-7
        rows, excess, larger = rows[on], excess[on], larger[on]
    return nearest


def _decode_source(row: dict, P: int) -> dict:
    counts, width = decode_small(row["source_counts"], P), int(row["source_width"])
    ids = np.full((P, width), -1, np.int32)
    probs = np.zeros((P, width), np.float32)
    kept = np.arange(width) < counts[:, None]
    ids[kept] = decode_ids(row["source_ids"])
    probs[kept] = np.exp(np.frombuffer(row["source_logprobs"], "<f2").astype(np.float32))
    arrays = {"source_ids": ids, "source_probs": probs}
    if row.get("source_index") is not None:
        arrays["source_index"] = decode_ids(row["source_index"])
    return arrays


def encode_row(row: dict, encoding: str = "plain") -> dict:
    """A row in documented names and shapes, as the fields that go to disk.

    Args:
        row: `id`, `input_ids` [T], `predicted`, `message`, `start`, `end`, `ce` [P], `topk_ids`, `topk_logprobs`
            [P, K], optionally `content_hash`, `slice`, the source columns of an aligned row, further str, int, float.
            Within a source row the kept entries may stand anywhere; they are served first, in order.
        encoding: plain or compact.
    Returns: field name -> bytes, str, int or float.
    Raises: ValueError where lengths disagree or a value has no place in the format.
    """
    P, K = np.asarray(row["topk_ids"]).shape
    for key in ("predicted", "message", "start", "end", "ce", "topk_logprobs", *SOURCE_ARRAYS):
        if key in row and len(row[key]) != P:
            raise ValueError(f"{key} of {row['id']!r}: expected {P} predicted tokens, got {len(row[key])}")
    if np.asarray(row["topk_logprobs"]).shape != (P, K):
        raise ValueError(f"topk_logprobs of {row['id']!r}: expected {(P, K)}, got {np.shape(row['topk_logprobs'])}")
    fields = {"id": row["id"], "num_tokens": len(row["input_ids"]), "num_predicted": P}
    fields |= _encode_table(row, encoding) | _encode_positions(row)
    done = {"input_ids", "predicted", "message", "start", "end", "ce", "topk_ids", "topk_logprobs"}
    if "source_ids" in row:
        fields |= _encode_source(row, P)
        done |= {"source_ids", "source_probs", "source_index"}
    for key, dtype in SOURCE_ARRAYS.items():
        if key in row:
            fields[key] = np.asarray(row[key], np.dtype(dtype).newbyteorder("<")).tobytes()
            done.add(key)
    for key, value in row.items():
        if key in done or value is None:
            continue
        if np.ndim(value):
            raise ValueError(f"{key} of {row['id']!r}: an array of this name has no place in the format")
        fields[key] = value.item() if hasattr(value, "item") else value
    return fields


_FIELDS = {"num_tokens", "num_predicted", "runs", "gaps", "widths", "topk_ids", "topk_logprobs", "ce", "input_ids"}
_FIELDS |= {"c_input_ids", "c_topk_ids", "c_topk_levels", "c_ce"}
_FIELDS |= {"source_width", "source_counts", "source_ids", "source_logprobs", "source_index", *SOURCE_ARRAYS}


def decode_row(row: dict) -> dict:
    """The documented row from a stored one, e.g. `datasets.load_from_disk(path)[i]`.

    Args:
        row: fields as `encode_row` made them; binary ones may be bytes or any buffer.
    Returns: `id` (and `content_hash`, `slice` where stored), `input_ids` int32 [T], `predicted`, `start`, `end` int32
        [P], `message` int16 [P], `topk_ids` int32 [P, K], `topk_logprobs` float16 [P, K], `ce` float32 [P]; of aligned
        rows also `source_ids` int32 [P, K'] (-1 padded), `source_probs` float32 [P, K'], `source_token_ce` float32 [P],
        `mapped_mass`, `label_tail` float16 [P] and the scalars stored with them. Arrays are fresh and writable.
    """
    P = int(row["num_predicted"])
    arrays = {key: value for key, value in row.items() if key not in _FIELDS and value is not None}
    arrays |= _decode_table(row, P) | _decode_positions(row, P)
    if row.get("source_ids") is not None:
        arrays |= _decode_source(row, P)
    for key, dtype in SOURCE_ARRAYS.items():
        if row.get(key) is not None:
            arrays[key] = np.frombuffer(row[key], np.dtype(dtype).newbyteorder("<")).astype(dtype)
    return arrays
