"""What a run measured, from the files that its stages wrote: `report.json`, and `report.html` made from it.

The page is self-contained and loads nothing. A section whose stage did not run is left out; the commands behind its
figures stand below it.
"""

from __future__ import annotations

import html
import json
import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fusechat_fuse.pipeline.best import Best
from fusechat_fuse.pipeline.recipe import Recipe
from fusechat_fuse.pipeline.steps import Step
from fusechat_fuse.store.card import shown_name
from fusechat_fuse.store.files import json_bytes, read_json, write_atomic
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
pre { white-space: pre-wrap; overflow-wrap: anywhere; } figure { margin: 0; } figure span { white-space: nowrap; }
.wide svg { width: 100%; min-width: 36rem; max-width: 48rem; }
text { font: 12px system-ui, sans-serif; fill: CanvasText; } figcaption { color: var(--dim); font-size: .85rem; }
"""
_COLOURS = ("#0969da", "#cf222e", "#1a7f37", "#9a6700", "#8250df", "#bf3989", "#1b7c83", "#6e7781")
_DASHES = ("", "6 3", "2 2", "8 3 2 3")
WIDTH, HEIGHT, LEFT, BOTTOM = 760, 300, 50, 30  # of a chart and its margins, in SVG units
Y_MARKS = 5


def write_report(
    recipe: Recipe, steps: list[Step], record: dict[str, Any], left_out: list[str], best: Best | None
) -> dict[str, Any]:
    """Write `report.json` and `report.html` into the run's directory; returns what `report.json` holds.

    Args:
        record: the entries of `stages.json`, which hold the commands as they were run.
        left_out: sentences on trainings that the run left out.
    """
    home = recipe.output_dir
    models = [step.output for step in steps if step.stage == "train"]
    merges = [step.output for step in steps if step.stage == "merge"]
    found = {
        "pivot": recipe.pivot.model,
        "sources": {name: model.model for name, model in recipe.sources.items()},
        "preset": recipe.preset,
        "best": best and {"path": str(best.output.relative_to(home)), "summary": best.summary},
        "left_out": left_out,
        "answers": _answers(home / "answers", [*recipe.sources]) if recipe.answers == "sources" else None,
        "compare": read_json(home / "compare" / "compare.json", "comparison"),
        "certificates": _each({name: home / "aligned" / name for name in recipe.sources}, _certificate),
        "losses": _each({model.name: model for model in models}, _losses),
        "slices": _each(
            {m.name: m / "slices.json" for m in models if m.name != "plain"}, lambda file: read_json(file, "slices")
        ),
        "merges": _each({m.name: home / "merged" / "reports" / m.name for m in merges}, _coefficients),
        "held_out": read_json(home / "held_out" / "compare" / "compare.json", "comparison"),
        "commands": {step.key: record.get(step.key, {}).get("command", step.shell) for step in steps},
        "seconds": {step.key: record[step.key]["seconds"] for step in steps if "seconds" in record.get(step.key, {})},
    }
    found = {name: value for name, value in found.items() if value}
    write_atomic(home / "report.json", json_bytes(found))
    write_atomic(home / "report.html", report_page(home.resolve().name, found).encode())
    return found


def _each(paths: dict[str, Path], read: Callable[[Path], Any]) -> dict[str, Any]:
    """What `read` finds at each path, by name; names without a finding are left out."""
    values = {name: read(path) for name, path in paths.items()}
    return {name: value for name, value in values.items() if value}


def _answers(folder: Path, sources: list[str]) -> dict[str, dict[str, Any]] | None:
    """By selected model: its conversations, how many of them it answered, and how many keep the data's answers, why."""
    assigned = read_json(folder / "assigned" / "assignment.json", "assignment")
    if not assigned:
        return None
    count = assigned["conversations"]["pivot"]
    found = {"pivot": {"conversations": count, "kept": {"pivot": count}}}
    for name in sources:
        if (file := folder / name / "answers.jsonl").exists():
            reasons = Counter(json.loads(line).get("kept_because") for line in file.read_text("utf-8").split("\n")[:-1])
            kept = {str(reason): number for reason, number in sorted(reasons.items(), key=str) if reason}
            found[name] = {"conversations": reasons.total(), "kept": kept}
    return found


def _certificate(folder: Path) -> dict[str, float] | None:
    manifest = read_json(folder / "manifest.json", "manifest")
    return manifest and {"mapping": manifest["options"]["mapping"], **manifest["certificate"]["all"]}


def _losses(folder: Path) -> list[dict[str, float]]:
    history = (read_json(folder / "trainer_state.json", "training log") or {}).get("log_history", [])
    kept = ("step", "loss", "lm_loss", "fusion_loss", "source_share")
    return [{name: entry[name] for name in kept if name in entry} for entry in history if "loss" in entry]


def _coefficients(folder: Path) -> dict[str, Any] | None:
    """The summary of the last merge (every merge reports into a numbered subfolder of its own)."""
    reports = sorted(folder.glob("*/summary.json"))
    return read_json(reports[-1], "merge report") if reports else None


def report_page(title: str, found: dict[str, Any]) -> str:
    """The report as HTML, from what `report.json` holds."""
    sources = ", ".join(f"{name} ({shown_name(model)})" for name, model in found["sources"].items())
    models = f"Pivot {shown_name(found['pivot'])}; sources {sources}; preset {found['preset']}."
    best = [*found["best"]["summary"], f"It is in {found['best']['path']}."] if "best" in found else []
    parts = [f"<h1>{html.escape(title)}</h1>", *_paragraphs([*best, models, *found.get("left_out", [])])]
    for key, (heading, body, stages) in _SECTIONS.items():
        if key in found:
            commands = "\n".join(text for step, text in found["commands"].items() if step.split()[0] in stages)
            details = f"<details><summary>commands</summary><pre>{html.escape(commands)}</pre></details>"
            parts += [f"<h2>{heading}</h2>", body(found[key]), *([details] if stages else [])]
    policy = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8">{policy}<title>{html.escape(title)}</title>'
    view = '<meta name="viewport" content="width=device-width">'
    return "\n".join([f"{head}{view}<style>{_STYLE}</style></head><body>", *parts, "</body></html>", ""])


def _cell(value) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return "" if value is None else html.escape(str(value))


def _table(head: list[str], rows: dict[str, list], best: dict[str, set[int]] | None = None) -> str:
    """A table; best: row -> indices of the cells in bold."""
    lines = ["<tr>" + "".join(f'<th scope="col">{html.escape(name)}</th>' for name in head) + "</tr>"]
    for name, cells in rows.items():
        bold = (best or {}).get(name, ())
        tds = [f"<td{' class=best' if n in bold else ''}>{_cell(cell)}</td>" for n, cell in enumerate(cells)]
        lines.append(f"<tr><td>{html.escape(name)}</td>{''.join(tds)}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _paragraphs(lines: list[str]) -> list[str]:
    return [f"<p>{html.escape(line)}</p>" for line in lines]


def _source_table(result: dict[str, Any]) -> str:
    """Median bits per byte, by which the choice is made, and what training by slices will take."""
    summaries = dict.fromkeys(line for choice in result.get("choices", []) for line in choice["summary"])
    lines = [*summaries]
    if result.get("left_out"):
        lines.append(f"{result['left_out']} conversations are left out: not every model has them whole, or at all.")
    return "\n".join([_comparison_table(result, "median"), *_paragraphs(lines)])


def _comparison_table(result: dict[str, Any], figure: str = "mean") -> str:
    """Mean or median bits per byte: one row per slice, one column per model, the lowest (as shown) in bold."""
    names, rows, best = result["models"], {}, {}
    for slice_name, figures in result["slices"].items():
        values = [figures["models"][name][figure] for name in names]
        rows[slice_name] = [figures["conversations"], *values]
        best[slice_name] = {n for n, value in enumerate(values, 1) if _cell(value) == _cell(min(values))}
    return _table(["slice", "conversations", *names], rows, best)


def _slice_table(chosen: dict[str, Any]) -> str:
    """Median CE of each model: one row per slice, the selected model in bold."""
    rows, best = {}, {}
    by_byte = chosen["ce_unit"] == "byte"  # in bits, as in the other tables
    unit = "bits per byte" if by_byte else "nats per token"
    for name, entry in chosen["slices"].items():
        medians = [one / math.log(2) if by_byte else one for one in entry["medians"]]
        rows[name or "all"] = [entry["conversations"], *medians, chosen["models"][entry["best"]]]
        best[name or "all"] = {1 + entry["best"]}
    head = ["slice", "conversations", *(f"{name}, {unit}" for name in chosen["models"]), "selected"]
    return "\n".join([_table(head, rows, best), *_paragraphs(undecided_lines(chosen["slices"]))])


def _coefficient_table(summary: dict[str, Any]) -> str:
    """Mean merge coefficients: one row per kind of tensor, one column per target."""
    kinds = summary["coefficients_by_kind"]
    targets = list(next(iter(kinds.values()))) if kinds else []
    rows = {kind: [of.get(name) for name in targets] for kind, of in kinds.items()}
    pairs = {pair: [cosine] for pair, cosine in summary.get("cosines", {}).items() if cosine is not None}
    lines = [_table(["tensors", *targets], rows), *([_table(["task vectors", "cosine"], pairs)] if pairs else [])]
    if (distance := summary.get("distance_to_linear")) is not None:
        lines += _paragraphs([f"Distance to linear merging: {distance:.1%} of its task vector."])
    return "\n".join(lines)


def _answer_table(answers: dict[str, dict[str, Any]]) -> str:
    rows = {}
    for name, entry in answers.items():
        why = ", ".join(f"{number} {reason}" for reason, number in entry["kept"].items())
        kept = sum(entry["kept"].values())
        rows[name] = [entry["conversations"], entry["conversations"] - kept, kept, "" if name == "pivot" else why]
    return _table(["selected", "conversations", "answered by it", "with the data's answers", "unusable answers"], rows)


def _certificate_table(certificates: dict[str, Any]) -> str:
    columns = ("mapping", "coverage", "mean_mapped_mass", "gap_bits_per_byte")
    rows = {name: [of_source.get(column) for column in columns] for name, of_source in certificates.items()}
    return _table(["source", *columns], rows)


def _titled(table: Callable[[Any], str], values: dict[str, Any]) -> str:
    return "\n".join(f"<h3>{html.escape(name)}</h3>{table(value)}" for name, value in values.items())


def _loss_chart(losses: dict[str, list[dict[str, float]]]) -> str:
    """The loss of each training by step as SVG, with a legend; curves differ in colour and dashes."""
    curves = {name: [(entry["step"], entry["loss"]) for entry in log] for name, log in losses.items()}
    points = [point for curve in curves.values() for point in curve]
    high_x, high_y = max(x for x, _ in points), max(y for _, y in points)
    low_y = min(y for _, y in points)
    span_x, span_y = (WIDTH - LEFT - 10) / (high_x or 1), (HEIGHT - BOTTOM - 10) / ((high_y - low_y) or 1)
    lines, legend = [], []
    for n, (name, curve) in enumerate(curves.items()):
        places = " ".join(f"{LEFT + x * span_x:.1f},{10 + (high_y - y) * span_y:.1f}" for x, y in curve)
        colour, dash = _COLOURS[n % len(_COLOURS)], _DASHES[n % len(_DASHES)]
        stroke = f'stroke="{colour}" stroke-dasharray="{dash}" stroke-width="2" fill="none"'
        lines.append(f'<polyline points="{places}" {stroke}/>')
        sample = f'<svg viewBox="0 0 30 8" width="30" aria-hidden="true"><path d="M0 4h30" {stroke}/></svg>'
        legend.append(f"<span>{sample} {html.escape(name)}</span>")
    axis = f'<path d="M{LEFT} 10V{HEIGHT - BOTTOM}H{WIDTH - 10}" stroke="currentColor" fill="none"/>'
    marks = [f'<text x="{WIDTH - 60}" y="{HEIGHT - 8}">step {high_x:g}</text>']
    for n in range(Y_MARKS):
        y = low_y + (high_y - low_y) * n / (Y_MARKS - 1)
        place = 10 + (high_y - y) * span_y
        marks.append(f'<path d="M{LEFT} {place:.1f}H{WIDTH - 10}" stroke="var(--line)" fill="none"/>')
        marks.append(f'<text x="4" y="{place + 4:.1f}">{y:.3g}</text>')
    label = html.escape(f"loss by step: {', '.join(curves)}")
    return (
        f'<figure><div class="wide"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"{axis}{''.join([*marks, *lines])}</svg></div>"
        f"<figcaption>loss, nats per labelled token, by step: {' '.join(legend)}</figcaption></figure>"
    )


_SECTIONS: dict[str, tuple[str, Callable[[Any], str], tuple[str, ...]]] = {  # heading, body, stages with commands
    "held_out": ("Held-out bits per byte, means (lower is better)", _comparison_table, ("evaluate",)),
    "answers": ("Who answered the training data", _answer_table, ("answer",)),
    "compare": (
        "Bits per byte of the training data, medians",
        _source_table,
        ("represent", "compare"),
    ),
    "certificates": ("Alignment", _certificate_table, ("align", "combine")),
    "losses": ("Training loss", _loss_chart, ("train",)),
    "slices": ("Model selected for each slice", partial(_titled, _slice_table), ()),
    "merges": ("Merge coefficients", partial(_titled, _coefficient_table), ("merge",)),
}
