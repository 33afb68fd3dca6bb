"""Trainings that would equal plain fine-tuning: their sources serve no slice of the data, as `compare` finds.

Training by slices with the label as fallback takes nothing from such a source. The choice of `compare` is training's
own where both name the same slices and compare by byte; of other settings nothing is said.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fusechat_fuse.pipeline.recipe import Model, Recipe
from fusechat_fuse.pipeline.record import Record
from fusechat_fuse.pipeline.steps import Step, slice_flags, steps_of
from fusechat_fuse.presets import or_preset
from fusechat_fuse.store.files import read_json


class Known(NamedTuple):
    """The steps of a recipe, by what is known of its sources."""

    steps: list[Step]  # without the trainings that are left out
    left_out: list[str]  # sentences on trainings that would equal plain fine-tuning
    notes: list[str]  # sentences on slices that take the choice of all data, and on `answers: sources`


def steps_now(recipe: Recipe, record: Record) -> Known:
    """The steps of a recipe, less the trainings that would equal plain fine-tuning (unless it says `targets: all`).

    Before `compare` has run, none is known to.
    """
    steps = steps_of(recipe, record.source_of_plain())
    compared = next(step for step in steps if step.stage == "compare")
    found = read_json(compared.output / "compare.json", "comparison") if record.is_done(compared) else None
    choices = (found or {}).get("choices", [])
    notes = [f"{name}: {line}" for name, choice in zip(recipe.sources, choices) for line in choice["summary"][1:]]
    if recipe.answers == "data" and choices and choices[-1]["share"]:
        notes.append(
            f"sources are selected for {choices[-1]['share']:.0%} of the conversations: with answers: sources in the "
            "recipe they answer these first, which helps where the data's answers are wrong"
        )
    equal = equal_to_plain(recipe, choices)
    how = "it is trained all the same (targets: all)"
    if recipe.targets != "all":
        how = "it is left out (targets: all in the recipe trains it)"
        steps = steps_of(recipe, record.source_of_plain(), equal)
    left_out = [f"{name} would equal plain fine-tuning, as {why}: {how}" for name, why in equal.items()]
    made = {step.name for step in steps if step.stage == "merge"}
    if lacking := [name for name in recipe.merges if name not in made]:
        left_out.append(f"merge {', '.join(lacking)}: left out, as fewer than two targets are trained")
    return Known(steps, left_out, notes)


def equal_to_plain(recipe: Recipe, choices: list[dict[str, Any]]) -> dict[str, str]:
    """The trainings that would equal plain fine-tuning, and why, by the choices of compare.json."""
    found = {}
    for (name, model), choice in zip(recipe.sources.items(), choices):
        if not choice["share"] and _takes_labels(recipe, model):
            found[f"target-{name}"] = f"{name} serves no slice of the data"
    several = recipe.multi and len(recipe.sources) > 1 and choices and not choices[-1]["share"]
    if several and _takes_labels(recipe, Model("")) and _combines_by_slice(recipe):
        found["multi"] = "no source serves a slice of the data"
    return found


def _takes_labels(recipe: Recipe, model: Model) -> bool:
    """Whether a training is on labels alone where its source serves no slice, and chooses as `compare` does."""
    flags = {**recipe.flags["train"], **model.flags.get("train", {})}
    names = ("fusion_function", "fusion_fallback", "ce_unit")
    options = or_preset(recipe.preset, **{name: flags.get(name) for name in names})
    same_slices = slice_flags(flags) == slice_flags(recipe.flags["train"])
    by_slice = str(options["fusion_function"]).endswith("_slice")
    return by_slice and (options["fusion_fallback"], options["ce_unit"]) == ("label", "byte") and same_slices


def _combines_by_slice(recipe: Recipe) -> bool:
    flags = recipe.flags["combine"]
    options = or_preset(recipe.preset, combination=flags.get("function"), ce_unit=flags.get("ce_unit"))
    same_slices = slice_flags(flags) == slice_flags(recipe.flags["train"])
    return (options["combination"], options["ce_unit"]) == ("min_ce_slice", "byte") and same_slices
