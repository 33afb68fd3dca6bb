"""`fusechat-merge card`: the recipe, the coefficients and the Hub's metadata in a merged model's README."""

import json
import re
import shutil
import tempfile
from pathlib import Path

import yaml
from huggingface_hub import metadata_load, metadata_save

from fusechat_merge.errors import writing

START, END = "<!-- fusechat-merge: start -->", "<!-- fusechat-merge: end -->"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def write(merged: str | Path, report_directory: str | Path | None = None) -> Path:
    """Add the section about the merge and the metadata to MERGED/README.md, or replace them.

    Args:
        merged: a merged model's directory with mergekit_config.yml.
        report_directory: a merge report; None: `merge-report` in the merged directory, computed where it is missing.

    Returns:
        The README's path.

    Raises:
        ValueError: the directory holds no merged model, or `report_directory` no report.
    """
    merged = Path(merged)
    recipe_path = merged / "mergekit_config.yml"
    if not recipe_path.is_file():
        raise ValueError(
            f"merged model {merged}: expected a directory with mergekit_config.yml, got none. "
            "Pass the output of mergekit-yaml (without --no-write-model-card)."
        )
    report_directory = Path(report_directory) if report_directory else merged / "merge-report"
    summary_path = report_directory / "summary.json"
    if not summary_path.is_file():
        if report_directory != merged / "merge-report":
            raise ValueError(
                f"report {report_directory}: expected a directory with summary.json, got none. "
                "Pass what `fusechat-merge inspect` or FUSECHAT_MERGE_REPORT wrote."
            )
        from fusechat_merge.inspection import inspect

        inspect(recipe_path, report_directory)
    summary = json.loads(summary_path.read_text(encoding="utf-8"))
    picture = report_directory / "coefficients.png"
    readme = merged / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else f"# {merged.name}\n"
    section = _section(summary, recipe_path.read_text(encoding="utf-8"), picture.is_file())
    text = re.sub(rf"\n*{START}.*?{END}\n*", "\n", text, flags=re.DOTALL).rstrip("\n")
    with writing(f"model card {readme}"), tempfile.TemporaryDirectory(prefix=".card-", dir=merged) as staging:
        staged = Path(staging, readme.name)  # a card that finds no room leaves the one that is there
        staged.write_text(f"{text}\n\n{START}\n{section}\n{END}\n", encoding="utf-8")
        metadata_save(staged, _metadata(metadata_load(staged) or {}, summary))
        if picture.is_file():
            shutil.copy(picture, copied := staged.with_name(picture.name))
            copied.replace(merged / picture.name)
        staged.replace(readme)
    return readme


def _metadata(metadata: dict, summary: dict) -> dict:
    """The front matter with base_model, base_model_relation, datasets and tags added; other keys stay."""
    named = _names(metadata.get("base_model"))
    models = [summary["pivot"], *summary["targets"].values()]
    named = [model for model in models if HUB_NAME.fullmatch(model)] + named
    tags = [*(metadata.get("tags") or []), "mergekit", "merge", "fusechat", summary["method"]]
    result = {
        **metadata,
        "tags": list(dict.fromkeys(tags)),
        "library_name": metadata.get("library_name", "transformers"),
    }
    if named:
        result |= {"base_model": list(dict.fromkeys(named)), "base_model_relation": "merge"}
    else:
        result.pop("base_model", None)  # mergekit writes an empty list where all models are local directories
    data = [name for card in (metadata, *map(_front_matter, models)) for name in _names(card.get("datasets"))]
    if data:
        result["datasets"] = list(dict.fromkeys(data))
    return result


def _names(entry) -> list[str]:
    """The names in an entry of a card, which is one string or a list."""
    return [entry] if isinstance(entry, str) else list(entry or [])


def _front_matter(model: str) -> dict:
    """The metadata of a target's own card, where the target is a directory with one that can be read."""
    readme = Path(model) / "README.md"
    try:
        return (metadata_load(readme) if readme.is_file() else None) or {}
    except (yaml.YAMLError, ValueError):  # not our card to correct
        return {}


def _section(summary: dict, recipe: str, picture: bool) -> str:
    name = {"sce": "[SCE](https://arxiv.org/abs/2408.07990)", "varm": "[VaRM](https://arxiv.org/abs/2402.16107)"}
    lines = [
        "## How the targets were merged",
        "",
        f"{name[summary['method']]}, computed by fusechat {summary['versions']['fusechat']} in float32 on mergekit "
        f"{summary['versions']['mergekit']}: {summary['tensors']} tensors, {summary['elements']:,} weights, "
        f"{summary['selected_share']:.1%} of them selected"
        + (f", {summary['erased_share']:.1%} of the updates erased." if summary["erased_share"] is not None else "."),
        "",
        "| target | mean coefficient | norm of the update | erased |",
        "|---|---|---|---|",
    ]
    for short, target in summary["targets"].items():
        shown = target if HUB_NAME.fullmatch(target) else short
        coefficient, erased = summary["coefficients"][short], summary["erased_shares"][short]
        lines.append(
            f"| {shown} | {coefficient:.4f} | {summary['update_norms'][short]:.4g} | "
            f"{'' if erased is None else format(erased, '.1%')} |"
        )
    parameters = yaml.safe_load(recipe).get("parameters") or {}
    ignored = [name for name in ("int8_mask", "normalize") if parameters.get(name)]
    if ignored:
        lines += ["", f"{' and '.join(f'`{name}`' for name in ignored)} in the recipe had no effect."]
    if picture:
        lines += ["", "![Coefficients by layer and kind of tensor](coefficients.png)"]
    return "\n".join([*lines, "", "Recipe:", "", "```yaml", recipe.rstrip("\n"), "```"])
