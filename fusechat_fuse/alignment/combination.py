"""`combine`: several aligned sources become one, conversation by conversation.

    min_ce         the source with the lowest cross-entropy; of equal ones the first
    avg_ce         q = sum_j w_j q_j,   w_j = exp(-CE_j) / sum_i exp(-CE_i)
    min_ce_slice   for all conversations of a slice, the source with the lowest median CE over them

Combining is associative: a combination stands for its sources. For avg_ce a row keeps `source_log_weight` =
log sum_j exp(-CE_j), its weight when more sources are added; its `source_ce` is the weighted mean of the sources'.

min_ce_slice compares the pivot too, so that the table of medians shows where no source should be fused. The rows are
the best source's even there; training decides by the table whether it uses them.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from fusechat_fuse.alignment.sparse_rows import add_up_equal_ids
from fusechat_fuse.errors import InputError
from fusechat_fuse.presets import or_preset
from fusechat_fuse.store.card import source_names
from fusechat_fuse.store.claim import first_difference
from fusechat_fuse.store.cross_entropy import CE_UNITS, pivot_cross_entropy, source_cross_entropy
from fusechat_fuse.store.shard_writer import ShardWriter, shard_ranges
from fusechat_fuse.store.shards import Representation, load_representation
from fusechat_fuse.store.slices import SliceChoice, choose_by_slice, name_slices, own_slices, undecided_lines
from fusechat_fuse.store.tokenizers import copy_tokenizer

COMBINATIONS = ("min_ce", "avg_ce", "min_ce_slice")
logger = logging.getLogger(__name__)


def combine(
    aligned_dirs: Sequence[str | Path],
    output_dir: str | Path,
    *,
    function: str | None = None,
    ce_unit: str | None = None,
    preset: str = "fusechat",
    slice_column: str = "slice",
    slice_pattern: str | None = None,
) -> dict:
    """Combine representations of several sources that were aligned to one pivot.

    A combination can be combined again: adding one source to it equals combining all at once (for avg_ce up to the
    float16 of the stored log-probabilities). A conversation that some sources lack is combined from the others. A
    repeated call continues an interrupted one.

    Args:
        aligned_dirs: at least two directories that `align` or `combine` wrote, of the same pivot representation.
        output_dir: new, or an earlier start of the same run.
        function: min_ce, avg_ce or min_ce_slice (equations in the module's docstring); None: the preset's.
        ce_unit: token (nats per token of each source's own tokenizer, the paper) or byte (nats per byte of text,
            comparable between tokenizers); None: the preset's.
        preset: fusechat (min_ce_slice by byte) or paper (min_ce by token).
        slice_column, slice_pattern: for min_ce_slice, as in `store.slices.name_slices`; the name that was used becomes
            the rows' `slice`.

    Returns:
        The manifest that was written: `sources` describes them, `taken` counts the conversations taken from each (none
        for avg_ce); a row's `source_index` [1] points into `sources` (-1: a mixture). For min_ce_slice also `slices`,
        the table of `store.slices.SliceChoice`, and `slice_models`, the models of its medians, the pivot first.

    Raises:
        InputError: fewer than two directories, another pivot, another function in an earlier combination.

    Source: FuseChat (arXiv 2408.07990) section 3.2 (MinCE), FuseLLM (arXiv 2401.10491) equation 7 (AvgCE).
    """
    function, ce_unit = or_preset(preset, combination=function, ce_unit=ce_unit).values()
    if function not in COMBINATIONS:
        raise InputError(f"value for function: expected one of {', '.join(COMBINATIONS)}, got {function!r}. Use one.")
    if ce_unit not in CE_UNITS:
        raise InputError(f"value for ce_unit: expected {' or '.join(CE_UNITS)}, got {ce_unit!r}. Use one of them.")
    options = {"function": function, "ce_unit": ce_unit}
    if function == "min_ce_slice":
        options |= {"slice_column": slice_column, "slice_pattern": slice_pattern}
    combination = Combination(_open_all(aligned_dirs, options), options)
    writer = ShardWriter(output_dir, combination.identity, kind="combined")
    copy_tokenizer(combination.parts[0], writer.path)
    shards = shard_ranges(len(combination.places))
    for shard in writer.left(range(len(shards))):
        rows = [combination.row(c) for c in shards[shard]]
        taken = Counter(str(int(row["source_index"][0])) for row in rows)
        writer.write(shard, rows, {"taken": dict(sorted(taken.items()))})
    infos = [writer.info(shard)["info"] for shard in range(len(shards))]
    writer.finish(len(shards), combination.manifest(sum((Counter(info["taken"]) for info in infos), Counter())))
    return load_representation(writer.path).manifest


def _open_all(aligned_dirs, options: dict) -> list[Representation]:
    if isinstance(aligned_dirs, str | Path) or len(aligned_dirs) < 2:
        raise InputError(
            f"aligned directories for combine: expected at least two, got {aligned_dirs!r}. "
            "One aligned directory needs no combining: train on it."
        )
    parts = [load_representation(path) for path in aligned_dirs]
    for part in parts:
        kind, first = part.manifest["kind"], parts[0]
        if kind not in ("aligned", "combined"):
            raise InputError(
                f"data for {part.path}: expected aligned or combined, got a {kind}. Run align on it first."
            )
        if part.manifest["pivot"] != first.manifest["pivot"]:
            raise InputError(
                f"pivot for {part.path}: expected that of {first.path}, got another pivot representation. "
                "Align all sources to one pivot representation."
            )
        if kind == "combined" and (difference := first_difference(part.manifest["options"], options)):
            raise InputError(
                f"combination for {part.path}: expected one made with the same options, got {difference}. Use the same."
            )
    for part in parts:
        source_cross_entropy(part.check()[0], options["ce_unit"])
    return parts


def _sources(part: Representation) -> list[dict]:
    """One description for each source of an aligned or combined directory."""
    if part.manifest["kind"] == "combined":
        return part.manifest["sources"]
    options, certificate = part.manifest["options"], part.manifest["certificate"]["all"]
    mapping = [options["mapping"], options["safe_only"], options.get("counts")]
    return [{**part.manifest["source"], "mapping": mapping, "certificate": certificate}]


def _places(parts: list[Representation]) -> list[list[tuple[int, int]]]:
    """(directory, row) of each conversation in each directory that holds it, in the order of its first occurrence."""
    places, seen = defaultdict(list), defaultdict(Counter)
    for n, part in enumerate(parts):
        for i, key in enumerate(zip(part.ids, part.column("content_hash"))):
            occurrence = seen[n][key]
            seen[n][key] += 1
            places[(*key, occurrence)].append((n, i))
    lacking = sum(len(found) < len(parts) for found in places.values())
    if lacking:
        logger.warning("%d of %d conversations are not in every directory.", lacking, len(places))
    return list(places.values())


class Combination:
    """The work of one run of `combine`: aligned or combined directories, and the options that decide the content."""

    def __init__(self, parts: list[Representation], options: dict):
        self.parts, self.options = parts, options
        sources = [_sources(part) for part in parts]
        self.sources = list(chain.from_iterable(sources))
        self.offsets = np.cumsum([0, *map(len, sources[:-1])]).tolist()  # where the sources of each part begin
        names = ("model", "model_fingerprint", "tokenizer", "data", "mapping")
        keys = [{name: source.get(name) for name in names} for source in self.sources]
        if twice := next((key for n, key in enumerate(keys) if key in keys[:n]), None):
            raise InputError(
                f"sources for combine: expected each once, got {twice['model']} with the same mapping and data twice. "
                "Leave one out."
            )
        self.identity = {"options": options, "pivot": parts[0].manifest["pivot"], "sources": keys}
        self.places = _places(parts)
        self.slices = self._slices() if options["function"] == "min_ce_slice" else []

    def _slices(self) -> list[str]:
        """The slice of every conversation; clusters (auto) are found in the first directory, and a conversation that
        it lacks belongs to none."""
        column, pattern = self.options["slice_column"], self.options["slice_pattern"]
        names = [own_slices(part) for part in self.parts]
        if pattern is not None:
            names = [name_slices(part, pattern=pattern) for part in self.parts]
        elif column != "slice" or not any(map(any, names)):
            names = [name_slices(self.parts[0], column=column)]
        return [next(filter(None, (names[n][i] for n, i in found if n < len(names))), "") for found in self.places]

    @cached_property
    def choice(self) -> SliceChoice | None:
        """The best model of each slice, for min_ce_slice: 0 is the pivot, n + 1 the source of directory n."""
        if self.options["function"] != "min_ce_slice":
            return None
        ces, ce_unit = np.full((1 + len(self.parts), len(self.places)), np.inf), self.options["ce_unit"]
        for c, places in enumerate(self.places):
            for n, i in places:
                row = self.parts[n][i]
                ces[0, c], ces[n + 1, c] = pivot_cross_entropy(row, ce_unit), source_cross_entropy(row, ce_unit)
        return choose_by_slice(self.slices, ces)

    def row(self, c: int) -> dict:
        """The combined row of conversation number c."""
        places, ce_unit = self.places[c], self.options["ce_unit"]
        if self.choice is not None:
            medians = self.choice.medians(self.slices[c])
            best = places[int(np.argmin([medians[n + 1] for n, _ in places]))]
            return self._numbered(*best) | {"slice": self.slices[c] or None}
        rows = [self._numbered(n, i) for n, i in places]
        ces = [source_cross_entropy(row, ce_unit) for row in rows]
        if self.options["function"] == "min_ce":
            return rows[int(np.argmin(np.where(np.isnan(ces), np.inf, ces)))]
        return average(rows, ces)

    def _numbered(self, n: int, i: int) -> dict[str, Any]:
        """Row i of directory n, with `source_index` pointing into the sources of all directories."""
        row = self.parts[n][i]
        index = row.get("source_index")
        index = np.zeros(1, np.int32) if index is None else np.asarray(index, np.int32)[:1]
        return row | {"source_index": np.where(index >= 0, index + self.offsets[n], -1).astype(np.int32)}

    def manifest(self, taken: Counter) -> dict:
        """The manifest, from how often each source was taken."""
        names, pivot = source_names({"sources": self.sources}), self.parts[0].manifest
        made = self.identity | {"sources": self.sources, "taken": {name: taken[str(n)] for n, name in enumerate(names)}}
        if self.choice is not None:
            own = zip(self.parts, self.offsets, [*self.offsets[1:], len(names)])
            labels = [names[first] if end - first == 1 else part.path.name for part, first, end in own]
            made |= {"slices": self.choice.table, "slice_models": ["pivot", *labels]}
        return made | {key: pivot.get(key) for key in ("model", "datasets", "tokenizer", "template", "versions")}


def average(rows: list[dict], ces: list[float]) -> dict:
    """The avg_ce mixture of one conversation's rows.

    Args:
        rows: aligned or combined rows of the same pivot tokens, borrowed.
        ces: CE_j of each; ignored for a row that has a `source_log_weight` of its own. A row without a CE (NaN: no
            text to count bytes of) is left out; if none has one, all weigh the same.

    Returns:
        A row: union of ids with mixed probabilities, mixed `mapped_mass`; `source_token_ce` of the mixture;
        `source_bytes` and `source_tokens` of the source with the lowest CE.
    """
    known = [n for n, ce in enumerate(ces) if not np.isnan(ce)]
    rows, ces = ([rows[n] for n in known], [ces[n] for n in known]) if known else (rows, [0.0] * len(rows))
    log_weight = np.array([row.get("source_log_weight", -ce) for row, ce in zip(rows, ces)], np.float64)
    total = np.logaddexp.reduce(log_weight)
    w = np.exp(log_weight - total)  # [M] of M rows

    def mean(values):
        total = 0.0
        for share, value in zip(w, values):
            total = total + share * value
        return total

    best_ce = [row.get("source_best_ce", ce) for row, ce in zip(rows, ces)]
    best = rows[int(np.argmin(best_ce))]
    ids = np.concatenate([row["source_ids"] for row in rows], axis=1)
    probs = np.concatenate([share * row["source_probs"] for share, row in zip(w, rows)], axis=1).astype(np.float64)
    add_up_equal_ids(ids, probs)
    with np.errstate(divide="ignore"):
        token = -np.log(mean(np.exp(-row["source_token_ce"].astype(np.float64)) for row in rows))
    mixed = {
        "source_ids": ids,
        "source_probs": probs.astype(np.float32),
        "source_token_ce": token.astype(np.float32),
        "mapped_mass": np.asarray(mean(row["mapped_mass"].astype(np.float64) for row in rows)).astype(np.float16),
        "source_ce": float(mean(row["source_ce"] for row in rows)),
        "source_bytes": best["source_bytes"],
        "source_tokens": best.get("source_tokens"),
        "source_index": np.full(1, -1, np.int32),
        "source_log_weight": float(total),
        "source_best_ce": float(min(best_ce)),
    }
    return {key: value for key, value in rows[0].items() if key != "label_tail"} | mixed


def combination_lines(manifest: dict) -> list[str]:
    """A combination for a terminal: how much there is, and what each source gave."""
    options, counts = manifest["options"], manifest["counts"]
    lines = [
        f"{options['function']} by {options['ce_unit']} of {len(manifest['sources'])} sources: "
        f"{counts['conversations']} conversations, {counts['predicted_tokens']} predicted tokens"
    ]
    for n, name in enumerate(source_names(manifest)):
        taken = "mixed" if options["function"] == "avg_ce" else f"taken {manifest['taken'][name]} times"
        lines.append(f"source {n}: {name}, {taken}")
    return lines + undecided_lines(manifest.get("slices", {}))
