"""What a run says of its losses: it stops where one is no number, and its mean is over all steps of all its parts."""

import json
import logging
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from fusechat_fuse.cli import main
from fusechat_fuse.errors import InputError
from fusechat_fuse.training.meter import FusionMeter
from fusechat_fuse.training.run import train
from fusechat_fuse.training.trainer import FusionTrainer
from tests.helpers.fusion_rows import aligned_rows
from tests.helpers.tiny_models import tiny_model
from tests.helpers.tiny_runs import aligned_directory, config, pivot_directory

pytestmark = pytest.mark.slow

WILD = {"learning_rate": 1e20, "optim": "sgd", "max_grad_norm": 0.0, "warmup_steps": 0, "lr_scheduler_type": "constant"}


@pytest.fixture(scope="module")
def pivot(tmp_path_factory):
    return pivot_directory(tmp_path_factory.mktemp("models") / "pivot")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return aligned_directory(tmp_path_factory.mktemp("data") / "aligned")


def assert_no_target(output: Path) -> None:
    for file in output.rglob("*"):
        assert file.suffix != ".safetensors"
        if file.suffix == ".json":
            json.loads(file.read_text(), parse_constant=pytest.fail)
    run_file = output / "fusion_run.json"
    assert not run_file.exists() or not json.loads(run_file.read_bytes())["finished"]


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_a_loss_that_is_no_number_stops_the_run_with_its_step(pivot, data, tmp_path, logging_steps):
    settings = config(tmp_path / "t", logging_steps=logging_steps, num_train_epochs=2, save_strategy="epoch", **WILD)
    with pytest.raises(FloatingPointError, match=r"loss for step [23]: expected a number"):
        train(pivot, data, settings)
    assert_no_target(tmp_path / "t")


class Spoil(TrainerCallback):
    """An update that leaves a weight that is no number."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.lm_head.weight.data[3, 3] = torch.inf


def test_weights_that_the_last_step_spoiled_are_found(tmp_path):
    settings = config(tmp_path / "t", max_steps=1)
    trainer = FusionTrainer(tiny_model(), settings, train_dataset=aligned_rows(4), callbacks=[Spoil()])
    with pytest.raises(FloatingPointError, match="weights after the last step"):
        trainer.train()


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_weight_that_is_no_number_is_found_before_training(tmp_path, monkeypatch, name, value, frozen):
    model = tiny_model()
    model.get_parameter(name).data[-1, 0] = value  # of a token that no row has
    model.get_parameter(name).requires_grad = not frozen
    monkeypatch.setattr(FusionTrainer, "training_step", pytest.fail)
    trainer = FusionTrainer(model, config(tmp_path / "t"), train_dataset=aligned_rows(4, vocab_size=40))
    with pytest.raises(InputError, match=f"weights for {name}: expected numbers, got some that are not finite"):
        trainer.train()


def test_the_command_refuses_a_pivot_with_a_weight_that_is_no_number(pivot, data, tmp_path, capsys):
    shutil.copytree(pivot, tmp_path / "pivot")
    model = AutoModelForCausalLM.from_pretrained(pivot)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "pivot")
    flags = ["--model_name_or_path", str(tmp_path / "pivot"), "--data_path", str(data), "--use_cpu"]
    assert main(["train", *flags, "--output_dir", str(tmp_path / "t"), "--report_to", "none"]) == 2
    assert "weights for model.layers.0.mlp.up_proj.weight: expected numbers" in capsys.readouterr().err
    assert_no_target(tmp_path / "t")


@pytest.mark.parametrize("packing", [False, True])
def test_evaluation_of_an_iterable_counts_every_conversation_once(tmp_path, packing):
    """Of which the last batch is not full."""
    rows = aligned_rows(7)
    lists = [{k: v.tolist() if hasattr(v, "tolist") else v for k, v in row.items()} for row in rows]
    stream = datasets.Dataset.from_list(lists).to_iterable_dataset()
    options = config(tmp_path, packing=packing, per_device_eval_batch_size=4)
    trainer = FusionTrainer(tiny_model(), options, train_dataset=rows)
    got, expected = trainer.evaluate(stream), trainer.evaluate(rows)
    for name in ("eval_loss", "eval_lm_loss", "eval_source_share", "eval_mapped_mass"):
        assert got[name] == pytest.approx(expected[name], rel=1e-3)
    for data in (stream, rows):
        output = trainer.evaluation_loop(trainer.get_eval_dataloader(data), "Evaluation", metric_key_prefix="eval")
        assert output.num_samples == 7
        assert "eval_conversations" not in output.metrics


def test_an_evaluation_that_is_no_number_is_an_error(tmp_path):
    model = tiny_model()
    model.lm_head.weight.data[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"loss for evaluation \(eval\)"):
        FusionTrainer(model, config(tmp_path), eval_dataset=aligned_rows(4)).evaluate()


def test_a_figure_that_does_not_exist_is_left_out(tmp_path):
    rows = [{name: value for name, value in row.items() if name != "mapped_mass"} for row in aligned_rows(4)]
    trainer = FusionTrainer(tiny_model(), config(tmp_path, fusion_tail="drop"), train_dataset=rows)
    trainer.train()
    assert [entry for entry in trainer.state.log_history if "mapped_mass" in entry] == []


def test_train_loss_of_a_continued_run_is_the_whole_runs(tmp_path):
    rows = aligned_rows(24)
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2}

    def trainer():
        return FusionTrainer(tiny_model(), config(tmp_path, **settings), train_dataset=rows)

    whole = trainer().train()
    parts = trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert parts.training_loss == pytest.approx(whole.training_loss, rel=1e-5)
    assert parts.metrics["train_loss"] == parts.training_loss
    single = FusionTrainer(tiny_model(), config(tmp_path, max_steps=5, logging_steps=1), train_dataset=rows)
    single.train()
    losses = [entry["loss"] for entry in single.state.log_history if "loss" in entry]
    assert whole.training_loss == pytest.approx(sum(losses) / 5, rel=1e-5)


def test_a_checkpoint_of_another_trainer_may_come_without_the_sum(tmp_path, caplog):
    rows = aligned_rows(16)
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    FusionTrainer(tiny_model(), config(tmp_path, **settings), train_dataset=rows).train()
    file = tmp_path / "checkpoint-2" / "trainer_state.json"
    state = json.loads(file.read_bytes())
    del state["stateful_callbacks"]["StepLosses"]
    file.write_text(json.dumps(state))
    trainer = FusionTrainer(tiny_model(), config(tmp_path, **settings), train_dataset=rows)
    with caplog.at_level(logging.WARNING):
        output = trainer.train(resume_from_checkpoint=str(file.parent))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert output.training_loss == pytest.approx(sum(losses[2:]) / 2, rel=1e-5)


def test_evaluation_of_several_sets_is_taken_off_the_clock_once(monkeypatch):
    now = iter([0.0, 10.0, 11.0, 12.0, 14.0])  # made, paused, paused within it, both resumed
    monkeypatch.setattr("fusechat_fuse.training.meter.time.perf_counter", lambda: next(now))
    meter = FusionMeter(["source"])
    with meter.paused(), meter.paused():
        pass
    assert meter._start == 4.0
