"""The bytes that each token of a vocabulary stands for, and whether two tokenizers have the same vocabulary.

Tokenizers spell their tokens differently: 'Ġthe', '▁the' and ' the' are the same bytes. Alignment works on bytes:
`token_table` reads a whole vocabulary, `token_spans` (`spans.py`) adds up the bytes of a tokenized text.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import lru_cache

from fusechat_fuse.errors import InputError

MARK = "▁"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level tokenizers (printable Latin-1 stands for itself)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(hidden)}


BYTE_OF_CHARACTER = _byte_alphabet()
CHARACTER_OF_BYTE = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}
_TO_LATIN_1 = {byte: "\uffff" for byte in range(256)} | {ord(c): chr(byte) for c, byte in BYTE_OF_CHARACTER.items()}


def backend_of(tokenizer):
    """The `tokenizers.Tokenizer` inside a transformers fast tokenizer (or the argument, if it is one already)."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "get_added_tokens_decoder"):
        raise InputError(
            f"token bytes for {type(tokenizer).__name__}: expected a fast tokenizer (with a tokenizer.json), got one "
            "without a `tokenizers` backend. Convert it with transformers' AutoTokenizer and save it again."
        )
    return backend


def component(part) -> dict:
    """A model, normalizer, pre-tokenizer or decoder as the dictionary that tokenizer.json holds ({} for None)."""
    return {} if part is None else json.loads(part.__getstate__())


def _steps(node: dict) -> list[dict]:
    """The components of a possibly nested sequence, in order."""
    for key in ("normalizers", "pretokenizers", "decoders"):
        if key in node:
            return [leaf for child in node[key] for leaf in _steps(child)]
    return [node] if node else []


def _insertion(normalizers: list[dict], pre: list[dict]) -> str | None:
    """When a '▁' is inserted before a stretch of text (see `Pipeline.insert`)."""
    if any(step["type"] == "Prepend" and step["prepend"] == MARK for step in normalizers):
        return "always"
    metaspace = next((step for step in pre if step["type"] == "Metaspace"), None)
    inserts = metaspace is not None and metaspace.get("prepend_scheme", "always") != "never"
    if inserts or any(step["type"] == "ByteLevel" and step.get("add_prefix_space") for step in pre):
        return "unless_blank"
    return None


def _unknown_piece(model) -> str | None:
    """The unknown token of a tokenizer's model, if it has one."""
    if type(model).__name__ != "Unigram":
        return getattr(model, "unk_token", None)
    state = component(model)
    return None if state.get("unk_id") is None else state["vocab"][state["unk_id"]][0]


@dataclass(frozen=True)
class Pipeline:
    """The parts of a tokenizer's pipeline that decide which bytes its tokens stand for.

    `family` is 'byte_level', 'metaspace' ('▁' is a blank) or 'plain'. `insert` says when a '▁' that stands for no byte
    is inserted before a stretch of text: 'always' (normalizer Prepend), 'unless_blank' (Metaspace), or None.
    """

    family: str
    byte_fallback: bool
    insert: str | None
    continuing_prefix: str
    unk: str | None

    @classmethod
    def of(cls, tokenizer) -> Pipeline:
        backend = backend_of(tokenizer)
        normalizers, pre, decoders = (
            _steps(component(part)) for part in (backend.normalizer, backend.pre_tokenizer, backend.decoder)
        )
        kinds = {step["type"] for step in (*normalizers, *pre, *decoders)}
        replaced = [json.dumps(s, ensure_ascii=False) for s in (*normalizers, *decoders) if s["type"] == "Replace"]
        marked = {"Metaspace", "Prepend"} & kinds or any(MARK in step for step in replaced)
        return cls(
            family="byte_level" if "ByteLevel" in kinds else "metaspace" if marked else "plain",
            byte_fallback="ByteFallback" in kinds or bool(getattr(backend.model, "byte_fallback", False)),
            insert=_insertion(normalizers, pre),
            continuing_prefix=getattr(backend.model, "continuing_subword_prefix", None) or "",
            unk=_unknown_piece(backend.model),
        )

    def piece_bytes(self, piece: str) -> bytes:
        """The bytes one vocabulary entry stands for in mid-text."""
        if self.family == "byte_level":
            try:
                return piece.translate(_TO_LATIN_1).encode("latin-1")
            except UnicodeEncodeError:  # a character that stands for itself
                return b"".join(
                    bytes([BYTE_OF_CHARACTER[c]]) if c in BYTE_OF_CHARACTER else c.encode("utf-8", "replace")
                    for c in piece
                )
        if self.byte_fallback and (match := _BYTE_PIECE.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        if self.family == "metaspace":
            piece = piece.replace(MARK, " ")
        elif self.continuing_prefix:
            piece = piece.removeprefix(self.continuing_prefix)
        return piece.encode("utf-8", "replace")


class TokenTable:
    """Bytes and roles of every id of one tokenizer; `token_table` builds it once.

    Lists by id: `pieces`, the vocabulary entries (None: no token has the id); `bytes` that each stands for in mid-text
    (None also for special tokens and the unknown one): 'Ġthe' and '▁the' are b' the', '<0x0A>' is b'\\n'; `own`, like
    bytes but with the content of special tokens. `special`: the special ids. `added`: id -> whether the added token
    swallows the blanks to its left and right.
    """

    def __init__(self, tokenizer):
        backend = backend_of(tokenizer)
        self.pipeline = Pipeline.of(tokenizer)
        self.normalizer = backend.normalizer
        vocabulary = backend.get_vocab(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        size = max([len(vocabulary), *(i + 1 for i in vocabulary.values())]) if vocabulary else 0
        special = {i for i, token in added.items() if token.special} | set(getattr(tokenizer, "all_special_ids", ()))
        self.unk_id = vocabulary.get(self.pipeline.unk)
        self.pieces: list[str | None] = [None] * size
        self.bytes: list[bytes | None] = [None] * size
        self.own: list[bytes] = [b""] * size
        ordinary = backend.get_vocab(with_added_tokens=False)
        for piece, i in vocabulary.items():
            as_piece = i not in added or (piece in ordinary and not added[i].special)
            self.pieces[i] = piece
            self.own[i] = self.pipeline.piece_bytes(piece) if as_piece else piece.encode()
            if i not in special and i != self.unk_id:
                self.bytes[i] = self.own[i]
        self.special = frozenset(special)
        self.added = {i: (token.lstrip, token.rstrip) for i, token in added.items()}


@lru_cache(maxsize=8)
def _table(tokenizer, size: int) -> TokenTable:
    return TokenTable(tokenizer)


def token_table(tokenizer) -> TokenTable:
    """The `TokenTable` of a tokenizer, built once per object (the last eight are cached)."""
    return _table(tokenizer, backend_of(tokenizer).get_vocab_size())


def tokenizer_hash(tokenizer) -> str:
    """SHA-256 of all that decides a tokenizer's ids: vocabulary, merges, normalizer, pre-tokenizer, added tokens.

    Chat template, decoder, post-processor, padding and the formatting of files do not matter.

    Args:
        tokenizer: transformers fast tokenizer or `tokenizers.Tokenizer`; borrowed.

    Returns:
        64 hexadecimal digits.
    """
    backend = backend_of(tokenizer)
    definition = {name: component(getattr(backend, name)) for name in ("model", "normalizer", "pre_tokenizer")}
    if merges := definition["model"].get("merges"):
        definition["model"]["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    definition["added_tokens"] = {
        i: [token.content, token.normalized, token.lstrip, token.rstrip, token.single_word]
        for i, token in backend.get_added_tokens_decoder().items()
    }
    described = json.dumps(definition, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(described.encode()).hexdigest()


def same_vocabulary(a, b) -> bool:
    """Whether two tokenizers give the same ids to the same ordinary tokens (special tokens may differ).

    So Mistral, Mixtral, SOLAR, Starling and OpenChat have one vocabulary. Ids beyond it (padded embeddings, further
    special tokens) make no difference, nor does an ordinary token of one that is special in the other.

    Args:
        a, b: transformers fast tokenizers or `tokenizers.Tokenizer`; borrowed.

    Returns:
        True if every id that is an ordinary token of both has the same bytes, and none is ordinary in only one.

    Source: `docs/method.md`, "Same vocabulary".
    """
    ta, tb = token_table(a), token_table(b)
    if ta.pipeline.family != tb.pipeline.family:
        return False

    def has_all(x: TokenTable, y: TokenTable) -> bool:
        """Whether x has the ordinary tokens of y, by the same ids."""
        ordinary = [i for i, spelt in enumerate(y.bytes) if spelt is not None]
        return all(i < len(x.pieces) and x.pieces[i] == y.pieces[i] for i in ordinary)

    return any(spelt is not None for spelt in ta.bytes) and has_all(ta, tb) and has_all(tb, ta)
