"""The bytes of a text that each token covers, found by adding up token bytes and checked against the text.

The offsets that tokenizers report are not used: they overlap where a character is split over several tokens and have
holes where a normalizer changed the text. WordPiece-like tokenizers, which lose blanks, are refused at the first blank.
"""

from __future__ import annotations

import unicodedata
from itertools import pairwise

import numpy as np

from fusechat_fuse.errors import InputError
from fusechat_fuse.text.tokens import MARK, TokenTable, token_table


def token_spans(tokenizer, text: str, ids) -> tuple[np.ndarray, np.ndarray]:
    """The span of each token in the text, found by adding up token bytes: text[start_i:end_i] is token i.

    A '▁' that the tokenizer inserts before a stretch of text has no bytes; a literal '▁' in the text has three,
    although its token reads as a blank. Special tokens span their own content; one that is not in the text (a BOS added
    by the tokenizer) has an empty span. Blanks that an added token swallows belong to no span.

    Args:
        tokenizer: transformers fast tokenizer or `tokenizers.Tokenizer`; borrowed.
        text: the text that was tokenized.
        ids: [n] token ids of the whole text.

    Returns:
        start, end: int32 [n], in UTF-8 bytes of the text, both non-decreasing.

    Raises:
        InputError: the bytes of the tokens are not those of the text; says where and why (lower-casing, NFKC, text
            that is not NFC, unknown characters).
    """
    return _Text(token_table(tokenizer), text).spans(np.asarray(ids, np.int64).tolist())


class _Text:
    """A text that the tokens of one tokenizer must spell, byte by byte."""

    def __init__(self, table: TokenTable, text: str):
        self.table, self.text, self.raw = table, text, text.encode()

    def spans(self, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        added = self.table.added
        lengths, gaps = np.zeros(len(ids), np.int64), np.zeros(len(ids) + 1, np.int64)
        cuts = [] if added.keys().isdisjoint(ids) else [k for k, i in enumerate(ids) if i in added]
        position = 0
        for before, cut in pairwise([-1, *cuts, len(ids)]):
            if before >= 0 and added[ids[before]][1] and lengths[before]:  # swallows the blanks after it
                gaps[before + 1] = _blanks(self.raw, position)
                position += int(gaps[before + 1])
            if before + 1 < cut:
                stretch = self._stretch(position, ids[before + 1 : cut])
                if stretch is None:
                    raise InputError(self._why_not(position, ids[before + 1 : cut]))
                lengths[before + 1 : cut] = stretch
                position += sum(stretch)
            if cut < len(ids):
                blanks, lengths[cut] = self._added_token(position, ids[cut])
                gaps[cut] += blanks
                position += int(blanks + lengths[cut])
        if position < len(self.raw):
            raise InputError(self._why_not(position, []))
        ends = np.cumsum(lengths + gaps[:-1])
        return (ends - lengths).astype(np.int32), ends.astype(np.int32)

    def _added_token(self, position: int, i: int) -> tuple[int, int]:
        """(blanks it swallows before it, its length) for the added token i; (0, 0) if it is not in the text."""
        blanks = _blanks(self.raw, position) if self.table.added[i][0] else 0
        if self.raw.startswith(self.table.own[i], position + blanks):
            return blanks, len(self.table.own[i])
        if i in self.table.special and i != self.table.unk_id:
            return 0, 0
        reading = self._stretch(position, [i])
        if reading is None:
            raise InputError(self._why_not(position, [i]))
        return 0, reading[0]

    def _stretch(self, position: int, ids: list[int]) -> list[int] | None:
        """Byte lengths of a run of ordinary tokens that must spell raw[position:...], or None."""
        pipeline, own = self.table.pipeline, list(map(self.table.own.__getitem__, ids))
        readings = [own]
        if pipeline.insert and own[0].startswith(b" "):
            dropped = [own[0][1:], *own[1:]]
            blank = self.raw.startswith((b" ", MARK.encode()), position)
            preferred = pipeline.insert == "always" or not blank
            readings = [dropped, own] if preferred else [own, dropped]
        for reading in readings:
            if self.raw.startswith(b"".join(reading), position):
                return list(map(len, reading))
        if pipeline.family == "metaspace" and MARK.encode() in self.raw:
            for reading in readings:
                if (lengths := _literal_marks(self.raw, position, reading)) is not None:
                    return lengths
        return None

    def _why_not(self, position: int, ids: list[int]) -> str:
        """One sentence: the first bytes of the text that the tokens do not spell, and the likeliest reason."""
        got = "nothing"
        for i in ids:  # find the token that fails
            got = self.table.own[i].decode(errors="replace")
            if (lengths := self._stretch(position, [i])) is None:
                break
            position += lengths[0]
        shown = self.raw[position : position + 16].decode(errors="replace")
        return (
            f"token bytes for the text at byte {position}: expected {shown!r}, got {got!r} ({self._reason(ids)}). "
            "Normalize or leave out this text, or use a tokenizer that keeps every byte."
        )

    def _reason(self, ids: list[int]) -> str:
        table = self.table
        if table.unk_id is not None and table.unk_id in ids:
            return "the tokenizer has no token for a character of it"
        if table.normalizer is None or (normal := table.normalizer.normalize_str(self.text)) == self.text:
            return "the tokenizer does not keep every byte"
        if unicodedata.normalize("NFC", self.text) == normal:
            return "it is not in Unicode's NFC form, to which the tokenizer normalizes"
        if normal.lower() == normal and self.text.lower() != self.text:
            return "the tokenizer lower-cases it"
        return "the tokenizer's normalizer changes it"


def _blanks(raw: bytes, position: int) -> int:
    """The number of bytes of white space at a position."""
    rest = raw[position:].decode(errors="replace")
    return len(rest[: len(rest) - len(rest.lstrip())].encode())


def _literal_marks(raw: bytes, position: int, pieces: list[bytes]) -> list[int] | None:
    """Lengths where a piece's blank may also stand for a literal '▁' (three bytes) in the text."""
    mark, lengths = MARK.encode(), []
    for piece in pieces:
        at = position
        for k in range(len(piece)):
            if raw[at : at + 1] == piece[k : k + 1]:
                at += 1
            elif piece[k : k + 1] == b" " and raw.startswith(mark, at):
                at += len(mark)
            else:
                return None
        lengths.append(at - position)
        position = at
    return lengths
