"""One side of a tokenizer pair: what alignment needs of the pivot's or the source's tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusechat_fuse.alignment.correspondence import joined_bytes
from fusechat_fuse.errors import InputError
from fusechat_fuse.store.shards import Representation
from fusechat_fuse.text.tokens import token_table


@dataclass
class Side:
    """One tokenizer as alignment sees it: bytes by id (None for special tokens), padded to the embedding's size."""

    path: Path
    bytes: list
    pieces: list
    sha256: str
    end_of_turn: int | None
    bos: int | None
    lengths: np.ndarray  # [V] bytes of each id, 0 for special tokens
    first_byte: np.ndarray  # [V] -1 for special tokens
    last_byte: np.ndarray  # [V]
    joined: np.ndarray  # bool [256, 256]

    @classmethod
    def of(cls, representation: Representation, tokenizer) -> Side:
        about, table = representation.manifest["tokenizer"], token_table(tokenizer)
        end_of_turn, bos = about.get("end_of_turn_id"), about.get("bos_id")
        size = max(len(table.bytes), int(representation.manifest.get("model", {}).get("vocab_size") or 0))
        spelled = table.bytes + [None] * (size - len(table.bytes))
        for name, role in {"end_of_turn_id": end_of_turn, "bos_id": bos}.items():
            if role is not None and not 0 <= role < size:
                raise InputError(
                    f"{name} for {representation.path}: expected an id below {size}, got {role}. Represent the model "
                    "again."
                )
            if role is not None:
                spelled[role] = None
        pad = lambda pick: np.array([pick(piece) if piece else -1 for piece in spelled], np.int64)  # noqa: E731
        return cls(
            path=representation.path,
            bytes=spelled,
            pieces=table.pieces + [None] * (size - len(table.pieces)),
            sha256=about["sha256"],
            end_of_turn=end_of_turn,
            bos=bos,
            lengths=np.maximum(pad(len), 0),
            first_byte=pad(lambda piece: piece[0]),
            last_byte=pad(lambda piece: piece[-1]),
            joined=joined_bytes(spelled),
        )

    def check(self, row: dict) -> None:
        """Raise InputError for a row with an id beyond the vocabulary, or with a figure that is not a number."""
        for name in ("input_ids", "topk_ids"):
            low, high = row[name].min(initial=0), row[name].max(initial=0)
            if high >= len(self.bytes) or low < (-1 if name == "topk_ids" else 0):
                raise InputError(
                    f"{name} of conversation {row['id']!r} for {self.path}: expected ids below {len(self.bytes)}, got "
                    f"{high if low >= 0 else low}. Represent the model again."
                )
        for name in ("ce", "topk_logprobs"):
            if not np.isfinite(row[name]).all():
                raise InputError(
                    f"{name} of conversation {row['id']!r} for {self.path}: expected finite numbers, got NaN or "
                    "infinity. Represent the model again."
                )
