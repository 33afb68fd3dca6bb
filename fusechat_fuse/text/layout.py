"""Where a chat template puts the contents of one sequence of roles, found by rendering contents unlike any others.

That shows the text around each content, what is trimmed off it, and which answers stand in the whole conversation as
they stood when they were the last in it (Qwen3 keeps a think block in the last answer only).
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from fusechat_fuse.text.messages import Unusable
from fusechat_fuse.text.templates import ChatTemplate

Trim = tuple[str | None, str | None]
_MARK = re.compile(r"QZ\d+ZQ")
_LINES = "\n" * 9  # more than a template puts before or after a content itself


@dataclass(frozen=True)
class Layout:
    """What a template does with one sequence of roles, n messages.

    `pieces` [n + 1]: the text before each content, and after the last one. The others [n] are in the order of the text:
    `order`: whose content it is; `trims`: what is trimmed off it (left, right), as `lstrip` and `rstrip` take it (""
    nothing, None white space); `predicted`: whether it is an answer that is rendered as when it was the last;
    `ended`: whether the end of turn follows.
    """

    pieces: tuple[str, ...]
    order: tuple[int, ...]
    trims: tuple[Trim, ...]
    predicted: tuple[bool, ...]
    ended: tuple[bool, ...]


def probe_layout(template: ChatTemplate, roles: tuple[str, ...]) -> Layout:
    """The layout of one sequence of roles. Raises: Unusable where no answer's place can be told."""
    marks = [f"QZ{n}ZQ" for n in range(len(roles))]
    plain = _render(template, roles, marks)
    found = Counter(_MARK.findall(plain))
    for n, mark in enumerate(marks):
        if found[mark] != 1:
            times = "repeats" if found[mark] else "leaves out"
            raise Unusable("template", f"the chat template {times} message {n} ({roles[n]}) of {len(roles)}")
    order = tuple(int(mark[2:-2]) for mark in _MARK.findall(plain))
    pieces = tuple(_MARK.split(plain))
    if not template.end_of_turn:
        raise Unusable("template", "the chat template ends no turn with a token of the vocabulary")
    ended = tuple(piece.lstrip().startswith(template.end_of_turn) for piece in pieces[1:])
    answers = [n for n, role in enumerate(roles) if role == "assistant"]
    if answers and not ended[order.index(answers[-1])]:
        raise Unusable("template", f"the chat template puts no end of turn after message {answers[-1]}")
    stable = {n for n in answers if _is_stable(template, plain, roles[: n + 1], marks)}
    if answers and not stable:
        raise Unusable(
            "template",
            f"the chat template renders the first {answers[-1] + 1} messages differently once the conversation "
            "goes on (it moves or strips text)",
        )
    return Layout(pieces, order, _trims(template, roles, marks), tuple(n in stable for n in order), ended)


def _trims(template: ChatTemplate, roles: tuple[str, ...], marks: list[str]) -> tuple[Trim, ...]:
    """What is trimmed off each content, left and right, in the order of the text."""
    blanks = _MARK.split(_render(template, roles, [f" \n\t{mark}\t\n " for mark in marks]))
    lines = _MARK.split(_render(template, roles, [f"{_LINES}{mark}{_LINES}" for mark in marks]))
    left = [_trimmed(a.endswith(" \n\t"), b.endswith(_LINES)) for a, b in zip(blanks[:-1], lines[:-1])]
    right = [_trimmed(a.startswith("\t\n "), b.startswith(_LINES)) for a, b in zip(blanks[1:], lines[1:])]
    return tuple(zip(left, right))


def _trimmed(keeps_blanks: bool, keeps_lines: bool) -> str | None:
    """What a template takes off one side of a content, by what it keeps of white space there."""
    return None if not keeps_blanks else "" if keeps_lines else "\n"


def _is_stable(template: ChatTemplate, whole: str, roles: tuple[str, ...], marks: list[str]) -> bool:
    """Whether the conversation up to an answer reads the same when it goes on: that is what the model saw."""
    mark = marks[len(roles) - 1]
    beginning, found, _ = _render(template, roles, marks).partition(mark)
    return bool(found) and whole.startswith(beginning + mark)


def _render(template: ChatTemplate, roles: tuple[str, ...], contents: list[str]) -> str:
    return template.render([{"role": role, "content": content} for role, content in zip(roles, contents)])
