"""Combining by slice: the best source serves all conversations of a slice, those with a wrong answer too.

The pivot is among those compared, so that the table says where no source should be fused; the rows are a source's all
the same, the best one's, and training decides by the table whether they are used.
"""

from __future__ import annotations

import numpy as np

from fusechat_fuse.store.cross_entropy import pivot_cross_entropy, source_cross_entropy
from fusechat_fuse.store.shards import Representation
from fusechat_fuse.store.slices import SliceChoice, choose_by_slice, name_slices

Places = list[tuple[int, int]]  # (directory, row) of one conversation


def choose_sources(
    parts: list[Representation], rows: list[Places], *, ce_unit: str, column: str, pattern: str | None
) -> tuple[list[str], SliceChoice]:
    """The slice of every conversation, and who serves which: 0 is the pivot, n + 1 the source of directory n.

    Args:
        parts: aligned or combined directories. rows: places of each conversation in them.
        ce_unit: token or byte. column, pattern: as `name_slices` takes them; clusters are those of the first directory,
            and a conversation it lacks is in none.
    """
    names = [name_slices(part, column=column, pattern=pattern) for part in parts[: 1 if column == "auto" else None]]
    slices = [next((names[n][i] for n, i in places if n < len(names)), "") for places in rows]
    ces = np.full((1 + len(parts), len(rows)), np.inf)
    for c, places in enumerate(rows):
        for n, i in places:
            row = parts[n][i]
            ces[0, c], ces[n + 1, c] = pivot_cross_entropy(row, ce_unit), source_cross_entropy(row, ce_unit)
    return slices, choose_by_slice(slices, ces)


def serving(choice: SliceChoice, name: str, places: Places) -> int:
    """Which of a conversation's places holds the best source of its slice."""
    medians = choice.medians(name)
    return int(np.argmin([medians[n + 1] for n, _ in places]))
