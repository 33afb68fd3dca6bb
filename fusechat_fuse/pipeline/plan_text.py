"""What `plan` found, as a table with one row per step, and the warnings below it."""

from __future__ import annotations

from typing import Any

from fusechat_fuse.pipeline import costs


def plan_lines(found: dict[str, Any]) -> list[str]:
    """What `plan` returns as text: a table with one row per step, the totals, how they were obtained, the warnings."""
    head = ["step", "conversations", "predicted", "padding", "disk", "memory/rank", "FLOPs", "time", "GPU hours"]
    table = [[*cells[: len(head) - (found["gpu"] is None)]] for cells in (head, *map(_cells, found["steps"]))]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]) for row in table]
    totals, gpu = found["totals"], found["gpu"]
    total = "total" + (f" without {len(found['failing'])} steps that have no figures" if found["failing"] else "")
    total += f": {totals['disk_bytes'] / 1e9:.2f} GB on disk, {totals['flops']:.1e} FLOPs"
    if totals["seconds"]:
        total += f", {totals['seconds'] / 3600:.2f} hours"
    if gpu:
        total += f" ({totals['gpu_seconds'] / 3600:.2f} GPU hours)"
    counted = "every conversation was encoded" if found["exact"] else "estimated from a sample of the conversations"
    if found["failing"]:
        counted = "not of every data set"
    times = "* measured"
    if gpu:
        times += f"; others at {costs.UTILIZATION:.0%} of the bfloat16 peak of {gpu}, one stage after the other"
    memory = f"of {gpu} if the step runs a model, else main memory" if gpu else "without a GPU; --gpu NAME for one"
    if any("measured_disk_bytes" in row for row in found["steps"]):
        memory += "; measured values in brackets (memory: main memory of the largest process)"
    lines += ["", f"{total}; {counted}.", f"Memory: {memory}. Times: {times}."]
    lines += [f"NOTE  {note}" for note in found["notes"]]
    return [*lines, *(f"WARNING  {warning}" for warning in found["warnings"])]


def _cells(row: dict[str, Any]) -> list[str]:
    def cell(key: str, form: str, scale: int | float = 1) -> str:
        return form.format(row[key] / scale) if row.get(key) else "-"

    def size(key: str, form: str, scale: int | float) -> str:
        measured = f"measured_{key}"
        return cell(key, form, scale) + (f" ({cell(measured, form, scale)})" if measured in row else "")

    hours = row.get("seconds", 0) * row["gpus"] / 3600
    return [
        f"{row['step']} x {row['ranks']}" if row["ranks"] > 1 else row["step"],
        cell("conversations", "{:,.0f}"),
        cell("predicted_tokens", "{:,.0f}"),
        cell("padding_share", "{:.1%}"),
        size("disk_bytes", "{:,.2f}", 1e6) + " MB",
        size("memory_bytes", "{:.2f}", 2**30) + " GiB",
        cell("flops", "{:.1e}"),
        cell("seconds", "{:,.0f} s") + ("*" if row["measured"] else ""),
        f"{hours:.2f}" if hours else "-",
    ]
