"""The messages of one row of chat data, whatever its shape, checked and cleaned.

Rules, each counted by its name and listed with the row:
- repaired: `leading_assistant` (messages before the first user message that an assistant wrote are left out),
  `trailing_user` (what follows the last answer is left out: nothing in it is predicted), `duplicate_id` (a second row
  of the same id becomes ID#2); left out as well: `tools`, `documents`, `images` (columns), `reasoning_content` (of a
  message), `system_column` (the messages have another system text); `weight` (neither 0 nor 1: taken as 1).
- skipped: `not_chat` (no known columns), `empty` (no message), `not_text` (a role or content that is no text),
  `lone_surrogate` (no valid Unicode), `unknown_role`, `system_not_first`, `repeated_role` (two users or two assistants
  in a row), `no_answer` (no assistant message that counts), `tool_calls` (an answer that is more than its text).
With `strict=True` each of them is an error that names file and row. Rows are counted from 0.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from fusechat_fuse.errors import InputError
from fusechat_fuse.store.files import short_digest

ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
}
SYSTEM_COLUMNS = ("system", "system_prompt")
LEFT_OUT_COLUMNS = {"tools": "tools", "functions": "tools", "documents": "documents", "images": "images"}
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
CALL_FIELDS = ("tool_calls", "function_call")
SLICE_COLUMNS = ("slice", "dataset", "source", "category")


class Unusable(InputError):
    """One conversation that cannot be used; `reason` is the rule's name, the text says what was found."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason

    def __reduce__(self):  # between processes
        return Unusable, (self.reason, str(self))


def content_hash(messages: list[dict[str, Any]]) -> str:
    """First 16 hexadecimal digits of the SHA-256 of the messages' roles and contents (and weights of 0)."""
    return short_digest(canonical_json(messages))


def canonical_json(messages: list[dict[str, Any]]) -> str:
    """Roles and contents (and weights of 0) as JSON in ASCII."""
    fields = [[m["role"], m["content"], *([0] if m.get("weight") == 0 else [])] for m in messages]
    return json.dumps(fields, ensure_ascii=True, separators=(",", ":"))


def _raw_messages(row: Any, column: str | None) -> list:
    """The row's messages as they are, whatever its shape."""
    if not isinstance(row, dict):
        raise Unusable("not_chat", f"expected an object, got {type(row).__name__}")
    there = [_listed(row[name]) for name in ([column] if column else ("messages", "conversations")) if name in row]
    if lists := [value for value in there if isinstance(value, list)]:
        return next((value for value in lists if value), [])
    if "prompt" in row and "completion" in row and not column:
        prompt, completion = _listed(row["prompt"]), _listed(row["completion"])
        asked = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        said = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
        return asked + said
    if "instruction" in row and "output" in row and not column:
        asked, more = row["instruction"], row.get("input")
        if more:
            asked = f"{asked}\n\n{more}" if isinstance(asked, str) and isinstance(more, str) else [asked, more]
        return [
            {"role": role, "content": content}
            for turn in [*_history(row.get("history")), (asked, row["output"])]
            for role, content in zip(("user", "assistant"), turn)
        ]
    columns = ", ".join(map(str, row)) or "none"
    known = "a column messages, conversations, prompt and completion, or instruction and output"
    expected = f"a list in column {column}" if column else known
    raise Unusable("not_chat", f"expected {expected}, got {columns}")


def _history(value: Any) -> list:
    """Earlier turns, pairs of question and answer, as LLaMA-Factory lays them beside Alpaca's columns."""
    turns = _listed("" if value is None else value)
    turns = [_listed(turn) for turn in turns] if isinstance(turns, list | str) else [turns]
    if not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise Unusable("not_chat", f"history: expected pairs of question and answer, got {value!r:.80}")
    return turns


def _listed(value: Any) -> Any:
    """A tuple or array as a list (data frames hold arrays), all else as it is."""
    return list(value) if isinstance(value, tuple | np.ndarray) else value


def _checked(position: int, message: Any) -> dict[str, Any]:
    """One message as {role, content, weight}."""
    if isinstance(message, dict) and message.get("role") is None:
        message = {**message, "role": message.get("from")}
    if not isinstance(message, dict) or not isinstance(message["role"], str):
        raise Unusable("not_text", f"message {position}: expected a role and a content, got {message!r:.80}")
    role = ROLES.get(message["role"].strip().lower())
    if role is None:
        known = ", ".join(ROLES)
        raise Unusable("unknown_role", f"message {position}: expected a role among {known}, got {message['role']!r}")
    if calls := next((name for name in CALL_FIELDS if message.get(name)), None):
        raise Unusable("tool_calls", f"message {position}: expected an answer of text alone, got {calls} as well")
    content = _text_of(position, message.get("value") if message.get("content") is None else message["content"])
    check_unicode(f"message {position}", content)
    weight = 0 if message.get("train") is False else message.get("weight")
    return {"role": role, "content": content, "weight": weight}


def check_unicode(what: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Unusable("lone_surrogate", f"{what}: character {error.start} is a lone surrogate") from error


def _text_of(position: int, content: Any) -> str:
    """A content that is text, or a list of text parts."""
    content = _listed(content)
    if isinstance(content, list):
        texts = [p.get("text") if isinstance(p, dict) and p.get("type", "text") == "text" else p for p in content]
        kept = [text for text in texts if isinstance(text, str)]
        if texts and len(kept) == len(texts):
            return "".join(kept)
        raise Unusable("not_text", f"message {position}: expected parts of text alone, got {content!r:.80}")
    if not isinstance(content, str):
        kind = type(content).__name__
        raise Unusable("not_text", f"message {position}: expected the content as a string, got {kind}")
    return content


def _with_system(row: dict, messages: list[dict], repairs: list[tuple[str, str]]) -> list[dict]:
    """The messages, after the system text of the row's own column if there is one and theirs is none or blank."""
    column = next((name for name in SYSTEM_COLUMNS if row.get(name)), None)
    if column is None:
        return messages
    text = row[column]
    rest = messages[messages[0]["role"] == "system" :]
    own = messages[0]["content"] if len(rest) < len(messages) else ""
    if not isinstance(text, str) or (own.strip() and text.strip() and own != text):
        got = "no text" if not isinstance(text, str) else "another text than the system message"
        repairs.append(("system_column", f"column {column} left out: it holds {got}"))
    elif text.strip():
        return [_checked(0, {"role": "system", "content": text}), *rest]
    return messages


def _left_out(row: dict, raw: list, messages: list[dict]) -> list[tuple[str, str]]:
    """Repairs: what of a row is not used, though a model might have seen it."""
    columns = [name for name in LEFT_OUT_COLUMNS if _listed(row.get(name)) not in (None, "", "[]", "{}", [], {})]
    repairs = [(LEFT_OUT_COLUMNS[name], f"column {name} left out") for name in columns]
    thought = [str(n) for n, message in enumerate(raw) if any(message.get(name) for name in REASONING_FIELDS)]
    if thought:
        repairs.append(("reasoning_content", f"reasoning of message {', '.join(thought)} left out"))
    weights = {n: message["weight"] for n, message in enumerate(messages) if message["role"] == "assistant"}
    if odd := {n: weight for n, weight in weights.items() if weight not in (None, 0, 1)}:
        repairs.append(("weight", f"weights by message {odd} taken as 1"))
    return repairs


def _plain(message: dict) -> dict[str, Any]:
    """{role, content}, and the weight of an answer that is not to be predicted."""
    weight = {"weight": 0} if message["role"] == "assistant" and message["weight"] == 0 else {}
    return {"role": message["role"], "content": message["content"], **weight}


def clean_messages(row: Any, column: str | None = None) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """The usable messages of one row and the repairs made to them.

    Args:
        row: one record of any shape read here. column: that holds the messages, where it has a name of its own.
    Returns: messages as {role, content} with roles system, user, assistant, and `weight` 0 where an answer is not to
        be predicted; [(rule, detail)] of repairs.
    Raises: Unusable naming the rule.
    """
    raw = _raw_messages(row, column)
    if not raw:
        raise Unusable("empty", "expected at least one message, got none")
    messages = [_checked(n, message) for n, message in enumerate(raw)]
    repairs = _left_out(row, raw, messages)
    messages = [_plain(message) for message in _with_system(row, messages, repairs)]
    head = messages[:1] if messages[0]["role"] == "system" else []
    body = messages[len(head) :]
    for n, message in enumerate(body):
        if message["role"] == "system":
            raise Unusable("system_not_first", f"message {n + len(head)}: expected system text first only")
    answers = [n for n, message in enumerate(body) if message["role"] == "assistant" and message.get("weight") != 0]
    if not answers:
        raise Unusable("no_answer", "expected an assistant message that counts, got none")
    first = next((n for n, message in enumerate(body) if message["role"] == "user"), len(body))
    if first > answers[-1]:
        got = "assistant messages alone" if first == len(body) else "none after the first user message"
        raise Unusable("no_answer", f"expected an answer to a user message, got {got}")
    if first:
        repairs.append(("leading_assistant", f"{first} message(s) before the first user message left out"))
    if left := len(body) - answers[-1] - 1:
        repairs.append(("trailing_user", f"{left} message(s) after the last answer left out"))
    body = body[first : answers[-1] + 1]
    for n in range(1, len(body)):
        if body[n]["role"] == body[n - 1]["role"]:
            raise Unusable("repeated_role", f"two {body[n]['role']} messages in a row (message {n + len(head)})")
    return head + body, repairs


def row_name(row: Any) -> str | None:
    given = row.get("id") if isinstance(row, dict) else None
    return str(given) if isinstance(given, str | int) and str(given).strip() else None


def slice_of(row: dict) -> str | None:
    named = (row.get(column) for column in SLICE_COLUMNS)
    return next((name for name in named if isinstance(name, str) and name), None)
