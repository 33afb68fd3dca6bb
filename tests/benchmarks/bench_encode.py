"""How fast chat data are read and tokenized, how far processes help, and what memory a large corpus takes.

    python -m tests.benchmarks.bench_encode [--conversations 20000] [--corpus 2000000] [--processes 2] [--repeats 3]

1. Conversations a second of `read_conversations`, of one thread that encodes (template, ids, byte spans, checks), of
   processes that do, and of the tokenizer alone, whose share of the encoder is the bound of what more code could gain.
2. Peak memory of reading a corpus of so many conversations from a .jsonl file, and of encoding the first 20,000 of them
   by shards, above that of a process that has loaded modules and tokenizer; the corpus's bytes beside it.
Conversations are text that comes with Python, question and answer, of the lengths of bench_represent.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from fusechat_fuse.capture import computation
from fusechat_fuse.text.chat import ConversationEncoder
from fusechat_fuse.text.conversations import read_conversations
from tests.benchmarks.bench_represent import make_conversations
from tests.helpers import real_tokenizers

SHARD = 256


def encoder_of() -> ConversationEncoder:
    return ConversationEncoder(real_tokenizers.qwen(), "native")


def write_corpus(path: Path, count: int) -> None:
    rows = make_conversations(2000)
    with path.open("w", encoding="utf-8") as file:
        for n in range(count):
            file.write(json.dumps({"id": f"c{n:08d}", "messages": rows[n % len(rows)]["messages"]}) + "\n")


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def encode_shards(encoder: ConversationEncoder, found: list, processes: int) -> float:
    """Seconds from the first to the last shard; the pool is there and warm."""
    shards = [found[n : n + SHARD] for n in range(0, len(found), SHARD)]
    with computation.tokenizing(encoder, processes) as tokenize:
        for warm in [tokenize(shards[0]) for _ in range(2 * max(processes, 1))]:
            warm.result()
        start, waiting = time.perf_counter(), []
        for shard in shards:
            waiting.append(tokenize(shard))
            if len(waiting) > processes:
                waiting.pop(0).result()
        for last in waiting:
            last.result()
        return time.perf_counter() - start


def speeds(count: int, processes: int, repeats: int) -> dict[str, float]:
    encoder = encoder_of()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.jsonl"
        write_corpus(path, count)
        taken: dict[str, list[float]] = {"read": [], "thread": [], "processes": [], "tokenizer alone": []}
        for _ in range(repeats):
            start = time.perf_counter()
            found, _ = read_conversations(path)
            taken["read"].append(time.perf_counter() - start)
            taken["thread"].append(encode_shards(encoder, found, 0))
            taken["processes"].append(encode_shards(encoder, found, processes))
            texts = ["\n".join(message["content"] for message in one.messages) for one in found]
            start = time.perf_counter()
            for text in texts:
                encoder.tokenizer(text, add_special_tokens=False)
            taken["tokenizer alone"].append(time.perf_counter() - start)
    tokens = sum(len(encoder.encode(one.messages).input_ids) for one in found[:500]) / 500
    return {"tokens_per_conversation": round(tokens)} | {
        f"{name}, conversations/s": round(count / median(times)) for name, times in taken.items()
    }


def corpus_memory(path: Path) -> dict[str, float]:
    """In this process: run it in one of its own."""
    encoder = encoder_of()
    encoder.encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    before = peak()
    found, _ = read_conversations(path)
    read = peak()
    encode_shards(encoder, found[:20_000], 0)
    return {
        "conversations": len(found),
        "corpus_mib": round(path.stat().st_size / 2**20),
        "before_mib": round(before),
        "read_mib": round(read - before),
        "read_and_encoded_mib": round(peak() - before),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--conversations", type=int, default=20_000)
    parser.add_argument("--corpus", type=int, default=2_000_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory_of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(json.dumps(corpus_memory(options.memory_of)))
        return
    print(json.dumps(speeds(options.conversations, options.processes, options.repeats)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.jsonl"
        write_corpus(path, options.corpus)
        command = [sys.executable, "-m", __spec__.name, "--memory_of", str(path)]
        print(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())


if __name__ == "__main__":
    main()
