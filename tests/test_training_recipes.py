"""The recipe files are read by what reads them: `run` and the commands it gives, accelerate's launcher."""

import json
import logging
import shlex
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from fusechat_fuse.cli import main, options_of, parser_of
from fusechat_fuse.pipeline.recipe import EXAMPLES as RECIPES
from fusechat_fuse.pipeline.recipe import LAUNCHED, read_recipe
from fusechat_fuse.pipeline.steps import ranks_of, steps_of
from fusechat_fuse.training.config import FusionConfig

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(file.stem for file in RECIPES.glob("*.yml"))
SOURCES = {"starling", "solar", "internlm2", "mixtral", "qwen"}


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_printed_and_its_commands_are_taken(name, tmp_path, monkeypatch, capsys):
    assert main(["run", "--example", name]) == 0
    text = capsys.readouterr().out
    assert text == (RECIPES / f"{name}.yml").read_text()
    assert f"fusechat-fuse run --example {name} > recipe.yml\n" in text
    monkeypatch.chdir(tmp_path)  # nothing of a checkout is needed
    Path("recipe.yml").write_text(text)
    for step in steps_of(read_recipe("recipe.yml")):
        assert step.stage == "merge" or options_of(step.arguments)
        assert ranks_of(step.command)[0] in (1, 8)


def test_the_examples_are_named_where_one_is_asked_for(capsys):
    assert main(["run", "--help"]) == 0
    assert " or ".join(reversed(NAMES)) in " ".join(capsys.readouterr().out.split())
    assert main(["run", "--example", "two-gpus"]) == 2
    assert f"example 'two-gpus' for run: expected one of {', '.join(NAMES)}. Use one." in capsys.readouterr().err
    assert main(["run"]) == 2
    assert "the following arguments are required: RECIPE.yml or --example." in capsys.readouterr().err


@pytest.mark.slow
def test_the_recipe_for_one_gpu_runs_as_it_stands_on_tiny_models(recipe_models, forked, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    text = (RECIPES / "one-gpu.yml").read_text()
    named = ("Qwen/Qwen3-0.6B", "HuggingFaceTB/SmolLM2-1.7B-Instruct", "allenai/OLMo-2-0425-1B-Instruct")
    for name, model in zip(named, ("pivot", "one", "two"), strict=True):
        assert name in text
        shutil.copytree(recipe_models / model, tmp_path / "at" / name)
    data = tmp_path / "at" / "HuggingFaceH4" / "no_robots"
    data.mkdir(parents=True)
    rows = [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"the {n} is"}]}
        for n in range(30)
    ]
    for split, part in (("train", rows[:24]), ("test", rows[24:])):
        lines = [json.dumps({**row, "category": ("Open QA", "Coding")[n % 2]}) + "\n" for n, row in enumerate(part)]
        (data / f"{split}.jsonl").write_text("".join(lines))
    launcher = {stage: forked.launcher for stage in LAUNCHED}
    (tmp_path / "at" / "recipe.yml").write_text(f"{text}launcher: {json.dumps(launcher)}\ntargets: all\n")
    caplog.set_level(logging.INFO)
    assert main(["run", "at/recipe.yml"]) == 0
    report = json.loads(Path("at/one-gpu/report.json").read_text())
    assert report["compare"]["models"] == [name.rpartition("/")[2] for name in named]
    assert set(report["held_out"]["slices"]) == {"all", "Open QA", "Coding"}
    assert report["held_out"]["slices"]["all"]["conversations"] == 6
    assert len(report["held_out"]["models"]) == 6  # pivot, plain, two targets, multi, the merge
    assert report["merges"].keys() == {"sce"}
    assert Path("at/one-gpu/best").resolve().is_dir()


def test_the_model_card_is_one_recipe_by_the_papers_settings():
    recipe = read_recipe(RECIPES / "fusechat-7b-v2.yml")
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
    assert environment(shlex.split(recipe.launcher["train"])[2:]) == environment(
        ["--config_file", str(EXAMPLES / "accelerate" / "fsdp.yaml")]
    )
    of = {step.key: step for step in steps}
    assert "--device_map auto" in of["represent qwen"].shell
    assert "accelerate" not in of["represent qwen"].shell
    assert "--num_processes 8 -m fusechat_fuse represent" in of["represent starling"].shell


def environment(words: list[str]) -> dict:
    """What accelerate's launcher tells the processes that it starts."""
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args([*words, "-m", "fusechat_fuse"]))
    return prepare_multi_gpu_env(arguments)


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
