"""Chat data of the usual shapes, read into one: an id and a list of {role, content} per conversation.

Read: ShareGPT (`conversations: [{from, value}]`), OpenAI / Hugging Face (`messages: [{role, content}]`, a content may
be a list of text parts), `prompt` and `completion`, each beside a column `system` or `system_prompt`; from files,
directories, globs and Hub names (`data_files.py`). An answer of `weight` 0 (or `train` false) is context: nothing
in it is predicted.

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

import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fusechat_fuse.errors import InputError, check_integer
from fusechat_fuse.store.card import shown_name
from fusechat_fuse.store.files import short_digest
from fusechat_fuse.text.data_files import Source, data_sources
from fusechat_fuse.text.messages import Unusable, canonical_json, check_unicode, clean_messages, row_name, slice_of
from fusechat_fuse.text.spool import Spool

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Conversation:
    """One usable conversation; its messages stay on disk until they are asked for. `content_hash` is the SHA-256 of the
    messages, its first 16 hexadecimal digits; `row` its place in the data."""

    id: str
    content_hash: str
    slice: str | None
    row: int
    spool: Spool
    start: int
    size: int

    @property
    def messages(self) -> list[dict[str, Any]]:
        """They alternate user and assistant, perhaps after a system message, and end with an assistant; an answer that
        is not to be predicted has `weight` 0."""
        keys = ("role", "content", "weight")
        return [dict(zip(keys, fields)) for fields in self.spool.read(self.start, self.size)]


@dataclass
class ReadReport:
    """What happened to the rows of one data set: `skipped` and `repaired` hold {row, id, reason, detail} each; with
    `strict` nothing may happen to them. `begins` are the files and which row is the first of each; `data` the names of
    what was read, Hub names as they are and files by their last part."""

    name: str
    strict: bool = False
    rows: int = 0
    skipped: list[dict] = field(default_factory=list)
    repaired: list[dict] = field(default_factory=list)
    begins: list[tuple[str, int]] = field(default_factory=list)
    data: list[str] = field(default_factory=list)

    def note(self, action: str, row: int, name: str | None, reason: str, detail: str) -> None:
        """Count a row as one to `skip` or `repair`.

        Raises: InputError that names it, where the reading is strict.
        """
        if self.strict:
            file, first = next(((f, n) for f, n in reversed(self.begins) if n <= row), (self.name, 0))
            raise InputError(
                f"conversation for {file}, row {row - first}: {detail} ({reason}). "
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


def read_conversations(
    data,
    *,
    split: str = "train",
    strict: bool = False,
    limit: int | None = None,
    messages_column: str | None = None,
    shuffle_seed: int | None = None,
) -> tuple[list[Conversation], ReadReport]:
    """Like `load_conversations`, as a list, with the report of what was skipped and repaired and why.

    Args:
        data: path, glob, Hub name, several of them, `datasets.Dataset` or `DatasetDict`, or an iterable of rows.
    """
    if limit is not None:
        check_integer("limit for chat data", limit)
    if shuffle_seed is not None:
        check_integer("shuffle_seed for chat data", shuffle_seed, least=0)
    sources = _sources(data, split)
    named = [entry for entry in (data if isinstance(data, list | tuple) else [data]) if isinstance(entry, str | Path)]
    report = ReadReport(_name_of(data), strict, data=[shown_name(str(entry)) for entry in named])
    found, seen, spool = [], Counter(), Spool()
    for number, of_file, row in _numbered(sources, report):
        report.rows += 1
        name = row_name(row)
        try:
            messages, repairs = clean_messages(row, messages_column)
            check_unicode("id", name or "")
            check_unicode("slice", slice_of(row) or "")
        except Unusable as problem:
            report.note("skip", number, name, problem.reason, str(problem))
            continue
        fields = canonical_json(messages)
        digest = short_digest(fields)
        given = name = name or digest
        while name in seen:  # a given ID#2 may be there before the second ID is
            seen[given] += 1
            name = f"{given}#{seen[given]}"
        seen[name] += 1
        if name != given:
            repairs.append(("duplicate_id", f"{given!r} appears again"))
        for rule, detail in repairs:
            report.note("repair", number, name, rule, detail)
        named = slice_of(row) or of_file
        place = spool.append(fields)
        found.append(Conversation(name, digest, named and sys.intern(str(named)), number, spool, *place))
        if len(found) == limit and shuffle_seed is None:
            break
    if shuffle_seed is not None:
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


def _name_of(data) -> str:
    entries = data if isinstance(data, list | tuple) else [data]
    if not entries or not all(isinstance(entry, str | Path) for entry in entries):
        return "the given rows"
    return f"{entries[0]}" + (f" and {len(entries) - 1} more" if len(entries) > 1 else "")


def _sources(data, split: str) -> list[tuple[str | None, Source]]:
    """Sources of rows, each with the slice that its rows are of where they name none: of several files one each.

    Files that differ in their numbers alone (train-00001-of-00008) are parts of one.
    """
    several = isinstance(data, list | tuple) and len(data) > 1 and all(isinstance(e, str | Path) for e in data)
    if not several:
        return [(None, source) for source in data_sources(data, split)]
    names = {str(entry): re.sub(r"[-_.]*\d+([-_.]of[-_.]\d+)?$", "", Path(entry).name.split(".")[0]) for entry in data}
    one = len(set(names.values())) == 1
    return [(None if one else names[str(e)] or None, source) for e in data for source in data_sources(e, split)]


def _numbered(sources: list[tuple[str | None, Source]], report: ReadReport) -> Iterator[tuple[int, str | None, Any]]:
    """All rows with their numbers through all sources, and slices; the report learns where each source begins."""
    number = 0
    for of_file, (name, rows) in sources:
        report.begins.append((name, number))
        for row in rows:
            yield number, of_file, row
            number += 1


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
        path_or_name: .json, .jsonl, .ndjson (also .gz, .zst) or .parquet file, glob of such, directory (saved by
            `datasets`, of such files, or a clone of a Hub data set), Hub name (NAME:CONFIGURATION of one that has
            several); several of them in a list; a `DatasetDict`.
        split: of a data set with several; in a directory of files their names tell it.
        strict: make every row that would be skipped or repaired an error that names file and row.
        limit: read no further once so many usable conversations are found.
        shuffle_seed: shuffle by it before the limit counts; None: the first ones, in their order.
        messages_column: the column that holds the messages, where it is neither `messages` nor `conversations`.
    Returns: `datasets.Dataset` with columns `id` (string; the given one, else a hash of the content), `messages` (list
        of {role, content}; system first if any, then user and assistant by turns, an answer last; `weight`, 0 or none,
        where an answer is not to be predicted); where there is one, `slice` (string or None: the row's own `slice`,
        `dataset`, `source` or `category`, else, of several paths, the name of its file without numbers at the end).
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
    if any("weight" in each for conversation in found for each in conversation.messages):
        message["weight"] = datasets.Value("int32")
    features = {"id": text, "messages": datasets.List(message)}
    if any(conversation.slice for conversation in found):
        features["slice"] = text
    columns = {key: [getattr(conversation, key) for conversation in found] for key in features}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))
