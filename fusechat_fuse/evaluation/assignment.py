"""`assign`: which model answers which conversation: the one that is selected for its slice, as training selects it.

Written to the output directory: `NAME.jsonl` for each representation directory NAME, with the conversations that its
model is selected for (id, slice, messages), and `assignment.json`. What no representation holds stays with the pivot.
`answer --benchmark data` then lets a source answer its file; the pivot's file keeps the data's answers.

Other conversations, such as held-out ones, are divided by the same choice: a conversation belongs to the slice that it
names, or else to that of the most similar prompt (`prompt_clusters.nearest`).
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusechat_fuse.errors import InputError
from fusechat_fuse.evaluation.comparison import compare
from fusechat_fuse.evaluation.questions import as_lines
from fusechat_fuse.store.files import json_bytes, read_json, write_atomic
from fusechat_fuse.store.prompt_clusters import nearest
from fusechat_fuse.store.shards import load_representation
from fusechat_fuse.store.slices import SliceChoice, name_slices, names_by_pattern
from fusechat_fuse.text.conversations import Conversation, read_conversations

logger = logging.getLogger(__name__)
RESULT = "assignment.json"


def assign(
    representation_dirs: Sequence,
    conversations,
    output_dir,
    *,
    slice_column: str = "slice",
    slice_pattern: str | None = None,
    split: str = "train",
    limit: int | None = None,
    shuffle_seed: int | None = None,
    messages_column: str | None = None,
    strict: bool = False,
) -> dict[str, Any]:
    """Divide chat data among a pivot and its sources, by the model that is selected for each slice.

    Args:
        representation_dirs: directories that `represent` wrote on these conversations, the pivot's first; or the one
            that `assign` wrote on other conversations, whose choice is used.
        conversations: as `load_conversations` takes them. output_dir: is written anew.
        slice_column, slice_pattern: as `compare` takes them; by another's choice ids that do not match name no slice.
        split, limit, shuffle_seed, messages_column, strict: as `represent` takes them.
    Returns: what `assignment.json` holds: models (the directories' names), conversations (name -> number), slices (the
        choice's table, see `store.slices.SliceChoice`).
    Raises: InputError as `compare` does, and for directories of equal names.
    Source: this project (docs/method.md, "Answers by sources").
    """
    output, folders = Path(output_dir), [Path(place) for place in representation_dirs]
    reading = {"split": split, "limit": limit, "shuffle_seed": shuffle_seed, "messages_column": messages_column}
    found, _ = read_conversations(conversations, strict=strict, **reading)
    if len(folders) == 1 and (folders[0] / RESULT).exists():
        names, choice, slices = _by_earlier_choice(folders[0], found, slice_pattern)
    else:
        names, choice, slices = _by_representations(folders, found, slice_column, slice_pattern)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for one, name in zip(found, slices, strict=True):
        best = 0 if name is None else choice.of(name)
        row = {"id": one.id, "slice": (one.slice if name is None else name) or "", "messages": one.messages}
        rows[names[best]].append(row if best else {**row, "answered_by": "data"})
    output.mkdir(parents=True, exist_ok=True)
    for name, of_model in rows.items():
        write_atomic(output / f"{name}.jsonl", as_lines(of_model).encode())
    counts = {name: len(of_model) for name, of_model in rows.items()}
    result = {"models": names, "conversations": counts, "slices": choice.table}
    write_atomic(output / RESULT, json_bytes(result))
    return result


Assigned = tuple[list[str], SliceChoice, list[str | None]]  # models, choice, each conversation's slice (None: unknown)


def _by_representations(folders: list[Path], found: list[Conversation], column: str, pattern: str | None) -> Assigned:
    """The choice that `compare` makes of representations of the conversations."""
    names = [folder.name for folder in folders]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(
            f"representations for assign: expected directories of different names, got {twice[0]} twice. Rename one."
        )
    compared = compare(folders, slice_column=column, slice_pattern=pattern)
    pivot = load_representation(folders[0])
    own = name_slices(pivot, column=column, pattern=pattern)
    slice_of = dict(zip(zip(pivot.ids, pivot.column("content_hash")), own, strict=True))
    choice = SliceChoice(compared["choices"][-1]["table"])
    return names, choice, [slice_of.get((one.id, one.content_hash)) for one in found]


def _by_earlier_choice(folder: Path, found: list[Conversation], pattern: str | None) -> Assigned:
    """The choice of an earlier `assign`, and the slices of other conversations among its own."""
    earlier = read_json(folder / RESULT, "assignment")
    try:
        names, choice = earlier["models"], SliceChoice(earlier["slices"])
        known = [json.loads(line) for name in names for line in _lines_of(folder / f"{name}.jsonl")]
    except (OSError, LookupError, TypeError) as error:
        raise InputError(
            f"assignment for {folder}: expected what assign writes, got another directory. Run assign again."
        ) from error
    matched = [""] * len(found) if pattern is None else names_by_pattern([one.id for one in found], pattern)
    own: list[str | None] = [name or one.slice or "" for name, one in zip(matched, found)]
    known_names = set(choice.table) - {""}
    unnamed = [n for n, name in enumerate(own) if known_names and name not in known_names]
    places = nearest([_prompt(found[n].messages) for n in unnamed], [_prompt(row["messages"]) for row in known])
    for n, place in zip(unnamed, places, strict=True):
        own[n] = "" if place is None else known[place]["slice"]
    if unnamed:
        logger.info("%d of %d conversations take the slice of the most similar prompt", len(unnamed), len(found))
    return names, choice, own


def _lines_of(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").split("\n")[:-1]


def _prompt(messages: list[dict[str, Any]]) -> str:
    """The text before the first answer."""
    first = next(n for n, message in enumerate(messages) if message["role"] == "assistant")
    return "\n".join(message["content"] for message in messages[:first])
