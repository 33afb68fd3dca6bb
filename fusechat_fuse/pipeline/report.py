"""What a run measured, read from the files that its stages wrote: `report.json`, and the page made from it.

What a stage that did not run would have measured is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusechat_fuse.pipeline.recipe import Recipe
from fusechat_fuse.pipeline.report_page import report_page
from fusechat_fuse.pipeline.steps import Step
from fusechat_fuse.store.files import json_bytes, read_json, write_atomic


def write_report(recipe: Recipe, steps: list[Step], record: dict[str, Any]) -> dict[str, Any]:
    """Write `report.json` and `report.html` into the run's directory.

    Args:
        recipe, steps: of the run. record: the entries of `stages.json`, which hold the commands as they were run.
    Returns: what `report.json` holds: pivot, sources, preset, compare, certificates, losses, slices, merges, held_out,
        commands, seconds; without the empty ones.
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
    write_atomic(home / "report.html", report_page(home.resolve().name, found).encode())
    return found


def _each(paths: dict[str, Path], read: Callable[[Path], Any]) -> dict[str, Any]:
    """What `read` finds at each path, by name; names without a finding are left out."""
    values = {name: read(path) for name, path in paths.items()}
    return {name: value for name, value in values.items() if value}


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
