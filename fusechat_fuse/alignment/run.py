"""`align`: carry a source's distributions to the pivot's tokens, conversation by conversation, shard by shard.

Conversations are joined by id and content hash. Positions come from `correspondence`, rows from `mapping`, the quality
figures from `certificate`; this module reads, hands over and writes. A shard holds SHARD conversations and lands whole,
so a killed run goes on where it was; its result does not depend on where that is, nor on the number of processes.
"""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
from collections import Counter, defaultdict
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from fusechat_fuse.alignment.candidates import Vocabularies
from fusechat_fuse.alignment.certificate import COUNTED, CoverageError, certificate, tally
from fusechat_fuse.alignment.correspondence import EXACT, correspond
from fusechat_fuse.alignment.sparse_rows import Mapped
from fusechat_fuse.alignment.streams import Batch, align_batch, make_batch
from fusechat_fuse.alignment.tokenizer_pair import Pair, load_counts, save_counts
from fusechat_fuse.alignment.vocabulary_maps import PairCounts
from fusechat_fuse.errors import InputError
from fusechat_fuse.store.shards import Representation, ShardWriter, load_representation
from fusechat_fuse.store.tokenizers import copy_tokenizer

MAPPINGS = ("exact", "min_edit", "statistics", "prefix")
SHARD = 256
_BATCH_TOKENS = 8192
_WORST = 10
_LEAST_MASS = 6e-8  # of an answered position: what float16 can tell from 0, which means no answer
logger = logging.getLogger(__name__)


def align(
    pivot_representation,
    source_representation,
    output_dir,
    *,
    mapping: str = "prefix",
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
        mapping: prefix (exact next-token probabilities; the default because its bits-per-byte gap is 0, see
            tests/benchmarks/bench_align_quality.py), statistics (MS, the paper's choice), exact (EM), min_edit (MinED).
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

    Source: method section 2; FuseChat (arXiv 2408.07990) section 3.2.
    """
    _check_options(mapping, num_proc, fail_under_coverage, counts)
    pivot, source = _open(pivot_representation, "pivot"), _open(source_representation, "source")
    pairs, join = join_conversations(pivot, source)
    pair = Pair.load(pivot, source, cache_dir)
    processes = max(int(num_proc or 1), 1)
    used, made_from = None, None
    if mapping == "statistics" and not pair.identity:
        used = load_counts(counts, pair) if counts else None
        made_from = _fingerprint([used.keys.tobytes().hex(), used.counts.tobytes().hex()]) if counts else "this corpus"
    identity = {
        "options": {"mapping": mapping, "safe_only": bool(safe_only), "counts": made_from},
        "pivot": _origin(pivot),
        "source": _origin(source),
    }
    writer = ShardWriter(output_dir, identity, kind="aligned")
    copy_tokenizer(pivot.path, writer.path)
    job = Job(pivot, source, pairs, pair, mapping, safe_only)
    if mapping == "statistics" and not pair.identity and used is None:
        used = collect_counts(job, writer.path, processes)
    job.vocab = pair.vocabularies(mapping, used, workers=processes)
    shards = range(-(-len(pairs) // SHARD))
    run_shards(job, writer, [shard for shard in shards if not writer.done(shard)], processes, "align")
    figures = _figures([writer.info(shard)["info"] for shard in shards])
    coverage = figures["all"]["coverage"] or 0.0
    if fail_under_coverage is not None and coverage < fail_under_coverage:
        raise CoverageError(
            f"coverage for {source.path} aligned to {pivot.path}: expected at least {fail_under_coverage:.2%} of the "
            f"predicted tokens answered, got {coverage:.2%}. Check that both saw the same texts, or lower the limit."
        )
    manifest = _manifest(pivot, source, identity, join, figures, pair.identity)
    manifest["inputs"] = {"source": str(source.path), "counts": None if counts is None else str(counts)}
    writer.finish(len(shards), manifest)
    return load_representation(writer.path).manifest


def _check_options(mapping: str, num_proc, fail_under_coverage, counts) -> None:
    if mapping not in MAPPINGS:
        raise InputError(f"value for mapping: expected one of {', '.join(MAPPINGS)}, got {mapping!r}. Use one of them.")
    if counts is not None and mapping != "statistics":
        raise InputError(f"value for counts: expected mapping statistics beside it, got {mapping!r}. Leave counts out.")
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
    return opened


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
    pairs, alone = [], []
    for row, key in enumerate(zip(pivot.ids, pivot.column("content_hash"))):
        if theirs.get(key):
            pairs.append((row, theirs[key].pop()))
        else:
            alone.append(key[0])
    left = [keys[row][0] for rows in theirs.values() for row in rows]
    changed = Counter(alone) & Counter(left)
    lists = {
        "only_pivot": list((Counter(alone) - changed).elements()),
        "only_source": list((Counter(left) - changed).elements()),
        "content_differs": list(changed.elements()),
    }
    if not pairs:
        why = f"{len(changed)} with another content" if changed else "no id in common"
        raise InputError(
            f"conversations for {source.path}: expected those of {pivot.path}, got {why}. "
            "Represent both models on the same data."
        )
    join = {"joined": len(pairs)} | {name: {"count": len(ids), "ids": ids[:20]} for name, ids in lists.items()}
    if len(pairs) < max(len(pivot), len(source)):
        logger.warning("%d conversations joined; left out: %s", len(pairs), {k: len(v) for k, v in lists.items()})
    return pairs, join


@dataclass
class Job:
    """What one run works on; picklable, shared by its processes."""

    pivot: Representation
    source: Representation
    pairs: list[tuple[int, int]]
    pair: Pair
    mapping: str
    safe_only: bool
    vocab: Vocabularies | None = None

    def rows(self, shard: int):
        """Conversations of one shard, in batches of about _BATCH_TOKENS pivot tokens."""
        pivot_rows, source_rows, tokens = [], [], 0
        for p, q in self.pairs[shard * SHARD : (shard + 1) * SHARD]:
            pivot_rows.append(self.pivot[p])
            source_rows.append(self.source[q])
            tokens += len(pivot_rows[-1]["predicted"])
            if tokens >= _BATCH_TOKENS:
                yield pivot_rows, source_rows
                pivot_rows, source_rows, tokens = [], [], 0
        if pivot_rows:
            yield pivot_rows, source_rows

    def aligned(self, shard: int) -> tuple[list[dict], dict]:
        """The aligned rows of one shard and its counts for the certificate."""
        rows, info = [], {"sums": {}, "worst": []}
        for pivot_rows, source_rows in self.rows(shard):
            batch = make_batch(pivot_rows, source_rows, self.pair)
            match, mapped, safe = align_batch(batch, self.pair, self.vocab, self.mapping, self.safe_only)
            counted = tally(batch.pivot, batch.source, match, mapped, safe, batch.conversation, len(pivot_rows))
            _add_counts(info, pivot_rows, counted)
            rows += _aligned_rows(pivot_rows, source_rows, batch, mapped)
        return rows, info

    def counts(self, shard: int) -> PairCounts:
        """How often pivot and source ids start together in one shard."""
        size, parts = len(self.pair.pivot.bytes), []
        for pivot_rows, source_rows in self.rows(shard):
            batch = make_batch(pivot_rows, source_rows, self.pair)
            pivot, source = batch.pivot, batch.source
            match = correspond(pivot.start, pivot.end, source.start, source.end)
            common = match.kind == EXACT
            parts.append(PairCounts.of(source.ids[match.source[common]], pivot.ids[common], size))
        return PairCounts.total(parts, size)


def _aligned_rows(pivot_rows, source_rows, batch: Batch, mapped: Mapped) -> list[dict]:
    """The pivot's rows with the source's columns."""
    P = len(batch.kept)
    ids, probs = mapped.ids, mapped.probs.astype(np.float32)
    token_ce, mass = -mapped.log_actual, np.where(mapped.answered, np.maximum(mapped.mass, _LEAST_MASS), 0.0)
    if not batch.kept.all():  # an empty token has no answer
        full = np.full((P, ids.shape[1]), -1, np.int32), np.zeros((P, ids.shape[1]), np.float32)
        full[0][batch.kept], full[1][batch.kept] = ids, probs
        ids, probs = full
        token_ce, mass = (_spread(array, batch.kept, fill) for array, fill in ((token_ce, np.inf), (mass, 0.0)))
    cuts = np.cumsum([len(row["predicted"]) for row in pivot_rows])[:-1]
    columns = (np.split(array, cuts) for array in (ids, probs, token_ce.astype(np.float32), mass.astype(np.float16)))
    rows = []
    for pivot, source, i, p, c, m in zip(pivot_rows, source_rows, *columns):
        rows.append(
            pivot
            | {
                "source_ids": i,
                "source_probs": p,
                "source_token_ce": c,
                "mapped_mass": m,
                "source_ce": float(np.mean(source["ce"], dtype=np.float64)),
                "source_bytes": int(np.sum(source["end"] - source["start"], dtype=np.int64)),
                "source_tokens": len(source["predicted"]),
            }
        )
    return rows


def _spread(values: np.ndarray, kept: np.ndarray, fill: float) -> np.ndarray:
    full = np.full(len(kept), fill)
    full[kept] = values
    return full


def _add_counts(info: dict, pivot_rows: list[dict], counted: dict[str, np.ndarray]) -> None:
    names = [row.get("slice") or "" for row in pivot_rows]
    for name in sorted(set(names)):
        chosen = np.array([other == name for other in names])
        sums = info["sums"].setdefault(name, dict.fromkeys(COUNTED, 0.0))
        for key in COUNTED:
            sums[key] += float(counted[key][chosen].sum())
    with np.errstate(invalid="ignore", divide="ignore"):
        gap = (counted["aligned_bits"] - counted["source_bits"]) / counted["covered_bytes"]
    worst = [
        {
            "id": pivot_rows[n]["id"],
            "gap_bits_per_byte": float(gap[n]),
            "coverage": float(counted["answered"][n] / counted["predicted"][n]),
            "predicted_tokens": int(counted["predicted"][n]),
        }
        for n in np.flatnonzero(np.isfinite(gap))
    ]
    info["worst"] = _largest(info["worst"] + worst)


def _largest(rows: list[dict]) -> list[dict]:
    return sorted(rows, key=lambda row: (-abs(row["gap_bits_per_byte"]), row["id"]))[:_WORST]


def _figures(infos: list[dict]) -> dict:
    """The certificate of all shards: `all`, per slice where the data names slices, the conversations of largest gap."""
    slices: dict[str, dict[str, float]] = {}
    for info in infos:
        for name, sums in info["sums"].items():
            kept = slices.setdefault(name, dict.fromkeys(COUNTED, 0.0))
            for key in COUNTED:
                kept[key] += sums[key]
    whole = {key: sum(part[key] for part in slices.values()) for key in COUNTED}
    figures = {"all": certificate(whole), "worst": _largest([row for info in infos for row in info["worst"]])}
    if set(slices) - {""}:
        figures["slices"] = {name or "(none)": certificate(part) for name, part in sorted(slices.items())}
    return figures


def _manifest(pivot, source, identity: dict, join: dict, figures: dict, same: bool) -> dict:
    return {
        **identity,
        "vocabulary": "identity" if same else "mapped",
        "certificate": figures,
        "join": join,
        "model": pivot.manifest.get("model"),
        "tokenizer": pivot.manifest["tokenizer"],
        "template": pivot.manifest.get("template"),
        "source_model": source.manifest.get("model"),
        "source_tokenizer": source.manifest["tokenizer"],
        "versions": {name: version(name) for name in ("numpy", "tokenizers", "rapidfuzz")},
    }


_job: Job | None = None  # of a worker process


def _work(task: tuple) -> tuple:
    kind, writer, shard = task
    if kind == "count":
        return shard, _job.counts(shard)
    rows, info = _job.aligned(shard)
    writer.write(shard, rows, info)
    return shard, None


def _start(job: Job) -> None:
    global _job
    _job = job


def run_shards(job: Job, writer, shards: list[int], processes: int, kind: str) -> list:
    """Work on shards, in this process or several; results in the order of `shards`."""
    from tqdm.auto import tqdm

    tasks = [(kind, writer, shard) for shard in shards]
    title = {"align": "align", "count": "count aligned tokens"}[kind]
    bar = tqdm(total=len(tasks), desc=title, unit="shard", disable=len(tasks) < 2)
    results = []
    processes = min(processes, len(tasks))
    with bar:
        if processes < 2:
            _start(job)
            for task in tasks:
                results.append(_work(task)[1])
                bar.update()
            _start(None)
            return results
        before = os.environ.get("TOKENIZERS_PARALLELISM")
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else a forked tokenizer warns
        try:
            method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
            with multiprocessing.get_context(method).Pool(processes, _start, (job,)) as pool:
                for _, result in pool.imap(_work, tasks):
                    results.append(result)
                    bar.update()
        finally:
            if before is None:
                del os.environ["TOKENIZERS_PARALLELISM"]
            else:
                os.environ["TOKENIZERS_PARALLELISM"] = before
    return results


def collect_counts(job: Job, folder: Path, processes: int) -> PairCounts:
    """Counts over the whole corpus, kept beside the shards for this run's repetition and for other corpora."""
    file = folder / "counts.safetensors"
    if file.exists():
        return load_counts(file, job.pair)
    shards = list(range(-(-len(job.pairs) // SHARD)))
    total = PairCounts.total(run_shards(job, None, shards, processes, "count"), len(job.pair.pivot.bytes))
    save_counts(file, total, job.pair)
    return total
