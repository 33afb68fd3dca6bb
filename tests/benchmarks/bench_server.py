"""What `represent --server` costs the client: CPU to read vLLM's answers, as a share of a core at 10,000 tokens/s.

    python tests/benchmarks/bench_server.py [--tokens 1000] [--rounds 9]

The answer is a recorded one's entries over and over, at top-10, half of the tokens predicted; median of the rounds.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import orjson

from fusechat_fuse.capture.server import to_top_k
from fusechat_fuse.capture.server_protocols import PROTOCOLS

RECORDED = Path(__file__).resolve().parents[1] / "recorded" / "vllm-0.32.0.json"
TOP_K, AT = 10, 10_000


def answer_of(tokens: int) -> tuple[bytes, list[int]]:
    """An answer to a prompt of so many tokens, and the prompt's ids."""
    recorded = json.loads(RECORDED.read_text())
    about = next(iter(recorded["answer"]["choices"][0]["prompt_logprobs"][1].values()))
    ids = [20_000 + n for n in range(tokens)]
    logprob = min(about["logprob"], -3.0)  # eleven of them are at most 1 in all
    one = [{**about, "rank": k + 1, "logprob": logprob - k / 7} for k in range(TOP_K + 1)]
    entries = [None, *({str(token + k): entry for k, entry in enumerate(one)} for token in ids[1:])]
    recorded["answer"]["choices"][0]["prompt_logprobs"] = entries
    return json.dumps(recorded["answer"], ensure_ascii=False).encode(), ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    raw, ids = answer_of(options.tokens)
    positions, shares = list(range(options.tokens // 2, options.tokens)), []
    for _ in range(options.rounds):
        begun = time.process_time()
        for _ in range(10):
            answer = PROTOCOLS["vllm"].answer(orjson.loads(raw), ids, positions, TOP_K)
            to_top_k(answer, np.array(ids)[positions], TOP_K, 50_000)
        shares.append((time.process_time() - begun) / 10 / options.tokens * AT)
    print(
        f"{len(raw) / options.tokens:.0f} bytes a token; {statistics.median(shares):.1%} of a core at {AT:,} tokens/s"
    )


if __name__ == "__main__":
    main()
