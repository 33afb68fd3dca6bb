"""`report.json` and `report.html`: what a run measured, in one page that asks for nothing from anywhere.

Everything is read from what the stages left; a section whose stage did not run is left out. Each figure stands above
the command that made it.
"""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from fusechat_fuse.pipeline.recipe import Recipe
from fusechat_fuse.pipeline.steps import Step
from fusechat_fuse.store.card import shown_name
from fusechat_fuse.store.files import json_bytes, read_json, write_atomic

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
WIDTH, HEIGHT, LEFT, BOTTOM = 760, 300, 50, 30  # of a picture, in its own units


def write_report(recipe: Recipe, steps: list[Step], record: dict[str, Any]) -> dict[str, Any]:
    """Write `report.json` and `report.html` into the run's directory.

    Args:
        recipe, steps: of the run. record: `stages.json`, for the commands as they were run.
    Returns: what report.json holds: compare, certificates, losses, slices, merges, held_out, commands; each by name,
        without what is not there.
    """
    home = recipe.output_dir
    models = [step.output for step in steps if step.stage == "train"]
    merges = [step.output for step in steps if step.stage == "merge"]
    found = {
        "pivot": recipe.pivot.model,
        "sources": {name: model.model for name, model in recipe.sources.items()},
        "preset": recipe.preset,
        "compare": read_json(home / "compare" / "compare.json", "comparison"),
        "certificates": _each({name: home / "aligned" / name for name in recipe.sources}, _certificate),
        "losses": _each({model.name: model for model in models}, _losses),
        "slices": _each({m.name: m / "slices.json" for m in models}, lambda file: read_json(file, "slices")),
        "merges": _each({m.name: home / "merged" / "reports" / m.name for m in merges}, _coefficients),
        "held_out": read_json(home / "held_out" / "compare" / "compare.json", "comparison"),
        "commands": {step.key: record.get(step.key, {}).get("command", step.shell) for step in steps},
        "seconds": {step.key: record[step.key]["seconds"] for step in steps if "seconds" in record.get(step.key, {})},
    }
    found = {name: value for name, value in found.items() if value}
    write_atomic(home / "report.json", json_bytes(found))
    write_atomic(home / "report.html", _page(home.resolve().name, found).encode())
    return found


def _each(paths: dict[str, Path], read) -> dict[str, Any]:
    values = {name: read(path) for name, path in paths.items()}
    return {name: value for name, value in values.items() if value}


def _certificate(folder: Path) -> dict[str, float] | None:
    manifest = read_json(folder / "manifest.json", "manifest")
    return manifest and {"mapping": manifest["options"]["mapping"], **manifest["certificate"]["all"]}


def _losses(folder: Path) -> list[dict[str, float]]:
    history = (read_json(folder / "trainer_state.json", "log") or {}).get("log_history", [])
    kept = ("step", "loss", "lm_loss", "fusion_loss", "source_share")
    return [{name: entry[name] for name in kept if name in entry} for entry in history if "loss" in entry]


def _coefficients(folder: Path) -> dict[str, Any] | None:
    """Of the last merge: each has a subfolder of its own, numbered."""
    reports = sorted(folder.glob("*/summary.json"))
    return read_json(reports[-1], "merge report") if reports else None


def _page(title: str, found: dict[str, Any]) -> str:
    """The report as HTML."""
    commands = found["commands"]

    def of(*stages: str) -> str:
        lines = "\n".join(text for key, text in commands.items() if key.split()[0] in stages)
        return f"<details><summary>commands</summary><pre>{html.escape(lines)}</pre></details>"

    parts = [f"<h1>{html.escape(title)}</h1>", f"<p>{_models(found)}</p>"]
    if "held_out" in found:
        parts += ["<h2>Held-out bits per byte (lower is better)</h2>", _compared(found["held_out"]), of("evaluate")]
    if "compare" in found:
        parts += ["<h2>What each model knows of the training data</h2>", _compared(found["compare"])]
        parts.append(of("represent", "compare"))
    if "certificates" in found:
        columns = ("mapping", "coverage", "mean_mapped_mass", "gap_bits_per_byte")
        rows = {name: [of_source.get(c) for c in columns] for name, of_source in found["certificates"].items()}
        parts += ["<h2>Alignment</h2>", _table(["source", *columns], rows), of("align", "combine")]
    if "losses" in found:
        curves = {name: [(e["step"], e["loss"]) for e in log] for name, log in found["losses"].items()}
        parts += ["<h2>Training loss</h2>", _picture(curves, "step", "loss"), of("train")]
    if "slices" in found:
        parts.append("<h2>Who serves which slice</h2>")
        parts += [f"<h3>{html.escape(name)}</h3>{_served(chosen)}" for name, chosen in found["slices"].items()]
    if "merges" in found:
        parts.append("<h2>Merge coefficients</h2>")
        parts += [f"<h3>{html.escape(name)}</h3>{_merged(summary)}" for name, summary in found["merges"].items()]
        parts.append(of("merge"))
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
    """A table; best: row -> number of the cell in bold."""
    lines = ["<tr>" + "".join(f'<th scope="col">{html.escape(name)}</th>' for name in head) + "</tr>"]
    for name, cells in rows.items():
        marked = (best or {}).get(name)
        tds = [f"<td{' class=best' if n == marked else ''}>{_cell(cell)}</td>" for n, cell in enumerate(cells)]
        lines.append(f"<tr><td>{html.escape(name)}</td>{''.join(tds)}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _compared(result: dict[str, Any]) -> str:
    """Mean bits per byte, a row a slice, a column a model."""
    names, rows, best = result["models"], {}, {}
    for slice_name, figures in result["slices"].items():
        means = [figures["models"][name]["mean"] for name in names]
        rows[slice_name] = [figures["conversations"], *means]
        best[slice_name] = 1 + means.index(min(means))
    return _table(["slice", "conversations", *names], rows, best)


def _served(chosen: dict[str, Any]) -> str:
    rows, best = {}, {}
    for name, entry in chosen["slices"].items():
        rows[name or "all"] = [entry["conversations"], *entry["medians"], chosen["models"][entry["best"]]]
        best[name or "all"] = 1 + entry["best"]
    unit = f"nats per {chosen['ce_unit']}"
    return _table(["slice", "conversations", *(f"{name}, {unit}" for name in chosen["models"]), "taken"], rows, best)


def _merged(summary: dict[str, Any]) -> str:
    kinds = summary["coefficients_by_kind"]
    targets = list(next(iter(kinds.values()))) if kinds else []
    return _table(["tensors", *targets], {kind: [of.get(name) for name in targets] for kind, of in kinds.items()})


def _picture(curves: dict[str, list[tuple[float, float]]], across: str, up: str) -> str:
    """Curves as SVG, told apart by colour and dashes, with their names."""
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
        f'<text x="{WIDTH - 60}" y="{HEIGHT - 8}">{across} {high_x:g}</text>',
    ]
    label = html.escape(f"{up} by {across}: {', '.join(curves)}")
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" aria-label="{label}">'
        f"{axis}{''.join(marks)}{''.join(lines)}</svg><figcaption>{html.escape(up)} by {across}</figcaption></figure>"
    )
