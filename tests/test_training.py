"""`train`: a pivot directory and aligned data in, a loadable target out; what it refuses; how it continues."""

import json
import re
import shutil
import signal
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from fusechat_fuse.errors import InputError
from fusechat_fuse.training.card import _metadata
from fusechat_fuse.training.options import TrainArguments
from fusechat_fuse.training.run import train
from tests.helpers import real_tokenizers
from tests.helpers.fusion_rows import aligned_rows
from tests.helpers.tiny_runs import VOCAB, aligned_directory, config, logged, pivot_directory, tokenizer

pytestmark = pytest.mark.slow


def test_the_hub_lists_a_target_below_its_pivot(tmp_path):
    metadata = _metadata("openchat/openchat_3.5", ["FuseAI/FuseChat-Mixture", "mine.json"], plain=False)
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("openchat/openchat_3.5", "finetune")
    assert metadata["datasets"] == ["FuseAI/FuseChat-Mixture"]
    assert "plain-fine-tuning" not in metadata["tags"]
    assert "plain-fine-tuning" in _metadata("openchat/openchat_3.5", [], plain=True)["tags"]
    assert not {"base_model", "base_model_relation", "datasets"} & set(
        _metadata(str(tmp_path), ["d.json"], plain=False)
    )


@pytest.fixture(scope="module")
def pivot(tmp_path_factory):
    return pivot_directory(tmp_path_factory.mktemp("models") / "pivot")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return aligned_directory(tmp_path_factory.mktemp("data") / "aligned")


def test_a_target_loads_generates_and_keeps_what_is_the_pivots(pivot, data, tmp_path):
    output = tmp_path / "target"
    metrics = train(pivot, data, config(output, num_train_epochs=4), eval_data_path=data)
    losses = logged(output)
    assert sum(losses[-3:]) < sum(losses[:3])  # it learns
    for name in ("lm_loss", "fusion_loss", "source_share", "mapped_mass", "tokens_per_second"):
        assert len(logged(output, name)) == len(losses)
    assert metrics["eval_lm_loss"] < logged(output, "lm_loss")[0]
    for step in range(len(losses)):
        lm, fusion = (logged(output, name)[step] for name in ("lm_loss", "fusion_loss"))
        assert losses[step] == pytest.approx(0.9 * lm + 0.1 * fusion, rel=1e-5)
    model = transformers.AutoModelForCausalLM.from_pretrained(output)
    before = load_file(pivot / "model.safetensors")
    after = load_file(output / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[name].shape == after[name].shape for name in before)
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    assert model.get_input_embeddings().weight.shape[0] == VOCAB
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (output / name).read_bytes() == (pivot / name).read_bytes()
    old, new = (json.loads((folder / "config.json").read_bytes()) for folder in (pivot, output))
    assert old == new
    loaded = transformers.AutoTokenizer.from_pretrained(output)
    assert loaded.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert model.generate(torch.tensor([[3, 4]]), max_new_tokens=3, do_sample=False).shape == (1, 5)
    assert not [file.name for file in output.rglob("*") if file.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_the_model_card_tells_the_story(pivot, data, tmp_path):
    output = tmp_path / "openchat-strong"
    train(pivot, data, config(tmp_path / "ours", max_steps=1))
    ours = (tmp_path / "ours" / "README.md").read_text()
    rows = (
        "weight lambda | 0.5 |",
        "avg_ce_slice (cross-entropy per byte)",
        "| label |",
        "| label (label noise 0.05) |",
    )
    assert [row for row in rows if row not in ours] == []
    train(pivot, data, config(output, max_steps=1, preset="paper"))
    text = (output / "README.md").read_text()
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["pipeline_tag"] == "text-generation"
    assert "fusechat" in metadata["tags"]
    assert "base_model" not in metadata  # a directory is no Hub name
    rows = (
        *("| language-model weight lambda | 0.9 |", "| fusion function | min_ce (cross-entropy per token) |"),
        *(
            "| source | strong-source |",
            "| mapping | prefix |",
            "| coverage | 0.93 |",
            "| conversations per step | 4 |",
        ),
        *(f"| torch | {version('torch')} |", "| train_loss | ", "# openchat-strong", "arxiv.org/abs/2408.07990"),
    )
    assert [row for row in rows if row not in text] == []
    sources = [
        {"model": name, "mapping": ["statistics"], "certificate": {"coverage": 0.5}} for name in ("solar", "qwen")
    ]
    combined = aligned_directory(tmp_path / "c", kind="combined", sources=sources, taken={"solar": 17, "qwen": 7})
    train(pivot, combined, config(tmp_path / "both", max_steps=1))
    both = (tmp_path / "both" / "README.md").read_text()
    for told in ("solar, qwen", "| solar: mapping | statistics |", "| qwen: conversations taken | 7 |"):
        assert told in both
    assert "| max_steps | 1 |" in text
    assert "num_train_epochs" not in text
    assert "| epochs | 0.1667 |" in text
    twins = [{"model": "solar", "mapping": ["prefix"], "certificate": {"coverage": c}} for c in (0.25, 0.75)]
    taken = {"solar#1": 4, "solar#2": 20}
    combined = aligned_directory(tmp_path / "d", kind="combined", sources=twins, taken=taken)
    train(pivot, combined, config(tmp_path / "twins", max_steps=1))
    told = (tmp_path / "twins" / "README.md").read_text()
    for row in (
        "| source | solar#1, solar#2 |",
        "| solar#1: coverage | 0.25 |",
        "| solar#2: coverage | 0.75 |",
        "| solar#1: conversations taken | 4 |",
        "| solar#2: conversations taken | 20 |",
    ):
        assert row in told
    assert str(tmp_path) not in text + both + told
    assert str(Path(pivot).parent) not in text


def test_the_same_command_again_leaves_a_finished_run_alone(pivot, data, tmp_path):
    first = train(pivot, data, config(tmp_path / "t", max_steps=2))
    stamp = (tmp_path / "t" / "model.safetensors").stat().st_mtime_ns
    assert train(pivot, data, config(tmp_path / "t", max_steps=2)) == pytest.approx(first)
    assert (tmp_path / "t" / "model.safetensors").stat().st_mtime_ns == stamp


@pytest.fixture(scope="module")
def finished(pivot, data, tmp_path_factory):
    """The directory of a finished run; borrowed."""
    output = tmp_path_factory.mktemp("runs") / "finished"
    train(pivot, data, config(output, max_steps=1))
    return output


@pytest.mark.parametrize(
    ("seed", "weight", "difference"),
    [(0, 0.9, "lm_loss_weight = 0.5 there and 0.9 here"), (9, 0.5, "data = ")],
    ids=["another option", "other data"],
)
def test_another_runs_directory_is_refused_with_the_difference(pivot, finished, tmp_path, seed, weight, difference):
    data = aligned_directory(tmp_path / "data", seed=seed)
    before = {file: file.read_bytes() for file in finished.rglob("*") if file.is_file()}
    with pytest.raises(InputError, match=rf"another run's \({difference}"):
        train(pivot, data, config(finished, max_steps=1, lm_loss_weight=weight))
    assert {file: file.read_bytes() for file in finished.rglob("*") if file.is_file()} == before


def test_overwrite_starts_anew_in_another_runs_directory(pivot, data, finished, tmp_path):
    output = tmp_path / "t"
    shutil.copytree(finished, output)
    train(pivot, data, config(output, max_steps=1, lm_loss_weight=0.5), overwrite=True)
    assert json.loads((output / "fusion_run.json").read_bytes())["identity"]["options"]["lm_loss_weight"] == 0.5


def test_a_directory_with_other_files_is_refused_and_left_as_it_is(pivot, data, tmp_path):
    (tmp_path / "notes.txt").write_text("keep")
    with pytest.raises(InputError, match=r"expected an empty one, got other files \('notes.txt'\)"):
        train(pivot, data, config(tmp_path, max_steps=1))
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]


def with_a_flipped_bit(folder: Path) -> Path:
    shard = next(aligned_directory(folder / "flipped").glob("*.arrow"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    return shard.parent


def another_tokenizer(pivot: Path, folder: Path) -> Path:
    shutil.copytree(pivot, folder / "other-tokenizer")
    real_tokenizers.tiny_unigram().save_pretrained(folder / "other-tokenizer")
    return folder / "other-tokenizer"


BAD_INPUT = {  # what is changed of pivot, data and options, given the pivot and a folder; what the error says
    "data that is not aligned": (
        lambda pivot, folder: {"data": aligned_directory(folder / "plain", kind="representation")},
        "expected aligned data, got a representation",
    ),
    "damaged data": (
        lambda pivot, folder: {"data": with_a_flipped_bit(folder)},
        "file for .*flipped.*arrow: expected the file the manifest lists",
    ),
    "no data": (
        lambda pivot, folder: {"data": folder / "nowhere"},
        "representation for .*nowhere: expected a finished directory",
    ),
    "ids beyond the vocabulary": (
        lambda pivot, folder: {"data": aligned_directory(folder / "wide", vocab_size=VOCAB + 1)},
        rf"expected ids below {VOCAB} .* got data of a pivot with {VOCAB + 1}",
    ),
    "a directory without a model": (
        lambda pivot, folder: {"pivot": aligned_directory(folder / "plain")},
        "model for .*plain: expected .*directory.*, got one without",
    ),
    "no model": (lambda pivot, folder: {"pivot": folder / "absent"}, "model for .*absent: expected a model directory"),
    "evaluation without data": (
        lambda pivot, folder: {"config": {"eval_strategy": "epoch"}},
        "eval_data_path: expected aligned data for eval_strategy epoch, got none",
    ),
    "an unknown dtype": (
        lambda pivot, folder: {"options": {"dtype": "int8"}},
        "value for dtype: expected one of float32",
    ),
    "another tokenizer": (
        lambda pivot, folder: {"pivot": another_tokenizer(pivot, folder)},
        "tokenizer for .*aligned: expected the one of .*other-tokenizer",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_found_before_any_work(pivot, data, tmp_path, change, message):
    given = {"pivot": pivot, "data": data, "options": {}, "config": {}, **change(pivot, tmp_path)}
    with pytest.raises(InputError, match=message):
        train(given["pivot"], given["data"], config(tmp_path / "never", **given["config"]), **given["options"])
    assert not (tmp_path / "never").exists()


def test_a_row_beyond_the_vocabulary_stops_the_run(pivot, tmp_path):
    rows = aligned_rows(8, vocab_size=500)
    rows[5]["source_ids"][0, 0] = VOCAB
    data = aligned_directory(tmp_path / "wrong", rows)
    with pytest.raises(InputError, match=rf"token id for conversation 'c5'.* of {VOCAB}, got {VOCAB}"):
        train(pivot, data, config(tmp_path / "t", fusion_function="source"))


def test_same_ids_under_another_chat_template_are_the_same_tokenizer(pivot, data, tmp_path):
    copy = tmp_path / "pivot"
    shutil.copytree(pivot, copy)
    own = tokenizer().from_pretrained(pivot)
    own.chat_template = "{{ messages[0].content }}"
    own.save_pretrained(copy)
    train(copy, data, config(tmp_path / "t", max_steps=1))
    assert tokenizer().from_pretrained(tmp_path / "t").chat_template == own.chat_template


def test_saved_in_another_precision(pivot, data, tmp_path):
    train(pivot, data, config(tmp_path / "t", max_steps=1), save_dtype="bfloat16")
    assert {t.dtype for t in load_file(tmp_path / "t" / "model.safetensors").values()} == {torch.bfloat16}
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "t").dtype == torch.bfloat16


@pytest.mark.parametrize("flag", ["bf16_full_eval", "fp16_full_eval"])
def test_the_target_is_as_trained_however_it_is_evaluated(pivot, data, tmp_path, flag):
    metrics = train(pivot, data, config(tmp_path / "t", max_steps=2, **{flag: True}), eval_data_path=data)
    assert metrics["eval_loss"] > 0
    train(pivot, data, config(tmp_path / "plain", max_steps=2))
    target, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("t", "plain"))
    assert all(torch.equal(target[name], plain[name]) for name in plain)
    assert (tmp_path / "t" / "config.json").read_bytes() == (tmp_path / "plain" / "config.json").read_bytes()


def test_a_generation_config_that_transformers_refuses_to_save_is_kept(pivot, data, tmp_path):
    copy = tmp_path / "pivot"
    shutil.copytree(pivot, copy)
    (copy / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}')
    train(copy, data, config(tmp_path / "t", max_steps=2, save_strategy="steps", save_steps=1))
    assert (tmp_path / "t" / "checkpoint-1" / "model.safetensors").exists()
    kept = tmp_path / "t" / "generation_config.json"
    assert kept.read_bytes() == (copy / "generation_config.json").read_bytes()


def test_low_rank_adapters_are_merged_into_the_target(pivot, data, tmp_path):
    pytest.importorskip("peft")
    train(pivot, data, config(tmp_path / "t", max_steps=3, learning_rate=1e-2), lora_r=2)
    before, after = load_file(pivot / "model.safetensors"), load_file(tmp_path / "t" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not changed & {"lm_head.weight", "model.embed_tokens.weight"}
    assert (tmp_path / "t" / "adapter" / "adapter_model.safetensors").is_file()
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "t")


WORKER = """
import os, signal, sys
from transformers import Trainer
from fusechat_fuse.training import run_directory, target
from fusechat_fuse.training.pivot import PivotFiles
from fusechat_fuse.training.run import train
from fusechat_fuse.training.trainer import FusionTrainer
from tests.helpers.tiny_runs import config

PLACES = {  # name -> owner, function, whether it is done before the kill, number of the call
    "claimed": (run_directory.RunDirectory, "claim", True, 1),
    "second step": (FusionTrainer, "training_step", False, 3),
    "weights of a checkpoint": (Trainer, "_save_optimizer_and_scheduler", False, 1),
    "fourth step": (FusionTrainer, "training_step", True, 7),
    "optimizer of a checkpoint": (Trainer, "_save_rng_state", False, 1),
    "checkpoint": (FusionTrainer, "_save_checkpoint", True, 1),
    "weights of the target": (PivotFiles, "copy_files", False, 1),
    "target": (target, "replace_into", False, 1),
    "before its end": (run_directory.RunDirectory, "finish", False, 1),
}

def kill(owner, name, done, number):
    original, calls = getattr(owner, name), []
    def killed(*args, **kwargs):
        calls.append(name)
        if len(calls) < number:
            return original(*args, **kwargs)
        if done:
            original(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(owner, name, killed)

pivot, data, output, place = sys.argv[1:]
if place in PLACES:
    kill(*PLACES[place])
settings = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
train(pivot, data, config(output, **settings))
"""
PLACES = re.findall(r'^    "(.*)": \(', WORKER, re.MULTILINE)


@pytest.mark.slow
def test_a_run_killed_nine_times_is_the_run_that_was_not(pivot, data, forked, tmp_path):
    """The same command after each kill: in a step, in every part of a checkpoint, while the target is written."""
    (tmp_path / "worker.py").write_text(WORKER)

    def run(name, place):
        command = [sys.executable, str(tmp_path / "worker.py"), str(pivot), str(data), str(tmp_path / name), place]
        return forked.run(command).returncode

    for place in PLACES:
        assert run("killed", place) == -signal.SIGKILL, place
        assert not json.loads((tmp_path / "killed" / "fusion_run.json").read_bytes())["finished"]
    # a checkpoint that the kill cut short has no trainer_state.json: it may not be continued from
    (tmp_path / "killed" / "checkpoint-99").mkdir()
    (tmp_path / "killed" / "checkpoint-99" / "model.safetensors").write_bytes(b"")
    assert [run(name, "none") for name in ("killed", "whole")] == [0, 0]
    assert len(logged(tmp_path / "whole")) == 9
    # the same up to rounding: where weights read from a file lie in memory decides how sums are split into vectors
    assert logged(tmp_path / "killed") == pytest.approx(logged(tmp_path / "whole"), rel=1e-5)
    metrics = [json.loads((tmp_path / n / "fusion_run.json").read_bytes())["metrics"] for n in ("killed", "whole")]
    assert metrics[0]["train_loss"] == pytest.approx(metrics[1]["train_loss"], rel=1e-5)
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    start = load_file(pivot / "model.safetensors")
    for name, tensor in whole.items():
        assert (killed[name] - tensor).abs().mean() <= 1e-3 * (tensor - start[name]).abs().mean() + 1e-9, name
    assert {file.name for file in (tmp_path / "killed").iterdir()} - {"checkpoint-99"} == {
        file.name for file in (tmp_path / "whole").iterdir()
    }


def test_arguments_parse_as_flags():
    parser = transformers.HfArgumentParser(TrainArguments)
    arguments = parser.parse_args_into_dataclasses(["--model_name_or_path", "m", "--data_path", "d", "--overwrite"])[0]
    assert arguments == TrainArguments("m", "d", overwrite=True)
