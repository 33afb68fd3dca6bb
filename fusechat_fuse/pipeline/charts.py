"""The charts of `report.html`: matplotlib's SVG, put into the page as text. Needs the extra `plot`.

What is drawn in INK takes the colour of the page's text, so that a chart can be read in a light and in a dark page.
"""

from __future__ import annotations

import html
import io
import re
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK = "#010203"
_STYLES: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.color": INK,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}
_COLOURS = ("#2f81f7", "#e5534b", "#2da44e", "#bf8700", "#a475f9", "#d6409f", "#1b9aaa", "#8b949e")
_DASHES = ("-", "--", "-.", ":")
WIDTH = 5.6  # inches: 403 px before scaling, so that a phone shows a chart at nearly full size


def loss_chart(losses: dict[str, list[dict[str, float]]]) -> str:
    """The loss of each training by step; curves differ in colour and dashes, and the legend lies below the axes."""
    with rc_context(_STYLES):
        rows = -(-len(losses) // 3)
        figure = Figure(figsize=(WIDTH, 3.1 + 0.22 * rows), layout="constrained")
        axes = figure.subplots()
        for n, (name, log) in enumerate(losses.items()):
            axes.plot(
                [entry["step"] for entry in log],
                [entry["loss"] for entry in log],
                color=_COLOURS[n % len(_COLOURS)],
                linestyle=_DASHES[n % len(_DASHES)],
                marker="o" if len(log) == 1 else None,
                label=name,
            )
        axes.set(xlabel="optimizer step", ylabel="training loss (nats per labelled token)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside lower center", ncols=3)
        return _svg(figure, "losses", f"Training loss by step: {', '.join(losses)}")


def difference_chart(differences: dict[str, tuple[float, float]], baseline: str, unit: str) -> str:
    """Differences to a baseline with their intervals, the first on top.

    Args:
        differences: name -> (mean, half width of the 95 % interval; NaN: unknown).
    """
    with rc_context(_STYLES):
        figure = Figure(figsize=(WIDTH, 0.9 + 0.3 * len(differences)), layout="constrained")
        axes = figure.subplots()
        places = range(len(differences))
        axes.axvline(0, color=INK, linewidth=1)
        means, widths = zip(*differences.values())
        axes.errorbar(means, places, xerr=widths, fmt="o", color=_COLOURS[0], capsize=4, linewidth=2)
        axes.set_yticks(places, list(differences))
        axes.set_ylim(len(differences) - 0.5, -0.5)
        axes.set_xlabel(f"{unit}, less {baseline}'s")
        axes.locator_params(axis="x", nbins=5)
        axes.grid(axis="y", visible=False)
        return _svg(figure, "differences", f"Differences to {baseline} with 95 % intervals: {', '.join(differences)}")


def _svg(figure: Figure, name: str, label: str) -> str:
    """The figure for a page: ids of its own, no sizes, no addresses, INK as the text's colour."""
    stream = io.StringIO()
    with rc_context({"svg.hashsalt": name}):  # the same ids every time
        figure.savefig(
            stream, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    drawn = stream.getvalue()
    box = re.search(r'viewBox="[^"]*"', drawn)
    inner = re.sub(r"<metadata>.*?</metadata>", "", drawn[drawn.index(">", drawn.index("<svg")) + 1 :], flags=re.DOTALL)
    inner = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", inner).replace(INK, "currentColor")
    opening = f'<svg {box[0] if box else ""} role="img" aria-label="{html.escape(label)}">'
    return opening + inner.rstrip()
