"""`align`: carry a source's distributions to the pivot's tokens, conversation by conversation, shard by shard.

Conversations are joined by id and content hash. Positions come from `correspondence`, rows from the mapping
(`mappings`), the quality figures from `certificate`, the work on a shard from `job`; this module checks, hands over and
writes the manifest. A shard lands whole, so a killed run goes on where it was; its result does not depend on where that
is, nor on the number of processes.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, defaultdict
from importlib.metadata import version

from fusechat_fuse.alignment.certificate import CoverageError, figures_of
from fusechat_fuse.alignment.job import Job, collect_counts, write_shards
from fusechat_fuse.alignment.mappings import MAPPINGS
from fusechat_fuse.alignment.tokenizer_pair import TokenizerPair, load_counts
from fusechat_fuse.errors import InputError
from fusechat_fuse.presets import or_preset
from fusechat_fuse.store.shard_writer import ShardWriter
from fusechat_fuse.store.shards import Representation, load_representation
from fusechat_fuse.store.tokenizers import copy_tokenizer

logger = logging.getLogger(__name__)


def align(
    pivot_representation,
    source_representation,
    output_dir,
    *,
    mapping: str | None = None,
    preset: str = "fusechat",
    num_proc: int | None = None,
    safe_only: bool = False,
    counts=None,
    fail_under_coverage: float | None = None,
    cache_dir=None,
) -> dict:
    """Align a source's representation to the pivot's tokens and vocabulary.

    Equal vocabularies are found and mapped by identity, whatever `mapping` says. A repeated call goes on where a killed
    one stopped.

    Args:
        pivot_representation, source_representation: directories that `represent` wrote, of the same conversations
            (joined by id and content; others are counted and left out).
        output_dir: new, or an earlier start of the same run.
        mapping: prefix (exact next-token probabilities; its bits-per-byte gap is 0, see
            tests/benchmarks/bench_align_quality.py), statistics (MS, the paper's choice), exact (EM), min_edit (MinED);
            None: the preset's.
        preset: fusechat (prefix) or paper (statistics).
        num_proc: processes; None is one.
        safe_only: answer only at starts that no token of either vocabulary could span.
        counts: for `statistics`, counts of an earlier corpus (`counts.safetensors` or the directory that holds it)
            instead of a pass over this one.
        fail_under_coverage: least share in [0, 1] of predicted tokens that must have an answer.
        cache_dir: where vocabulary maps are kept; None is FUSECHAT_CACHE or ~/.cache/fusechat.

    Returns:
        The manifest that was written: its `certificate` has the figures (`certificate.summary_lines` prints them),
        `join` what was left out.

    Raises:
        InputError: unknown option, directories that do not belong together, an output directory of another run.
        CoverageError: coverage below `fail_under_coverage`; what was computed stays for a look, unfinished.

    Source: `docs/method.md`, "Alignment"; FuseChat (arXiv 2408.07990) section 3.2.
    """
    mapping = str(or_preset(preset, mapping=mapping)["mapping"])
    _check_options(mapping, num_proc, fail_under_coverage, counts)
    pivot, source = _open(pivot_representation, "pivot"), _open(source_representation, "source")
    joined, join = join_conversations(pivot, source)
    pair = TokenizerPair.load(pivot, source, cache_dir)
    job = Job(pivot, source, joined, pair, MAPPINGS[mapping], safe_only)
    processes = max(int(num_proc or 1), 1)
    needs_counts = job.mapping.needs_counts and not pair.identity
    used = load_counts(counts, pair) if needs_counts and counts else None
    made_from = "this corpus" if needs_counts else None
    if used is not None:
        made_from = _fingerprint([used.keys.tobytes().hex(), used.counts.tobytes().hex()])
    identity = {
        "options": {"mapping": mapping, "safe_only": bool(safe_only), "counts": made_from},
        "pivot": _origin(pivot),
        "source": _origin(source),
    }
    writer = ShardWriter(output_dir, identity, kind="aligned")
    copy_tokenizer(pivot.path, writer.path)
    if needs_counts and used is None:
        used = collect_counts(job, writer.path, processes)
    job.vocab = pair.vocabularies(job.mapping, used, workers=processes)
    write_shards(job, writer, processes)
    figures = figures_of([writer.info(shard)["info"] for shard in job.shards])
    coverage = figures["all"]["coverage"] or 0.0
    if fail_under_coverage is not None and coverage < fail_under_coverage:
        raise CoverageError(
            f"coverage for {source.path} aligned to {pivot.path}: expected at least {fail_under_coverage:.2%} of the "
            f"predicted tokens answered, got {coverage:.2%}. Check that both saw the same texts, or lower the limit."
        )
    manifest = _manifest(pivot, source, identity, join, figures, pair.identity)
    manifest["inputs"] = {"source": str(source.path), "counts": None if counts is None else str(counts)}
    writer.finish(len(job.shards), manifest)
    return load_representation(writer.path).manifest


def _check_options(mapping: str, num_proc, fail_under_coverage, counts) -> None:
    if mapping not in MAPPINGS:
        raise InputError(f"value for mapping: expected one of {', '.join(MAPPINGS)}, got {mapping!r}. Use one of them.")
    if counts is not None and not MAPPINGS[mapping].needs_counts:
        takers = " or ".join(name for name, known in MAPPINGS.items() if known.needs_counts)
        raise InputError(f"value for counts: expected mapping {takers} beside it, got {mapping!r}. Leave counts out.")
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


def _fingerprint(parts: list) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _origin(representation: Representation) -> dict:
    manifest = representation.manifest
    return {
        "model": manifest.get("model", {}).get("name"),
        "model_fingerprint": manifest.get("model", {}).get("fingerprint"),
        "tokenizer": manifest["tokenizer"]["sha256"],
        "template": manifest.get("template"),
        "data": _fingerprint([shard["sha256"] for shard in manifest["shards"]]),
    }


def join_conversations(pivot: Representation, source: Representation) -> tuple[list[tuple[int, int]], dict]:
    """Rows that are the same conversation: equal id and equal content hash, in the pivot's order.

    Returns:
        [(pivot row, source row)], and what was left out: counts and up to 20 ids of conversations only the pivot has,
        only the source has, or whose content differs.
    """
    theirs = defaultdict(list)
    keys = list(zip(source.ids, source.column("content_hash")))
    for row, key in enumerate(keys):
        theirs[key].append(row)
    for rows in theirs.values():
        rows.reverse()
    joined, alone = [], []
    for row, key in enumerate(zip(pivot.ids, pivot.column("content_hash"))):
        if theirs.get(key):
            joined.append((row, theirs[key].pop()))
        else:
            alone.append(key[0])
    left = [keys[row][0] for rows in theirs.values() for row in rows]
    changed = Counter(alone) & Counter(left)
    lists = {
        "only_pivot": list((Counter(alone) - changed).elements()),
        "only_source": list((Counter(left) - changed).elements()),
        "content_differs": list(changed.elements()),
    }
    if not joined:
        why = f"{len(changed)} with another content" if changed else "no id in common"
        raise InputError(
            f"conversations for {source.path}: expected those of {pivot.path}, got {why}. "
            "Represent both models on the same data."
        )
    join = {"joined": len(joined)} | {name: {"count": len(ids), "ids": ids[:20]} for name, ids in lists.items()}
    if len(joined) < max(len(pivot), len(source)):
        logger.warning("%d conversations joined; left out: %s", len(joined), {k: len(v) for k, v in lists.items()})
    return joined, join


def _manifest(pivot, source, identity: dict, join: dict, figures: dict, same: bool) -> dict:
    return {
        **identity,
        "vocabulary": "identity" if same else "mapped",
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
