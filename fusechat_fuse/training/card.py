"""The target's model card: what it was made from, how, and how to use it; with the Hub's metadata."""

from pathlib import Path

from fusechat_fuse.models.identity import library_versions
from fusechat_fuse.store.card import (
    card_table,
    card_text,
    distinct_names,
    hub_data,
    is_hub_name,
    shown_name,
    source_names,
)
from fusechat_fuse.store.slices import undecided_lines

PAPER = "https://arxiv.org/abs/2408.07990"
CITATION = """@article{wan2024fusechat,
  title={FuseChat: Knowledge Fusion of Chat Models},
  author={Fanqi Wan and Longguang Zhong and Ziyi Yang and Ruijun Chen and Xiaojun Quan},
  journal={arXiv preprint arXiv:2408.07990},
  year={2024}
}"""
TRAINING = """
    num_train_epochs learning_rate lr_scheduler_type warmup_steps weight_decay max_length bf16 seed packing
""".split()
FIGURES = "train_loss eval_loss eval_lm_loss eval_fusion_loss eval_source_share eval_mapped_mass".split()


def write_model_card(folder: Path, title: str, trainer, pivot, arguments, metrics: dict) -> None:
    """Write README.md for a target, named `title`, of a FusionTrainer after training."""
    config, manifest = trainer.args, getattr(trainer.train_dataset, "manifest", {})
    pivot_name, sources = shown_name(pivot.name), distinct_names(trainer.sources)
    data = manifest.get("datasets") or []
    metadata = _metadata(pivot.name, data, plain=config.lm_loss_weight == 1)
    source_list = ", ".join(sources)
    how = "Plain fine-tuning of" if config.lm_loss_weight == 1 else "Pairwise knowledge fusion into"
    about_data = {"data": ", ".join(data) or "?", **_alignment(manifest)}
    figures = {name: metrics[name] for name in FIGURES if name in metrics}
    lines = [
        f"# {title}",
        "",
        f"{how} **{pivot_name}** (the pivot){'' if config.lm_loss_weight == 1 else f' of **{source_list}**'}, after "
        f"[FuseChat]({PAPER}). It has the pivot's architecture, tokenizer and vocabulary: targets of one pivot merge, "
        "for example with mergekit's `sce`.",
        "",
        *_section(
            "Loss",
            {
                "language-model weight lambda": config.lm_loss_weight,
                "fusion loss": config.fusion_loss_type,
                "fusion function": f"{config.fusion_function} (cross-entropy per {config.ce_unit})",
                "where no source is taken": config.fusion_fallback,
                "tail of the distributions": config.fusion_tail
                + (f" (label noise {config.label_noise})" if config.fusion_tail == "label" else ""),
                "temperature": config.fuse_temperature,
            },
        ),
        *_section("Data and alignment", {"pivot": pivot_name, "source": source_list, **about_data}),
        *slice_lines(trainer.slices),
        *_section("Training", _training(config, trainer.state, arguments) | figures),
        *_section("Versions", library_versions()),
        "## Citation",
        "",
        "```bibtex",
        CITATION,
        "```",
    ]
    (folder / "README.md").write_text(card_text(metadata, lines), encoding="utf-8")


def _section(title: str, rows: dict) -> list[str]:
    return [f"## {title}", "", card_table(rows), ""]


def _metadata(pivot: str, data: list[str], *, plain: bool) -> dict:
    """The Hub's front matter; the Hub lists a target below a pivot and data sets that are there."""
    metadata = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["fusechat", "model-fusion", *(["plain-fine-tuning"] if plain else [])],
    }
    if is_hub_name(pivot):
        metadata |= {"base_model": pivot, "base_model_relation": "finetune"}
    if named := hub_data(data):
        metadata["datasets"] = named
    return metadata


def slice_lines(chosen: dict | None) -> list[str]:
    """Who served which slice, and the medians that decided."""
    if chosen is None:
        return []
    names, figures = [shown_name(model) for model in chosen["models"]], chosen["slices"]
    head = ["slice", "conversations", *(f"{name}, nats per {chosen['ce_unit']}" for name in names), "taken"]
    rows = [
        [slice_name or "all", entry["conversations"], *(f"{m:.4f}" for m in entry["medians"]), names[entry["best"]]]
        for slice_name, entry in figures.items()
    ]
    lines = [head, ["---"] * len(head), *rows]
    table = ["| " + " | ".join(map(str, line)) + " |" for line in lines]
    undecided = [f"- {line}" for line in undecided_lines(figures)]
    return ["## Slices", "", *table, "", *undecided, *([""] if undecided else [])]


def _alignment(manifest: dict) -> dict:
    """Counts, mapping and certificate of the data (of each source where several were combined), flat."""
    counts = manifest.get("counts") or {}
    rows = {name.replace("_", " "): counts[name] for name in ("conversations", "predicted_tokens") if name in counts}
    if "sources" in manifest:
        rows["combined by"] = " per ".join(str(value) for value in manifest.get("options", {}).values())
        for name, source in zip(source_names(manifest), manifest["sources"]):
            rows |= _certificate(source.get("certificate"), str((source.get("mapping") or ["?"])[0]), f"{name}: ")
            if (taken := (manifest.get("taken") or {}).get(name)) is not None:
                rows[f"{name}: conversations taken"] = taken
        return rows
    return rows | _certificate(
        (manifest.get("certificate") or {}).get("all"), (manifest.get("options") or {}).get("mapping"), ""
    )


def _certificate(figures: dict | None, mapping: str | None, prefix: str) -> dict:
    chosen = {"mapping": mapping}
    for name in ("coverage", "exact", "inside", "safe", "mean_mapped_mass", "gap_bits_per_byte"):
        chosen[name.replace("_", " ")] = (figures or {}).get(name)
    return {prefix + name: value for name, value in chosen.items() if value is not None}


def _training(config, state, arguments) -> dict:
    rows = {name: getattr(getattr(config, name), "value", getattr(config, name)) for name in TRAINING}
    if config.max_steps > 0:
        del rows["num_train_epochs"]
        rows = {"max_steps": config.max_steps, "epochs": state.epoch, **rows}
    rows["conversations per step"] = config.conversations_per_step
    if arguments.lora_r:
        rows["LoRA"] = f"r {arguments.lora_r}, alpha {arguments.lora_alpha}, on {arguments.lora_target_modules}"
        rows["LoRA"] += ", above 4-bit weights, merged into whole ones" if arguments.load_in_4bit else ""
    return rows
