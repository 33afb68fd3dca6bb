"""What one run of `align` computes, shard by shard, in one process or several: aligned rows, and counts of ids.

A shard holds a range of the joined conversations (`shard_ranges`); its content depends on nothing else.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fusechat_fuse.alignment.candidates import Vocabularies
from fusechat_fuse.alignment.certificate import add_counts, tally
from fusechat_fuse.alignment.correspondence import EXACT
from fusechat_fuse.alignment.mappings import Mapping
from fusechat_fuse.alignment.sparse_rows import Mapped
from fusechat_fuse.alignment.streams import Batch, align_batch, make_batch
from fusechat_fuse.alignment.tokenizer_pair import TokenizerPair, load_counts, save_counts
from fusechat_fuse.alignment.vocabulary_maps import AlignedCounts
from fusechat_fuse.progress import progress
from fusechat_fuse.store.shard_writer import ShardWriter, shard_ranges
from fusechat_fuse.store.shards import Representation

_BATCH_TOKENS = 8192
_LEAST_MASS = 6e-8  # of a position with an answer: the smallest that float16 keeps above 0, which means no answer


@dataclass
class Job:
    """The input of one run, shared by its processes."""

    pivot: Representation
    source: Representation
    joined: list[tuple[int, int]]  # (pivot row, source row) of each conversation that both have
    pair: TokenizerPair
    mapping: Mapping
    safe_only: bool
    vocab: Vocabularies | None = None  # not needed for counting

    @property
    def needs_counts(self) -> bool:
        """Whether the mapping is decided by counts over the corpus."""
        return self.mapping.needs_counts and not self.pair.identity

    @property
    def shards(self) -> range:
        """Numbers of the shards."""
        return range(len(shard_ranges(len(self.joined))))

    def batches(self, shard: int) -> Iterator[tuple[list[dict], list[dict]]]:
        """The conversations of one shard in batches of about _BATCH_TOKENS pivot tokens: (pivot rows, source rows)."""
        pivot_rows, source_rows, tokens = [], [], 0
        for n in shard_ranges(len(self.joined))[shard]:
            p, q = self.joined[n]
            pivot_rows.append(self.pivot[p])
            source_rows.append(self.source[q])
            tokens += len(pivot_rows[-1]["predicted"])
            if tokens >= _BATCH_TOKENS:
                yield pivot_rows, source_rows
                pivot_rows, source_rows, tokens = [], [], 0
        if pivot_rows:
            yield pivot_rows, source_rows

    def write(self, writer: ShardWriter, shard: int) -> None:
        """Align one shard and write it, with its counts for the certificate."""
        assert self.vocab is not None
        rows, info = [], {"sums": {}, "worst": []}
        for pivot_rows, source_rows in self.batches(shard):
            batch = make_batch(pivot_rows, source_rows, self.pair)
            mapped = align_batch(batch, self.pair, self.vocab, self.mapping, self.safe_only)
            add_counts(info, pivot_rows, tally(batch, mapped))
            rows += _aligned_rows(pivot_rows, source_rows, batch, mapped, one_hot=self.mapping.renormalised)
        writer.write(shard, rows, info)

    def counts(self, shard: int) -> AlignedCounts:
        """How often each pair of pivot and source ids starts at the same byte, in one shard."""
        size, parts = len(self.pair.pivot.bytes), []
        for pivot_rows, source_rows in self.batches(shard):
            batch = make_batch(pivot_rows, source_rows, self.pair)
            common = batch.match.kind == EXACT
            source_ids = batch.source.ids[batch.match.source[common]]
            parts.append(AlignedCounts.of(source_ids, batch.pivot.ids[common], size))
        return AlignedCounts.total(parts, size)


def _aligned_rows(
    pivot_rows: list[dict], source_rows: list[dict], batch: Batch, mapped: Mapped, one_hot: bool
) -> list[dict]:
    """The pivot's rows with the source's columns; tokens without bytes, which no batch contains, have no answer (where
    the mapping is `one_hot`: probability 1 on the actual token, as elsewhere without one)."""
    kept, mass = batch.kept, np.where(mapped.answered, np.clip(mapped.mass, _LEAST_MASS, 1.0), 0.0)
    columns = {
        "source_ids": _scatter(mapped.ids, kept, -1),
        "source_probs": _scatter(mapped.probs.astype(np.float32), kept, 0),
        "source_token_ce": _scatter(-mapped.log_actual.astype(np.float32), kept, np.inf),
        "mapped_mass": _scatter(mass.astype(np.float16), kept, 0),
        "label_tail": _scatter(mapped.label_tail.astype(np.float16), kept, 0),
    }
    if one_hot and not kept.all():
        actual = np.concatenate([row["input_ids"][row["predicted"]] for row in pivot_rows])
        columns["source_ids"][~kept, 0], columns["source_probs"][~kept, 0] = actual[~kept], 1
    parts = zip(*(np.split(array, np.cumsum(batch.predicted)[:-1]) for array in columns.values()))
    return [
        {
            **pivot,
            **dict(zip(columns, part)),
            "source_ce": float(np.mean(source["ce"], dtype=np.float64)),
            "source_bytes": int(np.sum(source["end"] - source["start"], dtype=np.int64)),
            "source_tokens": len(source["predicted"]),
        }
        for pivot, source, part in zip(pivot_rows, source_rows, parts)
    ]


def _scatter(values: np.ndarray, kept: np.ndarray, fill: float) -> np.ndarray:
    full = np.full((len(kept), *values.shape[1:]), fill, values.dtype)
    full[kept] = values
    return full


def write_shards(job: Job, writer: ShardWriter, processes: int) -> None:
    """Align and write the shards that are missing."""
    _each(partial(job.write, writer), writer.left(job.shards), processes, "align")


def collect_counts(job: Job, folder: Path, processes: int) -> AlignedCounts:
    """Counts over the whole corpus, stored beside the shards for a repeated run and for other corpora."""
    file = folder / "counts.safetensors"
    if file.exists():
        return load_counts(file, job.pair)
    parts = _each(job.counts, list(job.shards), processes, "count aligned tokens")
    total = AlignedCounts.total(parts, len(job.pair.pivot.bytes))
    save_counts(file, total, job.pair)
    return total


_work: Callable[[int], Any] | None = None  # what forked processes call


def _call(shard: int):
    assert _work is not None
    return _work(shard)


def _each(work: Callable[[int], Any], shards: list[int], processes: int, title: str) -> list:
    """work(shard) for each shard, in one process or several that are forked; results in order of `shards`."""
    bar = partial(progress, total=len(shards), desc=title, unit="shard", show=len(shards) > 1)
    processes = min(processes, len(shards))
    if processes < 2:
        return list(bar(map(work, shards)))
    global _work
    _work, before = work, os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # otherwise a forked tokenizer warns
    try:
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            return list(bar(pool.imap(_call, shards)))
    finally:
        _work = None
        del os.environ["TOKENIZERS_PARALLELISM"]
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before
