"""A recipe's data as its models will see them: conversations encoded as `represent` encodes them, counted, not kept."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fusechat_fuse.errors import InputError
from fusechat_fuse.models.files import load_config, load_fast_tokenizer, positions_of
from fusechat_fuse.store.rows import encode_row
from fusechat_fuse.text.chat import ConversationEncoder, Encoded
from fusechat_fuse.text.conversations import Conversation, read_conversations
from fusechat_fuse.text.messages import Unusable
from fusechat_fuse.text.templates import check_template, resolve_template

_READING = ("split", "limit", "shuffle_seed", "messages_column", "strict")
_DECISIVE = ("data_path", *_READING, "pivot_name_or_path", "template", "max_length", "top_k")


@dataclass(frozen=True)
class Encodings:
    """Of the conversations that were encoded, int64 [n] each: their tokens, predicted tokens, and bytes of their rows
    in the plain encoding. scale: conversations of the data set for each that was tried."""

    scale: float
    lengths: np.ndarray
    predicted: np.ndarray
    row_bytes: np.ndarray

    @property
    def conversations(self) -> int:
        """Of the whole data set, without those that are left out."""
        return round(len(self.lengths) * self.scale)

    def total(self, counts: np.ndarray) -> int:
        """A sum over the whole data set."""
        return round(float(counts.sum()) * self.scale)


@dataclass
class DataReader:
    """Reads each data set once and encodes it once for each tokenizer, template and length.

    Args:
        sample: conversations encoded of a data set, at even distances.
    Attributes: warnings: sentences about what will be left out or cut. exact: whether everything was encoded.
    """

    sample: int
    warnings: list[str] = field(default_factory=list)
    exact: bool = True
    _read: dict[tuple, list[Conversation]] = field(default_factory=dict)
    _encoded: dict[tuple, Encodings] = field(default_factory=dict)

    def encodings(self, name: str, model: str, options: dict[str, Any]) -> Encodings:
        """What a model sees of the data of a represent step.

        Args:
            name: of the step, for what is said. options: all of `represent`.
        Raises: InputError where the data, the tokenizer or the template will be refused.
        """
        key = (model, *(str(options[name]) for name in _DECISIVE))
        if key not in self._encoded:
            self._encoded[key] = self._encode(name, model, options)
        return self._encoded[key]

    def _conversations(self, options: dict[str, Any]) -> list[Conversation]:
        reading = {name: options[name] for name in _READING}
        key = (*options["data_path"], *reading.values())
        if key not in self._read:
            self._read[key] = read_conversations(options["data_path"], **reading)[0]
        return self._read[key]

    def _encode(self, name: str, model: str, options: dict[str, Any]) -> Encodings:
        trust, pivot = options["trust_remote_code"], options["pivot_name_or_path"]
        tokenizer = load_fast_tokenizer(model, trust)
        template = resolve_template(options["template"], tokenizer, pivot and load_fast_tokenizer(pivot, trust))
        asked = options["max_length"]
        max_length = min(asked, positions_of(load_config(model, trust_remote_code=trust)) or asked)
        encoder = ConversationEncoder(tokenizer, template, max_length)
        found = self._conversations(options)
        tried = np.unique(np.linspace(0, len(found) - 1, min(self.sample, len(found))).astype(int))
        counts, cut, refused = [], 0, []
        for n in tried:
            try:
                one = encoder.encode(found[n].messages)
            except Unusable as problem:
                refused.append({"reason": problem.reason, "detail": str(problem)})
                continue
            counts.append((len(one.input_ids), len(one.predicted), _row_bytes(one, options["top_k"])))
            cut += one.truncated
        check_template(refused, len(tried))
        self._warn(name, refused, len(tried))
        if not counts:
            raise InputError(f"data for {name}: expected conversations that can be encoded, got none. See above.")
        if cut:
            self.warnings.append(f"{name}: {cut} of {len(tried)} conversations are cut at {max_length} tokens.")
        self.exact &= len(tried) == len(found)
        return Encodings(len(found) / len(tried), *np.array(counts, np.int64).T)

    def _warn(self, name: str, refused: list[dict[str, str]], tried: int) -> None:
        first = {entry["reason"]: entry["detail"] for entry in reversed(refused)}
        for reason, count in Counter(entry["reason"] for entry in refused).items():
            self.warnings.append(f"{name}: {count} of {tried} conversations are left out, {reason}: {first[reason]}")


def _row_bytes(one: Encoded, top_k: int) -> int:
    """Of its row in the plain encoding, which depend on shapes alone."""
    P = len(one.predicted)
    table = {"topk_ids": np.zeros((P, top_k), np.int32), "topk_logprobs": np.zeros((P, top_k), np.float16)}
    fields = {key: getattr(one, key) for key in ("input_ids", "predicted", "message", "start", "end")}
    row = encode_row({"id": "", "ce": np.zeros(P, np.float32), **table, **fields})
    return sum(len(value) for value in row.values() if isinstance(value, bytes))
