"""A plan as a table for people."""

from __future__ import annotations

from typing import Any

from fusechat_fuse.pipeline.costs import UTILIZATION


def plan_lines(found: dict[str, Any]) -> list[str]:
    """The lines of what `plan` returns: a row a step, the sums, what they hold for, the warnings."""
    head = ["step", "conversations", "predicted", "padding", "disk", "memory/rank", "FLOPs", "time", "GPU hours"]
    table = [[*cells[: len(head) - (found["gpu"] is None)]] for cells in (head, *map(_cells, found["steps"]))]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]) for row in table]
    totals, gpu = found["totals"], found["gpu"]
    end = f"in all: {totals['disk_bytes'] / 1e9:.2f} GB on disk, {totals['flops']:.1e} FLOPs"
    if totals["seconds"]:
        end += f", {totals['seconds'] / 3600:.2f} hours"
    if gpu:
        end += f" ({totals['gpu_seconds'] / 3600:.2f} GPU hours)"
    how = "every conversation was encoded" if found["exact"] else "from a sample of the conversations"
    of_time = "* measured"
    of_time += f"; others at {UTILIZATION:.0%} of {gpu}'s bfloat16 peak, one stage after the other" if gpu else ""
    place = (
        f"of {gpu} where a model runs, else main memory" if gpu else "of a process without a GPU; --gpu NAME for one"
    )
    if any("measured_disk_bytes" in row for row in found["steps"]):
        place += "; in brackets what was measured, of memory the largest process's main memory"
    lines += ["", f"{end}; {how}.", f"Memory: {place}. Times: {of_time}."]
    return [*lines, *(f"WARNING  {warning}" for warning in found["warnings"])]


def _cells(row: dict[str, Any]) -> list[str]:
    def cell(key: str, form: str, scale: int | float = 1) -> str:
        return form.format(row[key] if scale == 1 else row[key] / scale) if row.get(key) else "-"

    def beside(key: str, form: str, scale: int | float) -> str:
        return f" ({form.format(row[key] / scale)})" if key in row else ""

    hours = row.get("seconds", 0) * row["gpus"] / 3600
    return [
        f"{row['step']} x {row['ranks']}" if row["ranks"] > 1 else row["step"],
        cell("conversations", "{:,}"),
        cell("predicted_tokens", "{:,}"),
        cell("padding_share", "{:.1%}"),
        cell("disk_bytes", "{:,.2f}", 1e6) + beside("measured_disk_bytes", "{:,.2f}", 1e6) + " MB",
        cell("memory_bytes", "{:.2f}", 2**30) + beside("measured_memory_bytes", "{:.2f}", 2**30) + " GiB",
        cell("flops", "{:.1e}"),
        cell("seconds", "{:,.0f} s") + ("*" if row["measured"] else ""),
        f"{hours:.2f}" if hours else "-",
    ]
