"""The dataset card (README.md) of a store, the parts that all cards share, and the names that reports show."""

from __future__ import annotations

import os
import re
from typing import Any

import yaml

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?")  # of a data set, its configuration
_WHAT = {
    "representation": "Top-{k} next-token distributions of **{model}**",
    "aligned": "Next-token distributions of **{source}** at the tokens and in the vocabulary of **{model}**",
    "combined": "Next-token distributions of several models, one for each conversation, at the tokens and in the "
    "vocabulary of **{model}**",
}


def is_hub_name(name: str) -> bool:
    """Whether a name of a model or data set is one of the Hub's."""
    return bool(_HUB_NAME.fullmatch(name)) and not os.path.exists(name)


def shown_name(name: str) -> str:
    """A Hub name as it is, a path by its last part: no path of one machine in a card."""
    return name if is_hub_name(name) else os.path.basename(os.path.abspath(name))


def distinct_names(models: list[str]) -> list[str]:
    """The last part of each model's name; equal ones are numbered from 1: chat#1, chat#2."""
    names = [model.rstrip("/").rpartition("/")[2] for model in models]
    return [f"{name}#{names[: n + 1].count(name)}" if names.count(name) > 1 else name for n, name in enumerate(names)]


def source_names(manifest: dict[str, Any]) -> list[str]:
    """The name of each source of aligned or combined data, as every report shows it."""
    sources = manifest.get("sources") or [manifest.get("source") or {}]
    return distinct_names([str(source.get("model") or "source") for source in sources])


def hub_data(names: list[str]) -> list[str]:
    """The Hub's data sets among the names of data, without their configurations."""
    return list(dict.fromkeys(name.partition(":")[0] for name in names if is_hub_name(name)))


def card_text(metadata: dict[str, Any], lines: list[str]) -> str:
    """Front matter and text of a card."""
    return "\n".join(["---", yaml.safe_dump(metadata, sort_keys=False).strip(), "---", "", *lines, ""])


def card_table(rows: dict[str, Any]) -> str:
    """Two columns in Markdown."""
    cells = [
        f"| {key} | {value:.4g} |" if isinstance(value, float) else f"| {key} | {value} |"
        for key, value in rows.items()
    ]
    return "\n".join(["| | |", "|---|---|", *cells])


def _entry(manifest: dict[str, Any], key: str, name: str) -> str | None:
    """An entry of an entry, which another writer may have left as a plain word."""
    found = manifest.get(key)
    return found.get(name) if isinstance(found, dict) else found


def dataset_card(manifest: dict[str, Any], columns: list[str]) -> str:
    """The card of a store directory, from its manifest; `datasets` and the Hub's viewer read the shards by it.

    Args:
        manifest: as it is written. columns: the fields of a stored row.
    """
    kind, data = manifest["kind"], manifest.get("datasets") or []
    model = shown_name(_entry(manifest, "model", "name") or "the pivot")
    source = shown_name(_entry(manifest, "source", "model") or "the source")
    options = manifest.get("options") or {}
    metadata: dict[str, Any] = {"tags": ["fusechat", kind], "task_categories": ["text-generation"]}
    if hub := hub_data(data):
        metadata["source_datasets"] = hub
    files = [{"split": "train", "path": "shard-*.arrow"}]
    metadata["configs"] = [{"config_name": "default", "data_files": files}]
    what = _WHAT[kind].format(k=options.get("top_k"), model=model, source=source)
    rows = {"data": ", ".join(data) or "rows given in Python", "template": _entry(manifest, "template", "name")}
    rows |= {"encoding": manifest["encoding"], **options, **manifest["counts"]}
    rows |= (manifest.get("certificate") or {}).get("all") or {}
    shown = {key.replace("_", " "): value for key, value in rows.items() if isinstance(value, str | int | float)}
    lines = [f"# {what.replace('**', '')}", "", f"{what} on chat data, written by fusechat ({kind}).", ""]
    lines += [card_table(shown), "", "## Use", "", "```python", "from fusechat_fuse import load_representation", ""]
    lines += ["row = load_representation('DIRECTORY')[0]  # a dict of numpy arrays", "```", ""]
    lines += [f"Columns as they are stored: {', '.join(columns)}.", ""]
    lines += [
        "The rows hold the tokens of the conversations: the licence of the data is that of what it was made from."
    ]
    return card_text(metadata, lines)
