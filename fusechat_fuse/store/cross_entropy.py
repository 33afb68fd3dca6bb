"""A conversation's cross-entropy (CE), per token or per byte: what models are compared by.

token   nats per token of each model's own tokenizer (the paper)
byte    nats per byte of assistant text, which is comparable between tokenizers
"""

from __future__ import annotations

import numpy as np

from fusechat_fuse.errors import InputError

CE_UNITS = ("token", "byte")


def pivot_cross_entropy(row: dict, ce_unit: str) -> float:
    """The pivot's CE of an aligned row, from `ce` and, per byte, `start` and `end`: nats per unit, NaN without text."""
    ce = float(np.mean(row["ce"], dtype=np.float64))
    if ce_unit == "token":
        return ce
    num_bytes = int(np.sum(row["end"] - row["start"], dtype=np.int64))
    return ce * len(row["ce"]) / num_bytes if num_bytes else float("nan")


def source_cross_entropy(row: dict, ce_unit: str) -> float:
    """The same of the source, from `source_ce` and, per byte, `source_tokens` and `source_bytes`.

    Raises: InputError per byte where the number of tokens is not known.
    """
    ce = float(row["source_ce"])
    if ce_unit == "token":
        return ce
    if row.get("source_tokens") is None or row.get("source_bytes") is None:
        raise InputError(
            f"cross-entropy per byte for conversation {row.get('id')!r}: expected source_tokens and source_bytes, got "
            "a row without them (imported data do not hold the number of the source's tokens). Set ce_unit to token."
        )
    num_bytes = int(row["source_bytes"])
    return ce * int(row["source_tokens"]) / num_bytes if num_bytes else float("nan")
