"""The table of mappings: how each builds its vocabulary map and its rows. A new mapping is a new entry.

Imports numpy alone, so that the command's help can list the mappings quickly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fusechat_fuse.alignment.candidate_outcomes import Outcome, prefix_outcomes, single_id_outcomes
from fusechat_fuse.alignment.candidates import SourceStream, Stream, Vocabularies
from fusechat_fuse.alignment.correspondence import Correspondence
from fusechat_fuse.alignment.prefix import prefix_rows
from fusechat_fuse.alignment.single_id import single_id_rows
from fusechat_fuse.alignment.sparse_rows import Mapped
from fusechat_fuse.alignment.vocabulary_maps import AlignedCounts, exact_map, min_edit_map, statistics_map


@dataclass(frozen=True)
class Mapping:
    """One rule that maps a source's candidates to the pivot's tokens.

    to_pivot builds the map from source id to pivot id (int32 [V_S], -1: none) from the bytes of the source's and the
    pivot's ids, the pivot's ids by their bytes, the counts if it needs them, and the number of threads; None: the rows
    need no such map, only paths. Renormalised rows sum to 1, and a position without an answer is one-hot.
    """

    name: str  # the value of `--mapping`
    summary: str  # a few words for `--help`
    # the rows of a batch; for `inspect`, the pivot token that each candidate became, or the reason why none
    rows: Callable[[Stream, SourceStream, Correspondence, Vocabularies], Mapped]
    outcomes: Callable[[Stream, SourceStream, Correspondence, Vocabularies], list[list[Outcome]]]
    to_pivot: Callable[[list, list, dict, AlignedCounts | None, int], np.ndarray] | None = None
    kept_on_disk: bool = False  # whether the map is cached, since building it takes minutes
    needs_counts: bool = False  # whether the map depends on how often ids were aligned over the corpus
    renormalised: bool = False


def _paper(name: str, summary: str, to_pivot, **more) -> Mapping:
    return Mapping(name, summary, single_id_rows, single_id_outcomes, to_pivot, renormalised=True, **more)


MAPPINGS = {
    mapping.name: mapping
    for mapping in (
        _paper("exact", "EM", lambda source, pivot, by_bytes, counts, workers: exact_map(source, by_bytes)),
        _paper(
            "min_edit",
            "MinED",
            lambda source, pivot, by_bytes, counts, workers: min_edit_map(source, by_bytes, workers=workers),
            kept_on_disk=True,
        ),
        _paper(
            "statistics",
            "MS, the paper's choice",
            lambda source, pivot, by_bytes, counts, workers: statistics_map(source, pivot, by_bytes, counts),
            needs_counts=True,
        ),
        Mapping("prefix", "the source's own next-token probabilities", prefix_rows, prefix_outcomes),
    )
}
