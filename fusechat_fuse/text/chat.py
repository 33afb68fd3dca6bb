"""Messages to token ids, with the predicted tokens and where each lies in its message.

A chat template is asked twice. Once with probe contents, per sequence of roles: that shows the text the template puts
around each content, whether it trims contents, and which answers stand in the whole conversation as they stood when
they were the last in it: those alone are predicted, the others are context (Qwen3 keeps a think block in the last
answer only). An end of turn is predicted where it is the one that ends the last answer. And once with the real
contents: the result must be exactly the probed pieces with the contents between them, else the conversation is refused.
So every content's place is known by construction, whatever the text says, and no piece is ever tokenized alone: the
whole text is, once, by the tokenizer as it is.

A template of another family (`template="pivot"`) is rendered as its own tokenizer would; then, in the pieces around the
contents only, its BOS and end of turn are replaced by the model's own; a model's BOS also stands before a template that
has none. A content that holds the text of one of the model's special tokens is refused: it must not become one.

Refusals (`Unusable`, counted by name): `special_token`, `template` (it raises, changes, drops or moves a content),
`bytes` (the tokens do not give the text back), `too_long` (nothing predicted within max_length).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from fusechat_fuse.errors import InputError
from fusechat_fuse.text.messages import Unusable
from fusechat_fuse.text.spans import token_spans
from fusechat_fuse.text.templates import (
    ChatTemplate,
    added_texts,
    bos_of,
    control_texts,
    end_of_turn_of,
    native_template,
    own_variables,
    resolve_template,
)


@dataclass(frozen=True)
class Encoded:
    """One conversation as ids. T tokens, P predicted ones.

    input_ids int32 [T]; predicted int32 [P], indices into it, ascending and > 0; message int16 [P]; start, end int32
    [P], UTF-8 bytes of that message's content, the end of turn at len(content), len(content) + 1; truncated: whether
    max_length cut tokens off; context_answers: answers that are not predicted because the template renders them
    otherwise once the conversation goes on.
    """

    input_ids: np.ndarray
    predicted: np.ndarray
    message: np.ndarray
    start: np.ndarray
    end: np.ndarray
    truncated: bool
    context_answers: int = 0


@dataclass(frozen=True)
class _Shape:
    """What a template does with one sequence of roles: `pieces[n]` stands before the n-th content in the text, the last
    piece at the end; `order` says whose content that is; `trims` what is trimmed off it (left, right), as
    `lstrip` and `rstrip` take it ("" nothing, None white space); `predicted` whether it is an answer that stands as it
    stood when it was the last, `ended` whether the end of turn follows."""

    pieces: tuple[str, ...]
    order: tuple[int, ...]
    trims: tuple[tuple[str | None, str | None], ...]
    predicted: tuple[bool, ...]
    ended: tuple[bool, ...]


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
        added = added_texts(tokenizer)
        self.bos, self.end_of_turn = self.template.bos, self.template.end_of_turn
        if not self._is_own():
            self.bos, self.end_of_turn = bos_of(tokenizer), end_of_turn_of(tokenizer)
        self.end_of_turn_id = added.get(self.end_of_turn, -1)  # -1: no template of this name works, every probe says so
        reserved = {*control_texts(tokenizer, self.template), self.end_of_turn, self.bos} - {""}
        names = "|".join(re.escape(t) for t in sorted(reserved, key=len, reverse=True))
        self._reserved = re.compile(names or "(?!)")  # without any nothing matches
        special = {added[text] for text in reserved if text in added}
        self._is_special = np.zeros(2 + max(special, default=-1), bool)  # by id, the last one for all that are higher
        self._is_special[list(special)] = True
        self._shapes: dict[tuple[str, ...], _Shape | Unusable] = {}

    def _is_own(self) -> bool:
        """Whether the template already renders this tokenizer's BOS and end of turn: its own does, and a file's."""
        others = self.template.name in ("pivot", "native")  # unless it is this tokenizer's very own
        if not others and self.template.variables == tuple(sorted(own_variables(self.tokenizer).items())):
            return self.template.end_of_turn in (*added_texts(self.tokenizer), "")
        try:
            native = native_template(self.tokenizer)
        except InputError:
            return False
        return self.template.sha256 == native.sha256

    def encode(self, messages: list[dict[str, str]]) -> Encoded:
        """Ids, predicted tokens and byte spans of one conversation.

        Args:
            messages: {role, content} each, as `read_conversations` leaves them (an answer of `weight` 0 is not
                predicted); borrowed.
        Raises: Unusable naming the rule and the message.
        """
        shape, contents = self._rendered(messages)
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

    def check(self, messages: list[dict[str, str]]) -> None:
        """Raise Unusable, as `encode` does, for what is known without tokenizing: far cheaper."""
        self._rendered(messages)

    def parse(self, text: str, roles: tuple[str, ...]) -> list[dict[str, str]] | None:
        """The messages of these roles that were rendered to `text`, whose last turn may be cut off; None where the
        template renders no such text. Raises: Unusable, as `encode` does."""
        shape = self._shape(roles)
        first, *between, last = self._own_pieces(shape.pieces)
        if not text.startswith(first):
            return None
        contents, position = [], len(first)
        for piece in between:
            if (end := text.find(piece, position)) < 0:
                return None
            contents.append(text[position:end])
            position = end + len(piece)
        contents.append(text[position:].removesuffix(last))
        return [{"role": role, "content": contents[shape.order.index(n)]} for n, role in enumerate(roles)]

    def _rendered(self, messages: list[dict[str, str]]) -> tuple[_Shape, list[str]]:
        """The shape of a conversation and its contents as the template renders them, in the text's order."""
        for n, message in enumerate(messages):
            if found := self._reserved.search(message["content"]):
                raise Unusable("special_token", f"message {n} holds the text of the special token {found[0]!r}")
        shape = self._shape(tuple(message["role"] for message in messages))
        contents = [messages[i]["content"].lstrip(a).rstrip(b) for i, (a, b) in zip(shape.order, shape.trims)]
        self._check_rendering(shape, contents, messages)
        return shape, contents

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=False, verbose=False)["input_ids"]

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
        plain, padded = self._render(roles, marks), self._render(roles, [f" \n\t{mark}\t\n " for mark in marks])
        for n, mark in enumerate(marks):
            if plain.count(mark) != 1:
                times = "leaves out" if mark not in plain else "repeats"
                raise Unusable("template", f"the chat template {times} message {n} ({roles[n]}) of {len(roles)}")
        order = tuple(sorted(range(len(roles)), key=lambda n: plain.index(marks[n])))
        pieces = tuple(re.split("|".join(marks), plain))
        ends = "\n" * 9  # more than a template puts before or after a content itself
        lines = self._render(roles, [f"{ends}{mark}{ends}" for mark in marks])
        trims = tuple(
            (
                _trimmed(f" \n\t{marks[n]}" in padded, f"{ends}{marks[n]}" in lines),
                _trimmed(f"{marks[n]}\t\n " in padded, f"{marks[n]}{ends}" in lines),
            )
            for n in order
        )
        if not self.template.end_of_turn:
            raise Unusable("template", "the chat template ends no turn with a token of the vocabulary")
        ended = tuple(piece.lstrip().startswith(self.template.end_of_turn) for piece in pieces[1:])
        answers = [n for n, role in enumerate(roles) if role == "assistant"]
        if answers and not ended[order.index(answers[-1])]:
            raise Unusable("template", f"the chat template puts no end of turn after message {answers[-1]}")
        stand = {n for n in answers if self._stands(plain, roles[: n + 1], marks)}
        if answers and not stand:
            raise Unusable(
                "template",
                f"the chat template renders the first {answers[-1] + 1} messages differently once the conversation "
                "goes on (it moves or strips text)",
            )
        return _Shape(pieces, order, trims, tuple(n in stand for n in order), ended)

    def _stands(self, whole: str, roles: tuple[str, ...], marks: list[str]) -> bool:
        """Whether the conversation up to an answer reads the same when it goes on: that is what the model saw."""
        mark = marks[len(roles) - 1]
        beginning, found, _ = self._render(roles, marks).partition(mark)
        return bool(found) and whole.startswith(beginning + mark)

    def _render(self, roles: tuple[str, ...], contents: list[str]) -> str:
        return self.template.render([{"role": role, "content": content} for role, content in zip(roles, contents)])

    def _check_rendering(self, shape: _Shape, contents: list[str], messages: list[dict[str, str]]) -> None:
        text = self._render(tuple(m["role"] for m in messages), [m["content"] for m in messages])
        position = 0
        for n, piece, content in zip([*shape.order, len(messages) - 1], shape.pieces, [*contents, ""]):
            if not text.startswith(piece + content, position):
                raise Unusable("template", f"the chat template changes the text of or around message {n}")
            position += len(piece) + len(content)
        if position != len(text):
            raise Unusable("template", "the chat template adds text at the end")

    def _own_pieces(self, pieces: tuple[str, ...]) -> list[str]:
        """The template's pieces with this model's BOS and end of turn in place of its own."""
        theirs = self.template
        if (theirs.bos, theirs.end_of_turn) == (self.bos, self.end_of_turn):
            return list(pieces)
        ours = {theirs.bos: self.bos, theirs.end_of_turn: self.end_of_turn}  # some put BOS before each question
        marks = re.compile("|".join(re.escape(mark) for mark in sorted(ours, key=len, reverse=True) if mark))
        own = [pieces[0].removeprefix(theirs.bos), *pieces[1:]]
        own = [marks.sub(lambda found: ours[found[0]], piece) for piece in own]
        return [self.bos + own[0], *own[1:]]

    def _locate(self, ids, start, end, places, shape: _Shape, messages) -> Encoded:
        special = self._is_special[np.minimum(ids, len(self._is_special) - 1)]
        turns = np.flatnonzero(ids == self.end_of_turn_id)
        found = [(np.empty(0, np.int32),) * 4]  # and of each answer: predicted, message, start, end
        context_answers = 0
        lows = np.searchsorted(end, [first for first, _ in places], side="right")
        highs = np.searchsorted(start, [last for _, last in places], side="left")
        for (first, last), low, high, n, trims, stands, ended in zip(
            places, lows, highs, shape.order, shape.trims, shape.predicted, shape.ended
        ):
            low = self._with_empty_tokens(low, start, end, first, last)
            if special[low:high].any():
                raise Unusable("special_token", f"message {n} joins its surroundings to a special token")
            if messages[n]["role"] != "assistant" or messages[n].get("weight") == 0:
                continue
            if not stands:
                context_answers += 1
                continue
            content = messages[n]["content"]
            lead = len(content.encode()) - len(content.lstrip(trims[0]).encode())
            size = len(content.encode())
            while not ended and low < high and end[high - 1] > last:
                high -= 1  # it runs into what follows: no prediction of the content alone
            predicted = np.arange(low, max(low, high), dtype=np.int32)  # low is the higher where an empty token stands
            begins, ends = (np.clip(edge[low:high], first, last) - first + lead for edge in (start, end))
            if ended:
                if (at := np.searchsorted(turns, high)) == len(turns):
                    raise Unusable("template", f"no end-of-turn token follows message {n}")
                of_end = turns[at], size, size + 1
                predicted, begins, ends = (np.append(*both) for both in zip((predicted, begins, ends), of_end))
            found.append((predicted, np.full_like(predicted, n), begins, ends))
        predicted, message, begins, ends = (np.concatenate(parts) for parts in zip(*found))
        keep = (predicted > 0) & (predicted < self.max_length)
        if not keep.any():
            raise Unusable("too_long", f"no predicted token within {self.max_length} tokens (of {len(ids)})")
        return Encoded(
            input_ids=ids[: self.max_length],
            predicted=predicted[keep].astype(np.int32),
            message=message[keep].astype(np.int16),
            start=begins[keep].astype(np.int32),
            end=ends[keep].astype(np.int32),
            truncated=len(ids) > self.max_length,
            context_answers=context_answers,
        )

    @staticmethod
    def _with_empty_tokens(low: int, start, end, first: int, last: int) -> int:
        """Tokens without bytes that stand right at a content's beginning (an inserted '▁') belong to it."""
        if first < last:
            while low > 0 and start[low - 1] == end[low - 1] == first:
                low -= 1
        return int(low)


def _trimmed(keeps_blanks: bool, keeps_lines: bool) -> str | None:
    """What a template takes off one side of a content, by what it keeps of white space there."""
    return None if not keeps_blanks else "" if keeps_lines else "\n"


def encode_conversation(
    tokenizer, messages, template: ChatTemplate | str = "native", max_length: int = 2048
) -> Encoded:
    """One conversation as ids, predicted tokens and byte spans (see `Encoded`).

    For many conversations make one `ConversationEncoder`: it probes the template once per sequence of roles.
    """
    return ConversationEncoder(tokenizer, template, max_length).encode(messages)
