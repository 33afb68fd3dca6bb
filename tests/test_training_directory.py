"""The output directory of `train`: when it is free, what it is never, and how the target lands in it."""

import errno
import json
import logging
import os
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

import fusechat_fuse.training.run as run_module
import fusechat_fuse.training.target as target_module
from fusechat_fuse.cli import main
from fusechat_fuse.errors import InputError, as_sentence, writing
from fusechat_fuse.store.files import write_atomic
from fusechat_fuse.training.run import train
from fusechat_fuse.training.trainer import FusionTrainer
from tests.helpers.tiny_models import tiny_model
from tests.helpers.tiny_runs import aligned_directory, config, pivot_directory

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pivot(tmp_path_factory):
    return pivot_directory(tmp_path_factory.mktemp("models") / "pivot")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return aligned_directory(tmp_path_factory.mktemp("data") / "aligned")


@pytest.fixture(scope="module")
def finished(pivot, data, tmp_path_factory):
    """The directory of a finished run with its evaluation; borrowed."""
    output = tmp_path_factory.mktemp("runs") / "finished"
    train(pivot, data, config(output, max_steps=2, save_strategy="steps", save_steps=1), eval_data_path=data)
    return output


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# -- whose it is -------------------------------------------------------------------------------------------------------


def test_a_run_that_fails_before_training_leaves_nothing(pivot, data, tmp_path, monkeypatch):
    def fail(self, *args, **kwargs):
        raise InputError("the trainer cannot be built.")

    monkeypatch.setattr(FusionTrainer, "_prepare_collator", fail)
    with pytest.raises(InputError, match="cannot be built"):
        train(pivot, data, config(tmp_path / "targets" / "t", max_steps=1))
    assert list(tmp_path.iterdir()) == []


def test_a_directory_without_a_checkpoint_is_free(pivot, data, tmp_path, monkeypatch):
    def fail(self, *args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(FusionTrainer, "training_step", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            train(pivot, data, config(tmp_path / "t", max_steps=1))
    assert (tmp_path / "t" / "fusion_run.json").exists()
    train(pivot, data, config(tmp_path / "t", max_steps=1, lm_loss_weight=0.5))
    run = json.loads((tmp_path / "t" / "fusion_run.json").read_bytes())
    assert (run["finished"], run["identity"]["options"]["lm_loss_weight"]) == (True, 0.5)


def test_a_run_with_a_checkpoint_keeps_its_directory(pivot, data, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "t")
    run = json.loads((tmp_path / "t" / "fusion_run.json").read_bytes())
    (tmp_path / "t" / "fusion_run.json").write_text(json.dumps(run | {"finished": False}))
    with pytest.raises(InputError, match="another run's"):
        train(pivot, data, config(tmp_path / "t", max_steps=2, lm_loss_weight=0.5))


CHANGES = {
    "lr_scheduler_kwargs": ({"lr_scheduler_kwargs": {"num_cycles": 2}}, {}),
    "optim_args": ({"optim_args": "weight_decay=0.1"}, {}),
    "dataloader_drop_last": ({"dataloader_drop_last": True}, {}),
    "average_tokens_across_devices": ({"average_tokens_across_devices": False}, {}),
    "save_dtype": ({}, {"save_dtype": "bfloat16"}),
    "eval_data": ({}, {"eval_data_path": None}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_the_target_or_its_figures_is_another_run(pivot, data, finished, name):
    changes, options = CHANGES[name]
    before = contents(finished)
    settings = config(finished, **{"max_steps": 2, "save_strategy": "steps", "save_steps": 1, **changes})
    with pytest.raises(InputError, match=rf"another run's \({name} = "):
        train(pivot, data, settings, **{"eval_data_path": data, **options})
    assert contents(finished) == before


def test_another_chat_template_is_another_run(pivot, data, finished, tmp_path):
    """The target gets the pivot's."""
    shutil.copytree(pivot, tmp_path / "pivot")
    with open(tmp_path / "pivot" / "chat_template.jinja", "a") as file:
        file.write("{# changed #}")
    with pytest.raises(InputError, match=r"another run's \(chat_template = "):
        train(tmp_path / "pivot", data, config(finished, max_steps=2), eval_data_path=data)


def test_a_finished_run_says_so_with_the_remedy(pivot, data, finished, caplog):
    settings = config(finished, max_steps=2, save_strategy="steps", save_steps=1)
    with caplog.at_level(logging.INFO, logger="fusechat_fuse"):
        train(pivot, data, settings, eval_data_path=data)
    assert "holds this very run, finished; nothing to do (--overwrite trains anew)." in caplog.text


@pytest.mark.parametrize(("resume", "first"), [(None, 2), ("true", 2), (True, 2), ("false", 1), (False, 1)])
def test_an_interrupted_run_is_continued_unless_forbidden(pivot, data, finished, tmp_path, caplog, resume, first):
    shutil.copytree(finished, tmp_path / "t")
    run = json.loads((tmp_path / "t" / "fusion_run.json").read_bytes())
    (tmp_path / "t" / "fusion_run.json").write_text(json.dumps(run | {"finished": False}))
    shutil.rmtree(tmp_path / "t" / "checkpoint-2")
    steps = []
    settings = config(tmp_path / "t", max_steps=2, save_strategy="steps", save_steps=1, resume_from_checkpoint=resume)
    original = FusionTrainer.training_step

    def training_step(self, *args):
        steps.append(self.state.global_step + 1)
        return original(self, *args)

    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.INFO, logger="fusechat_fuse"):
        patch.setattr(FusionTrainer, "training_step", training_step)
        train(pivot, data, settings, eval_data_path=data)
    assert steps[0] == first
    assert ("Continuing after step 1, from " in caplog.text) == (first == 2)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("what", ["pivot", "data", "evaluation data", "pivot within"])
def test_what_a_run_reads_is_never_its_output(pivot, data, tmp_path, what, overwrite):
    train(pivot, data, config(tmp_path / "t", max_steps=1))
    model, rows, evaluation = tmp_path / "t", tmp_path / "t" / "rows", data
    shutil.copytree(data, rows)
    shutil.copytree(pivot, tmp_path / "t" / "checkpoint-7")
    given = {
        "pivot": (model, data, None),
        "pivot within": (model / "checkpoint-7", data, None),
        "data": (pivot, rows, None),
        "evaluation data": (pivot, evaluation, rows),
    }[what]
    before = contents(tmp_path)
    with pytest.raises(InputError, match=f"expected one apart from the {what.removesuffix(' within')}, got "):
        train(*given[:2], config(tmp_path / "t", max_steps=1), eval_data_path=given[2], overwrite=overwrite)
    assert contents(tmp_path) == before


def test_overwrite_replaces_runs_only(pivot, data, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"someone's")
    with pytest.raises(InputError, match=r"expected an empty one, got other files \('model.safetensors'\)"):
        train(pivot, data, config(tmp_path, max_steps=1), overwrite=True)
    assert (tmp_path / "model.safetensors").read_bytes() == b"someone's"


@pytest.mark.parametrize("save_strategy", ["no", "steps"])
@pytest.mark.parametrize("moment", ["on_step_begin", "on_pre_optimizer_step", "on_step_end"])
def test_a_run_that_is_stopped_early_is_not_finished_and_continues(
    pivot, data, tmp_path, monkeypatch, moment, save_strategy
):
    """SIGTERM with --enable_jit_checkpoint, noticed at any moment of a step."""
    options = {"max_steps": 4, "logging_steps": 1, "enable_jit_checkpoint": True}
    options |= {"save_strategy": save_strategy, "save_steps": 1, "save_total_limit": None}
    original = getattr(JITCheckpointCallback, moment)

    def stop(self, args, state, control, **kwargs):
        self.jit_manager.is_checkpoint_requested = state.global_step == 2
        original(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(JITCheckpointCallback, moment, stop)
        with pytest.raises(RuntimeError, match=r"expected 4 steps, got [23] before .* the same command again to"):
            train(pivot, data, config(tmp_path / "t", **options))
    assert not json.loads((tmp_path / "t" / "fusion_run.json").read_bytes())["finished"]
    assert not list((tmp_path / "t").glob("*.safetensors"))
    assert (tmp_path / "t" / "checkpoint-2").exists()
    continued = train(pivot, data, config(tmp_path / "t", **options))
    whole = train(pivot, data, config(tmp_path / "whole", **options))
    assert continued["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-5)
    targets = [load_file(tmp_path / name / "model.safetensors") for name in ("t", "whole")]
    for name, tensor in targets[1].items():
        torch.testing.assert_close(targets[0][name], tensor, rtol=1e-4, atol=1e-5)


# -- how the target lands ----------------------------------------------------------------------------------------------


def fill_the_disk(monkeypatch):
    """safetensors' own error, from Rust: its number is in the text alone. Some of the file is there."""

    def save_pretrained(self, folder, **kwargs):
        (folder := target_module.Path(folder)).mkdir(parents=True, exist_ok=True)
        (folder / "model.safetensors").write_bytes(b"half")
        (folder / "config.json").write_text("{}")
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", save_pretrained)


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, to be spoiled."""
    return shutil.copytree(finished, tmp_path / "copied")


@pytest.mark.parametrize(
    ("asked", "options", "message"),
    [
        ("typo", {"overwrite": True}, "expected a whole checkpoint"),
        ("copied/checkpoint-1", {"overwrite": True}, "expected one outside .*copied, got one that --overwrite would"),
        ("copied/checkpoint-1", {"output": "new"}, "expected one of a run like this, got another's .lm_loss_weight = "),
    ],
    ids=["typo", "own", "another run's"],
)
def test_a_checkpoint_that_is_asked_for_is_looked_at_first(pivot, data, copied, tmp_path, asked, options, message):
    output = tmp_path / options.pop("output", "copied")
    before = contents(tmp_path)
    settings = config(output, max_steps=2, lm_loss_weight=0.25, resume_from_checkpoint=str(tmp_path / asked))
    with pytest.raises(InputError, match=message):
        train(pivot, data, settings, **options)
    assert contents(tmp_path) == before


def test_a_finished_run_without_its_weights_is_no_finished_run(pivot, data, copied):
    (copied / "model.safetensors").unlink()
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(InputError, match="expected the weights of a finished run, got none"):
        train(pivot, data, config(copied, **settings), eval_data_path=data)


def test_overwriting_leaves_what_is_not_the_runs(pivot, data, copied, monkeypatch):
    kept = [copied / name for name in ("mine.safetensors", "adapter/mine", "checkpoint-9/mine")]
    for file in kept:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fusechat_fuse.training.run_directory.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            train(pivot, data, config(copied, max_steps=1), overwrite=True)
    assert not json.loads((copied / "fusion_run.json").read_text())["finished"]  # half removed, and it says so
    train(pivot, data, config(copied, max_steps=1), overwrite=True)
    assert all(file.read_text() == "mine" for file in kept)
    assert not (copied / "checkpoint-2").exists()


def test_a_checkpoint_without_its_optimizer_is_left_out(pivot, data, copied, caplog):
    for step in (1, 2):
        (copied / f"checkpoint-{step}" / "optimizer.pt").unlink()
    file = copied / "fusion_run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"finished": False}))
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    train(pivot, data, config(copied, **settings), eval_data_path=data)
    assert "saved without its optimizer); it is left out" in caplog.text
    assert "Continuing after" not in caplog.text


def test_float16_weights_are_refused_where_all_are_trained(pivot, data, tmp_path):
    with pytest.raises(InputError, match="expected float32 or bfloat16 to train all weights, got float16"):
        train(pivot, data, config(tmp_path / "t", max_steps=1), dtype="float16")


def test_weights_beyond_float16_are_not_saved_in_it():
    with pytest.raises(FloatingPointError, match="weights for w: expected numbers within float16"):
        target_module.cast_weights({"w": torch.tensor([1.0, 1e5])}, torch.float16)


def test_a_full_disk_is_told_with_the_path_and_leaves_no_part_of_a_target(pivot, data, tmp_path, monkeypatch, capsys):
    flags = ["--model_name_or_path", pivot, "--data_path", data, "--output_dir", tmp_path / "t", "--max_steps", "1"]
    flags += ["--use_cpu", "--report_to", "none", "--save_strategy", "no", "--per_device_train_batch_size", "4"]
    flags += ["--gradient_accumulation_steps", "1"]
    with monkeypatch.context() as patch:
        fill_the_disk(patch)
        assert main(["train", *map(str, flags)]) == 1
    said = capsys.readouterr().err
    assert f"error: disk for {tmp_path / 't'}: expected room to write, got none left." in said
    assert {entry.name for entry in (tmp_path / "t").iterdir()} <= {"fusion_run.json", "trainer_state.json"}
    assert main(["train", *map(str, flags)]) == 0
    assert (tmp_path / "t" / "model.safetensors").exists()
    assert not (tmp_path / "t" / target_module.STAGING_DIR).exists()


def test_a_disk_that_fills_up_under_torch_save_is_told():
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 169280 vs 169168")
    with pytest.raises(OSError, match="No space left") as caught, writing("/a/b"):
        raise error
    assert as_sentence(caught.value)[0].startswith("error: disk for /a/b: expected room to write")


@pytest.mark.parametrize("content", ["{}", "[]", '{"identity": 3}'])
def test_a_run_file_that_is_none_is_named(pivot, data, copied, content):
    (copied / "fusion_run.json").write_text(content)
    with pytest.raises(InputError, match=r"run file for .*fusion_run.json: expected what a run wrote"):
        train(pivot, data, config(copied, max_steps=1))


@pytest.mark.parametrize(
    ("number", "told", "code"),
    [
        (errno.ENOSPC, "disk for /a/b: expected room to write, got none left", 1),
        (errno.EROFS, "path for /a/b: expected a place to write, got a read-only file system", 2),
        (errno.ENOTDIR, "path for /a/b: expected directories on the way to it, got a file in place of one", 2),
        (errno.EACCES, "path for /a/b: expected read and write permission, got none", 2),
        (errno.EIO, "failed: OSError", 1),
    ],
)
@pytest.mark.parametrize("kind", ["python", "rust", "cause"])
def test_failures_of_the_file_system_are_sentences(number, told, code, kind):
    error = OSError(number, os.strerror(number))
    if kind == "rust":
        error = RuntimeError(f"I/O error: {os.strerror(number)} (os error {number})")
    if kind == "cause":
        cause, error = error, RuntimeError("unexpected position 64")
        error.__context__ = cause
    with pytest.raises(OSError, match=re.escape(os.strerror(number))) as caught, writing("/a/b"):
        raise error
    text, got = as_sentence(caught.value)
    assert told in text
    assert got == code


def test_other_errors_pass(tmp_path):
    with pytest.raises(ZeroDivisionError), writing("/a/b"):
        raise ZeroDivisionError("os")
    assert as_sentence(ZeroDivisionError("x\n y")) == ("failed: ZeroDivisionError: x y", 1)
    with pytest.raises(FileNotFoundError, match="elsewhere"), writing("/a/b"):
        (tmp_path / "elsewhere").read_bytes()


def test_a_file_that_cannot_be_written_leaves_no_part(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space") as caught:
        write_atomic(tmp_path / "a.json", b"{}")
    assert caught.value.filename == str(tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []


def test_an_output_behind_a_file_is_refused(pivot, data, tmp_path):
    (tmp_path / "file").write_text("keep")
    with pytest.raises(InputError, match=r"output for .*t: expected a directory, got a file \(.*file\) on the way"):
        train(pivot, data, config(tmp_path / "file" / "t", max_steps=1))


def test_a_tied_weight_is_saved_once_in_another_precision(data, tmp_path):
    tied = pivot_directory(tmp_path / "tied", tie_word_embeddings=True)
    train(tied, data, config(tmp_path / "t", max_steps=1), save_dtype="bfloat16")
    saved = load_file(tmp_path / "t" / "model.safetensors")
    assert saved.keys() == load_file(tied / "model.safetensors").keys()
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


def test_what_shares_memory_goes_on_sharing_it():
    weights = target_module.cast_weights(tiny_model("Llama-tied").state_dict(), torch.bfloat16)
    assert weights["lm_head.weight"] is weights["model.embed_tokens.weight"]
    assert len({id(tensor) for tensor in weights.values()}) == len(weights) - 1


def test_a_target_is_whole_where_checkpoints_are_sharded(pivot, data, tmp_path, monkeypatch):
    """FSDP by accelerate wants a GPU: here only what saving asks, as it is with SHARDED_STATE_DICT."""
    save = run_module.save_target

    def as_with_fsdp(trainer, *arguments):
        trainer.is_fsdp_enabled = True
        sharded = SimpleNamespace(state_dict_type="StateDictType.SHARDED_STATE_DICT")
        monkeypatch.setattr(trainer.accelerator.state, "fsdp_plugin", sharded, raising=False)  # shared by all trainers
        save(trainer, *arguments)

    train(pivot, data, config(tmp_path / "whole", max_steps=2))
    monkeypatch.setattr(run_module, "save_target", as_with_fsdp)
    train(pivot, data, config(tmp_path / "sharded", max_steps=2))
    whole, sharded = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "sharded"))
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)


@pytest.mark.parametrize(("stage", "gathers"), [(2, False), (3, True)])
def test_zero_3_gathers_the_weights_for_the_target(stage, gathers):
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": False}
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": zero})
    state = SimpleNamespace(deepspeed_plugin=plugin)
    target_module.prepare_saving(SimpleNamespace(is_deepspeed_enabled=True, accelerator=SimpleNamespace(state=state)))
    assert zero["stage3_gather_16bit_weights_on_model_save"] is gathers


def test_a_run_killed_while_it_wrote_its_target_takes_no_step_more(pivot, data, tmp_path):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    run = lambda name: train(pivot, data, config(tmp_path / name, learning_rate=1e-2, **options))  # noqa: E731
    run("whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "killed" / name).unlink()
    about = json.loads((tmp_path / "killed" / "fusion_run.json").read_text())
    (tmp_path / "killed" / "fusion_run.json").write_text(json.dumps({**about, "finished": False}))
    run("killed")
    assert not (tmp_path / "killed" / "checkpoint-4").exists()
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
