"""Chat data of the usual shapes, read into one: an id and a list of {role, content} per conversation.

Read: ShareGPT (`conversations: [{from, value}]`), OpenAI / Hugging Face (`messages: [{role, content}]`, a content may
be a list of text parts, messages may call tools), `prompt` and `completion`, Alpaca (`instruction`, `input`, `output`,
`history`), each beside a column `system` or `system_prompt`; from files, directories, globs and Hub names
(`data_files.py`). The rules by which rows are repaired and skipped are in `messages.py`.
"""

from __future__ import annotations

import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fusechat_fuse.errors import InputError, check_integer
from fusechat_fuse.store.card import shown_name
from fusechat_fuse.store.files import short_digest
from fusechat_fuse.text.data_files import Source, data_sources, names_in
from fusechat_fuse.text.messages import (
    Unusable,
    as_python,
    canonical_json,
    check_unicode,
    clean_messages,
    message_of,
    row_name,
    slice_of,
)
from fusechat_fuse.text.spool import Spool
from fusechat_fuse.text.tools import FIELDS as TOOL_FIELDS
from fusechat_fuse.text.tools import as_texts

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Conversation:
    """One usable conversation. Its messages are kept on disk, in `spool`, and read when they are asked for.

    `content_hash`: first 16 hexadecimal digits of the SHA-256 of the messages. `row`: number of its row in the data.
    """

    id: str
    content_hash: str
    slice: str | None
    row: int
    spool: Spool
    start: int
    size: int

    @property
    def messages(self) -> list[dict[str, Any]]:
        """{role, content} each: perhaps a system message, then user and assistant by turns, an assistant last. An
        answer that is not to be predicted has `weight` 0. Calls of tools: see `text/tools.py`."""
        return [message_of(*fields) for fields in self.spool.read(self.start, self.size)]

    def __reduce__(self):  # for a user's own processes; the spool belongs to this one
        fields = (self.id, self.content_hash, self.slice, self.row, canonical_json(self.messages))
        return _unpickled, fields


@cache
def _spool_of_unpickled() -> Spool:
    return Spool()


def _unpickled(name: str, digest: str, slice_name: str | None, row: int, fields: str) -> Conversation:
    spool = _spool_of_unpickled()
    return Conversation(name, digest, slice_name, row, spool, *spool.append(fields))


@dataclass
class ReadReport:
    """What happened to the rows of one data set.

    `skipped`, `repaired`: {row, id, reason, detail} each; with `strict` both stay empty. `begins`: (file, number of its
    first row). `data`: names of what was read, Hub names as they are and files by their last part.
    """

    name: str
    strict: bool = False
    rows: int = 0
    skipped: list[dict] = field(default_factory=list)
    repaired: list[dict] = field(default_factory=list)
    begins: list[tuple[str, int]] = field(default_factory=list)
    data: list[str] = field(default_factory=list)

    def note(self, action: str, row: int, name: str | None, reason: str, detail: str) -> None:
        """Record a row to `skip` or `repair` (`action`). Raises: InputError that names the row if reading is strict."""
        if self.strict:
            file, first = next(((f, n) for f, n in reversed(self.begins) if n <= row), (self.name, 0))
            raise InputError(
                f"conversation for {file}, row {row - first}: {detail} ({reason}). "
                f"Correct the row, or leave strict off to {action} it."
            )
        entries = {"skip": self.skipped, "repair": self.repaired}[action]
        entries.append({"row": row, "id": name, "reason": reason, "detail": detail})

    def counts(self) -> dict[str, Any]:
        """Number of rows read, and of skipped and repaired ones by reason."""
        return {
            "rows": self.rows,
            "skipped": count_reasons(self.skipped),
            "repaired": count_reasons(self.repaired),
        }


def count_reasons(entries: list[dict]) -> dict[str, int]:
    """The number of entries of each `reason`."""
    return dict(sorted(Counter(entry["reason"] for entry in entries).items()))


def read_conversations(
    data,
    *,
    split: str = "train",
    strict: bool = False,
    limit: int | None = None,
    messages_column: str | None = None,
    shuffle_seed: int | None = None,
    prompts: bool = False,
) -> tuple[list[Conversation], ReadReport]:
    """Like `load_conversations`, as a list, with the report of what was skipped and repaired and why.

    Args:
        data: path, glob, Hub name, several of them, `datasets.Dataset` or `DatasetDict`, or an iterable of rows.
        prompts: read what is to be answered: the messages of a row up to its last user message.
    """
    if limit is not None:
        check_integer("limit for chat data", limit)
    if shuffle_seed is not None:
        check_integer("shuffle_seed for chat data", shuffle_seed, least=0)
    names = names_in(data)
    name = f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}" if names else "the given rows"
    report = ReadReport(name, strict, data=[shown_name(name) for name in names])
    usable = _usable(_sources(data, split), report, messages_column, prompts)
    if shuffle_seed is None:
        found = list(islice(usable, limit))
    else:
        found = list(usable)
        found = [found[n] for n in np.random.default_rng(shuffle_seed).permutation(len(found))[:limit]]
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


def _usable(sources, report: ReadReport, messages_column: str | None, prompts: bool) -> Iterator[Conversation]:
    """The usable conversations among the rows of all sources; the report learns of the others."""
    seen, spool = Counter(), Spool()
    for file_slice, number, row in _numbered(sources, report):
        name = row_name(row)
        try:
            messages, repairs = clean_messages(row, messages_column, prompts)
            check_unicode("id", name or "")
            check_unicode("slice", slice_of(row) or "")
        except Unusable as problem:
            report.note("skip", number, name, problem.reason, str(problem))
            continue
        fields = canonical_json(messages)
        digest = short_digest(fields)
        given = name or digest
        unique = _unique_id(given, seen)
        if unique != given:
            repairs.append(("duplicate_id", f"{given!r} appears again"))
        for rule, detail in repairs:
            report.note("repair", number, unique, rule, detail)
        slice_name = slice_of(row) or (None if row.get("slice") == "" else file_slice)
        start, size = spool.append(fields)
        yield Conversation(unique, digest, slice_name and sys.intern(str(slice_name)), number, spool, start, size)


def rows_of(data, found: list[Conversation], split: str = "train") -> list[dict[str, Any]]:
    """The rows of conversations as the data have them, with all their columns."""
    numbers = {one.row for one in found}
    rows = {number: row for _, number, row in _numbered(_sources(data, split), ReadReport("")) if number in numbers}
    return [as_python(rows[one.row]) for one in found]


def _unique_id(given: str, seen: Counter) -> str:
    """The id, or ID#2, ID#3, ... where it was seen before (a given ID#2 may come before the second ID does)."""
    name = given
    while name in seen:
        seen[given] += 1
        name = f"{given}#{seen[given]}"
    seen[name] += 1
    return name


def _sources(data, split: str) -> list[tuple[str | None, Source]]:
    """Sources of rows, each with the slice of those rows that name none: with several files, the file's name.

    Files whose names differ only in numbers (train-00001-of-00008) are one slice.
    """
    paths = names_in(data)
    slices = [re.sub(r"[-_.]*\d+([-_.]of[-_.]\d+)?$", "", Path(path).name.split(".")[0]) for path in paths]
    if len(set(slices)) < 2:
        return [(None, source) for source in data_sources(data, split)]
    return [(each or None, source) for path, each in zip(paths, slices) for source in data_sources(path, split)]


def _numbered(sources: list[tuple[str | None, Source]], report: ReadReport) -> Iterator[tuple[str | None, int, Any]]:
    """(slice of its file, number over all sources, row) of all rows; the report learns where each source begins."""
    for file_slice, (name, rows) in sources:
        report.begins.append((name, report.rows))
        for row in rows:
            report.rows += 1
            yield file_slice, report.rows - 1, row


def load_conversations(
    path_or_name,
    *,
    split: str = "train",
    strict: bool = False,
    limit: int | None = None,
    messages_column: str | None = None,
    shuffle_seed: int | None = None,
):
    """Read chat data of any usual shape into one.

    Args:
        path_or_name: .json, .jsonl, .ndjson (also .gz, .zst) or .parquet file, glob of such files, directory (saved by
            `datasets`, of such files, or a clone of a Hub data set), Hub name (NAME:CONFIGURATION if it has several);
            a list of these; a `DatasetDict`; rows.
        split: split to read; in a directory of files, their names say which split they belong to.
        strict: make every row that would be skipped or repaired an error that names file and row.
        limit: stop after this number of usable conversations.
        shuffle_seed: shuffle with this seed before `limit` is applied; None: keep the order of the data.
        messages_column: column with the messages, if neither `messages` nor `conversations`.
    Returns: `datasets.Dataset` with columns `id` (string; the given one, else a hash of the content), `messages` (list
        of {role, content}; system first if any, then user and assistant by turns, an answer last; `weight` 0 on an
        answer that is not to be predicted, else none; where tools are called, `tool_calls` and, in the first message,
        `tools` as JSON texts, and `tool_call_id` and `name` of results); if any row has one, `slice` (string or None:
        the row's own `slice`, `dataset`, `source` or `category`, else, of several paths, the file's name without
        trailing numbers; the `slice` "" names none).
    Raises: InputError where nothing usable is found, the file cannot be read, or (strict) a row breaks a rule.
    """
    import datasets

    found, _ = read_conversations(
        path_or_name,
        split=split,
        strict=strict,
        limit=limit,
        messages_column=messages_column,
        shuffle_seed=shuffle_seed,
    )
    text = datasets.Value("string")
    message = {"role": text, "content": text}
    messages = [conversation.messages for conversation in found]
    present = {name for each in messages for one in each for name in one}
    message |= {name: text for name in TOOL_FIELDS if name in present}
    if "weight" in present:
        message["weight"] = datasets.Value("int32")
    features = {"id": text, "messages": datasets.List(message)}
    if any(conversation.slice for conversation in found):
        features["slice"] = text
    columns = {key: [getattr(conversation, key) for conversation in found] for key in features}
    columns["messages"] = [[as_texts(one) for one in each] for each in messages]
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))
