"""A row as training takes it: its documented names, numpy arrays, and values that can be (docs/api.md, "An aligned
row"). Stored rows are decoded; rows made by hand may hold lists, arrays or tensors."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from fusechat_fuse.errors import InputError
from fusechat_fuse.store.rows import decode_row
from fusechat_fuse.training.choice import require_columns

ROUNDING = 0.01  # by which float16 probabilities may exceed 1


class _Column(NamedTuple):
    shape: str  # T tokens, P predicted tokens, K entries
    dtype: Any
    least: float = -np.inf
    most: float = np.inf
    expected: str = ""


COLUMNS = {
    "input_ids": _Column("T", np.int32, 0, expected="ids from 0"),
    "predicted": _Column("P", np.int32, 1, expected="indices from 1"),
    "message": _Column("P", np.int32),
    "start": _Column("P", np.int32, 0, expected="bytes from 0"),
    "end": _Column("P", np.int32, 0, expected="bytes from 0"),
    "topk_ids": _Column("PK", np.int32, -1, expected="ids, or -1"),
    "topk_logprobs": _Column("PK", np.float32, most=0, expected="log-probabilities, at most 0"),
    "ce": _Column("P", np.float32, 0, expected="nats, at least 0"),
    "source_ids": _Column("PK", np.int32, -1, expected="ids, or -1"),
    "source_probs": _Column("PK", np.float32, 0, 1 + ROUNDING, "probabilities from 0 to 1"),
    "source_token_ce": _Column("P", np.float32),
    "mapped_mass": _Column("P", np.float32, 0, 1 + ROUNDING, "probabilities from 0 to 1"),
    "label_tail": _Column("P", np.float32, -1, 2 + ROUNDING, "marks from -1 to 2"),
}


def as_documented(row) -> dict:
    """A row with its documented names and numpy arrays, checked; InputError names conversation and column."""
    if not isinstance(row, Mapping):
        raise InputError(
            f"row for FusionCollator: expected an aligned row, got {type(row).__name__}. Pass a directory that align "
            "or combine wrote, or rows of one."
        )
    row = dict(row)
    require_columns(row, "id")
    row["id"] = str(row["id"])
    if "num_predicted" in row:
        try:
            row = decode_row(row)
        except (ValueError, TypeError) as error:
            raise InputError(
                f"stored row for conversation {row['id']!r}: expected its binary fields as they are on disk, got some "
                "that are cut. Read the data without with_format."
            ) from error
    row = {name: _array(row["id"], name, value) if name in COLUMNS else value for name, value in row.items()}
    require_columns(row, "input_ids", "predicted")
    _check_positions(row)
    for ids, probs in (("topk_ids", "topk_logprobs"), ("source_ids", "source_probs")):
        if row.get(ids) is not None and row.get(probs) is not None:
            _check_distributions(row, ids, probs)
    return row


def _array(name: str, column: str, value) -> np.ndarray | None:
    """One column of conversation `name` as an array of the documented shape, with values in their range."""
    if value is None:
        return None
    spec = COLUMNS[column]
    if isinstance(value, torch.Tensor):
        value = (value.float() if value.is_floating_point() else value).numpy(force=True)
    kinds, what = ("iu", "integers") if spec.dtype is np.int32 else ("f", "floating-point numbers")
    try:
        array = np.asarray(value, spec.dtype if isinstance(value, list) else None)
    except (ValueError, TypeError):
        array = np.array(None)  # lists that make none
    if array.ndim < len(spec.shape) and array.size == 0:  # lists without entries
        array = array.reshape(len(array), 0)
    if array.ndim != len(spec.shape) or array.dtype.kind not in kinds:
        got = f"{array.dtype} of shape {array.shape}" if array.ndim else "lists that make no array"
        raise _refused(name, column, f"{what} of shape [{', '.join(spec.shape)}]", got)
    inside = (array >= spec.least) & (array <= spec.most)
    if not inside.all() and spec.expected and not (column == "ce" and np.isnan(array[~inside]).all()):
        raise _refused(name, column, spec.expected, f"{array[~inside][0]:.6g}")
    return array


def _check_positions(row: dict) -> None:
    tokens, at = len(row["input_ids"]), row["predicted"]
    if len(at) and (at[-1] >= tokens or (np.diff(at) <= 0).any()):
        got = f"{at.min()} to {at.max()}" if at.max() >= tokens else "some that are not"
        raise _refused(row["id"], "predicted", f"ascending indices into {tokens} tokens", got)
    for column, spec in COLUMNS.items():
        if spec.shape[0] == "P" and row.get(column) is not None and len(row[column]) != len(at):
            raise _refused(row["id"], column, f"{len(at)} predicted tokens", len(row[column]))


def _check_distributions(row: dict, ids: str, probs: str) -> None:
    if row[ids].shape != row[probs].shape:
        raise _refused(row["id"], probs, f"the shape of {ids}, {row[ids].shape}", row[probs].shape)
    values = np.exp(row[probs], dtype=np.float32) if probs == "topk_logprobs" else row[probs]
    mass = values.sum(1, dtype=np.float32).max(initial=0)
    if not mass <= 1 + ROUNDING:
        raise _refused(row["id"], probs, "probabilities that add up to 1 at most", f"a sum of {mass:.6g}")


def _refused(name: str, column: str, expected: str, got) -> InputError:
    return InputError(
        f"column {column!r} for conversation {name!r}: expected {expected}, got {got}. See docs/api.md, An aligned row."
    )
