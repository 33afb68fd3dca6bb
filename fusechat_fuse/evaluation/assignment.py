"""`assign`: which model answers which conversation: the one that is selected for its slice, as training selects it.

Written to the output directory: `NAME.jsonl` for each representation directory NAME, with the conversations that its
model is selected for (id, slice, messages), and `assignment.json`. What no representation holds stays with the pivot.
`answer --benchmark data` then lets a source answer its file; the pivot's file keeps the data's answers.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusechat_fuse.errors import InputError
from fusechat_fuse.evaluation.comparison import compare
from fusechat_fuse.evaluation.questions import as_lines
from fusechat_fuse.store.files import json_bytes, write_atomic
from fusechat_fuse.store.shards import load_representation
from fusechat_fuse.store.slices import SliceChoice, name_slices
from fusechat_fuse.text.conversations import read_conversations

logger = logging.getLogger(__name__)


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
        representation_dirs: directories that `represent` wrote on these conversations, the pivot's first.
        conversations: as `load_conversations` takes them. output_dir: is written anew.
        slice_column, slice_pattern: as `compare` takes them.
        split, limit, shuffle_seed, messages_column, strict: as `represent` takes them.
    Returns: what `assignment.json` holds: conversations (directory's name -> number), slices (the choice's table, see
        `store.slices.SliceChoice`).
    Raises: InputError as `compare` does, and for directories of equal names.
    Source: this project (docs/method.md, "Answers by sources").
    """
    names, output = [Path(place).name for place in representation_dirs], Path(output_dir)
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(
            f"representations for assign: expected directories of different names, got {twice[0]} twice. Rename one."
        )
    reading = {"split": split, "limit": limit, "shuffle_seed": shuffle_seed, "messages_column": messages_column}
    found, _ = read_conversations(conversations, strict=strict, **reading)
    compared = compare(representation_dirs, slice_column=slice_column, slice_pattern=slice_pattern)
    choice = SliceChoice(compared["choices"][-1]["table"])
    pivot = load_representation(representation_dirs[0])
    own = name_slices(pivot, column=slice_column, pattern=slice_pattern)
    slice_of = dict(zip(zip(pivot.ids, pivot.column("content_hash")), own, strict=True))
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for one in found:
        key = (one.id, one.content_hash)
        best = choice.of(slice_of[key]) if key in slice_of else 0
        row = {"id": one.id, "slice": slice_of.get(key, one.slice) or "", "messages": one.messages}
        rows[names[best]].append(row if best else {**row, "answered_by": "data"})
    output.mkdir(parents=True, exist_ok=True)
    for name, of_model in rows.items():
        write_atomic(output / f"{name}.jsonl", as_lines(of_model).encode())
    result = {"conversations": {name: len(of_model) for name, of_model in rows.items()}, "slices": choice.table}
    write_atomic(output / "assignment.json", json_bytes(result))
    return result
