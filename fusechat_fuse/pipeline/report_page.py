"""`report.html`: what `report.json` holds, as one self-contained page that loads nothing.

A section whose stage did not run is left out; the commands behind its figures stand below it.
"""

from __future__ import annotations

import html
from typing import Any

from fusechat_fuse.store.card import shown_name
from fusechat_fuse.store.slices import undecided_lines

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --dim: #6e7781; }
@media (prefers-color-scheme: dark) { :root { --dim: #9aa4ae; } }
body { margin: 0 auto; max-width: 70rem; padding: 1.2rem; font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
td, th { text-align: right; padding: .2rem .7rem; border-bottom: 1px solid var(--line); }
td:first-child, th:first-child { text-align: left; } .best { font-weight: bold; }
td { font-variant-numeric: tabular-nums; } details { color: var(--dim); font-size: .85rem; margin: .4rem 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; } svg { max-width: 100%; height: auto; }
text { font: 12px system-ui, sans-serif; fill: CanvasText; } figcaption { color: var(--dim); font-size: .85rem; }
"""
_COLOURS = ("#0969da", "#cf222e", "#1a7f37", "#9a6700", "#8250df", "#bf3989", "#1b7c83", "#6e7781")
_DASHES = ("", "6 3", "2 2", "8 3 2 3")
WIDTH, HEIGHT, LEFT, BOTTOM = 760, 300, 50, 30  # of a chart and its margins, in SVG units


def report_page(title: str, found: dict[str, Any]) -> str:
    """The report as HTML.

    Args:
        title: of the page. found: what `report.json` holds.
    """
    commands = found["commands"]

    def commands_of(*stages: str) -> str:
        lines = "\n".join(text for key, text in commands.items() if key.split()[0] in stages)
        return f"<details><summary>commands</summary><pre>{html.escape(lines)}</pre></details>"

    parts = [f"<h1>{html.escape(title)}</h1>", f"<p>{_models(found)}</p>"]
    if "held_out" in found:
        parts += [
            "<h2>Held-out bits per byte (lower is better)</h2>",
            _comparison_table(found["held_out"]),
            commands_of("evaluate"),
        ]
    if "compare" in found:
        parts += ["<h2>Bits per byte of the training data (lower is better)</h2>", _comparison_table(found["compare"])]
        parts.append(commands_of("represent", "compare"))
    if "certificates" in found:
        columns = ("mapping", "coverage", "mean_mapped_mass", "gap_bits_per_byte")
        rows = {name: [of_source.get(c) for c in columns] for name, of_source in found["certificates"].items()}
        parts += ["<h2>Alignment</h2>", _table(["source", *columns], rows), commands_of("align", "combine")]
    if "losses" in found:
        curves = {name: [(e["step"], e["loss"]) for e in log] for name, log in found["losses"].items()}
        parts += ["<h2>Training loss</h2>", _line_chart(curves, "step", "loss"), commands_of("train")]
    if "slices" in found:
        parts.append("<h2>Model selected for each slice</h2>")
        parts += [f"<h3>{html.escape(name)}</h3>{_slice_table(chosen)}" for name, chosen in found["slices"].items()]
    if "merges" in found:
        parts.append("<h2>Merge coefficients</h2>")
        parts += [
            f"<h3>{html.escape(name)}</h3>{_coefficient_table(summary)}" for name, summary in found["merges"].items()
        ]
        parts.append(commands_of("merge"))
    policy = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8">{policy}<title>{html.escape(title)}</title>'
    view = '<meta name="viewport" content="width=device-width">'
    return "\n".join([f"{head}{view}<style>{_STYLE}</style></head><body>", *parts, "</body></html>", ""])


def _models(found: dict[str, Any]) -> str:
    sources = ", ".join(f"{name} ({shown_name(model)})" for name, model in found["sources"].items())
    return html.escape(f"Pivot {shown_name(found['pivot'])}; sources {sources}; preset {found['preset']}.")


def _cell(value) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return "" if value is None else html.escape(str(value))


def _table(head: list[str], rows: dict[str, list], best: dict[str, int] | None = None) -> str:
    """A table; best: row -> index of the cell in bold."""
    lines = ["<tr>" + "".join(f'<th scope="col">{html.escape(name)}</th>' for name in head) + "</tr>"]
    for name, cells in rows.items():
        best_cell = (best or {}).get(name)
        tds = [f"<td{' class=best' if n == best_cell else ''}>{_cell(cell)}</td>" for n, cell in enumerate(cells)]
        lines.append(f"<tr><td>{html.escape(name)}</td>{''.join(tds)}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _comparison_table(result: dict[str, Any]) -> str:
    """Mean bits per byte: one row per slice, one column per model."""
    names, rows, best = result["models"], {}, {}
    for slice_name, figures in result["slices"].items():
        means = [figures["models"][name]["mean"] for name in names]
        rows[slice_name] = [figures["conversations"], *means]
        best[slice_name] = 1 + means.index(min(means))
    return _table(["slice", "conversations", *names], rows, best)


def _slice_table(chosen: dict[str, Any]) -> str:
    """Median CE of each model: one row per slice, the selected model in bold."""
    rows, best = {}, {}
    for name, entry in chosen["slices"].items():
        rows[name or "all"] = [entry["conversations"], *entry["medians"], chosen["models"][entry["best"]]]
        best[name or "all"] = 1 + entry["best"]
    unit = f"nats per {chosen['ce_unit']}"
    head = ["slice", "conversations", *(f"{name}, {unit}" for name in chosen["models"]), "selected"]
    undecided = "".join(f"<p>{html.escape(line)}</p>" for line in undecided_lines(chosen["slices"]))
    return _table(head, rows, best) + undecided


def _coefficient_table(summary: dict[str, Any]) -> str:
    """Mean merge coefficients: one row per kind of tensor, one column per target."""
    kinds = summary["coefficients_by_kind"]
    targets = list(next(iter(kinds.values()))) if kinds else []
    return _table(["tensors", *targets], {kind: [of.get(name) for name in targets] for kind, of in kinds.items()})


def _line_chart(curves: dict[str, list[tuple[float, float]]], x_label: str, y_label: str) -> str:
    """A line chart as SVG, with a legend; curves differ in colour and dashes.

    Args:
        curves: name -> points (x, y). x_label, y_label: of the axes.
    """
    points = [point for curve in curves.values() for point in curve]
    high_x, high_y = max(x for x, _ in points), max(y for _, y in points)
    low_y = min(y for _, y in points)
    span_x, span_y = (WIDTH - LEFT - 10) / (high_x or 1), (HEIGHT - BOTTOM - 10) / ((high_y - low_y) or 1)
    lines = []
    for n, (name, curve) in enumerate(curves.items()):
        places = " ".join(f"{LEFT + x * span_x:.1f},{10 + (high_y - y) * span_y:.1f}" for x, y in curve)
        colour, dash = _COLOURS[n % len(_COLOURS)], _DASHES[n % len(_DASHES)]
        stroke = f'stroke="{colour}" stroke-dasharray="{dash}" stroke-width="2" fill="none"'
        y = 20 + 18 * n
        lines.append(f'<polyline points="{places}" {stroke}/>')
        lines.append(f'<path d="M{WIDTH - 190} {y - 4}h30" {stroke}/>')
        lines.append(f'<text x="{WIDTH - 152}" y="{y}">{html.escape(name)}</text>')
    axis = f'<path d="M{LEFT} 10V{HEIGHT - BOTTOM}H{WIDTH - 10}" stroke="currentColor" fill="none"/>'
    marks = [
        f'<text x="4" y="20">{high_y:.3g}</text><text x="4" y="{HEIGHT - BOTTOM}">{low_y:.3g}</text>',
        f'<text x="{WIDTH - 60}" y="{HEIGHT - 8}">{x_label} {high_x:g}</text>',
    ]
    label = html.escape(f"{y_label} by {x_label}: {', '.join(curves)}")
    caption = f"<figcaption>{html.escape(y_label)} by {x_label}</figcaption>"
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" aria-label="{label}">'
        f"{axis}{''.join(marks)}{''.join(lines)}</svg>{caption}</figure>"
    )
