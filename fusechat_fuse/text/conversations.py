"""Chat data of the usual shapes, read into one: an id and a list of {role, content} per conversation.

Read: ShareGPT (`conversations: [{from, value}]`), OpenAI / Hugging Face (`messages: [{role, content}]`), `prompt` and
`completion`; as .json, .jsonl, .parquet, a directory that `datasets` saved, a directory of such files, or a Hub name.

Rules, each counted by its name and listed with the row:
- repaired: `leading_assistant` (messages before the first user message that an assistant wrote are left out),
  `trailing_user` (what follows the last answer is left out: nothing in it is predicted), `duplicate_id` (a second row
  of the same id becomes ID#2).
- skipped: `not_chat` (no known columns), `empty` (no message), `not_text` (a role or content that is no string),
  `lone_surrogate` (no valid Unicode), `unknown_role`, `system_not_first`, `repeated_role` (two users or two assistants
  in a row), `no_answer` (no assistant message).
With `strict=True` each of them is an error that names file and row. Rows are counted from 0.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusechat_fuse.errors import InputError
from fusechat_fuse.text.data_files import data_rows

ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
}
SLICE_COLUMNS = ("slice", "dataset", "source", "category")
logger = logging.getLogger(__name__)


class Unusable(InputError):
    """One conversation that cannot be used; `reason` is the rule's name, the text says what was found."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


@dataclass
class Conversation:
    """One usable conversation: messages alternate user and assistant, perhaps after a system message, and end with an
    assistant; `content_hash` is the SHA-256 of the messages, its first 16 hexadecimal digits; `row` its place in the
    data."""

    id: str
    messages: list[dict[str, str]]
    content_hash: str
    slice: str | None = None
    row: int = -1


@dataclass
class ReadReport:
    """What happened to the rows of one data set: `skipped` and `repaired` hold {row, id, reason, detail} each; with
    `strict` nothing may happen to them."""

    name: str
    strict: bool = False
    rows: int = 0
    skipped: list[dict] = field(default_factory=list)
    repaired: list[dict] = field(default_factory=list)

    def note(self, action: str, row: int, name: str | None, reason: str, detail: str) -> None:
        """Count a row as one to `skip` or `repair`.

        Raises: InputError that names it, where the reading is strict.
        """
        if self.strict:
            raise InputError(
                f"conversation for {self.name}, row {row}: {detail} ({reason}). "
                f"Mend the row, or leave strict off to {action} it."
            )
        entries = {"skip": self.skipped, "repair": self.repaired}[action]
        entries.append({"row": row, "id": name, "reason": reason, "detail": detail})

    def counts(self) -> dict[str, Any]:
        """Rows read, and skipped and repaired ones by reason."""
        return {
            "rows": self.rows,
            "skipped": count_reasons(self.skipped),
            "repaired": count_reasons(self.repaired),
        }


def count_reasons(entries: list[dict]) -> dict[str, int]:
    """How often each `reason` is among the entries, by name."""
    return dict(sorted(Counter(entry["reason"] for entry in entries).items()))


def content_hash(messages: list[dict[str, str]]) -> str:
    """First 16 hexadecimal digits of the SHA-256 of the messages' roles and contents."""
    plain = json.dumps([[m["role"], m["content"]] for m in messages], ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(plain.encode()).hexdigest()[:16]


def _raw_messages(row: Any) -> list:
    """The row's messages as [{role, content}], whatever its shape; contents unchecked."""
    if not isinstance(row, dict):
        raise Unusable("not_chat", f"expected an object, got {type(row).__name__}")
    if isinstance(row.get("messages"), list):
        return row["messages"]
    if isinstance(row.get("conversations"), list):
        turns = row["conversations"]
        return [
            {"role": t.get("from", t.get("role")), "content": t.get("value", t.get("content"))}
            if isinstance(t, dict)
            else t
            for t in turns
        ]
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            return prompt + completion
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    columns = ", ".join(map(str, row)) or "none"
    raise Unusable("not_chat", f"expected a column messages, conversations, or prompt and completion, got {columns}")


def _checked(position: int, message: Any) -> dict[str, str]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise Unusable("not_text", f"message {position}: expected a role and a content, got {message!r:.80}")
    role, content = ROLES.get(message["role"].strip().lower()), message.get("content")
    if role is None:
        known = ", ".join(ROLES)
        raise Unusable("unknown_role", f"message {position}: expected a role among {known}, got {message['role']!r}")
    if not isinstance(content, str):
        kind = type(content).__name__
        raise Unusable("not_text", f"message {position}: expected the content as a string, got {kind}")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise Unusable("lone_surrogate", f"message {position}: character {error.start} is a lone surrogate") from error
    return {"role": role, "content": content}


def clean_messages(row: Any) -> tuple[list[dict[str, str]], list[tuple[str, str]]]:
    """The usable messages of one row and the repairs made to them.

    Args:
        row: one record of any shape read here.
    Returns: messages as {role, content} with roles system, user, assistant; [(rule, detail)] of repairs.
    Raises: Unusable naming the rule.
    """
    raw = _raw_messages(row)
    if not raw:
        raise Unusable("empty", "expected at least one message, got none")
    messages, repairs = [_checked(n, message) for n, message in enumerate(raw)], []
    head = messages[:1] if messages[0]["role"] == "system" else []
    body = messages[len(head) :]
    for n, message in enumerate(body):
        if message["role"] == "system":
            raise Unusable("system_not_first", f"message {n + len(head)}: expected system text first only")
    if not any(message["role"] == "assistant" for message in body):
        raise Unusable("no_answer", "expected an assistant message, got none")
    first = next((n for n, message in enumerate(body) if message["role"] == "user"), len(body))
    if first:
        if first == len(body):
            raise Unusable("no_answer", "expected an answer to a user message, got assistant messages alone")
        repairs.append(("leading_assistant", f"{first} message(s) before the first user message left out"))
        body = body[first:]
    last = max((n for n, message in enumerate(body) if message["role"] == "assistant"), default=-1)
    if last < 0:
        raise Unusable("no_answer", "expected an answer after the first user message, got none")
    if last + 1 < len(body):
        repairs.append(("trailing_user", f"{len(body) - last - 1} message(s) after the last answer left out"))
        body = body[: last + 1]
    for n in range(1, len(body)):
        if body[n]["role"] == body[n - 1]["role"]:
            raise Unusable("repeated_role", f"two {body[n]['role']} messages in a row (message {n + len(head)})")
    return head + body, repairs


def _row_name(row: Any) -> str | None:
    given = row.get("id") if isinstance(row, dict) else None
    return str(given) if isinstance(given, str | int) and str(given).strip() else None


def _slice_of(row: dict) -> str | None:
    named = (row.get(column) for column in SLICE_COLUMNS)
    return next((name for name in named if isinstance(name, str) and name), None)


def read_conversations(data, *, split: str = "train", strict: bool = False) -> tuple[list[Conversation], ReadReport]:
    """Like `load_conversations`, as a list, with the report of what was skipped and repaired and why.

    Args:
        data: path, Hub name, `datasets.Dataset`, or an iterable of rows.
    """
    named = isinstance(data, str | Path)
    report = ReadReport(str(data) if named else "the given rows", strict)
    found, seen = [], Counter()
    for number, row in enumerate(data_rows(str(data), split) if named else data):
        report.rows += 1
        name = _row_name(row)
        try:
            messages, repairs = clean_messages(row)
        except Unusable as problem:
            report.note("skip", number, name, problem.reason, str(problem))
            continue
        digest = content_hash(messages)
        name = name or digest
        seen[name] += 1
        if seen[name] > 1:
            repairs.append(("duplicate_id", f"{name!r} appears again"))
            name = f"{name}#{seen[name]}"
        for rule, detail in repairs:
            report.note("repair", number, name, rule, detail)
        found.append(Conversation(name, messages, digest, _slice_of(row), number))
    if not found:
        first = report.skipped[0] if report.skipped else None
        got = f"none (row {first['row']}: {first['detail']})" if first else "no rows"
        raise InputError(
            f"chat data for {report.name}: expected at least one usable conversation, got {got}. "
            "See the formats in the documentation of load_conversations."
        )
    if report.skipped or report.repaired:
        logger.warning("%s: %s", report.name, report.counts())
    return found, report


def load_conversations(path_or_name, *, split: str = "train", strict: bool = False):
    """Read chat data of any usual shape into one.

    Args:
        path_or_name: .json, .jsonl or .parquet file, directory (saved by `datasets`, or of such files), or Hub name.
        split: of a data set with several.
        strict: make every row that would be skipped or repaired an error that names file and row.
    Returns: `datasets.Dataset` with columns `id` (string; the given one, else a hash of the content), `messages` (list
        of {role, content}; system first if any, then user and assistant by turns, an answer last); where a row has one,
        `slice` (string or None: the row's own `slice`, `dataset`, `source` or `category`).
    Raises: InputError where nothing usable is found, the file cannot be read, or (strict) a row breaks a rule.
    """
    import datasets

    found, _ = read_conversations(path_or_name, split=split, strict=strict)
    text = datasets.Value("string")
    features = {"id": text, "messages": datasets.List({"role": text, "content": text})}
    if any(conversation.slice for conversation in found):
        features["slice"] = text
    columns = {key: [getattr(conversation, key) for conversation in found] for key in features}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))
