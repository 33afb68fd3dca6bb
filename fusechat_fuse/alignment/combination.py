"""`combine`: several aligned sources become one, conversation by conversation.

    min_ce   the source with the lowest cross-entropy; of equal ones the first
    avg_ce   q = sum_j w_j q_j,   w_j = exp(-CE_j) / sum_i exp(-CE_i)
    min_ce_slice   for all conversations of a slice, the source with the lowest median CE over them

Combining is associative: a combination stands for its sources. For avg_ce a row keeps `source_log_weight` =
log sum_j exp(-CE_j), its weight when more sources are added; its `source_ce` is the weighted mean of the sources'.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from fusechat_fuse.alignment.slice_combination import choose_sources, serving
from fusechat_fuse.alignment.sparse_rows import add_up_equal_ids
from fusechat_fuse.errors import InputError
from fusechat_fuse.presets import or_preset
from fusechat_fuse.store.claim import first_difference
from fusechat_fuse.store.cross_entropy import CE_UNITS, source_cross_entropy
from fusechat_fuse.store.shards import Representation, ShardWriter, load_representation
from fusechat_fuse.store.tokenizers import copy_tokenizer

COMBINATIONS = ("min_ce", "avg_ce", "min_ce_slice")
SHARD = 256
_OF_SOURCE = ("source_ids", "source_probs", "source_token_ce", "mapped_mass", "label_tail", "source_ce", "source_bytes")
_OF_SOURCE += ("source_tokens", "source_index", "source_log_weight", "source_best_ce")
logger = logging.getLogger(__name__)


def combine(
    aligned_dirs,
    output_dir,
    *,
    function: str | None = None,
    ce_unit: str | None = None,
    preset: str = "fusechat",
    slice_column: str = "slice",
    slice_pattern: str | None = None,
) -> dict:
    """Combine representations of several sources that were aligned to one pivot.

    A combination can be combined again: adding one source to it equals combining all at once (for avg_ce to the
    float16 of the stored log-probabilities). A conversation that some sources lack is combined from
    the others. A repeated call goes on where a killed one stopped.

    Args:
        aligned_dirs: at least two directories that `align` or `combine` wrote, same pivot representation.
        output_dir: new, or an earlier start of the same run.
        function: min_ce, avg_ce or min_ce_slice (equations in the module's text); None: the preset's.
        ce_unit: token (nats per token of each source's own tokenizer, the paper) or byte (nats per byte of text,
            comparable between tokenizers); None: the preset's.
        preset: fusechat (min_ce_slice by byte) or paper (min_ce by token).
        slice_column, slice_pattern: for min_ce_slice, as `store.slices.name_slices` takes them; the rows' `slice`
            becomes the name that was used.

    Returns:
        The manifest that was written: `sources` names them, `taken` counts the conversations each one won (not avg_ce);
        a row's `source_index` [1] points into `sources` (-1: a mixture). Of min_ce_slice also `slices`: the table of
        medians, the pivot's first, and `slice_models`, whose they are.

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
    parts = _open_all(aligned_dirs, options)
    lists = [_sources(part) for part in parts]
    sources = [source for several in lists for source in several]
    _check_distinct(sources)
    offsets = np.cumsum([0, *(len(several) for several in lists)])
    rows = _join(parts)
    identity = {
        "options": options,
        "pivot": parts[0].manifest["pivot"],
        "sources": [_key(source) for source in sources],
    }
    writer = ShardWriter(output_dir, identity, kind="combined")
    copy_tokenizer(parts[0].path, writer.path)
    slices, choice = [], None
    if function == "min_ce_slice":
        slices, choice = choose_sources(parts, rows, ce_unit=ce_unit, column=slice_column, pattern=slice_pattern)
    shards = range(-(-len(rows) // SHARD))
    for shard in writer.left(shards):
        combined, taken = [], Counter()
        for c in range(shard * SHARD, min((shard + 1) * SHARD, len(rows))):
            candidates = [_numbered(parts[n][i], int(offsets[n])) for n, i in rows[c]]
            if choice is None:
                row = _combined(candidates, function, ce_unit)
            else:
                row = candidates[serving(choice, slices[c], rows[c])]
                row["slice"] = slices[c] or None
            taken[str(int(row["source_index"][0]))] += 1
            combined.append(row)
        writer.write(shard, combined, {"taken": dict(sorted(taken.items()))})
    taken = sum((Counter(writer.info(shard)["info"]["taken"]) for shard in shards), Counter())
    first = parts[0].manifest
    manifest = {
        **identity,
        "sources": sources,
        "taken": {name: taken[str(n)] for n, name in enumerate(source_names(sources))},
    }
    if choice is not None:
        own = (source_names(several)[0] if len(several) == 1 else None for several in lists)
        labels = [name or part.path.name for name, part in zip(own, parts)]
        manifest |= {"slices": choice.table, "slice_models": ["pivot", *labels]}
    manifest |= {key: first.get(key) for key in ("model", "datasets", "tokenizer", "template", "versions")}
    writer.finish(len(shards), manifest)
    return load_representation(writer.path).manifest


def source_names(sources: list[dict]) -> list[str]:
    """Names of a combination's sources, as `taken` has them; equal ones are told apart by their number."""
    names = [str(source.get("model")) for source in sources]
    return [name + (f" #{n}" if names.count(name) > 1 else "") for n, name in enumerate(names)]


def combination_lines(manifest: dict) -> list[str]:
    """A combination for a terminal: how much there is, and what each source gave."""
    options, counts = manifest["options"], manifest["counts"]
    lines = [
        f"{options['function']} by {options['ce_unit']} of {len(manifest['sources'])} sources: "
        f"{counts['conversations']} conversations, {counts['predicted_tokens']} predicted tokens"
    ]
    for n, name in enumerate(source_names(manifest["sources"])):
        taken = "mixed" if options["function"] == "avg_ce" else f"taken {manifest['taken'][name]} times"
        lines.append(f"source {n}: {name}, {taken}")
    return lines


def _check_distinct(sources: list[dict]) -> None:
    keys = [_key(source) for source in sources]
    twice = next((key for n, key in enumerate(keys) if key in keys[:n]), None)
    if twice is not None:
        raise InputError(
            f"sources for combine: expected each once, got {twice['model']} with the same mapping and data twice. "
            "Leave one out."
        )


def _key(source: dict) -> dict:
    return {name: source.get(name) for name in ("model", "model_fingerprint", "tokenizer", "data", "mapping")}


def _sources(part: Representation) -> list[dict]:
    """What is in an aligned or combined directory: one description a source."""
    manifest = part.manifest
    if manifest["kind"] == "combined":
        return manifest["sources"]
    options = manifest["options"]
    return [
        {
            **manifest["source"],
            "mapping": [options["mapping"], options["safe_only"], options.get("counts")],
            "certificate": manifest["certificate"]["all"],
        }
    ]


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
    return [part.check() for part in parts]


def _join(parts: list[Representation]) -> list[list[tuple[int, int]]]:
    """For each conversation, in the order of first sight: its (directory, row) places."""
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


def _numbered(row: dict[str, Any], offset: int) -> dict[str, Any]:
    index = row.get("source_index")
    index = np.zeros(1, np.int32) if index is None else np.asarray(index, np.int32)[:1]
    return row | {"source_index": np.where(index >= 0, index + offset, -1).astype(np.int32)}


def _combined(rows: list[dict], function: str, ce_unit: str) -> dict:
    """One conversation out of its rows from several sources."""
    ces = [source_cross_entropy(row, ce_unit) for row in rows]
    if function == "min_ce":
        return rows[int(np.argmin(np.where(np.isnan(ces), np.inf, ces)))]
    return average(rows, ces)


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
        "source_tokens": best["source_tokens"],
        "source_index": np.full(1, -1, np.int32),
        "source_log_weight": float(total),
        "source_best_ce": float(min(best_ce)),
    }
    return {key: value for key, value in rows[0].items() if key not in _OF_SOURCE} | mixed
