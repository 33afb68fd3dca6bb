"""What the stages of a run left in its directory, read for `report.json`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from fusechat_fuse.pipeline.recipe import Recipe
from fusechat_fuse.pipeline.steps import Step
from fusechat_fuse.store.files import read_json


def each(paths: dict[str, Path], read: Callable[[Path], Any]) -> dict[str, Any]:
    """What `read` finds at each path, by name; names without a finding are left out."""
    values = {name: read(path) for name, path in paths.items()}
    return {name: value for name, value in values.items() if value}


def answers(folder: Path, sources: list[str]) -> dict[str, dict[str, Any]] | None:
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


def certificate(folder: Path) -> dict[str, float] | None:
    manifest = read_json(folder / "manifest.json", "manifest")
    return manifest and {"mapping": manifest["options"]["mapping"], **manifest["certificate"]["all"]}


def losses(folder: Path) -> list[dict[str, float]]:
    history = (read_json(folder / "trainer_state.json", "training log") or {}).get("log_history", [])
    kept = ("step", "loss", "lm_loss", "fusion_loss", "source_share")
    return [{name: entry[name] for name in kept if name in entry} for entry in history if "loss" in entry]


def about(recipe: Recipe, home: Path) -> dict[str, Any]:
    """The data, options and versions of a run, and the day of its report."""
    manifest = read_json(home / "representations" / "pivot" / "manifest.json", "manifest") or {}
    counted = manifest.get("counts", {})
    return {
        "data": recipe.data,
        "held-out data": recipe.held_out,
        **{name: counted[name] for name in ("conversations", "predicted_tokens") if name in counted},
        "options": {stage: flags for stage, flags in recipe.flags.items() if flags},
        "versions": manifest.get("versions", {}),
        "date": date.today().isoformat(),
    }


def weights(step: Step) -> dict[str, Any]:
    """What a merge by mergekit's own method does, which reports no coefficients: the configuration says it."""
    config = json.loads(next(iter(step.files.values())))
    targets, parameters = [Path(entry["model"]).name for entry in config["models"]], config["parameters"]
    found = {"method": config["merge_method"], "parameters": parameters}
    weight = parameters.get("weight")
    if config["merge_method"] == "linear" and isinstance(weight, int | float):
        share = 1 / len(targets) if parameters.get("normalize", True) else weight
        found["coefficients"] = dict.fromkeys(targets, share)
    return found


def coefficients(folder: Path) -> dict[str, Any] | None:
    """The summary of the last merge (every merge reports into a numbered subfolder of its own)."""
    reports = sorted(folder.glob("*/summary.json"))
    return read_json(reports[-1], "merge report") if reports else None
