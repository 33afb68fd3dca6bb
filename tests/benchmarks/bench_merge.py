"""SCE of one tensor against mergekit's own `sce_merge`: time, extra memory, error; and a plain copy of the same bytes.

    python tests/benchmarks/bench_merge.py [--elements 17 59] [--threads 2] [--repeats 3]

Each line runs in a process of its own, both methods in turn on the same tensors: five targets, task vectors of standard
deviation 0.3 : 1 : 3 : 1 : 0.3 times 1e-4. Times are medians. Extra memory is the peak of the resident set during the
merge beyond inputs and output. Beside the ratio of times stands that of processor seconds (all threads), which other
programs on the machine disturb less. The error is that of the update (merged minus pivot) relative to the exact one,
computed in float64 on a stretch of the tensor from exact coefficients and, for tau < 1, an exact threshold; in bfloat16
what remains is the rounding of the result.
"""

import argparse
import ctypes
import gc
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

SCALES = (0.3e-4, 1e-4, 3e-4, 1e-4, 0.3e-4)
STRETCH = 1 << 20


def inputs(elements: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Pivot and targets, made piece by piece."""
    tensors = [torch.empty(elements, dtype=dtype) for _ in range(1 + len(SCALES))]
    generator = torch.Generator().manual_seed(0)
    for start in range(0, elements, STRETCH):
        piece = slice(start, min(start + STRETCH, elements))
        pivot = 0.02 * torch.randn(piece.stop - start, generator=generator)
        tensors[0][piece] = pivot
        for target, scale in zip(tensors[1:], SCALES):
            target[piece] = pivot + scale * torch.randn(piece.stop - start, generator=generator)
    return tensors


def exact_update(tensors: list[torch.Tensor], tau: float) -> torch.Tensor:
    """merged - pivot on the first STRETCH elements, in float64."""
    pivot, targets = tensors[0], tensors[1:]
    elements = pivot.numel()
    pieces = [slice(start, min(start + STRETCH, elements)) for start in range(0, elements, STRETCH)]
    deltas = lambda piece: torch.stack([t[piece].double() - pivot[piece].double() for t in targets])  # noqa: E731
    threshold = -1.0
    if tau < 1:
        variances = torch.cat([deltas(piece).var(0, unbiased=False) for piece in pieces])
        kept = math.floor(tau * int(torch.count_nonzero(variances)))
        threshold = float(variances.kthvalue(elements - kept + 1).values)
        del variances
    sums = torch.zeros(len(targets), dtype=torch.float64)
    for piece in pieces:
        d = deltas(piece)
        sums += (d.square() * (d.var(0, unbiased=False) >= threshold)).sum(1)
    eta = (sums / sums.sum())[:, None]
    d = deltas(pieces[0])
    d = d * (d.var(0, unbiased=False) >= threshold)
    kept = d.sign() == torch.where(d.sum(0) >= 0, 1.0, -1.0)
    return (eta * d * kept).sum(0) / (eta * kept).sum(0).clamp(min=1e-300)


def peak_beyond(function) -> tuple[float, float, torch.Tensor, int]:
    """(seconds, processor seconds, result, peak resident bytes beyond those before the call and the result)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed is no memory of this one
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = _status("VmRSS")
    start, processor = time.perf_counter(), time.process_time()
    result = function()
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    return seconds, processor, result, _status("VmHWM") - before - result.numel() * result.itemsize


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def measure(millions: int, dtype_name: str, tau: float, threads: int, repeats: int) -> dict:
    from mergekit.merge_methods import merge_tensors
    from mergekit.merge_methods.sce import sce_merge as shipped

    from fusechat_merge import sce as ours

    torch.set_num_threads(threads)
    tensors = inputs(millions * 1_000_000, getattr(torch, dtype_name))
    elements = tensors[0].numel()
    run = lambda method: merge_tensors(tensors, method, base_index=0, parameters={"select_topk": tau})  # noqa: E731
    run_small = [t[:100_000] for t in tensors]
    for method in (ours, shipped):  # load libraries
        merge_tensors(run_small, method, base_index=0, parameters={"select_topk": tau})
    exact = exact_update(tensors, tau)
    seconds, processor = {"ours": [], "shipped": []}, {"ours": [], "shipped": []}
    memory, errors = {}, {}
    for turn in range(repeats):
        for name, method in (("ours", ours), ("shipped", shipped)):
            spent, busy, merged, extra = peak_beyond(lambda method=method: run(method))
            seconds[name].append(spent)
            processor[name].append(busy)
            memory[name] = max(memory.get(name, extra), extra)
            if turn == 0:
                update = merged[:STRETCH].double() - tensors[0][:STRETCH].double()
                errors[name] = float((update - exact).norm() / exact.norm())
            del merged
    copies = []
    copied = torch.empty_like(tensors[0])
    for _ in range(max(3, repeats)):
        start = time.perf_counter()
        for tensor in tensors:
            copied.copy_(tensor)
        copies.append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    busy = {name: statistics.median(values) for name, values in processor.items()}
    return {
        "elements": elements,
        "dtype": dtype_name,
        "tau": tau,
        "threads": threads,
        "ours_s": medians["ours"],
        "shipped_s": medians["shipped"],
        "ratio": medians["shipped"] / medians["ours"],
        "ours_processor_s": busy["ours"],
        "shipped_processor_s": busy["shipped"],
        "processor_ratio": busy["shipped"] / busy["ours"],
        "copies": medians["ours"] / statistics.median(copies),
        "ours_extra_bytes_per_element": memory["ours"] / elements,
        "ours_extra_mib": memory["ours"] / 2**20,
        "shipped_extra_bytes_per_element": memory["shipped"] / elements,
        "ours_error": errors["ours"],
        "shipped_error": errors["shipped"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, nargs="+", default=[17, 59], help="millions of elements")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--taus", type=float, nargs="+", default=[1.0, 0.1])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        millions, dtype, tau = arguments.one
        print(json.dumps(measure(int(millions), dtype, float(tau), arguments.threads, arguments.repeats)))
        return
    print(f"{platform.machine()}, {arguments.threads} threads, torch {torch.__version__}, 5 targets")
    head = ("elements", "dtype", "tau", "ours s", "shipped s", "ratio", "cpu r.", "copies", "extra B", "shipped")
    print("".join(f"{title:>10}" for title in (*head, "error", "shipped")))
    lines = []
    for millions in arguments.elements:
        for dtype in arguments.dtypes:
            for tau in arguments.taus:
                command = [sys.executable, __file__, "--one", str(millions), dtype, str(tau)]
                command += ["--threads", str(arguments.threads), "--repeats", str(arguments.repeats)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(done.stderr)
                line = json.loads(done.stdout.splitlines()[-1])
                lines.append(line)
                cells = [f"{line['elements'] / 1e6:.0f}M", line["dtype"], str(line["tau"]), f"{line['ours_s']:.3f}"]
                cells += [f"{line[key]:.1f}" for key in ("shipped_s", "ratio", "processor_ratio", "copies")]
                cells += [f"{line[f'{name}_extra_bytes_per_element']:.2f}" for name in ("ours", "shipped")]
                cells += [f"{line[f'{name}_error']:.1e}" for name in ("ours", "shipped")]
                print("".join(f"{cell:>10}" for cell in cells), flush=True)
    print(json.dumps({"benchmark": "merge", "torch": torch.__version__, "lines": lines}))


if __name__ == "__main__":
    main()
