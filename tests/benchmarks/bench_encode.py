"""How fast chat data are read and tokenized, and how much memory a large corpus takes.

    python -m tests.benchmarks.bench_encode [--conversations 20000] [--corpus 2000000] [--repeats 3]

1. Conversations a second of `read_conversations`, of a thread that encodes (template, ids, byte spans, checks), and of
   the tokenizer alone, whose share of the encoder bounds what faster code could gain.
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

from fusechat_fuse.capture.computation import encode_ahead
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


def encode_shards(encoder: ConversationEncoder, found: list) -> float:
    """Seconds from the first to the last shard."""
    start = time.perf_counter()
    for _ in encode_ahead(encoder, (found[n : n + SHARD] for n in range(0, len(found), SHARD))):
        pass
    return time.perf_counter() - start


def speeds(count: int, repeats: int) -> dict[str, float]:
    encoder = encoder_of()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.jsonl"
        write_corpus(path, count)
        taken: dict[str, list[float]] = {"read": [], "thread": [], "tokenizer alone": []}
        for _ in range(repeats):
            start = time.perf_counter()
            found, _ = read_conversations(path)
            taken["read"].append(time.perf_counter() - start)
            taken["thread"].append(encode_shards(encoder, found))
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
    encode_shards(encoder, found[:20_000])
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
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory_of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(json.dumps(corpus_memory(options.memory_of)))
        return
    print(json.dumps(speeds(options.conversations, options.repeats)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.jsonl"
        write_corpus(path, options.corpus)
        command = [sys.executable, "-m", __spec__.name, "--memory_of", str(path)]
        print(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())


if __name__ == "__main__":
    main()
