"""What a run measured, from the files that its stages wrote: `report.json`, and `report.html` made from it.

The page is self-contained and loads nothing. A section whose stage did not run is left out; the commands behind its
figures stand below it.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from functools import partial
from typing import Any

from fusechat_fuse.pipeline import findings
from fusechat_fuse.pipeline.best import Best
from fusechat_fuse.pipeline.recipe import Recipe
from fusechat_fuse.pipeline.steps import Step
from fusechat_fuse.store.card import shown_name
from fusechat_fuse.store.files import json_bytes, read_json, write_atomic
from fusechat_fuse.store.slices import undecided_lines

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --dim: #59636e; --accent: #0969da; --card: #0969da12; }
@media (prefers-color-scheme: dark) { :root { --dim: #9aa4ae; --accent: #4493f8; --card: #4493f81f; } }
body { margin: 0 auto; max-width: 62rem; padding: 1.2rem; font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: .4rem 0; } h3 { font-size: 1rem; margin: 1.2rem 0 .2rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
.result { background: var(--card); border-left: 4px solid var(--accent); border-radius: 4px; padding: .4rem 1.1rem; }
.result p:first-child { font-size: 1.1rem; } p { max-width: 46rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: .6rem 0; } table { border-collapse: collapse; font-size: .9rem; }
td, th { text-align: right; padding: .25rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--dim); font-weight: 600; vertical-align: bottom; } td { font-variant-numeric: tabular-nums; }
td:first-child, th:first-child { text-align: left; padding-left: 0; position: sticky; left: 0; background: Canvas; }
tr:hover td { background: color-mix(in srgb, var(--accent) 8%, Canvas); } .best { font-weight: bold; }
.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.facts td:first-child { white-space: nowrap; }
details { color: var(--dim); font-size: .85rem; margin: .4rem 0; } details table { color: CanvasText; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
figure { margin: .6rem 0; } svg { width: 100%; max-width: 34rem; height: auto; font-family: system-ui, sans-serif; }
figcaption { color: var(--dim); font-size: .85rem; max-width: 46rem; }
@media (max-width: 30rem) { body { padding: .8rem; } td, th { padding: .25rem .5rem; } }
"""
_NO_CHART = "There is no chart: matplotlib is not installed (pip install 'fusechat[plot]')."


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
    found = {
        "pivot": recipe.pivot.model,
        "sources": {name: model.model for name, model in recipe.sources.items()},
        "preset": recipe.preset,
        "best": best and {"path": str(best.output.relative_to(home)), "summary": best.summary},
        "left_out": left_out,
        "answers": findings.answers(home / "answers", [*recipe.sources]) if recipe.answers == "sources" else None,
        "compare": read_json(home / "compare" / "compare.json", "comparison"),
        "certificates": findings.each({name: home / "aligned" / name for name in recipe.sources}, findings.certificate),
        "losses": findings.each({model.name: model for model in models}, findings.losses),
        "slices": findings.each(  # plain fine-tuning takes nothing from a source
            {m.name: m / "slices.json" for m in models if m.name != "plain"}, lambda file: read_json(file, "slices")
        ),
        "merges": {
            step.output.name: findings.coefficients(home / "merged" / "reports" / step.output.name)
            or findings.weights(step)
            for step in steps
            if step.stage == "merge" and step.output.exists()
        },
        "held_out_answers": findings.answers(home / "held_out" / "answers", [*recipe.sources]),
        "held_out": read_json(home / "held_out" / "compare" / "compare.json", "comparison"),
        "commands": {step.key: record.get(step.key, {}).get("command", step.shell) for step in steps},
        "seconds": {step.key: record[step.key]["seconds"] for step in steps if "seconds" in record.get(step.key, {})},
    }
    found["about"] = findings.about(recipe, home)
    found = {name: value for name, value in found.items() if value}
    write_atomic(home / "report.json", json_bytes(found))
    write_atomic(home / "report.html", report_page(home.resolve().name, found).encode())
    return found


def report_page(title: str, found: dict[str, Any]) -> str:
    """The report as HTML, from what `report.json` holds."""
    sources = ", ".join(f"{name} ({shown_name(model)})" for name, model in found["sources"].items())
    models = f"Pivot {shown_name(found['pivot'])}; sources {sources}; preset {found['preset']}."
    best = [*found["best"]["summary"], f"It is in {found['best']['path']}."] if "best" in found else []
    result = ['<div class="result">', *_paragraphs(best), "</div>"] if best else []
    parts = [f"<h1>{html.escape(title)}</h1>", *result, *_paragraphs([models, *found.get("left_out", [])])]
    for key, (heading, body, stages) in _SECTIONS.items():
        if key in found:
            commands = "\n".join(text for step, text in found["commands"].items() if step.split()[0] in stages)
            details = f"<details><summary>commands</summary><pre>{html.escape(commands)}</pre></details>"
            parts += [f"<h2>{heading}</h2>", body(found[key]), *([details] if stages else [])]
    if seconds := found.get("seconds"):
        table = _table(["step", "seconds"], {step: [value] for step, value in seconds.items()})
        total = f"seconds of each step, {sum(seconds.values()):,.0f} in all"
        parts.append(f"<details><summary>{total}</summary>{table}</details>")
    policy = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8">{policy}<title>{html.escape(title)}</title>'
    view = '<meta name="viewport" content="width=device-width">'
    return "\n".join([f"{head}{view}<style>{_STYLE}</style></head><body>", *parts, "</body></html>", ""])


def _cell(value) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return "" if value is None else html.escape(str(value))


def _table(head: list[str], rows: dict[str, list], best: dict[str, int] | None = None) -> str:
    """A table; best: row -> index of the cell in bold, unless another one of the row shows the same."""
    lines = ["<tr>" + "".join(f'<th scope="col">{html.escape(name)}</th>' for name in head) + "</tr>"]
    for name, cells in rows.items():
        best_cell, shown = (best or {}).get(name), [_cell(cell) for cell in cells]
        tds = [
            f"<td{' class=best' if n == best_cell and shown.count(c) == 1 else ''}>{c}</td>"
            for n, c in enumerate(shown)
        ]
        lines.append(f"<tr><td>{html.escape(name)}</td>{''.join(tds)}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _paragraphs(lines: list[str]) -> list[str]:
    return [f"<p>{html.escape(line)}</p>" for line in lines]


def _source_table(result: dict[str, Any]) -> str:
    """Median bits per byte, by which the choice is made, and what training by slices will take."""
    summaries = dict.fromkeys(line for choice in result.get("choices", []) for line in choice["summary"])
    if left_out := result.get("left_out"):
        summaries[f"{left_out} conversations are left out: not every model has them whole, or at all."] = None
    return "\n".join([_comparison_table(result, "median"), *_paragraphs([*summaries])])


def _comparison_table(result: dict[str, Any], figure: str = "mean", best_of: Callable = min) -> str:
    """Mean or median of a measure: one row per slice, one column per model, the best in bold."""
    names, rows, best = result["models"], {}, {}
    for slice_name, figures in sorted(result["slices"].items(), key=lambda entry: entry[0] != "all"):
        values = [figures["models"][name][figure] for name in names]
        rows[slice_name or "all"] = [figures["conversations"], *values]
        best[slice_name or "all"] = 1 + values.index(best_of(values))
    return _table(["slice", "conversations", *names], rows, best)


def _slice_table(chosen: dict[str, Any]) -> str:
    """Median CE of each model: one row per slice, the selected model in bold."""
    per_byte = chosen["ce_unit"] == "byte"
    unit = "bits per byte" if per_byte else "nats per token"  # as the choice was made: by the paper per token
    rows, best = {}, {}
    for name, entry in chosen["slices"].items():
        medians = [median / math.log(2) if per_byte else median for median in entry["medians"]]
        rows[name or "all"] = [entry["conversations"], *medians, chosen["models"][entry["best"]]]
        best[name or "all"] = 1 + entry["best"]
    head = ["slice", "conversations", *chosen["models"], "selected"]
    notes = [f"Medians, {unit}.", *undecided_lines(chosen["slices"])]
    if not per_byte:
        notes.append("Per token, as ce_unit says: each model is measured on tokens of its own, unlike bits per byte.")
    return "\n".join([_table(head, rows, best), *_paragraphs(notes)])


def _slice_tables(chosen: dict[str, dict[str, Any]]) -> str:
    note = "Each training counts all conversations of its data, also those that the comparison above leaves out."
    return "\n".join([*_paragraphs([note]), _titled(_slice_table, chosen)])


def _coefficient_table(summary: dict[str, Any]) -> str:
    """Mean merge coefficients: one row per kind of tensor, one column per target."""
    whole, kinds = summary.get("coefficients", {}), summary.get("coefficients_by_kind", {})
    targets = list(next(iter(kinds.values()))) if kinds else list(whole)
    rows = {kind: [of.get(name) for name in targets] for kind, of in {"all": whole, **kinds}.items() if of}
    if not kinds:
        parameters = ", ".join(f"{name} {value}" for name, value in summary.get("parameters", {}).items())
        rule = f"Method {summary['method']}{f' ({parameters})' if parameters else ''}: "
        rule += "one coefficient for all tensors of a target." if whole else "it reports no coefficients."
        return "\n".join([*_paragraphs([rule]), *([_table(["tensors", *targets], rows)] if whole else [])])
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
    return _table(["source", "mapping", "tokens with an answer", "mean mapped mass", "gap, bits per byte"], rows)


def _titled(table: Callable[[Any], str], values: dict[str, Any]) -> str:
    return "\n".join(f"<h3>{html.escape(name)}</h3>{table(value)}" for name, value in values.items())


def _chart(draw: Callable[[Any], str], caption: str) -> str:
    """A figure by `pipeline.charts`; without matplotlib the sentence that says so."""
    try:
        from fusechat_fuse.pipeline import charts
    except ImportError:
        return "\n".join(_paragraphs([_NO_CHART]))
    return f"<figure>{draw(charts)}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _losses_shown(losses: dict[str, list[dict[str, float]]]) -> str:
    """The loss of each training by step, and its first and last value."""
    caption = (
        "The mean of the last steps before each point. Trainings minimise nats per token of the pivot; what is "
        "minimised differs between them, so the curves show whether a training has settled, not which model is better."
    )
    rows = {name: [log[-1]["step"], log[0]["loss"], log[-1]["loss"]] for name, log in losses.items()}
    table = _table(["training", "steps", "first loss", "last loss"], rows)
    return "\n".join([_chart(lambda charts: charts.loss_chart(losses), caption), table])


def _differences(ranking: dict[str, Any]) -> str:
    """The ranked results' differences to the baseline, by the measure that decides, with intervals."""
    measure = ranking.get("measures", [ranking])[0]
    unit, baseline, higher = measure.get("name", "bits per byte"), ranking["baseline"], measure.get("higher_is_better")
    found = {
        name: tuple(of["to_baseline"])
        for name, of in measure["models"].items()
        if baseline == "pivot" or name != "pivot"
    }
    found = dict(sorted(found.items(), key=lambda entry: -entry[1][0] if higher else entry[1][0]))
    better = "right" if higher else "left"
    caption = (
        f"Held-out data, paired, with 95 % intervals: a result whose whole interval is {better} of 0 is better than "
    )
    return _chart(lambda charts: charts.difference_chart(found, baseline, unit), f"{caption}{baseline}.")


def _held_out(result: dict[str, Any]) -> str:
    """The ranking, and the means of every measure by slice."""
    ranking = result.get("ranking")
    if not ranking:
        return _comparison_table(result)
    head, *rows = ranking.get("table", [[]])
    lines = [_differences(ranking), *([_table(head, {name: cells for name, *cells in rows})] if rows else [])]
    for measure in ranking.get("measures", [])[:-1]:  # the last: of the data's answers
        higher = measure["higher_is_better"]
        lines.append(f"<h3>{html.escape(measure['name'])}, by slice ({'higher' if higher else 'lower'} is better)</h3>")
        of = {"models": result["models"], "slices": measure["slices"]}
        lines.append(_comparison_table(of, best_of=max if higher else min))
    lines += ["<h3>bits per byte of the data's answers, by slice (lower is better)</h3>"] if len(lines) > 2 else []
    return "\n".join([*lines, _comparison_table(result)])


def _facts(about: dict[str, Any]) -> str:
    """Names and values, one a line."""
    rows = {name.replace("_", " "): _fact(value) for name, value in about.items() if value}
    cells = "".join(f"<tr><td>{name}</td><td>{html.escape(text)}</td></tr>" for name, text in rows.items())
    return f'<div class="wide"><table class="facts">{cells}</table></div>'


def _fact(value) -> str:
    if isinstance(value, dict):
        return "; ".join(
            f"{name}: {_fact(of)}" if isinstance(of, dict) else f"{name} {of}" for name, of in value.items()
        )
    return (
        ", ".join(map(str, value))
        if isinstance(value, list)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )


_SECTIONS: dict[str, tuple[str, Callable[[Any], str], tuple[str, ...]]] = {  # heading, body, stages with commands
    "held_out": ("Held-out results, means", _held_out, ("evaluate",)),
    "answers": ("Who answered the training data", _answer_table, ("answer",)),
    "held_out_answers": ("Who answered the held-out prompts", _answer_table, ()),
    "compare": (
        "Bits per byte of the training data, medians",
        _source_table,
        ("represent", "compare"),
    ),
    "certificates": ("Alignment", _certificate_table, ("align", "combine")),
    "losses": ("Training loss", _losses_shown, ("train",)),
    "slices": ("Model selected for each slice", _slice_tables, ()),
    "merges": ("Merge coefficients", partial(_titled, _coefficient_table), ("merge",)),
    "about": ("About this run", _facts, ()),
}
