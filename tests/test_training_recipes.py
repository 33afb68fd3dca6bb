"""The recipe files are read by what reads them: `run` and the commands it gives, accelerate's launcher."""

from dataclasses import fields
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from fusechat_fuse.cli import parser_of
from fusechat_fuse.pipeline.recipe import read_recipe
from fusechat_fuse.pipeline.steps import steps_of
from fusechat_fuse.training.config import FusionConfig

EXAMPLES = Path(__file__).parents[1] / "examples"
SOURCES = {"starling", "solar", "internlm2", "mixtral", "qwen"}


def test_the_model_card_is_one_recipe_by_the_papers_settings():
    recipe = read_recipe(EXAMPLES / "recipes" / "fusechat-7b-v2.yml")
    assert (recipe.pivot.model, set(recipe.sources)) == ("openchat/openchat_3.5", SOURCES)
    assert recipe.merges == {"sce": ("sce", {"select_topk": 0.1, "out_dtype": "bfloat16"})}
    steps = steps_of(recipe)
    assert [step.stage for step in steps].count("train") == 5
    for step in steps:
        if step.stage == "merge":
            continue
        parser = parser_of(step.arguments[0])
        options = parser.parse(step.arguments[1:])  # all are known
        if step.stage == "align":
            assert options["preset"] == "paper"
        if step.stage == "train":
            assert step.command[:2] == ["accelerate", "launch"]
            is_the_papers({**options, "use_cpu": True, "bf16": None})
    of = {step.key: step for step in steps}
    assert "--device_map auto" in of["represent qwen"].shell
    assert "accelerate" not in of["represent qwen"].shell
    assert "--num_processes 8 -m fusechat_fuse represent" in of["represent starling"].shell


def is_the_papers(options: dict) -> None:
    of_config = {field.name for field in fields(FusionConfig) if field.init}
    config = FusionConfig(**{name: value for name, value in options.items() if name in of_config})
    told = {
        **{"lm_loss_weight": 0.9, "fusion_loss_type": "ce", "fusion_function": "min_ce", "fusion_fallback": "pivot"},
        **{"fusion_tail": "drop", "ce_unit": "token", "fuse_temperature": 1.0, "num_train_epochs": 3},
        **{"learning_rate": 5e-6, "lr_scheduler_type": "cosine", "warmup_steps": 0.03, "weight_decay": 0},
        **{"max_length": 2048, "total_batch_size": 128, "activation_checkpointing": True},
    }
    assert {name: getattr(config, name) for name in told} == told


@pytest.mark.parametrize("name", ["fsdp", "zero3", "ddp"])
def test_accelerate_reads_its_file(name):
    config = load_config_from_file(str(EXAMPLES / "accelerate" / f"{name}.yaml"))
    assert (config.num_processes, config.mixed_precision) == (8, "bf16")
    kind = {"fsdp": "FSDP", "zero3": "DEEPSPEED", "ddp": "MULTI_GPU"}[name]
    assert getattr(config.distributed_type, "value", config.distributed_type) == kind
    if name == "fsdp":
        assert config.fsdp_config["fsdp_version"] == 2
        assert "FULL_STATE_DICT" in config.fsdp_config["fsdp_state_dict_type"]  # else no target is written
    if name == "zero3":
        assert config.deepspeed_config["zero3_save_16bit_model"]
