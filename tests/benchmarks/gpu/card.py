"""What the GPU benchmarks share: the card's name, times by its own events, peaks of its allocator."""

import gc
import json
import statistics
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PEERS = ("torch", "triton", "transformers", "accelerate", "mergekit", "liger-kernel", "cut-cross-entropy")


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe() -> dict:
    """The card and the versions beside which its figures are to be read."""
    found = {"card": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, small shapes"}
    for name in PEERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def measure(step: Callable[[], object], turns: int, *, forget: Callable[[], object] | None = None) -> dict:
    """Median seconds of `step` after one turn to warm up, and the most memory that was allocated beyond what was held
    before it; or what it died of. `forget` lets go of the last turn's results first."""
    seconds, peak = [], 0
    try:
        for turn in range(1 + turns):
            if forget is not None:
                forget()
            before = _reset_peak()
            spent = _timed(step)
            if turn:
                seconds.append(spent)
                peak = max(peak, _peak() - before)
    except torch.OutOfMemoryError:
        gc.collect()
        torch.cuda.empty_cache()
        return {"seconds": None, "peak": None, "failed": "out of memory"}
    return {"seconds": statistics.median(seconds), "peak": peak}


def _timed(step: Callable[[], object]) -> float:
    if not torch.cuda.is_available():
        import time

        started = time.perf_counter()
        step()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def _reset_peak() -> int:
    if not torch.cuda.is_available():
        return 0
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def save(name: str, lines: list[dict], folder: str | None) -> None:
    """The JSON beside the printed table."""
    if folder is not None:
        text = json.dumps({"benchmark": name, **describe(), "lines": lines}, indent=1)
        Path(folder, f"{name}.json").write_text(text + "\n")
