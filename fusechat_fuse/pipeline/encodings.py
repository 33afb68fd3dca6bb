"""A recipe's data in the tokens of its models: conversations are encoded as by `represent`, and only counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fusechat_fuse.errors import InputError
from fusechat_fuse.models.files import load_config, load_fast_tokenizer, positions_of
from fusechat_fuse.pipeline.recipe import READING
from fusechat_fuse.store.rows import encode_row
from fusechat_fuse.text.chat import ConversationEncoder, Encoded
from fusechat_fuse.text.conversations import Conversation, read_conversations
from fusechat_fuse.text.messages import Unusable
from fusechat_fuse.text.templates import check_template, resolve_template

_DECISIVE = ("model_name_or_path", "data_path", *READING, "pivot_name_or_path", "template", "max_length", "top_k")


@dataclass(frozen=True)
class Encodings:
    """Counts of the encoded conversations of a data set; arrays are int64 [n]."""

    scale: float  # conversations of the data set per conversation tried
    lengths: np.ndarray
    predicted: np.ndarray
    row_bytes: np.ndarray  # in the plain encoding

    @property
    def conversations(self) -> int:
        """Usable conversations in the whole data set."""
        return round(len(self.lengths) * self.scale)

    @property
    def counts(self) -> dict[str, int]:
        """Conversations, predicted tokens and tokens of the whole data set."""
        tokens = {"predicted_tokens": self.total(self.predicted), "tokens": self.total(self.lengths)}
        return {"conversations": self.conversations, **tokens}

    def total(self, counts: np.ndarray) -> int:
        """The sum of counts [n], scaled to the whole data set."""
        return round(float(counts.sum()) * self.scale)


@dataclass
class DataReader:
    """Reads each data set once, and encodes it once per tokenizer, template and length."""

    sample: int  # at most this many conversations of a data set are encoded, evenly spaced
    warnings: list[str] = field(default_factory=list)  # sentences about skipped and truncated conversations
    exact: bool = True  # whether all were encoded
    _read: dict[tuple, list[Conversation]] = field(default_factory=dict)
    _encoded: dict[tuple, Encodings] = field(default_factory=dict)

    def encodings(self, name: str, options: dict[str, Any]) -> Encodings:
        """The data of a represent step in its model's tokens; `name` is the step's, for warnings.

        Raises: InputError if `represent` will refuse the data, the tokenizer or the template.
        """
        key = tuple(str(options[name]) for name in _DECISIVE)
        if key not in self._encoded:
            self._encoded[key] = self._encode(name, options)
        return self._encoded[key]

    def _conversations(self, options: dict[str, Any]) -> list[Conversation]:
        reading = {name: options[name] for name in READING}
        key = (*options["data_path"], *reading.values())
        if key not in self._read:
            self._read[key] = read_conversations(options["data_path"], **reading)[0]
        return self._read[key]

    def _encode(self, name: str, options: dict[str, Any]) -> Encodings:
        model, pivot = options["model_name_or_path"], options["pivot_name_or_path"]
        trust, max_length = options["trust_remote_code"], options["max_length"]
        tokenizer = load_fast_tokenizer(model, trust)
        template = resolve_template(options["template"], tokenizer, pivot and load_fast_tokenizer(pivot, trust))
        max_length = min(max_length, positions_of(load_config(model, trust_remote_code=trust)) or max_length)
        encoder = ConversationEncoder(tokenizer, template, max_length)
        found = self._conversations(options)
        tried = np.unique(np.linspace(0, len(found) - 1, min(self.sample, len(found))).astype(int))
        counts, truncated, refused = [], 0, []
        for n in tried:
            try:
                one = encoder.encode(found[n].messages)
            except Unusable as problem:
                refused.append({"reason": problem.reason, "detail": str(problem)})
                continue
            counts.append((len(one.input_ids), len(one.predicted), _row_bytes(one, options["top_k"])))
            truncated += one.truncated
        check_template(refused, len(tried))
        first = {entry["reason"]: entry["detail"] for entry in reversed(refused)}
        for reason, count in Counter(entry["reason"] for entry in refused).items():
            self.warnings.append(
                f"{name}: {count} of {len(tried)} conversations are left out, {reason}: {first[reason]}"
            )
        if not counts:
            raise InputError(
                f"data for {name}: expected conversations that can be encoded, got none. See the warnings on it."
            )
        if truncated:
            self.warnings.append(f"{name}: {truncated} of {len(tried)} conversations are cut at {max_length} tokens.")
        self.exact &= len(tried) == len(found)
        return Encodings(len(found) / len(tried), *np.array(counts, np.int64).T)


def _row_bytes(one: Encoded, top_k: int) -> int:
    """The size of a conversation's row in the plain encoding, which depends on shapes alone."""
    P = len(one.predicted)
    table = {"topk_ids": np.zeros((P, top_k), np.int32), "topk_logprobs": np.zeros((P, top_k), np.float16)}
    fields = {key: getattr(one, key) for key in ("input_ids", "predicted", "message", "start", "end")}
    row = encode_row({"id": "", "ce": np.zeros(P, np.float32), **table, **fields})
    return sum(len(value) for value in row.values() if isinstance(value, bytes))
