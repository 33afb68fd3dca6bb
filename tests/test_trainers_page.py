"""The programs of docs/trainers.md, run as they stand with the real libraries: the losses are FusionTrainer's."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fusechat_fuse.training.config import FusionConfig
from fusechat_fuse.training.trainer import FusionTrainer
from tests.helpers.fusion_rows import aligned_rows
from tests.helpers.tiny_runs import aligned_directory, pivot_directory

pytestmark = pytest.mark.slow
PAGE = Path(__file__).parents[1] / "docs/trainers.md"
PROGRAMS = dict(re.findall(r"^## (.+?)\n.*?^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE))
SLICES = ("maths", "poems")


@pytest.fixture
def in_users_place(tmp_path, monkeypatch):
    """The pivot and data that the programs name: fourteen conversations, one of two slices takes the source."""
    monkeypatch.chdir(tmp_path)
    pivot_directory(tmp_path / "models/pivot")
    rows = [aligned_rows(7, seed=n, vocab_size=500, source_better=n == 0) for n in range(2)]
    rows = [row | {"slice": SLICES[n]} for n, some in enumerate(rows) for row in some]
    aligned_directory(tmp_path / "aligned/source", rows)
    return tmp_path


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def fused(**changes):
    """FusionTrainer after training with its defaults on what the programs train on."""
    model = AutoModelForCausalLM.from_pretrained("models/pivot")
    config = FusionConfig("fused", logging_steps=1, save_strategy="no", report_to="none", **changes)
    trainer = FusionTrainer(model, config, train_dataset="aligned/source")
    trainer.train()
    return trainer


def assert_same_weights(path, model):
    theirs = AutoModelForCausalLM.from_pretrained(path).state_dict()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(theirs[name], weight, rtol=0, atol=3e-6)


def run_program(name: str, *changes: tuple[str, str]) -> dict:
    program, names = PROGRAMS[name], {"__name__": "__main__"}
    for old, new in changes:
        assert old in program
        program = program.replace(old, new)
    exec(compile(program, f"{PAGE.name}, {name}", "exec"), names)
    return names


def test_trl(in_users_place):
    theirs = run_program("TRL's SFTTrainer")["trainer"]
    mine = fused(lr_scheduler_type="linear", warmup_steps=0)
    assert 0 < mine.state.log_history[0]["source_share"] < 1
    assert len(losses_of(mine)) == 3
    assert losses_of(theirs) == pytest.approx(losses_of(mine), rel=1e-5)
    theirs.save_model("trl")
    assert_same_weights("trl", mine.model)


@pytest.mark.parametrize(
    "changes",
    [
        [("processing_class=tokenizer\n", "processing_class=tokenizer, peft_config=LoraConfig(r=4)\n")],
        [("FusionCollator(", "FusionCollator(packing=True, "), ("attention_mask", "position_ids")],
    ],
    ids=["adapters", "packed"],
)
def test_what_is_said_of_trl(in_users_place, changes):
    changes = [("from trl", "from peft import LoraConfig\nfrom trl"), ("_epochs=3", "_epochs=1"), *changes]
    theirs = run_program("TRL's SFTTrainer", *changes)["trainer"]
    assert losses_of(theirs) == pytest.approx(losses_of(fused())[:1], rel=1e-5)


def test_accelerate(in_users_place, capsys):
    run_program("PyTorch and accelerate")
    printed = [float(loss) for loss in re.findall(r"^epoch \d, loss (.+)$", capsys.readouterr().out, re.MULTILINE)]
    mine = fused(lr_scheduler_type="constant", warmup_steps=0)
    assert len(printed) == 3
    assert printed == pytest.approx(losses_of(mine), rel=1e-5)
    assert_same_weights("target-loop", mine.model)


def test_peft(in_users_place):
    trainer = run_program("PEFT")["trainer"]
    assert trainer.loss_path == "lean"
    assert losses_of(trainer)[0] == pytest.approx(losses_of(fused())[0], rel=1e-5)  # adapters start as nothing
    assert losses_of(trainer)[-1] < losses_of(trainer)[0]
    assert (in_users_place / "adapter/adapter_config.json").exists()
    pivot, target = (
        AutoModelForCausalLM.from_pretrained(name).state_dict() for name in ("models/pivot", "target-peft")
    )
    assert pivot.keys() == target.keys()
    assert not torch.equal(pivot["model.layers.0.mlp.up_proj.weight"], target["model.layers.0.mlp.up_proj.weight"])
