"""The messages of one row of chat data: found in any usual shape, checked and cleaned.

Rules, each counted by its name and listed with the row:
- repaired: `leading_assistant` (assistant messages before the first user message are left out), `trailing_user` (what
  follows the last answer is left out: nothing in it is predicted), `duplicate_id` (a second row of the same id becomes
  ID#2); left out as well: `tools` (where no message calls one), `documents`, `images` (columns), `reasoning_content`
  (of a message), `system_column`
  (the messages have another system text); `weight` (a mark of what is trained on that is neither true nor false:
  taken as true), `unknown_mark` (a field of an answer that looks like such a mark, and is not known); noted alone:
  `empty_answer` (an answer without text, at which an immediate end of turn is predicted).
- skipped: `not_chat` (no known columns), `empty` (no message), `not_text` (a role or content that is not text),
  `lone_surrogate` (not valid Unicode), `unknown_role`, `system_not_first`, `repeated_role` (two users or two assistants
  in a row), `no_answer` (no assistant message to be predicted), `no_question` (no user message, of prompts to be
  answered), `unwanted` (a completion whose `label` is false), `tool_calls` (a call without a name, or a tool's result
  that no call stands before).
With `strict=True` each of them is an error that names file and row. Rows are counted from 0.
"""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any

import numpy as np

from fusechat_fuse.errors import Unusable
from fusechat_fuse.store.files import short_digest
from fusechat_fuse.text.tools import FIELDS as TOOL_FIELDS
from fusechat_fuse.text.tools import as_texts, calls_tools, fields_of, tools_of, uses_tools

ROLES: dict[str, str] = dict.fromkeys(("user", "human"), "user")
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant")
ROLES |= dict.fromkeys(("system", "developer"), "system")
ROLES |= dict.fromkeys(("tool", "function"), "tool")
SYSTEM_COLUMNS = ("system", "system_prompt")
UNUSED_COLUMNS = {"tools": "tools", "functions": "tools", "documents": "documents", "images": "images"}
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
# fields of a message that say whether it is trained on: it is not where one is false (TRAINED) or true (MASKED)
TRAINED_FIELDS = ("weight", "train", "training", "trainable", "loss", "loss_weight", "loss_mask", "compute_loss")
MASKED_FIELDS = ("masked", "no_loss", "ignore_loss")
_LIKE_A_MARK = re.compile("train|loss|mask|weight|learn|supervis|ignore|exclude|skip")
_TRUTH = {"true": 1, "false": 0, "yes": 1, "no": 0, "1": 1, "0": 0, "1.0": 1, "0.0": 0}
SLICE_COLUMNS = ("slice", "dataset", "source", "category")


def content_hash(messages: list[dict[str, Any]]) -> str:
    """First 16 hexadecimal digits of the SHA-256 of the messages' roles and contents (weights of 0, tool calls)."""
    return short_digest(canonical_json(messages))


def canonical_json(messages: list[dict[str, Any]]) -> str:
    """Roles and contents as JSON in ASCII: [role, content], then 0 where the weight is 0, then the fields of tools."""
    fields = []
    for message in messages:
        more = {name: message[name] for name in TOOL_FIELDS if name in message}
        weight = [0] if message.get("weight") == 0 else []
        fields.append([message["role"], message["content"], *weight, *([more] if more else [])])
    return json.dumps(fields, ensure_ascii=True, separators=(",", ":"))


def message_of(role: str, content: str, *more: Any) -> dict[str, Any]:
    """A message of its fields in `canonical_json`."""
    message: dict[str, Any] = {"role": role, "content": content}
    for part in more:
        message |= part if isinstance(part, dict) else {"weight": part}
    return message


def is_answer(message: dict[str, Any]) -> bool:
    """Whether a message is a text answer to be predicted: not of weight 0, and not one that calls tools."""
    return message["role"] == "assistant" and message.get("weight") != 0 and not calls_tools(message)


def clean_messages(
    row: Any, column: str | None = None, prompts: bool = False
) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """The usable messages of one row and the repairs made to them.

    Args:
        row: one record of any shape read here. column: the column with the messages, if it has a name of its own.
        prompts: read what is to be answered: the messages up to the last user message; no answer is needed.
    Returns: messages as {role, content} with roles system, user, assistant, tool, `weight` 0 where an answer is not to
        be predicted, and the fields of tools (`tools.FIELDS`), the list of tools in the first; [(rule, detail)] of
        repairs.
    Raises: Unusable naming the rule.
    """
    row = as_python(row)
    raw = _raw_messages(row, column, prompts)
    if not raw:
        raise Unusable("empty", "expected at least one message, got none")
    messages = [_checked(n, message) for n, message in enumerate(raw)]
    repairs = _unused_parts(row, raw, messages)
    tools = tools_of(row, raw) if uses_tools(messages) else []
    messages = _in_order(_with_system(row, messages, repairs), repairs, prompts)
    for n, message in enumerate(messages):
        if is_answer(message) and not message["content"].strip():
            repairs.append(("empty_answer", f"message {n} is predicted: an end of turn after no text"))
    if tools and uses_tools(messages):
        messages[0] = {**messages[0], "tools": tools}
    return messages, repairs


def as_python(value: Any) -> Any:
    """Rows of data frames as Python's own values: arrays and tuples as lists, numpy's numbers as Python's, NaN and NA
    (a missing value) as None."""
    if isinstance(value, str):  # numpy's too
        return value
    if isinstance(value, dict):
        return {key: as_python(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [as_python(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    missing = (isinstance(value, float) and value != value) or type(value).__name__ == "NAType"
    return None if missing else value


def _raw_messages(row: Any, column: str | None, prompts: bool) -> list:
    """The messages of a row as they are, whatever its shape."""
    if not isinstance(row, dict):
        raise Unusable("not_chat", f"expected an object, got {type(row).__name__}")
    named = [row[name] for name in ([column] if column else ("messages", "conversations")) if name in row]
    if lists := [value for value in named if isinstance(value, list)]:
        return next((value for value in lists if value), [])
    if column is None and "prompt" in row and (prompts or "completion" in row):
        return _prompt_and_completion(row)
    if column is None and "instruction" in row and (prompts or "output" in row):
        return _alpaca(row)
    columns = ", ".join(map(str, row)) or "none"
    known = "a column messages, conversations, prompt and completion, or instruction and output"
    expected = f"a list in column {column}" if column else known
    raise Unusable("not_chat", f"expected {expected}, got {columns}")


def _prompt_and_completion(row: dict) -> list:
    """TRL's columns `prompt` and `completion`, each a text or a list of messages (KTO's: with a `label`)."""
    if row.get("label") is False:
        raise Unusable("unwanted", "label is false: expected a completion that is wanted")
    messages = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        value = row.get(column, [])
        messages += value if isinstance(value, list) else [{"role": role, "content": value}]
    return messages


def _alpaca(row: dict) -> list:
    """Alpaca's columns `instruction`, `input` and `output`, after LLaMA-Factory's `history`."""
    question, more = row["instruction"], row.get("input")
    if more:
        question = f"{question}\n\n{more}" if isinstance(question, str) and isinstance(more, str) else [question, more]
    history = [] if row.get("history") in (None, "") else row["history"]
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise Unusable("not_chat", f"history: expected pairs of question and answer, got {history!r:.80}")
    return [
        {"role": role, "content": content}
        for turn in [*history, (question, row.get("output", ""))]
        for role, content in zip(("user", "assistant"), turn)
    ]


def _checked(position: int, message: Any) -> dict[str, Any]:
    """One message as {role, content}, and weight 0 on an answer that is not to be predicted."""
    if isinstance(message, dict) and message.get("role") is None:
        message = {**message, "role": message.get("from")}
    if not isinstance(message, dict) or not isinstance(message["role"], str):
        raise Unusable("not_text", f"message {position}: expected a role and a content, got {message!r:.80}")
    role = ROLES.get(message["role"].strip().lower())
    if role is None:
        known = ", ".join(ROLES)
        raise Unusable("unknown_role", f"message {position}: expected a role among {known}, got {message['role']!r}")
    more = fields_of(position, message, role)
    content = message.get("value") if message.get("content") is None else message["content"]
    checked = {"role": role, "content": "" if content is None and more else _text_of(position, content), **more}
    for text in as_texts(checked).values():
        check_unicode(f"message {position}", text)
    return checked | ({"weight": 0} if role == "assistant" and _is_masked(message) else {})


def _is_masked(message: dict) -> bool:
    """Whether one of a message's fields says that it is not trained on."""
    off = any(_truth(message.get(name)) == 0 for name in TRAINED_FIELDS)
    return off or any(_truth(message.get(name)) == 1 for name in MASKED_FIELDS)


def _truth(value: Any) -> Any:
    """True and false in their usual spellings as 1 and 0, all else as it is."""
    return _TRUTH.get(value.strip().lower(), value) if isinstance(value, str) else value


def _looks_like_a_mark(name: str, value: Any) -> bool:
    """Whether a field may say whether its message is trained on."""
    return str(value).lower() in ("true", "false") or bool(value and _LIKE_A_MARK.search(name))


def check_unicode(what: str, text: str) -> None:
    """Raise Unusable for a text with a lone surrogate, which has no bytes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Unusable("lone_surrogate", f"{what}: character {error.start} is a lone surrogate") from error


def _text_of(position: int, content: Any) -> str:
    """A content that is text, or a list of text parts."""
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


def _unused_parts(row: dict, raw: list, messages: list[dict]) -> list[tuple[str, str]]:
    """Repairs: the parts of a row that are not used, though a model might have seen them."""
    unused = [name for name, rule in UNUSED_COLUMNS.items() if rule != "tools" or not uses_tools(messages)]
    columns = [name for name in unused if row.get(name) not in (None, "", "[]", "{}", [], {})]
    repairs = [(UNUSED_COLUMNS[name], f"column {name} left out") for name in columns]
    reasoning = [str(n) for n, message in enumerate(raw) if any(message.get(name) for name in REASONING_FIELDS)]
    if reasoning:
        repairs.append(("reasoning_content", f"reasoning of message {', '.join(reasoning)} left out"))
    known = (*TRAINED_FIELDS, *MASKED_FIELDS)
    for n, (message, fields) in enumerate(zip(messages, raw)):
        if message["role"] == "assistant" and "weight" not in message:
            odd = [f"{name} {fields[name]!r:.40}" for name in known if _truth(fields.get(name)) not in (None, 0, 1)]
            if odd:
                repairs.append(("weight", f"message {n}: {', '.join(odd)} taken as 1"))
            others = [(name, value) for name, value in fields.items() if name not in known]
            unknown = [name for name, value in others if _looks_like_a_mark(name, value)]
            if unknown:
                repairs.append(("unknown_mark", f"message {n} is predicted: {', '.join(unknown)} not understood"))
    return repairs


def _with_system(row: dict, messages: list[dict], repairs: list[tuple[str, str]]) -> list[dict]:
    """The messages, after the row's system column if they have no system text of their own."""
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


def _in_order(messages: list[dict], repairs: list[tuple[str, str]], prompts: bool) -> list[dict]:
    """The messages from the system's or first user's to the last answer (or prompt): users and assistants by turns, and
    after a call of tools their results."""
    head = messages[:1] if messages[0]["role"] == "system" else []
    body = messages[len(head) :]
    for n, message in enumerate(body):
        if message["role"] == "system":
            raise Unusable("system_not_first", f"message {n + len(head)}: expected a system message only at the start")
    users = [n for n, message in enumerate(body) if message["role"] == "user"]
    if prompts and not users:
        raise Unusable("no_question", "expected a user message to be answered, got none")
    answers = [n for n, message in enumerate(body) if is_answer(message)]
    if not answers and not prompts:
        got = "tool calls alone" if uses_tools(body) else "none"
        raise Unusable("no_answer", f"expected an assistant message to be predicted, got {got}")
    first, last = users[0] if users else len(body), (users if prompts else answers)[-1]
    if first > last:
        got = "assistant messages alone" if first == len(body) else "none after the first user message"
        raise Unusable("no_answer", f"expected an answer to a user message, got {got}")
    if first:
        repairs.append(("leading_assistant", f"{first} message(s) before the first user message left out"))
    if (left := len(body) - last - 1) and not prompts:
        repairs.append(("trailing_user", f"{left} message(s) after the last answer left out"))
    body = body[first : last + 1]
    for n, (before, message) in enumerate(pairwise(body), start=len(head) + 1):
        if message["role"] != "tool" and message["role"] == before["role"]:
            raise Unusable("repeated_role", f"two {message['role']} messages in a row (message {n})")
        if message["role"] == "tool" != before["role"] and not calls_tools(before):
            raise Unusable("tool_calls", f"message {n}: expected a tool's result after a tool call, got it after none")
    return head + body


def row_name(row: Any) -> str | None:
    """The id that a row gives itself, if any; a whole number as a table with gaps has it (7.0) is "7"."""
    given = as_python(row.get("id")) if isinstance(row, dict) else None
    given = int(given) if isinstance(given, float) and given.is_integer() else given
    return str(given) if isinstance(given, str | int) and str(given).strip() else None


def slice_of(row: dict) -> str | None:
    """The slice that a row names, by a text or a whole number (a label of `datasets`), if any."""
    named = (as_python(row.get(column)) for column in SLICE_COLUMNS)
    return next((str(name) for name in named if type(name) is int or (isinstance(name, str) and name)), None)
