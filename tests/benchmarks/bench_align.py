"""Speed of alignment: tokens a second with reading and writing, growth with length, vocabulary maps, processes.

    python -m tests.benchmarks.bench_align [--conversations 500] [--tokens 600] [--min_edit] [--num_proc 2]

Distributions are made up (seeded), tokenizers real: openchat as pivot, qwen as source. The released code's times for a
2,048-token conversation are those of its own run on a machine of this kind: 4.7 s a pass for dynamic time warping
(two passes), 0.025 s for the rows.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import tempfile
import time
from itertools import count
from pathlib import Path

import numpy as np

from fusechat_fuse.alignment.correspondence import correspond
from fusechat_fuse.alignment.job import Job, collect_counts, write_shards
from fusechat_fuse.alignment.mappings import MAPPINGS
from fusechat_fuse.alignment.paths import PathTable
from fusechat_fuse.alignment.streams import make_batch
from fusechat_fuse.alignment.tokenizer_pair import TokenizerPair
from fusechat_fuse.alignment.vocabulary_maps import exact_map, min_edit_map
from fusechat_fuse.store.shard_writer import ShardWriter
from fusechat_fuse.store.shards import Representation
from tests.helpers import real_tokenizers
from tests.helpers.alignment_data import end_of_turn, make_row, write_representation

RELEASED_DTW_SECONDS, RELEASED_ROWS_SECONDS = 4.71, 0.0254


def sentences(count: int, tokens: int) -> list[str]:
    """Texts of about `tokens` tokens out of Python's documentation."""
    corpus = "\n\n".join(real_tokenizers.tiny_corpus())
    width = int(tokens * 3.6)
    return [corpus[(n * 7919) % (len(corpus) - width) :][:width] for n in range(count)]


def quick_rows(tokenizer, texts: list[str], seed: int, K: int = 10) -> list[dict]:
    """Representation rows with tables drawn from a pool (making each anew would take minutes); 90 % hold the actual."""
    closing = end_of_turn(tokenizer)
    pool = make_row(tokenizer, "pool", [texts[0]], header="", end_of_turn=closing, K=K, seed=seed)
    rng = np.random.default_rng(seed)
    frequent = np.bincount(np.concatenate([tokenizer(text).input_ids for text in texts[:20]]))
    frequent = np.argsort(-frequent, kind="stable")[: 4 * K].astype(np.int32)
    rows = []
    for n, text in enumerate(texts):
        row = make_row(tokenizer, f"t{n}", [text], header="Assistant: ", end_of_turn=closing, K=1, seed=seed)
        P = len(row["predicted"])
        row["topk_logprobs"] = pool["topk_logprobs"][rng.integers(0, len(pool["ce"]), P)]
        row["topk_ids"] = rng.permuted(np.tile(frequent, (P, 1)), axis=1)[:, :K]
        actual = row["input_ids"][row["predicted"]]
        hit = (rng.random(P) < 0.9) & ~(row["topk_ids"] == actual[:, None]).any(1)
        row["topk_ids"][hit, rng.integers(0, 3, P)[hit]] = actual[hit]
        same = row["topk_ids"] == actual[:, None]
        own = -(same * row["topk_logprobs"].astype(np.float64)).sum(1)
        row["ce"] = np.where(same.any(1), own, 6.0).astype(np.float32)
        rows.append(row)
    return rows


def median(function, repeats: int, clock=time.perf_counter) -> float:
    """Median time of a few calls: wall time, or with time.process_time the time on the processor."""
    times = []
    for _ in range(repeats):
        begin = clock()
        function()
        times.append(clock() - begin)
    return statistics.median(times)


class Setting:
    """Two representations of the same texts in a folder, openchat the pivot, qwen the source."""

    def __init__(self, folder: Path, conversations: int, tokens: int):
        texts = sentences(conversations, tokens)
        self.folder, self.numbers = folder, count()
        self.opened: list[Representation] = []
        for seed, name in enumerate(("openchat", "qwen")):
            tokenizer = getattr(real_tokenizers, name)()
            rows = quick_rows(tokenizer, texts, seed)
            path = folder / f"{name}-{conversations}-{tokens}"
            self.opened.append(
                write_representation(path, tokenizer, rows, end_of_turn=end_of_turn(tokenizer), shard=256)
            )
        self.tokens = self.opened[0].manifest["counts"]["predicted_tokens"]

    def align(self, pair: TokenizerPair, mapping: str, vocab, processes: int = 1, counts: bool = False) -> None:
        """Both passes of `align` with reading and writing, without start-up and vocabulary maps."""
        joined = [(n, n) for n in range(len(self.opened[0]))]
        job = Job(*self.opened, joined, pair, MAPPINGS[mapping], False, vocab)
        out = self.folder / f"out-{next(self.numbers)}"
        writer = ShardWriter(out, {"run": str(out)}, kind="aligned")
        if counts:
            collect_counts(job, out, processes)
        write_shards(job, writer, processes)
        infos = [writer.info(n)["info"] for n in job.shards]
        sums = [info["sums"][""] for info in infos]
        source, aligned, size = (sum(s[k] for s in sums) for k in ("source_bits", "aligned_bits", "covered_bytes"))
        assert size > 0
        assert mapping != "prefix" or abs(aligned - source) / size < 1e-6  # the product is the source's own
        shutil.rmtree(out)


def at_once(setting: Setting, pair: TokenizerPair, vocab, processes: int) -> None:
    """The whole work in each of several processes that share nothing: what the machine gives to `processes`."""

    def work(place: int) -> None:
        setting.numbers = count(1_000_000 * (1 + place) + os.getpid())
        setting.align(pair, "prefix", vocab)

    workers = [multiprocessing.get_context("fork").Process(target=work, args=(place,)) for place in range(processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0


def vocabulary_maps(pair: TokenizerPair, min_edit: bool) -> dict[str, float]:
    """Seconds to build each map of the pair."""
    pieces = [piece or b"" for piece in pair.source.bytes]
    seconds = {
        "exact": median(lambda: exact_map(pair.source.bytes, pair.by_bytes), 3, time.process_time),
        "prefix": median(lambda: PathTable.of(pair.speller.paths(pieces)), 1),
    }
    if min_edit:
        workers = len(os.sched_getaffinity(0))
        seconds["min_edit"] = median(lambda: min_edit_map(pair.source.bytes, pair.by_bytes, workers=workers), 1)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--conversations", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=600)
    parser.add_argument("--num_proc", type=int, default=2)
    parser.add_argument("--min_edit", action="store_true", help="also time that map (minutes)")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    folder, figures = Path(tempfile.mkdtemp()), {}
    try:
        main_set = Setting(folder, options.conversations, options.tokens)
        pair = TokenizerPair(*main_set.opened, folder / "cache")
        figures["map_seconds"] = vocabulary_maps(pair, options.min_edit)
        vocab = {name: pair.vocabularies(MAPPINGS[name]) for name in ("prefix", "exact")}
        vocab["statistics"] = vocab["exact"]  # the same rows to make; the counting pass is timed as well
        figures["tokens_per_second"] = {}
        for mapping, maps in vocab.items():
            for name, clock in (("wall", time.perf_counter), ("processor", time.process_time)):
                seconds = median(
                    lambda m=mapping, v=maps: main_set.align(pair, m, v, counts=m == "statistics"),
                    options.repeats,
                    clock,
                )
                figures["tokens_per_second"].setdefault(name, {})[mapping] = round(main_set.tokens / seconds)
        one = median(lambda: main_set.align(pair, "prefix", vocab["prefix"]), options.repeats)
        several = median(lambda: main_set.align(pair, "prefix", vocab["prefix"], options.num_proc), options.repeats)
        apart = median(lambda: at_once(main_set, pair, vocab["prefix"], options.num_proc), options.repeats)
        figures["processes"] = {
            "num_proc": options.num_proc,
            "speed_up": round(one / several, 2),
            "of_separate_runs_at_once": round(options.num_proc * one / apart, 2),
        }
        per_length = {}
        for tokens in (512, 2048):
            setting = Setting(folder, 60, tokens)
            seconds = median(
                lambda s=setting: s.align(pair, "prefix", vocab["prefix"]), options.repeats, time.process_time
            )
            per_length[tokens] = seconds / 60
            batch = make_batch([setting.opened[0][0]], [setting.opened[1][0]], pair)
            places = (batch.pivot.start, batch.pivot.end, batch.source.start, batch.source.end)
            figures[f"correspondence_seconds_{tokens}"] = median(lambda p=places: correspond(*p), 200)
        figures["seconds_per_conversation"] = per_length
        figures["time_2048_over_512"] = round(per_length[2048] / per_length[512], 2)
        figures["faster_than_released"] = {
            "correspondence": round(RELEASED_DTW_SECONDS / figures["correspondence_seconds_2048"]),
            "align": round((2 * RELEASED_DTW_SECONDS + RELEASED_ROWS_SECONDS) / per_length[2048]),
        }
        figures["peak_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    finally:
        shutil.rmtree(folder)
    print(f"{main_set.tokens} pivot tokens in {options.conversations} conversations, openchat <- qwen, top 10")
    wall, processor = (figures["tokens_per_second"][name] for name in ("wall", "processor"))
    print("tokens/s on one core, reading and writing included: by the clock, by processor time")
    for mapping in wall:
        print(f"{mapping:<12} {wall[mapping]:>9,} {processor[mapping]:>9,}")
    for mapping, seconds in figures["map_seconds"].items():
        print(f"map {mapping:<12} {seconds:8.2f} s for {len(pair.source.bytes):,} x {len(pair.pivot.bytes):,} ids")
    print(f"2,048 tokens take {figures['time_2048_over_512']} x the time of 512")
    print(
        "{num_proc} processes: {speed_up} x; separate runs: {of_separate_runs_at_once} x".format(**figures["processes"])
    )
    print("released / ours at 2,048 tokens:", figures["faster_than_released"])
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
