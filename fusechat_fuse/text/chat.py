"""Messages to token ids, with the predicted tokens and where each lies in its message.

A chat template is rendered twice. First with probe contents, once for each sequence of roles (`layout.py`): that shows
the pieces of text around each content and which answers are predicted. Then with the real contents: the result must be
exactly those pieces with the contents between them, else the conversation is refused. So the place of every content is
known by construction, whatever it says. The whole text is tokenized once, by the tokenizer as it is, never its pieces.

A template of another family (`template="pivot"`) is rendered as its own tokenizer would. Then, only in the pieces
around the contents, its BOS and end of turn are replaced by the model's own; a model's BOS is also put before a
template that has none. A content with the text of one of the model's special tokens is refused: it must not become one.

Refusals (`Unusable`, counted by name): `special_token`, `template` (it raises, changes, drops or moves a content),
`bytes` (the tokens do not spell the text), `too_long` (nothing predicted within max_length).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from fusechat_fuse.errors import InputError
from fusechat_fuse.text.layout import Layout, probe_layout
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
    max_length cut tokens off; context_answers: number of answers that are not predicted because the template renders
    them differently once the conversation goes on.
    """

    input_ids: np.ndarray
    predicted: np.ndarray
    message: np.ndarray
    start: np.ndarray
    end: np.ndarray
    truncated: bool
    context_answers: int = 0


class ConversationEncoder:
    """Turns conversations into ids with one template and one tokenizer.

    Args:
        tokenizer: transformers fast tokenizer; borrowed.
        template: ChatTemplate, or the name that `resolve_template` takes.
        max_length: number of tokens kept, from the beginning.
    """

    def __init__(self, tokenizer, template: ChatTemplate | str = "native", max_length: int = 2048):
        self.tokenizer = tokenizer
        self.template = template if isinstance(template, ChatTemplate) else resolve_template(template, tokenizer)
        self.max_length = max_length
        added = added_texts(tokenizer)
        self.bos, self.end_of_turn = self.template.bos, self.template.end_of_turn
        if not self._is_own():
            self.bos, self.end_of_turn = bos_of(tokenizer), end_of_turn_of(tokenizer)
        self.end_of_turn_id = added.get(self.end_of_turn, -1)  # -1: every probe raises
        reserved = {*control_texts(tokenizer, self.template), self.end_of_turn, self.bos} - {""}
        names = "|".join(re.escape(t) for t in sorted(reserved, key=len, reverse=True))
        self._reserved = re.compile(names or "(?!)")  # (?!) matches nothing
        special = {added[text] for text in reserved if text in added}
        self._is_special = np.zeros(2 + max(special, default=-1), bool)  # by id; the last entry serves all higher ids
        self._is_special[list(special)] = True
        self._layouts: dict[tuple[str, ...], Layout | Unusable] = {}

    def _is_own(self) -> bool:
        """Whether the template already renders this tokenizer's BOS and end of turn: its own does, and a file's."""
        of_a_model = self.template.name in ("pivot", "native")
        if not of_a_model and self.template.variables == tuple(sorted(own_variables(self.tokenizer).items())):
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
        layout, contents = self._rendered(messages)
        pieces = self._own_pieces(layout.pieces)
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
        return self._locate(ids, start, end, places[:-1], layout, messages)

    def check(self, messages: list[dict[str, str]]) -> None:
        """Raise Unusable, as `encode` does, for what is known without tokenizing (far cheaper)."""
        self._rendered(messages)

    def parse(self, text: str, roles: tuple[str, ...]) -> list[dict[str, str]] | None:
        """The messages of these roles that were rendered to `text`, whose last turn may be cut off; None where the
        template renders no such text. Raises: Unusable, as `encode` does."""
        layout = self._layout(roles)
        first, *between, last = self._own_pieces(layout.pieces)
        if not text.startswith(first):
            return None
        contents, position = [], len(first)
        for piece in between:
            if (end := text.find(piece, position)) < 0:
                return None
            contents.append(text[position:end])
            position = end + len(piece)
        contents.append(text[position:].removesuffix(last))
        return [{"role": role, "content": contents[layout.order.index(n)]} for n, role in enumerate(roles)]

    def _rendered(self, messages: list[dict[str, str]]) -> tuple[Layout, list[str]]:
        """The layout of a conversation and its contents as the template renders them, in the order of the text."""
        for n, message in enumerate(messages):
            if found := self._reserved.search(message["content"]):
                raise Unusable("special_token", f"message {n} holds the text of the special token {found[0]!r}")
        layout = self._layout(tuple(message["role"] for message in messages))
        contents = [messages[i]["content"].lstrip(a).rstrip(b) for i, (a, b) in zip(layout.order, layout.trims)]
        self._check_rendering(layout, contents, messages)
        return layout, contents

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=False, verbose=False)["input_ids"]

    def _layout(self, roles: tuple[str, ...]) -> Layout:
        if roles not in self._layouts:
            try:
                self._layouts[roles] = probe_layout(self.template, roles)
            except Unusable as problem:
                self._layouts[roles] = problem
        if isinstance(layout := self._layouts[roles], Unusable):
            raise Unusable(layout.reason, str(layout))
        return layout

    def _check_rendering(self, layout: Layout, contents: list[str], messages: list[dict[str, str]]) -> None:
        text = self.template.render([{"role": m["role"], "content": m["content"]} for m in messages])
        position = 0
        for n, piece, content in zip([*layout.order, len(messages) - 1], layout.pieces, [*contents, ""]):
            if not text.startswith(piece + content, position):
                raise Unusable("template", f"the chat template changes the text of or around message {n}")
            position += len(piece) + len(content)
        if position != len(text):
            raise Unusable("template", "the chat template adds text at the end")

    def _own_pieces(self, pieces: tuple[str, ...]) -> list[str]:
        """The template's pieces with BOS and end of turn replaced by this model's."""
        theirs = self.template
        if (theirs.bos, theirs.end_of_turn) == (self.bos, self.end_of_turn):
            return list(pieces)
        ours = {
            theirs.bos: self.bos,
            theirs.end_of_turn: self.end_of_turn,
        }  # some put BOS before each question
        marks = re.compile("|".join(re.escape(mark) for mark in sorted(ours, key=len, reverse=True) if mark))
        own = [pieces[0].removeprefix(theirs.bos), *pieces[1:]]
        own = [marks.sub(lambda found: ours[found[0]], piece) for piece in own]
        return [self.bos + own[0], *own[1:]]

    def _locate(self, ids, start, end, places, layout: Layout, messages) -> Encoded:
        special = self._is_special[np.minimum(ids, len(self._is_special) - 1)]
        turns = np.flatnonzero(ids == self.end_of_turn_id)
        found = [(np.empty(0, np.int32),) * 4]  # and of each answer: predicted, message, start, end
        context_answers = 0
        lows = np.searchsorted(end, [first for first, _ in places], side="right")
        highs = np.searchsorted(start, [last for _, last in places], side="left")
        for (first, last), low, high, n, trims, stands, ended in zip(
            places, lows, highs, layout.order, layout.trims, layout.predicted, layout.ended
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
