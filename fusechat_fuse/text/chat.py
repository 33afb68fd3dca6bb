"""Messages to token ids, with the predicted tokens and where each lies in its message.

A chat template is rendered twice. First with probe contents, once for each sequence of roles (`layout.py`): that shows
the pieces of text around each content and which answers are predicted. Then with the real contents: the result must be
exactly those pieces with the contents between them, else the conversation is refused. So the place of every content is
known by construction, whatever it says. The whole text is tokenized once, by the tokenizer as it is, never its pieces.

A template of another family (`template="pivot"`) is rendered as its own tokenizer would. Then, only in the pieces
around the contents, its BOS and end of turn are replaced by the model's own; a model's BOS is also put before a
template that has none. A content with the text of one of the model's special tokens is refused: it must not become one.

Calls of tools and their results are part of the pieces around the contents, so the layout of a conversation with them
is its own; nothing of them is predicted.

Refusals (`Unusable`, counted by name): `special_token`, `template` (it raises, changes, drops or moves a content),
`tool_calls` (the same, where tools are called), `bytes` (the tokens do not spell the text), `too_long` (nothing
predicted within max_length).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fusechat_fuse.errors import InputError
from fusechat_fuse.text.layout import Layout, probe_layout
from fusechat_fuse.text.messages import Unusable, is_answer
from fusechat_fuse.text.spans import token_spans
from fusechat_fuse.text.templates import (
    ChatTemplate,
    added_texts,
    any_of,
    bos_of,
    check_contents,
    control_texts,
    end_of_turn_of,
    own_variables,
    resolve_template,
    template_of,
)
from fusechat_fuse.text.tools import calls_tools, check_rendered, uses_tools


@dataclass(frozen=True)
class Encoded:
    """One conversation as ids. T tokens, P predicted ones.

    input_ids int32 [T]; predicted int32 [P], indices into it, ascending and > 0; message int16 [P]; start, end int32
    [P], UTF-8 bytes of that message's content, the end of turn at len(content), len(content) + 1; truncated: whether
    max_length cut tokens off; context_answers: number of answers that are not predicted because the template renders
    them differently once the conversation goes on; tool_call_turns: number of assistant messages that call tools.
    """

    input_ids: np.ndarray
    predicted: np.ndarray
    message: np.ndarray
    start: np.ndarray
    end: np.ndarray
    truncated: bool
    context_answers: int = 0
    tool_call_turns: int = 0


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
        reserved = {*control_texts(tokenizer, self.template), self.end_of_turn, self.bos}
        self._reserved = any_of(reserved)
        special = {added[text] for text in reserved if text in added}
        self._is_special = np.zeros(2 + max(special, default=-1), bool)  # by id; the last entry serves all higher ids
        self._is_special[list(special)] = True
        self._layouts: dict[tuple[tuple[str, ...], tuple[int, ...]], Layout | Unusable] = {}

    def _is_own(self) -> bool:
        """Whether the template already renders this tokenizer's BOS and end of turn: its own does, and a file's."""
        of_a_model = self.template.name in ("pivot", "native")
        if not of_a_model and self.template.variables == own_variables(self.tokenizer):
            return self.template.end_of_turn in (*added_texts(self.tokenizer), "")
        native = template_of(self.tokenizer)
        return native is not None and self.template.sha256 == native.sha256

    def encode(self, messages: list[dict[str, Any]]) -> Encoded:
        """Ids, predicted tokens and byte spans of one conversation.

        Args:
            messages: {role, content} each, as `read_conversations` leaves them (an answer of `weight` 0, or that
                calls tools, is not predicted); borrowed.
        Raises: Unusable naming the rule and the message.
        """
        layout, contents = self._rendered(messages)
        text, places, turn_ends = self._text(layout, contents)
        text, ids = self._tokenized(text, turn_ends)
        try:
            start, end = token_spans(self.tokenizer, text, ids)
        except InputError as error:
            raise Unusable("bytes", str(error)) from error
        within = [place for place in places if place[2] <= len(text.encode())]
        return self._located(ids, start, end, within, layout, messages)

    def _text(self, layout: Layout, contents: list[str]) -> tuple[str, list[tuple[int, int, int]], list[int]]:
        """(the rendered text; of each content, in bytes: where the model begins to generate, where the content begins
        and ends; where each end of turn ends, in characters)."""
        parts, places, turn_ends, position, characters = [], [], [], 0, 0
        pieces = self._own_pieces(layout.pieces)
        ended = (False, *layout.ended)
        for piece, content, blanks, after_answer in zip(pieces, [*contents, ""], [*layout.generated, 0], ended):
            if after_answer:
                turn_ends.append(characters + len(piece) - len(piece.lstrip()) + len(self.end_of_turn))
            first = position + len(piece.encode())
            position = first + len(content.encode())
            places.append((first - len(piece[len(piece) - blanks :].encode()), first, position))
            parts += piece, content
            characters += len(piece) + len(content)
        return "".join(parts), places[:-1], turn_ends

    def _tokenized(self, text: str, turn_ends: list[int]) -> tuple[str, np.ndarray]:
        """A text and its ids; a long text only up to an end of turn, which no token runs across, with more than
        `max_length` tokens before it."""
        at_least = 8 * self.max_length
        for cut in turn_ends:
            if cut >= at_least:
                ids = self._ids(text[:cut])
                if len(ids) > self.max_length:
                    return text[:cut], np.array(ids, np.int32)
                at_least = 2 * cut
        return text, np.array(self._ids(text), np.int32)

    def check(self, messages: list[dict[str, Any]]) -> None:
        """Raise Unusable, as `encode` does, for what is known without tokenizing (far cheaper)."""
        self._rendered(messages)

    def parse(self, text: str, roles: tuple[str, ...]) -> list[dict[str, str]] | None:
        """The messages of these roles that were rendered to `text`, whose last turn may be cut off; None where the
        template renders no such text. Raises: Unusable, as `encode` does."""
        layout = self._layout([{"role": role} for role in roles])
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

    def openings(self) -> list[np.ndarray]:
        """The ids that begin a conversation and stand nowhere else: the BOS, else the text before a system message."""
        first = self.bos
        if not first:
            try:
                roles = ("system", "user", "assistant")
                first = self._own_pieces(self._layout([{"role": role} for role in roles]).pieces)[0].rstrip()
            except Unusable:
                first = ""
        return [np.array(self._ids(first))] if first else []

    def _rendered(self, messages: list[dict[str, Any]]) -> tuple[Layout, list[str]]:
        """The layout of a conversation and its contents as the template renders them, in the order of the text."""
        check_contents(messages, self._reserved)
        reasoning = tuple(n for n, message in enumerate(messages) if "</think>" in message["content"])
        try:
            return self._checked(messages, self._layout(messages, reasoning))
        except Unusable as problem:
            if uses_tools(messages):
                raise Unusable("tool_calls", str(problem)) from problem
            raise

    def _checked(self, messages: list[dict[str, Any]], layout: Layout) -> tuple[Layout, list[str]]:
        """The layout and the contents, where the template puts just these there. Raises: Unusable where not."""
        contents = [messages[i]["content"].lstrip(a).rstrip(b) for i, (a, b) in zip(layout.order, layout.trims)]
        text, position = self.template.render(messages), 0
        for n, piece, content in zip([*layout.order, len(messages) - 1], layout.pieces, [*contents, ""]):
            if not text.startswith(piece + content, position):
                raise Unusable("template", f"the chat template changes the text of or around message {n}")
            position += len(piece) + len(content)
        if position != len(text):
            raise Unusable("template", "the chat template adds text at the end")
        return layout, contents

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=False, verbose=False)["input_ids"]

    def _layout(self, messages: list[dict[str, Any]], reasoning: tuple[int, ...] = ()) -> Layout:
        """The layout of the messages: kept for a sequence of roles, made anew where tools are called."""
        if uses_tools(messages):
            check_rendered(messages, self.template.render)
            return probe_layout(self.template, messages, reasoning)
        key = tuple(message["role"] for message in messages), reasoning
        if key not in self._layouts:
            try:
                self._layouts[key] = probe_layout(self.template, [{"role": role} for role in key[0]], reasoning)
            except Unusable as problem:
                self._layouts[key] = problem
        if isinstance(layout := self._layouts[key], Unusable):
            raise Unusable(layout.reason, str(layout))
        return layout

    def _own_pieces(self, pieces: tuple[str, ...]) -> list[str]:
        """The template's pieces with BOS and end of turn replaced by this model's."""
        theirs = self.template
        if (theirs.bos, theirs.end_of_turn) == (self.bos, self.end_of_turn):
            return list(pieces)
        # everywhere: some templates put BOS before each question
        ours = {theirs.bos: self.bos, theirs.end_of_turn: self.end_of_turn}
        own = [pieces[0].removeprefix(theirs.bos), *pieces[1:]]
        own = [any_of(ours).sub(lambda found: ours[found[0]], piece) for piece in own]
        return [self.bos + own[0], *own[1:]]

    def _located(self, ids, start, end, places, layout: Layout, messages) -> Encoded:
        """Which tokens are predicted, and the bytes of its message that each covers."""
        is_special = self._is_special[np.minimum(ids, len(self._is_special) - 1)]
        turn_ends = np.flatnonzero(ids == self.end_of_turn_id)
        begin, first, last = np.array(places, np.int64).reshape(-1, 3).T
        low = np.searchsorted(end, first, side="right")  # the first token that runs into the content
        with_blanks = np.minimum(low, np.searchsorted(start, begin, side="left"))  # inserted marks ('▁') too
        low = np.where(begin < last, with_blanks, low)
        high = np.searchsorted(start, last, side="left")
        found = [(np.empty(0, np.int64),) * 4]  # and of each answer: predicted, message, start, end
        for k, n in enumerate(layout.order[: len(places)]):
            if is_special[low[k] : high[k]].any():
                raise Unusable("special_token", f"message {n} joins its surroundings to a special token")
            if not (layout.predicted[k] and is_answer(messages[n])):
                continue
            stop = int(high[k])
            if layout.ended[k]:
                if (at := np.searchsorted(turn_ends, stop)) == len(turn_ends):
                    raise Unusable("template", f"no end-of-turn token follows message {n}")
                stop = int(turn_ends[at]) + 1
            else:  # a token that runs into the text after the content does not predict the content alone
                while low[k] < stop and end[stop - 1] > last[k]:
                    stop -= 1
            content, tokens = messages[n]["content"], slice(int(low[k]), stop)
            left, kept = layout.trims[k][0], last[k] - first[k]
            spans = _spans_in(content, left, kept, start[tokens] - first[k], end[tokens] - first[k])
            spans[1, -1:] += layout.ended[k]  # the end of turn: [L, L + 1)
            predicted = np.arange(low[k], stop)
            found.append((predicted, np.full_like(predicted, n), *spans))
        predicted, message, starts, ends = (np.concatenate(parts) for parts in zip(*found))
        keep = (predicted > 0) & (predicted < self.max_length)
        if not keep.any():
            raise Unusable("too_long", f"no predicted token within {self.max_length} tokens")
        return Encoded(
            input_ids=ids[: self.max_length],
            predicted=predicted[keep].astype(np.int32),
            message=message[keep].astype(np.int16),
            start=starts[keep].astype(np.int32),
            end=ends[keep].astype(np.int32),
            truncated=len(ids) > self.max_length,
            context_answers=sum(is_answer(messages[n]) and not p for n, p in zip(layout.order, layout.predicted)),
            tool_call_turns=sum(map(calls_tools, messages)),
        )


def _spans_in(content: str, left: str | None, kept: int, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Spans [2, n] of tokens in the bytes of a content. Tokens of blanks around it have empty spans, at byte 0 or at
    its end.

    Args:
        left: what the template trims off the content's left. kept: bytes of the content that it keeps.
        start, end: spans [n] of the tokens, from the first byte kept.
    """
    size = len(content.encode())
    spans = np.clip([start, end], 0, kept) + size - len(content.lstrip(left).encode())
    spans[:, end <= 0] = 0
    spans[:, start >= kept] = size
    return spans
