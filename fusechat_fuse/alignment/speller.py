"""Spells bytes as pivot tokens in mid-text, by a copy of the pivot's tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from fusechat_fuse.text.tokens import CHARACTER_OF_BYTE, MARK, backend_of, component, token_table


class Speller:
    """Spells bytes as pivot tokens in mid-text.

    Works on a copy of the pivot tokenizer without normalizer, prefix, post-processor and special added tokens, so
    ' the' gives [▁the] and 'the' [the]. Leading continuation bytes of a cut character are spelled byte by byte. An
    unfinished character at the end: a byte-level pivot runs its merges on the raw bytes; the path of another pivot
    stops before it.
    """

    def __init__(self, tokenizer):
        table = token_table(tokenizer)
        self.bytes, self.pipeline = table.bytes, table.pipeline
        self.is_byte_piece = [bool(re.fullmatch("<0x..>", piece or "")) for piece in table.pieces]
        self.unk_id = table.unk_id
        self._copy, self._merges_only, self._replaces_blanks = _stripped(tokenizer)
        self._byte_ids = {}
        for i, piece in enumerate(self.bytes):
            if piece is not None and len(piece) == 1 and (piece[0] not in self._byte_ids or self.is_byte_piece[i]):
                self._byte_ids[piece[0]] = i

    def paths(self, pieces: Sequence[bytes]) -> list[list[int]]:
        """The path of pivot ids of each byte string; shorter than the bytes where the pivot cannot spell the rest."""
        split = [_split_utf8(piece) for piece in pieces]
        bodies = [self._text(body) for _, body, tail in split if not (tail and self._merges_only)]
        encoded = iter(self._copy.encode_batch(bodies, add_special_tokens=False))
        paths = []
        for piece, (lead, body, tail) in zip(pieces, split):
            path = [self._byte_ids.get(byte, -1) for byte in lead]
            if tail and self._merges_only:
                spelled = "".join(CHARACTER_OF_BYTE[byte] for byte in body + tail)
                path += self._merges_only.encode(spelled, add_special_tokens=False).ids
            else:
                path += next(encoded).ids
            paths.append(self._longest_valid_prefix(piece, path))
        return paths

    def _text(self, body: bytes) -> str:
        text = body.decode()
        return text.replace(" ", MARK) if self._replaces_blanks else text

    def _longest_valid_prefix(self, piece: bytes, path: list[int]) -> list[int]:
        """The path before the first id that does not spell the next bytes (unknown token, no token for a byte)."""
        at, mark = 0, MARK.encode()
        for n, i in enumerate(path):
            own = self.bytes[i] if i >= 0 else None
            if own is None:
                return path[:n]
            if not piece.startswith(own, at):
                rest = piece[at:].replace(mark, b" ")
                if mark not in piece or not rest.startswith(own):
                    return path[:n]
                at += len(own) + 2 * own.count(b" ")
                continue
            at += len(own)
        return path


def _split_utf8(piece: bytes) -> tuple[bytes, bytes, bytes]:
    """(leading continuation bytes, valid UTF-8, what follows the first byte that is not valid)."""
    lead = 0
    while lead < len(piece) and 0x80 <= piece[lead] < 0xC0:
        lead += 1
    try:
        piece[lead:].decode()
        return piece[:lead], piece[lead:], b""
    except UnicodeDecodeError as error:
        return piece[:lead], piece[lead : lead + error.start], piece[lead + error.start :]


def _stripped(tokenizer):
    """(copy that reads mid-text, copy that only merges raw bytes or None, whether blanks must be given as '▁')."""
    from tokenizers import Tokenizer

    backend, table = backend_of(tokenizer), token_table(tokenizer)
    ordinary = backend.get_vocab(with_added_tokens=False)
    kept = [t for _, t in sorted(backend.get_added_tokens_decoder().items()) if not t.special]
    if all(token.content in ordinary for token in kept):
        copy = Tokenizer(backend.model)  # shares the model; nothing below changes it
        copy.add_tokens(kept)
    else:
        data = json.loads(backend.to_str())
        data["added_tokens"] = [token for token in data["added_tokens"] if not token["special"]]
        copy = Tokenizer.from_str(json.dumps(data | {"normalizer": None, "post_processor": None}))
        copy.no_padding()
        copy.no_truncation()
    before = component(backend.pre_tokenizer)
    if before:
        copy.pre_tokenizer = _pre_tokenizer(_without_prefix(before))
    merges_only = None
    if table.pipeline.family == "byte_level":
        merges_only = Tokenizer(backend.model)
    replaces = table.pipeline.family == "metaspace" and "Metaspace" not in json.dumps(before)
    return copy, merges_only, replaces


def _pre_tokenizer(described: dict):
    """The pre-tokenizer a tokenizer.json would describe so."""
    from tokenizers import Tokenizer, models

    shell = json.loads(Tokenizer(models.BPE()).to_str()) | {"pre_tokenizer": described}
    return Tokenizer.from_str(json.dumps(shell)).pre_tokenizer


def _without_prefix(node: dict) -> dict:
    """A pre-tokenizer that puts nothing before its text."""
    if "pretokenizers" in node:
        return node | {"pretokenizers": [_without_prefix(child) for child in node["pretokenizers"]]}
    if node["type"] == "Metaspace":
        return node | {"prepend_scheme": "never"}
    if node["type"] == "ByteLevel":
        return node | {"add_prefix_space": False}
    return node
