"""Where a chat template puts the contents of one sequence of roles, found by rendering contents unlike any others.
Tool calls and their results stay as they are, part of the text around the other contents (`tools.py`).

That shows the text around each content, what is trimmed off it, and of each answer:

- whether it is predicted: whether it is rendered in the whole conversation as when it was the last (Qwen3 keeps a think
  block in the last answer only);
- which blanks before it the model generates itself: those between the generation prompt and the content (`Assistant:`
  and `Assistant: 42` leave one). Where the template fills in more than blanks there, the model generates none of it.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from fusechat_fuse.text.messages import Unusable
from fusechat_fuse.text.templates import ChatTemplate
from fusechat_fuse.text.tools import Message, calls_tools, is_surrounding

_MARK = re.compile(r"(?:<think>\nQZ\d+ZQ\n</think>\n\n)?QZ\d+ZQ")
_LINES = "\n" * 9  # more than a template puts before or after a content itself


@dataclass(frozen=True)
class Layout:
    """What a template does with one sequence of roles, n messages, not counting tools' results and calls without text.

    `pieces` [n + 1]: the text before each content, and after the last one. The others [n] are in the order of the text:
    `order`: whose content it is; `trims`: what is trimmed off it (left, right), as `lstrip` and `rstrip` take it (""
    nothing, None white space); `predicted`: whether it is an answer that is rendered as when it was the last;
    `generated`: how many blanks at the end of the piece before an answer the model generates; `ended`: whether the end
    of turn follows, perhaps after blanks.
    """

    pieces: tuple[str, ...]
    order: tuple[int, ...]
    trims: tuple[tuple[str | None, str | None], ...]
    predicted: tuple[bool, ...]
    generated: tuple[int, ...]
    ended: tuple[bool, ...]


def probe_layout(template: ChatTemplate, messages: list[Message], reasoning: tuple[int, ...] = ()) -> Layout:
    """The layout of one sequence of roles. Raises: Unusable where no answer's place can be told.

    Args:
        messages: of which only roles matter, and all of what concerns tools.
        reasoning: the messages that hold a think block, which some templates take out and put back.
    """
    marks = [f"QZ{n}ZQ" for n in range(len(messages))]
    marks = [f"<think>\n{mark}\n</think>\n\n{mark}" if n in reasoning else mark for n, mark in enumerate(marks)]
    whole = _render(template, messages, marks)
    order = tuple(int(mark[:-2].rpartition("QZ")[2]) for mark in _MARK.findall(whole))
    found = Counter(order)
    for n, message in enumerate(messages):
        if found[n] != 1 and not is_surrounding(message):
            times = "repeats" if found[n] else "leaves out"
            which = f"message {n} ({message['role']}) of {len(messages)}"
            raise Unusable("template", f"the chat template {times} {which}")
    if not template.end_of_turn:
        raise Unusable("template", "the chat template ends no turn with a token of the vocabulary")
    pieces = tuple(_MARK.split(whole))
    ended = tuple(piece.lstrip().startswith(template.end_of_turn) for piece in pieces[1:])
    answers = {n: k for k, n in enumerate(order) if messages[n]["role"] == "assistant" and not calls_tools(messages[n])}
    last = max(answers, default=-1)
    if answers and not ended[answers[last]]:
        raise Unusable("template", f"the chat template puts no end of turn after message {last}")

    def probe(n: int) -> tuple[bool, int]:
        return _probe_answer(template, whole, messages[: n + 1], marks)

    probed = _probe_alike({n: pieces[k : k + 2] for n, k in answers.items()}, probe)
    if answers and not any(stable for stable, _ in probed.values()):
        raise Unusable(
            "template",
            f"the chat template renders the first {last + 1} messages differently once the conversation goes on (it "
            "moves or strips text)",
        )
    predicted, generated = zip(*(probed.get(n, (False, 0)) for n in order))
    return Layout(pieces, order, _trims(template, messages, marks), predicted, generated, ended)


def _probe_answer(template: ChatTemplate, whole: str, messages: list[Message], marks: list[str]) -> tuple[bool, int]:
    """(whether the conversation up to an answer, the last of `messages`, reads the same in the whole conversation, as
    that is what the model saw; how many blanks before the answer the model generates)."""
    mark = marks[len(messages) - 1]
    beginning, found, _ = _render(template, messages, marks).partition(mark)
    if not found or not whole.startswith(beginning + mark):
        return False, 0
    try:
        prompt = _render(template, messages[:-1], marks, generation_prompt=True)
    except Unusable:  # some templates demand an answer
        return True, 0
    filled_in = beginning.removeprefix(prompt) if beginning.startswith(prompt) else ""
    return True, len(filled_in) if filled_in.isspace() else 0


def _probe_alike(pieces_of: dict[int, tuple[str, ...]], probe: Callable[[int], tuple[bool, int]]) -> dict:
    """The result of `probe` for every answer, from few calls: each renders all messages up to that answer.

    Among answers with the same pieces around them, the first two, the last two and some between (at powers of two from
    either end) are probed. If those between agree, the rest are taken to be the same, else every answer is probed.

    Args:
        pieces_of: answer -> the pieces before and after it.
    """
    alike = defaultdict(list)
    for n, pieces in pieces_of.items():
        alike[pieces].append(n)
    found = {}
    for group in alike.values():
        size = len(group)
        inner = {
            group[k]
            for power in range(size.bit_length())
            for k in (1 << power, size - 1 - (1 << power))
            if 2 <= k < size - 2
        }
        found |= {n: probe(n) for n in {*group[:2], *group[-2:], *inner}}
        agree = len({found[n] for n in inner}) == 1
        found |= {n: found[min(inner)] if agree else probe(n) for n in group if n not in found}
    return found


def _trims(template: ChatTemplate, messages: list[Message], marks: list[str]) -> tuple:
    """What is trimmed off each content, left and right, in the order of the text."""
    blanks = _MARK.split(_render(template, messages, [f" \n\t{mark}\t\n " for mark in marks]))
    lines = _MARK.split(_render(template, messages, [f"{_LINES}{mark}{_LINES}" for mark in marks]))
    left = [_trimmed(a.endswith(" \n\t"), b.endswith(_LINES)) for a, b in zip(blanks[:-1], lines[:-1])]
    right = [_trimmed(a.startswith("\t\n "), b.startswith(_LINES)) for a, b in zip(blanks[1:], lines[1:])]
    return tuple(zip(left, right))


def _trimmed(keeps_blanks: bool, keeps_lines: bool) -> str | None:
    """What a template takes off one side of a content, by what it keeps of white space there."""
    return None if not keeps_blanks else "" if keeps_lines else "\n"


def _render(
    template: ChatTemplate, messages: list[Message], contents: list[str], generation_prompt: bool = False
) -> str:
    marked = [m if is_surrounding(m) else {**m, "content": content} for m, content in zip(messages, contents)]
    return template.render(marked, generation_prompt)
