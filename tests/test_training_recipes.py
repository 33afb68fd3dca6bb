"""The recipe files are read by what reads them: the train command's options, accelerate's launcher."""

from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from fusechat_fuse.training.config import FusionConfig
from fusechat_fuse.training.run import TrainArguments

EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPES = sorted((EXAMPLES / "recipes").glob("*.yml"))
SOURCES = {"starling", "solar", "internlm2", "mixtral", "qwen"}


def test_there_is_one_for_every_pair_of_the_model_card():
    assert {path.stem for path in RECIPES} == {f"openchat-{source}" for source in SOURCES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_the_papers_training(path):
    options = yaml.safe_load(path.read_text())
    names = {field.name for field in fields(FusionConfig)} | {field.name for field in fields(TrainArguments)}
    assert set(options) <= names
    arguments = {field.name for field in fields(TrainArguments)}
    config = FusionConfig(use_cpu=True, **{name: value for name, value in options.items() if name not in arguments})
    default = FusionConfig(config.output_dir, preset="paper", use_cpu=True)
    told = (
        *("lm_loss_weight", "fusion_loss_type", "fusion_function", "fusion_fallback", "fusion_tail", "ce_unit"),
        *("fuse_temperature", "num_train_epochs"),
        *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_length", "total_batch_size"),
    )
    for name in told:
        assert getattr(config, name) == getattr(default, name), name
    assert options["data_path"].endswith(path.stem)
    assert config.activation_checkpointing


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
