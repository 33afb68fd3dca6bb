"""Distributions that others made, as a representation or an aligned directory: those that were published with FuseChat
and FuseLLM, DistillKit's captures (`distillkit.py`) and stored answers of servers (`answer_lines.py`).

FuseChat's and FuseLLM's released data are `datasets` directories of rows, padded or not: `input_ids`,
`attention_mask`, `labels` and, for every position t, the ten largest logits for token t + 1 (`per_step_logits`,
`per_step_indices`), with the conversation's mean cross-entropy (`metric_ce`) or every token's (`per_step_metric_ce`).
After their alignment also a source's over the pivot's tokens: FuseChat's `fused_per_step_logits`,
`fused_per_step_indices` and `fused_metric_ce` (or `per_step_fused_metric_ce`), FuseLLM's
`per_step_aligned_logits_N`, `per_step_aligned_indices_N` and `metric_ce_aligned_N` (or
`per_step_metric_ce_aligned_N`) of source number N. No text and, mostly, no normaliser: conversations are rebuilt from
the ids, and one that is not rendered to the very same ids again is left out; log-probabilities are exact where
`per_step_metric_ce` gives the cross-entropy of a listed token, and renormalised over the ten elsewhere, as the released
training takes them.

FuseLLM's plain text (template `text`) becomes the answer to an empty message.

Shape letters: T tokens, P predicted tokens, K entries.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from fusechat_fuse.capture.answer_lines import AnswerLines
from fusechat_fuse.capture.captured_rows import CapturedRows
from fusechat_fuse.capture.computation import write_representation
from fusechat_fuse.capture.distillkit import DistillKit
from fusechat_fuse.capture.imported_rows import ImportedRows, key_of
from fusechat_fuse.capture.manifest import Capture
from fusechat_fuse.capture.released_rows import FUSED, PIVOT, Columns, ReleasedRows
from fusechat_fuse.errors import InputError, check_integer
from fusechat_fuse.models.files import load_fast_tokenizer, model_file
from fusechat_fuse.models.identity import Identity
from fusechat_fuse.processes import Process
from fusechat_fuse.store.files import read_json, short_digest
from fusechat_fuse.store.shard_writer import ROWS_PER_SHARD, ShardWriter
from fusechat_fuse.store.shards import Representation
from fusechat_fuse.text.chat import ConversationEncoder
from fusechat_fuse.text.conversations import read_conversations
from fusechat_fuse.text.templates import resolve_template

logger = logging.getLogger(__name__)
_LINES = re.compile(r"\.(json|jsonl|ndjson)(\.gz|\.zst)?$")
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow file in the stream format
_NUMBERED = re.compile(r"(?:per_step_aligned_(?:logits|indices)|(?:per_step_)?metric_ce_aligned)_(\d+)")
TOKENS = ("input_ids", "attention_mask", "labels")


def import_released(
    released: str | Path | list[str],
    model_name_or_path: str | Path,
    output_dir: str | Path,
    *,
    template: str = "native",
    source_number: int | None = None,
    top_k: int = 10,
    max_length: int = 2048,
    shard_size: int = ROWS_PER_SHARD,
    encoding: str = "plain",
    trust_remote_code: bool = False,
) -> Representation:
    """Make distributions of others a representation or, where they hold a source's columns, an aligned directory.

    Captures hold log-probabilities, which are kept as they are; where a DistillKit capture lists no entry of the actual
    token, its ce is that of the last entry. Released data hold logits. Per predicted token t with logits z (K largest
    of row t - 1): log p = z - n, n = z_y + ce_y where the actual token y is among the K and its ce is known, else n =
    log sum exp z. Where ce is unknown it is -log p_y, or -log p of the last entry where y is not listed, times one
    number for the conversation that makes the mean `metric_ce`.

    Args:
        released: `datasets` directories (`save_to_disk`), all splits of each; Parquet files of a DistillKit capture, or
            their directory, with its compression_config.yaml; JSON lines of servers' answers. One or several of a kind.
        model_name_or_path: tokenizer that made `input_ids`: the model's, and the pivot's for aligned data.
        output_dir: new, or an interrupted run's, which is continued.
        template: the chat template that made them: native (the tokenizer's own), a built-in name, text (plain text,
            an EOS at its end) or a .jinja file.
        source_number: of FuseLLM's columns of several sources, which to take.
        top_k: entries to keep of a capture that has more; released data are kept whole.
        max_length: tokens to which conversations were cut. shard_size: conversations per shard.
        encoding: plain or compact.
    Returns: the Representation in output_dir, beside the conversations.jsonl for other models; its manifest's
        `released` counts the tokens whose log-probabilities are exact or renormalised and whose ce was known or
        estimated.
    Raises: InputError for missing columns, or where not one conversation is rendered to its ids again.
    Source: columns as written by the authors' scripts; arXiv 2408.07990, section 3.2.
    """
    check_integer("max_length for import", max_length)
    check_integer("shard_size for import", shard_size)
    check_integer("top_k for import", top_k)
    names = [str(name) for name in (released if isinstance(released, list | tuple) else [released])]
    tokenizer = load_fast_tokenizer(model_name_or_path, trust_remote_code)
    encoder = ConversationEncoder(tokenizer, resolve_template(template, tokenizer), max_length)
    if (rows := _captured(names, encoder, model_name_or_path, top_k)) is None:
        rows = _released(names, encoder, source_number)
    elif source_number is not None:
        raise InputError(f"source_number for {rows.name}: expected none, as a capture is of one model. Leave it out.")
    capture = _capture(rows, names, str(model_name_or_path))
    rows.check_order()
    identity = capture.identity(
        {"top_k": rows.top_k, "max_length": max_length, "shard_size": shard_size},
        short_digest("".join(one.content_hash for one in capture.conversations)),
    )
    if isinstance(rows, ReleasedRows) and rows.source:
        figures = rows.data[PIVOT.mean if PIVOT.mean in rows.data.column_names else PIVOT.by_token]
        own = short_digest(np.hstack(list(figures)).astype(np.float64).tobytes())
        identity["pivot"] = {"tokenizer": identity["tokenizer"], "template": identity["template"], "data": own}
        identity["options"] |= {"mapping": "released", "safe_only": False}
        if source_number is not None:
            identity["options"]["source_number"] = source_number
    writer = _Writer(rows, output_dir, identity, encoding)
    found = write_representation(capture, writer, shard_size, Process(), lambda: rows)
    if "pivot" not in identity:
        _write_conversations(capture, writer.path / "conversations.jsonl")
    return found


def _captured(names: list[str], encoder: ConversationEncoder, model, top_k: int) -> CapturedRows | None:
    """The rows of captures; None where the names are those of `datasets` directories."""
    paths = [Path(name) for name in names]
    if not all(path.exists() for path in paths) or any((path / "state.json").exists() for path in paths):
        return None
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    if parquet := [file for file in files if file.suffix == ".parquet"]:
        root = paths[0] if paths[0].is_dir() else paths[0].parent
        captures: DistillKit | AnswerLines = DistillKit(parquet, root, encoder)
    elif any(_LINES.search(file.name) for file in files) and not any(file.suffix == ".arrow" for file in files):
        config = model_file(model, "config.json")
        embeddings = read_json(config, "model").get("vocab_size") if config else None
        captures = AnswerLines(names, encoder, max(len(encoder.tokenizer), embeddings or 0))
    else:
        return None
    return CapturedRows(captures, encoder, top_k)


def _write_conversations(capture: Capture, path: Path) -> None:
    """Write the rebuilt conversations, which other models are to represent, one a line."""
    aside = path.with_suffix(".tmp")
    with aside.open("w", encoding="utf-8") as file:
        for one in capture.conversations:
            file.write(json.dumps({"id": one.id, "messages": one.messages}, ensure_ascii=False) + "\n")
    aside.replace(path)


def _released(names: list[str], encoder: ConversationEncoder, source_number: int | None) -> ReleasedRows:
    """The rows of FuseChat's or FuseLLM's data."""
    data = _read(names)
    name, source = ", ".join(Path(name).name for name in names), _source(data.column_names, source_number)
    if source_number is not None:
        name += f" (source {source_number})"
    _check_columns(data, names, source)
    return ReleasedRows(data, encoder, name, source)


def _capture(rows: ImportedRows, names: list[str], model: str) -> Capture:
    """The conversations of the rows, as far as they are rendered to the same ids again."""
    template, rebuilt = rows.encoder.template.name, list(rows.conversations())
    if not rebuilt:
        first = f": {rows.skipped[0]['detail']}" if rows.skipped else ""
        raise InputError(
            f"released data in {', '.join(names)}: expected conversations that the template {template} renders to "
            f"their ids, got none in {rows.rows} rows{first}. Give the tokenizer and the template that made them."
        )
    found, report = read_conversations(rebuilt)
    report.skipped += rows.skipped
    report.rows, report.data = rows.rows, [Path(name).name for name in names]
    made_from: Identity = {"name": model, "fingerprint": rows.fingerprint}
    return Capture(found, report, rows.encoder, made_from, template)


def _read(names: list[str]) -> Any:
    """All rows of all splits, with the columns checked."""
    from datasets import DatasetDict, concatenate_datasets, load_from_disk

    parts = []
    for name in names:
        _check_files(Path(name))
        try:
            loaded = load_from_disk(name)
        except (OSError, ValueError) as error:
            raise InputError(
                f"released data for {name}: expected a directory that datasets' save_to_disk wrote, got none. Download "
                "the data set, and give the directory that holds its dataset_info.json or dataset_dict.json."
            ) from error
        parts += loaded.values() if isinstance(loaded, DatasetDict) else [loaded]
    try:
        return concatenate_datasets(parts)
    except ValueError as error:
        raise InputError(
            f"columns for {', '.join(names)}: expected the same in all splits, got others ({error}). "
            "Import them one by one."
        ) from error


def _check_files(path: Path) -> None:
    """Raise InputError where a file of a `datasets` directory is missing or cut off: perhaps between two batches, which
    reads as fewer rows."""
    for state in sorted(path.rglob("state.json")):
        for entry in read_json(state, "released data")["_data_files"]:
            file = state.parent / entry["filename"]
            size = file.stat().st_size if file.is_file() else 0
            if size:
                with open(file, "rb") as handle:
                    handle.seek(max(size - len(_END_OF_STREAM), 0))
                    if handle.read() == _END_OF_STREAM:
                        continue
            got = f"{size:,} bytes without its end" if size else "nothing"
            raise InputError(f"released data for {file}: expected a whole file, got {got}. Download it again.")


def _source(names: list[str], number: int | None) -> Columns | None:
    """The columns of the source, of FuseChat's names or of FuseLLM's, which end in the source's number."""
    numbers = sorted({int(match[1]) for match in map(_NUMBERED.fullmatch, names) if match})
    if number is None and any(name in names for name in vars(FUSED).values()):
        return FUSED
    if number is None and not numbers:
        return None
    number = numbers[0] if number is None and len(numbers) == 1 else number
    if number not in numbers:
        raise InputError(
            f"source_number for the released data: expected one of {', '.join(map(str, numbers)) or 'no source'}, got "
            f"{number}. Import the sources one by one, each to a directory of its own."
        )
    cross_entropies = f"metric_ce_aligned_{number}", f"per_step_metric_ce_aligned_{number}"
    return Columns(f"per_step_aligned_logits_{number}", f"per_step_aligned_indices_{number}", *cross_entropies)


def _check_columns(data, names: list[str], source: Columns | None) -> None:
    needed, found = [*TOKENS], data.column_names
    for columns in (PIVOT, source) if source else (PIVOT,):
        needed += [columns.indices, columns.logits, *([] if columns.by_token in found else [columns.mean])]
    missing = [name for name in needed if name not in found]
    if missing or not len(data):
        raise InputError(
            f"columns for {', '.join(names)}: expected {', '.join(TOKENS)}, {PIVOT.logits}, {PIVOT.indices} and "
            f"{PIVOT.mean}, and at least one row, got {', '.join(found) or 'none'} ({len(data)} rows, "
            f"without {', '.join(missing) or 'any'}). Give distributions that were released."
        )


class _Writer(ShardWriter):
    """Adds an aligned source's columns to each shard, and counts of exact and renormalised tokens to the manifest."""

    def __init__(self, rows: ImportedRows, output_dir, identity: dict, encoding: str):
        kind = "aligned" if rows.source else "representation"
        super().__init__(output_dir, identity, kind=kind, encoding=encoding)
        self.rows = rows

    def write(self, shard: int, rows: list[dict], info: dict | None = None) -> None:
        totals = Counter()
        for row in rows:
            totals.update(self.rows.counts[key_of(row["input_ids"])])
        if isinstance(self.rows, ReleasedRows) and self.rows.source:
            rows = [{**row, **self.rows.source_of(row)} for row in rows]
            totals["answered_tokens"] = int(sum((row["mapped_mass"] > 0).sum() for row in rows))
        super().write(shard, rows, {**(info or {}), "released": totals})

    def finish(self, num_shards: int, manifest: dict) -> None:
        totals = Counter()
        for shard in range(num_shards):
            totals.update(self.info(shard)["info"]["released"])
        manifest = {**manifest, "released": dict(totals)}
        if self.rows.source:
            tokens = totals["exact_tokens"] + totals["renormalised_tokens"]
            coverage = totals["answered_tokens"] / max(tokens, 1)
            origin = {"model": self.rows.name, "model_fingerprint": self.rows.fingerprint, "data": manifest["data"]}
            manifest |= {"certificate": {"all": {"coverage": coverage}}, "source": origin}
            manifest["pivot"] = self.identity["pivot"]
        super().finish(num_shards, manifest)
        if totals["renormalised_tokens"]:
            logger.warning(
                "%(renormalised_tokens)d predicted tokens have no normaliser in the released data: their probabilities "
                "are those of the listed entries alone (%(exact_tokens)d are exact; %(estimated_ce)d cross-entropies "
                "follow from metric_ce).",
                totals,
            )
