"""The table of mappings: how each builds its map, makes its rows and accounts for them. A new mapping is a new entry.

Cheap to import (numpy alone), so that the command's help can list it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fusechat_fuse.alignment.candidate_outcomes import Fate, prefix_fates, single_id_fates
from fusechat_fuse.alignment.candidates import SourceStream, Stream, Vocabularies
from fusechat_fuse.alignment.correspondence import Correspondence
from fusechat_fuse.alignment.prefix import prefix_rows
from fusechat_fuse.alignment.single_id import single_id_rows
from fusechat_fuse.alignment.sparse_rows import Mapped
from fusechat_fuse.alignment.vocabulary_maps import AlignedCounts, exact_map, min_edit_map, statistics_map


@dataclass(frozen=True)
class Mapping:
    """One way from a source's candidates to the pivot's tokens.

    Attributes:
        name: as users write it.
        summary: a few words for `--help`.
        rows: makes the rows of a batch.
        fates: says of each candidate what became of it.
        to_pivot: builds the map from source id to pivot id (int32 [V_S], -1: none) from the bytes of the source's and
            the pivot's ids, the pivot's ids by their bytes, the counts if it needs them, and the number of threads;
            None: the rows need paths alone.
        kept_on_disk: building that map takes minutes.
        needs_counts: how often ids were aligned over the corpus decides.
        renormalised: rows sum to 1, and a position without an answer takes the one-hot row of the actual token.
    """

    name: str
    summary: str
    rows: Callable[[Stream, SourceStream, Correspondence, Vocabularies], Mapped]
    fates: Callable[[Stream, SourceStream, Correspondence, Vocabularies], list[list[Fate]]]
    to_pivot: Callable[[list, list, dict, AlignedCounts | None, int], np.ndarray] | None = None
    kept_on_disk: bool = False
    needs_counts: bool = False
    renormalised: bool = False


def _exact(source_bytes, pivot_bytes, by_bytes, counts: AlignedCounts | None, workers: int) -> np.ndarray:
    return exact_map(source_bytes, by_bytes)


def _min_edit(source_bytes, pivot_bytes, by_bytes, counts: AlignedCounts | None, workers: int) -> np.ndarray:
    return min_edit_map(source_bytes, by_bytes, workers=workers)


def _statistics(source_bytes, pivot_bytes, by_bytes, counts: AlignedCounts | None, workers: int) -> np.ndarray:
    assert counts is not None
    return statistics_map(source_bytes, pivot_bytes, by_bytes, counts)


def _paper(name: str, summary: str, to_pivot, **more) -> Mapping:
    return Mapping(name, summary, single_id_rows, single_id_fates, to_pivot, renormalised=True, **more)


MAPPINGS = {
    mapping.name: mapping
    for mapping in (
        _paper("exact", "EM", _exact),
        _paper("min_edit", "MinED", _min_edit, kept_on_disk=True),
        _paper("statistics", "MS, the paper's choice", _statistics, needs_counts=True),
        Mapping("prefix", "the source's own next-token probabilities", prefix_rows, prefix_fates),
    )
}
