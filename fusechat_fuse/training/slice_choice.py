"""The choice by slice, made before training from the aligned data alone: one pass over them, none through a model.

The figures (conversations, median CE of pivot and source, who serves) are logged and kept with the target, and every
process comes to the same ones. Data that were combined by slice bring theirs in the manifest, over all sources.
"""

import logging
import math
import re
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np

from fusechat_fuse.errors import InputError
from fusechat_fuse.store.cross_entropy import pivot_cross_entropy, source_cross_entropy
from fusechat_fuse.store.shards import Representation
from fusechat_fuse.store.slices import SliceChoice, choose_by_slice, name_slices, names_by_pattern, undecided_lines
from fusechat_fuse.training.choice import require_columns
from fusechat_fuse.training.dataset import bounded, check_not_empty, each_of
from fusechat_fuse.training.rows import as_documented

logger = logging.getLogger(__name__)
MAX_SAMPLED_ROWS = 20_000  # of an iterable, which may have no end
SHARPNESS = {"token": 1.0, "byte": 4.0}  # b: a token is about four bytes, so both units weigh as AvgCE does per token


@dataclass(frozen=True)
class SourceBySlice:
    """The source's weight in the distribution of a conversation, by its slice: 0 where the pivot serves it, else
    exp(-b s) / (exp(-b s) + exp(-b p)) by the medians s of the slice's source and p of the pivot.

    sharpness: b, of SHARPNESS by the unit of the medians. names: (id, content hash) -> slice, of the training data;
    pattern: names others by their id; else the row's own column does. choice: 0 is the pivot, more a source.
    """

    choice: SliceChoice
    names: dict[tuple, str]
    sharpness: float
    pattern: str | None = None
    models: list[str] | None = None  # whose medians they are, where the data say it

    def __call__(self, row: dict) -> float:
        name = self._name(row)
        medians, best = self.choice.medians(name), self.choice.of(name)
        gap = min(medians[best] - medians[0], 0.0)
        return 1 / (1 + math.exp(self.sharpness * gap)) if best > 0 else 0.0

    def _name(self, row: dict) -> str:
        name = self.names.get((row["id"], row.get("content_hash")))
        if name is not None:
            return name
        if self.pattern is not None:
            found = re.search(self.pattern, row["id"])
            return (found[found.re.groups and 1] or "") if found else ""
        return row.get("slice") or ""


def source_by_slice(data, *, ce_unit: str, column: str = "slice", pattern: str | None = None) -> SourceBySlice:
    """Choose pivot or source for every slice of aligned data.

    Args:
        data: a Representation of aligned or combined data, or rows in another form, or a dict of these (which have no
            automatic slices); of an iterable without a length the first MAX_SAMPLED_ROWS rows.
        ce_unit: token or byte. column, pattern: as `store.slices.name_slices` takes them.
    Raises: InputError for a column or pattern that names nothing, or a row without a column that the CE needs.
    """
    keys, own, ces = [], [], []
    needed = ("ce", "source_ce", *(("start", "end") if ce_unit == "byte" else ()))
    check_not_empty(data)
    rows = chain.from_iterable(map(bounded, each_of(data)))
    for row in rows if hasattr(data, "__len__") else islice(rows, MAX_SAMPLED_ROWS):
        row = as_documented(row)
        require_columns(row, *needed)
        keys.append((row["id"], row.get("content_hash")))
        own.append(row.get("slice") or "")
        ces.append((pivot_cross_entropy(row, ce_unit), source_cross_entropy(row, ce_unit)))
    if isinstance(data, Representation):
        table = data.manifest.get("slices")
        if table is not None:  # chosen among all sources when they were combined, and the rows named so
            sharpness, models = SHARPNESS[data.manifest["options"]["ce_unit"]], data.manifest["slice_models"]
            return SourceBySlice(SliceChoice(table), dict(zip(keys, own)), sharpness, models=models)
        own = name_slices(data, column=column, pattern=pattern)
    elif pattern is not None:
        own = names_by_pattern([name for name, _ in keys], pattern, "the training data")
    elif column == "none":
        own = [""] * len(keys)
    elif column != "slice":
        raise InputError(
            f"slice_column for rows in Python: expected slice or none, got {column!r}. Use one of them, or train on a "
            "directory that align or combine wrote."
        )
    elif not any(own):
        logger.warning("No row names a slice, and slices are found in directories of align and combine alone.")
    return SourceBySlice(choose_by_slice(own, np.array(ces).T), dict(zip(keys, own)), SHARPNESS[ce_unit], pattern)


def format_slice_choice(chosen: SourceBySlice, models: list[str], ce_unit: str) -> str:
    """The choice for the log: one line per slice, with the medians in the order of the models (the pivot first)."""
    choice = chosen.choice
    lines = [f"slices by median cross-entropy, nats per {ce_unit} ({', '.join(models)}):"]
    for name, entry in choice.table.items():
        medians = ", ".join(f"{median:.4f}" for median in entry["medians"])
        lines.append(f"  {name or 'all'}: {medians} -> {models[entry['best']]}, {entry['conversations']} conversations")
    lines += [f"  {line}" for line in undecided_lines(choice.table)]
    if not any(entry["best"] for entry in choice.table.values()):
        lines.append("  no slice takes anything from a source: with the label as fallback this is plain fine-tuning")
    return "\n".join(lines)
