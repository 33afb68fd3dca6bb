"""Shared by the examples that measure: intervals, time over several starts, and files of results."""

from __future__ import annotations

import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from scipy import stats

START = time.monotonic()


def half_width(values: np.ndarray) -> float:
    """Half width of the 95 % interval of a mean (Student's t); nan for a single value."""
    n = len(values)
    return float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / n**0.5) if n > 1 else float("nan")


def facts(command: str, root: Path, packages: tuple[str, ...], finished: bool = True) -> dict:
    """How figures were made: command, minutes of all finished starts (None: rows are missing), machine, versions."""
    minutes = None
    if finished:
        clock = root / "minutes.txt"
        minutes = (float(clock.read_text()) if clock.exists() else 0) + (time.monotonic() - START) / 60
        clock.write_text(f"{minutes:.1f}")
    return {
        "command": f"python examples/{command}",
        "minutes": None if minutes is None else round(minutes, 1),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": ", ".join(f"{name} {version(name)}" for name in packages),
    }


def sentence(about: dict) -> str:
    """The facts in Markdown."""
    took = "finished rows only" if about["minutes"] is None else f"{about['minutes']} minutes in all starts"
    return f"`{about['command']}`, {took}, {about['machine']}; {about['versions']}."


def write(folder: Path, name: str, results: dict, tables: str) -> None:
    """Write NAME.json and NAME.md, and print the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1))
    (folder / f"{name}.md").write_text(tables)
    print(tables)


def draw(rows: list[tuple[str, float, float]], label: str, path: Path) -> None:
    """Plot differences with their intervals, (name, mean, half width), from the top down."""
    from matplotlib.figure import Figure

    names, means, halves = zip(*rows[::-1], strict=True)
    figure = Figure(figsize=(8, 0.2 * len(rows) + 1), layout="constrained")
    axes = figure.add_subplot()
    axes.errorbar(means, range(len(rows)), xerr=halves, fmt="o", markersize=4)
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_xlabel(label)
    figure.savefig(path, dpi=110)
