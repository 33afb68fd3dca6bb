"""Messages to token ids, with the predicted tokens and where each lies in its message.

A chat template is asked twice. Once with probe contents, per sequence of roles: that shows the text the template puts
around each content, whether it trims contents, and whether the beginning of a conversation reads the same once it goes
on. And once with the real contents: the result must be exactly the probed pieces with the contents between them, else
the conversation is refused. So every content's place is known by construction, whatever the text says, and no piece is
ever tokenized alone: the whole text is, once, by the tokenizer as it is.

A template of another family (`template="pivot"`) is rendered as its own tokenizer would; then, in the pieces around the
contents only, its BOS and end of turn are replaced by the model's own. A content that holds the text of one of the
model's special tokens is refused: it must not become one.

Refusals (`Unusable`, counted by name): `special_token`, `template` (it raises, changes, drops or moves a content),
`bytes` (the tokens do not give the text back), `too_long` (nothing predicted within max_length).
"""

from __future__ import annotations

import hashlib
import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fusechat_fuse.conversations import Unusable
from fusechat_fuse.errors import InputError
from fusechat_fuse.templates import BUILT_IN, family_of
from fusechat_fuse.tokens import token_spans

logger = logging.getLogger(__name__)
_DATE = "26 Jul 2024"  # what Llama-3.1's template prints by default; templates must not depend on the day


def load_fast_tokenizer(name_or_path, trust_remote_code: bool = False):
    """A tokenizer whose ids are those of its own tokenizer.json.

    transformers 5 rebuilds some classes' pipelines (a LlamaTokenizer gets a Metaspace pre-tokenizer, which changes the
    ids of white space), so tokenizer.json is loaded as it is wherever there is one.

    Args:
        name_or_path: directory, Hub name, or a transformers fast tokenizer (returned as it is).
        trust_remote_code: run the repository's own tokenizer code where it has no tokenizer.json.
    Returns: a transformers fast tokenizer.
    Raises: InputError where there is no tokenizer or none of the fast kind.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not isinstance(name_or_path, (str, Path)):
        return _must_be_fast(name_or_path, type(name_or_path).__name__)
    folder = Path(name_or_path)
    if folder.is_file() or (folder.is_absolute() and not folder.is_dir()):
        raise InputError(f"tokenizer for {folder}: expected a model directory, got none there. Check the path.")
    if folder.is_dir() and not [*folder.glob("*tokenizer*"), *folder.glob("*.tiktoken"), *folder.glob("tekken.json")]:
        raise InputError(f"tokenizer for {folder}: expected tokenizer.json in it, got no tokenizer. Copy one there.")
    if not folder.is_dir() or (folder / "tokenizer.json").exists():
        try:
            return _must_be_fast(PreTrainedTokenizerFast.from_pretrained(str(name_or_path)), name_or_path)
        except Exception as error:
            if folder.is_dir():
                raise InputError(
                    f"tokenizer for {folder}: expected a readable tokenizer.json, got {_first_line(error)}."
                ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name_or_path), trust_remote_code=trust_remote_code)
    except Exception as error:
        raise InputError(
            f"tokenizer for {name_or_path}: expected a model directory or Hub name with a tokenizer, got "
            f"{_first_line(error)}. Check the name."
        ) from error
    tokenizer = _must_be_fast(tokenizer, name_or_path)
    logger.warning(
        "%s has no tokenizer.json: transformers rebuilt the tokenizer from its vocabulary file, and ids of white space "
        "may differ from the original's. Put the original tokenizer.json beside it.",
        name_or_path,
    )
    return tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")


def _must_be_fast(tokenizer, name):
    if not hasattr(getattr(tokenizer, "backend_tokenizer", None), "encode"):
        raise InputError(
            f"tokenizer for {name}: expected a fast tokenizer (tokenizer.json), got {type(tokenizer).__name__} without "
            "a tokenizers backend. Save one with tokenizer.json and give that directory."
        )
    return tokenizer


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template with what its own family puts into it.

    `bos` and `end_of_turn` are the texts it renders ("" for no BOS), `variables` the special tokens it may name.
    """

    name: str
    source: str
    bos: str
    end_of_turn: str
    variables: tuple[tuple[str, str], ...]

    @property
    def sha256(self) -> str:
        """Over everything that decides what it renders."""
        return hashlib.sha256(repr((self.source, self.bos, self.end_of_turn, self.variables)).encode()).hexdigest()

    def render(self, messages: list[dict[str, str]]) -> str:
        """The conversation as text. Raises: Unusable where the template refuses it."""
        return _render(self.source, dict(self.variables), messages)


def _render(source: str, variables: dict, messages: list[dict[str, str]]) -> str:
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, _ = render_jinja_template(
            conversations=[messages], chat_template=source, date_string=_DATE, add_generation_prompt=False, **variables
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
        raise Unusable("template", f"the chat template refuses the conversation ({_first_line(error)})") from error
    return texts[0]


def _variables(tokenizer) -> dict[str, str]:
    return {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}


def special_texts(tokenizer) -> dict[str, int]:
    """Text -> id of every special token of a tokenizer."""
    added = tokenizer.added_tokens_decoder
    named = set(tokenizer.all_special_ids)
    return {token.content: i for i, token in added.items() if token.special or i in named}


def _added_texts(tokenizer) -> dict[str, int]:
    return {token.content: i for i, token in tokenizer.added_tokens_decoder.items()} | special_texts(tokenizer)


def _first_of(texts, text: str) -> str | None:
    """The leftmost, then longest, of `texts` in `text`."""
    pattern = "|".join(re.escape(t) for t in sorted(texts, key=len, reverse=True))
    match = re.search(pattern, text) if pattern else None
    return match[0] if match else None


_PROBE = [{"role": "user", "content": "QZ0ZQ"}, {"role": "assistant", "content": "QZ1ZQ"}]


def _own(name: str, source: str, tokenizer) -> ChatTemplate:
    """A template with the BOS and end of turn that it renders with this tokenizer's special tokens."""
    variables = _variables(tokenizer)
    text = _render(source, variables, _PROBE)
    head, _, tail = text.partition("QZ1ZQ")
    end_of_turn = _first_of(_added_texts(tokenizer), tail) or ""
    bos = variables.get("bos_token", "")
    bos = bos if bos and head.startswith(bos) else ""
    return ChatTemplate(name, source, bos, end_of_turn, tuple(sorted(variables.items())))


def _built_in(name: str) -> ChatTemplate:
    family = BUILT_IN[name]
    return ChatTemplate(name, family.source, family.bos, family.end_of_turn, (("bos_token", family.bos),))


def native_template(tokenizer, name: str = "the model") -> ChatTemplate:
    """The tokenizer's own chat template, or the built-in one of its family where it has none.

    Args:
        tokenizer: transformers fast tokenizer. name: for the error text.
    Raises: InputError where it has no template and its family cannot be told from its special tokens.
    """
    if tokenizer.chat_template:
        return _own("native", tokenizer.get_chat_template(), tokenizer)
    family = family_of(set(_added_texts(tokenizer)))
    if family is None:
        names = ", ".join(BUILT_IN)
        raise InputError(
            f"chat template for {name}: expected one in its tokenizer, got none and no special tokens of a known "
            f"family. Give template one of {names}, or a .jinja file."
        )
    return _built_in(family)


def resolve_template(template: str, tokenizer, pivot_tokenizer=None) -> ChatTemplate:
    """The template meant by the option `template`.

    Args:
        template: pivot (the pivot's own), native (the model's own), a built-in name, or the path of a Jinja file.
        tokenizer: the model's. pivot_tokenizer: the pivot's; None means that the model is the pivot.
    Returns: ChatTemplate; BOS and end of turn are still those of its own family (`ConversationEncoder` puts the model's
        in their place).
    Raises: InputError for an unknown name, an unreadable file, or a tokenizer without a template.
    """
    if template in ("native", "pivot"):
        if template == "native" or pivot_tokenizer is None:
            return replace(native_template(tokenizer, _name(tokenizer, "the model")), name=template)
        return replace(native_template(pivot_tokenizer, _name(pivot_tokenizer, "the pivot")), name=template)
    if template in BUILT_IN:
        return _built_in(template)
    path = Path(template)
    if not path.is_file():
        names = ", ".join(["pivot", "native", *BUILT_IN])
        raise InputError(f"chat template for {template!r}: expected one of {names} or a .jinja file, got neither.")
    try:
        return _own(path.name, path.read_text(encoding="utf-8"), tokenizer)
    except (UnicodeDecodeError, Unusable) as error:
        raise InputError(f"chat template for {path}: expected a Jinja chat template, got {error}. Mend it.") from error


def _name(tokenizer, otherwise: str) -> str:
    return getattr(tokenizer, "name_or_path", "") or otherwise


def end_of_turn_of(tokenizer) -> str:
    """The text of a tokenizer's own end-of-turn token: what its template puts after an answer, else its EOS.

    Raises: InputError where it has neither.
    """
    try:
        text = native_template(tokenizer).end_of_turn
    except InputError:
        text = ""
    text = text if text in _added_texts(tokenizer) else tokenizer.eos_token
    if not text:
        raise InputError("end of turn for the tokenizer: expected an EOS token, got none. Set tokenizer.eos_token.")
    return text


def bos_of(tokenizer) -> str:
    """The text of the BOS a tokenizer begins a conversation with, "" where it uses none: a token that its template or
    its post-processor puts first."""
    bos = tokenizer.bos_token
    if not bos:
        return ""
    if list(tokenizer("a").input_ids[:1]) == [tokenizer.bos_token_id]:
        return bos
    try:
        return bos if native_template(tokenizer).bos == bos else ""
    except InputError:
        return ""


@dataclass(frozen=True)
class Encoded:
    """One conversation as ids. T tokens, P predicted ones.

    input_ids int32 [T]; predicted int32 [P], indices into it, ascending and > 0; message int16 [P]; start, end int32
    [P], UTF-8 bytes of that message's content, the end of turn at len(content), len(content) + 1; truncated: whether
    max_length cut tokens off.
    """

    input_ids: np.ndarray
    predicted: np.ndarray
    message: np.ndarray
    start: np.ndarray
    end: np.ndarray
    truncated: bool


@dataclass(frozen=True)
class _Shape:
    """What a template does with one sequence of roles: `pieces[n]` stands before the n-th content in the text, the last
    piece at the end; `order` says whose content that is; `trims` which sides of it are trimmed (left, right)."""

    pieces: tuple[str, ...]
    order: tuple[int, ...]
    trims: tuple[tuple[bool, bool], ...]


class ConversationEncoder:
    """Turns conversations into ids by one template and one tokenizer.

    Args:
        tokenizer: transformers fast tokenizer; borrowed.
        template: ChatTemplate, or the name that `resolve_template` takes.
        max_length: tokens kept from the beginning.
    """

    def __init__(self, tokenizer, template: ChatTemplate | str = "native", max_length: int = 2048):
        self.tokenizer = tokenizer
        self.template = template if isinstance(template, ChatTemplate) else resolve_template(template, tokenizer)
        self.max_length = max_length
        self.special = special_texts(tokenizer)
        added = _added_texts(tokenizer)
        self.bos, self.end_of_turn = self.template.bos, self.template.end_of_turn
        if not self._is_own():
            self.bos, self.end_of_turn = bos_of(tokenizer), end_of_turn_of(tokenizer)
        self.end_of_turn_id = added.get(self.end_of_turn, -1)  # -1: no template of this name works, every probe says so
        reserved = {*self.special, self.end_of_turn, self.bos} - {""}
        self._reserved = re.compile("|".join(re.escape(t) for t in sorted(reserved, key=len, reverse=True)))
        self._special_ids = np.array(sorted({*self.special.values(), self.end_of_turn_id}))
        self._shapes: dict[tuple[str, ...], _Shape | Unusable] = {}

    def _is_own(self) -> bool:
        """Whether the template already renders this tokenizer's BOS and end of turn."""
        if self.template.variables == tuple(sorted(_variables(self.tokenizer).items())):
            return self.template.end_of_turn in (*_added_texts(self.tokenizer), "")
        try:
            native = native_template(self.tokenizer)
        except InputError:
            return False
        return self.template.sha256 == native.sha256

    def encode(self, messages: list[dict[str, str]]) -> Encoded:
        """Ids, predicted tokens and byte spans of one conversation.

        Args:
            messages: {role, content} each, as `read_conversations` leaves them; borrowed.
        Raises: Unusable naming the rule and the message.
        """
        for n, message in enumerate(messages):
            if found := self._reserved.search(message["content"]):
                raise Unusable("special_token", f"message {n} holds the text of the special token {found[0]!r}")
        shape = self._shape(tuple(message["role"] for message in messages))
        contents = [self._kept(messages[i]["content"], trims) for i, trims in zip(shape.order, shape.trims)]
        self._check_rendering(shape, contents, messages)
        pieces = self._own_pieces(shape.pieces)
        text, places, position = "", [], 0
        for piece, content in zip(pieces, [*contents, ""]):
            position += len(piece.encode())
            places.append((position, position + len(content.encode())))
            position = places[-1][1]
            text += piece + content
        ids = np.array(self._ids(text), np.int32)
        try:
            start, end = token_spans(self.tokenizer, text, ids)
        except InputError as error:
            raise Unusable("bytes", str(error)) from error
        return self._locate(ids, start, end, places[:-1], shape, messages)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=False, verbose=False)["input_ids"]

    def _kept(self, content: str, trims: tuple[bool, bool]) -> str:
        content = content.lstrip() if trims[0] else content
        return content.rstrip() if trims[1] else content

    def _shape(self, roles: tuple[str, ...]) -> _Shape:
        if roles not in self._shapes:
            try:
                self._shapes[roles] = self._probe(roles)
            except Unusable as problem:
                self._shapes[roles] = problem
        if isinstance(shape := self._shapes[roles], Unusable):
            raise Unusable(shape.reason, str(shape))
        return shape

    def _probe(self, roles: tuple[str, ...]) -> _Shape:
        """Where the template puts each content, found by rendering contents that occur nowhere else."""
        marks = [f"QZ{n}ZQ" for n in range(len(roles))]
        plain = self.template.render([{"role": r, "content": m} for r, m in zip(roles, marks)])
        padded = self.template.render([{"role": r, "content": f" \n\t{m}\t\n "} for r, m in zip(roles, marks)])
        for n, mark in enumerate(marks):
            if plain.count(mark) != 1:
                times = "leaves out" if mark not in plain else "repeats"
                raise Unusable("template", f"the chat template {times} message {n} ({roles[n]}) of {len(roles)}")
        order = tuple(sorted(range(len(roles)), key=lambda n: plain.index(marks[n])))
        pieces = tuple(re.split("|".join(marks), plain))
        trims = tuple((f" \n\t{marks[n]}" not in padded, f"{marks[n]}\t\n " not in padded) for n in order)
        for n, role in enumerate(roles[:-1]):
            if role == "assistant":
                self._check_prefix(plain, roles[: n + 1], marks)
        for place, n in enumerate(order):
            if roles[n] == "assistant" and not pieces[place + 1].lstrip().startswith(self.template.end_of_turn):
                raise Unusable("template", f"the chat template puts no end of turn after message {n}")
        if not self.template.end_of_turn:
            raise Unusable("template", "the chat template ends no turn with a token of the vocabulary")
        return _Shape(pieces, order, trims)

    def _check_prefix(self, whole: str, roles: tuple[str, ...], marks: list[str]) -> None:
        """The conversation up to an answer must read the same when it goes on: that is what the model saw."""
        beginning = self.template.render([{"role": r, "content": m} for r, m in zip(roles, marks)])
        upto = beginning[: beginning.index(marks[len(roles) - 1]) + len(marks[len(roles) - 1])]
        if not whole.startswith(upto):
            raise Unusable(
                "template",
                f"the chat template renders the first {len(roles)} messages differently once the conversation goes on "
                "(it moves or strips text); a built-in template may serve",
            )

    def _check_rendering(self, shape: _Shape, contents: list[str], messages: list[dict[str, str]]) -> None:
        text, position = self.template.render(messages), 0
        for n, piece, content in zip([*shape.order, len(messages) - 1], shape.pieces, [*contents, ""]):
            if not text.startswith(piece + content, position):
                raise Unusable("template", f"the chat template changes the text of or around message {n}")
            position += len(piece) + len(content)
        if position != len(text):
            raise Unusable("template", "the chat template adds text at the end")

    def _own_pieces(self, pieces: tuple[str, ...]) -> list[str]:
        """The template's pieces with this model's BOS and end of turn in place of its own."""
        own = list(pieces)
        if self.template.end_of_turn != self.end_of_turn:
            own = [piece.replace(self.template.end_of_turn, self.end_of_turn) for piece in own]
        if self.template.bos != self.bos:
            own[0] = self.bos + own[0].removeprefix(self.template.bos)
        return own

    def _locate(self, ids, start, end, places, shape: _Shape, messages) -> Encoded:
        special = np.isin(ids, self._special_ids)
        predicted, message, begins, ends = [], [], [], []
        for (first, last), n, trims in zip(places, shape.order, shape.trims):
            low, high = np.searchsorted(end, first, side="right"), np.searchsorted(start, last, side="left")
            low = self._with_empty_tokens(low, start, end, first, last)
            if special[low:high].any():
                raise Unusable("special_token", f"message {n} joins its surroundings to a special token")
            if messages[n]["role"] != "assistant":
                continue
            content = messages[n]["content"]
            lead = len(content.encode()) - len(content.lstrip().encode()) if trims[0] else 0
            size = len(content.encode())
            turn = next((t for t in range(high, len(ids)) if ids[t] == self.end_of_turn_id), None)
            if turn is None:
                raise Unusable("template", f"no end-of-turn token follows message {n}")
            predicted += [*range(low, high), turn]
            message += [n] * (high - low + 1)
            begins += [*(np.clip(start[low:high], first, last) - first + lead), size]
            ends += [*(np.clip(end[low:high], first, last) - first + lead), size + 1]
        keep = [k for k, t in enumerate(predicted) if 0 < t < self.max_length]
        if not keep:
            raise Unusable("too_long", f"no predicted token within {self.max_length} tokens (of {len(ids)})")
        arrays = (
            np.array(values, dtype)[keep]
            for values, dtype in ((predicted, np.int32), (message, np.int16), (begins, np.int32), (ends, np.int32))
        )
        return Encoded(ids[: self.max_length], *arrays, truncated=len(ids) > self.max_length)

    @staticmethod
    def _with_empty_tokens(low: int, start, end, first: int, last: int) -> int:
        """Tokens without bytes that stand right at a content's beginning (an inserted '▁') belong to it."""
        if first < last:
            while low > 0 and start[low - 1] == end[low - 1] == first:
                low -= 1
        return int(low)


def encode_conversation(
    tokenizer, messages, template: ChatTemplate | str = "native", max_length: int = 2048
) -> Encoded:
    """One conversation as ids, predicted tokens and byte spans (see `Encoded`).

    For many conversations make one `ConversationEncoder`: it probes the template once per sequence of roles.
    """
    return ConversationEncoder(tokenizer, template, max_length).encode(messages)
