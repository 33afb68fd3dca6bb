"""`align`: map a source's distributions to the pivot's tokens and vocabulary, shard by shard.

Conversations are joined by id and content hash. Positions come from `correspondence`, rows from the mapping
(`mappings`), the quality figures from `certificate`, and `job` computes a shard; this module checks the input and
writes the manifest. Shards are written whole, so a repeated call continues a killed run; its result depends neither on
where the run was killed nor on the number of processes.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict, deque
from importlib.metadata import version
from pathlib import Path

from fusechat_fuse.alignment.certificate import CoverageError, figures_of
from fusechat_fuse.alignment.job import Job, collect_counts, write_shards
from fusechat_fuse.alignment.mappings import MAPPINGS
from fusechat_fuse.alignment.tokenizer_pair import TokenizerPair, load_counts
from fusechat_fuse.alignment.vocabulary_maps import AlignedCounts
from fusechat_fuse.errors import InputError
from fusechat_fuse.presets import or_preset
from fusechat_fuse.store.files import short_digest
from fusechat_fuse.store.shard_writer import ShardWriter
from fusechat_fuse.store.shards import Representation, load_representation
from fusechat_fuse.store.tokenizers import copy_tokenizer

logger = logging.getLogger(__name__)


def align(
    pivot_representation: str | Path | Representation,
    source_representation: str | Path | Representation,
    output_dir: str | Path,
    *,
    mapping: str | None = None,
    preset: str = "fusechat",
    num_proc: int | None = None,
    safe_only: bool = False,
    counts: str | Path | None = None,
    fail_under_coverage: float | None = None,
    cache_dir: str | Path | None = None,
) -> dict:
    """Align a source's representation to the pivot's tokens and vocabulary.

    Equal vocabularies are detected and mapped by identity, whatever `mapping` says. A repeated call continues an
    interrupted one.

    Args:
        pivot_representation, source_representation: directories that `represent` wrote for the same conversations
            (joined by id and content; all others are counted and left out).
        output_dir: new, or an earlier start of the same run.
        mapping: prefix (exact next-token probabilities; its bits-per-byte gap is 0, see
            tests/benchmarks/bench_align_quality.py), statistics (MS, the paper's choice), exact (EM), min_edit (MinED);
            None: the preset's.
        preset: fusechat (prefix) or paper (statistics).
        num_proc: number of processes; None: one.
        safe_only: give an answer only at token starts that no token of either vocabulary could span.
        counts: for `statistics`, the counts of an earlier corpus (`counts.safetensors` or its directory), instead of a
            pass over this one.
        fail_under_coverage: smallest share in [0, 1] of the predicted tokens that must have an answer.
        cache_dir: directory of the vocabulary maps; None: FUSECHAT_CACHE or ~/.cache/fusechat.

    Returns:
        The manifest that was written: `certificate` has the figures (`certificate.summary_lines` formats them), `join`
        counts the conversations left out.

    Raises:
        InputError: unknown option, directories that do not belong together, an output directory of another run.
        CoverageError: coverage below `fail_under_coverage`; the shards stay, without a manifest.

    Source: `docs/method.md`, "Alignment"; FuseChat (arXiv 2408.07990) section 3.2.
    """
    mapping = str(or_preset(preset, mapping=mapping)["mapping"])
    _check_options(mapping, num_proc, fail_under_coverage, counts)
    pivot, source = _open(pivot_representation, "pivot"), _open(source_representation, "source")
    if origin(pivot) == origin(source):
        raise InputError(
            f"source representation for {source.path}: expected another model's, got the pivot's own ({pivot.path}). "
            "Give the representation of a source."
        )
    joined, join = join_conversations(pivot, source)
    job = Job(pivot, source, joined, TokenizerPair(pivot, source, cache_dir), MAPPINGS[mapping], safe_only)
    used_counts = load_counts(counts, job.pair) if job.needs_counts and counts else None
    identity = _identity(job, used_counts)
    writer = ShardWriter(output_dir, identity, kind="aligned")
    copy_tokenizer(pivot, writer.path)
    processes = int(num_proc or 1)
    if job.needs_counts and used_counts is None:
        used_counts = collect_counts(job, writer.path, processes)
    job.vocab = job.pair.vocabularies(job.mapping, used_counts, workers=processes)
    write_shards(job, writer, processes)
    figures = figures_of([writer.info(shard)["info"] for shard in job.shards])
    coverage = figures["all"]["coverage"] or 0.0
    if fail_under_coverage is not None and coverage < fail_under_coverage:
        raise CoverageError(
            f"coverage for {source.path} aligned to {pivot.path}: expected an answer for at least "
            f"{fail_under_coverage:.2%} of the predicted tokens, got {coverage:.2%}. Check that both represent the "
            "same texts, or lower the limit."
        )
    inputs = {"source": str(source.path), "counts": None if counts is None else str(counts)}
    writer.finish(len(job.shards), _manifest(job, identity, join, figures) | {"inputs": inputs})
    return load_representation(writer.path).manifest


def _check_options(mapping: str, num_proc, fail_under_coverage, counts) -> None:
    if mapping not in MAPPINGS:
        raise InputError(f"value for mapping: expected one of {', '.join(MAPPINGS)}, got {mapping!r}. Use one of them.")
    if counts is not None and not MAPPINGS[mapping].needs_counts:
        users = " or ".join(name for name, known in MAPPINGS.items() if known.needs_counts)
        raise InputError(f"value for counts: expected mapping {users} with it, got {mapping!r}. Leave counts out.")
    if num_proc is not None and int(num_proc) < 1:
        raise InputError(f"value for num_proc: expected at least 1, got {num_proc}. Leave it out for one process.")
    if fail_under_coverage is not None and not 0 <= float(fail_under_coverage) <= 1:
        raise InputError(
            f"value for fail_under_coverage: expected a share from 0 to 1, got {fail_under_coverage}. "
            "Write 95 % as 0.95."
        )


def _open(path, role: str) -> Representation:
    opened = path if isinstance(path, Representation) else load_representation(path)
    if opened.manifest.get("kind") != "representation":
        raise InputError(
            f"{role} representation for {opened.path}: expected what `represent` wrote, got "
            f"{opened.manifest.get('kind')} data. Give the {role}'s own representation."
        )
    return opened.check()


def _identity(job: Job, counts: AlignedCounts | None) -> dict:
    """What decides the content of the aligned data."""
    made_from = "this corpus" if job.needs_counts else None
    if counts is not None:
        made_from = short_digest(repr([counts.keys.tobytes().hex(), counts.counts.tobytes().hex()]))
    options = {"mapping": job.mapping.name, "safe_only": bool(job.safe_only), "counts": made_from}
    return {"options": options, "pivot": origin(job.pivot), "source": origin(job.source)}


def origin(representation: Representation) -> dict:
    """Which representation it is, as aligned data record it for their pivot and source."""
    manifest = representation.manifest
    return {
        "model": manifest.get("model", {}).get("name"),
        "model_fingerprint": manifest.get("model", {}).get("fingerprint"),
        "tokenizer": manifest["tokenizer"]["sha256"],
        "template": manifest.get("template"),
        "data": short_digest(repr([shard["sha256"] for shard in manifest["shards"]])),
    }


def join_conversations(pivot: Representation, source: Representation) -> tuple[list[tuple[int, int]], dict]:
    """Rows that are the same conversation: equal id and equal content hash, in the pivot's order.

    Returns:
        [(pivot row, source row)], and what was left out: counts and up to 20 ids of the conversations that only the
        pivot has, that only the source has, or whose content differs.
    """
    source_rows = defaultdict(deque)
    for row, key in enumerate(zip(source.ids, source.column("content_hash"))):
        source_rows[key].append(row)
    joined, only_pivot = [], []
    for row, key in enumerate(zip(pivot.ids, pivot.column("content_hash"))):
        if source_rows.get(key):
            joined.append((row, source_rows[key].popleft()))
        else:
            only_pivot.append(key[0])
    only_source = [name for (name, _), rows in source_rows.items() for _ in rows]
    changed = Counter(only_pivot) & Counter(only_source)
    lists = {
        "only_pivot": list((Counter(only_pivot) - changed).elements()),
        "only_source": list((Counter(only_source) - changed).elements()),
        "content_differs": list(changed.elements()),
    }
    if not joined:
        why = f"{len(changed)} with different content" if changed else "no id in common"
        raise InputError(
            f"conversations for {source.path}: expected those of {pivot.path}, got {why}. "
            "Represent both models on the same data."
        )
    join = {"joined": len(joined)} | {name: {"count": len(ids), "ids": ids[:20]} for name, ids in lists.items()}
    if len(joined) < max(len(pivot), len(source)):
        logger.warning("%d conversations joined; left out: %s", len(joined), {k: len(v) for k, v in lists.items()})
    return joined, join


def _manifest(job: Job, identity: dict, join: dict, figures: dict) -> dict:
    pivot, source = job.pivot, job.source
    return {
        **identity,
        "vocabulary": "identity" if job.pair.identity else "mapped",
        "certificate": figures,
        "join": join,
        "model": pivot.manifest.get("model"),
        "datasets": pivot.manifest.get("datasets"),
        "tokenizer": pivot.manifest["tokenizer"],
        "template": pivot.manifest.get("template"),
        "source_model": source.manifest.get("model"),
        "source_tokenizer": source.manifest["tokenizer"],
        "versions": {name: version(name) for name in ("numpy", "tokenizers", "rapidfuzz")},
    }
