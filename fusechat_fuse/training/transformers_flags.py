"""The flags of transformers' TrainingArguments, kept in a table: help and checks need no import of the Trainer (10 s).

`python -m fusechat_fuse.training.transformers_flags` writes the table anew, from the installed transformers.
"""

from __future__ import annotations

import dataclasses
import json
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fusechat_fuse.flags import Flag, as_phrase

TABLE = Path(__file__).with_suffix(".json")


def table_is_exact() -> bool:
    """Whether the table was made from the installed version of transformers."""
    return json.loads(TABLE.read_text(encoding="utf-8"))["transformers"] == version("transformers")


def kept_flags() -> list[Flag]:
    """The flags of the table."""
    rows = json.loads(TABLE.read_text(encoding="utf-8"))["flags"]
    return [Flag(**{**row, "choices": tuple(row.get("choices", ()))}) for row in rows]


def installed_flags() -> list[Flag]:
    """The flags of the installed transformers, as its own parser reads them from the fields."""
    from transformers import HfArgumentParser, TrainingArguments

    actions = HfArgumentParser([TrainingArguments], add_help=False)._actions  # pyright: ignore[reportArgumentType]
    of_field = {action.dest: action for action in reversed(actions)}  # the first of a name: not --no_NAME
    flags = [_flag(action) for action in reversed(of_field.values())]
    return [flag for flag in flags if flag is not None]


def _flag(action: Any) -> Flag | None:
    """A flag for an argument of HfArgumentParser; None for one that only Python can give."""
    kind = getattr(action.type, "__name__", "str").replace("string_to_bool", "bool").replace("<lambda>", "str")
    choices = tuple(action.choices or ())
    if isinstance(action.type, type) and issubclass(action.type, Enum):
        kind, choices = "str", tuple(member.value for member in action.type)
    if kind not in ("str", "int", "float", "bool"):
        return None
    default = action.default.value if isinstance(action.default, Enum) else action.default
    help_text = (action.help or "").replace("%(default)s", str(default)).replace("%%", "%")
    several = None if kind == "bool" else action.nargs
    return Flag(action.dest, as_phrase(help_text), kind, default, action.required, several, choices)


if __name__ == "__main__":
    plain = {field.name: field.default for field in dataclasses.fields(Flag)}
    rows = [{k: v for k, v in dataclasses.asdict(flag).items() if v != plain[k]} for flag in installed_flags()]
    lines = ",\n".join(json.dumps(row) for row in rows)
    TABLE.write_text(f'{{"transformers": "{version("transformers")}", "flags": [\n{lines}\n]}}\n', encoding="utf-8")
