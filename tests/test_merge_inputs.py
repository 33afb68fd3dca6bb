"""Inputs and outputs of a merge that mergekit and transformers read differently, or that a merge would lose."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.merge_methods import merge_state_dicts
from mergekit.options import MergeOptions
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM, LlamaForCausalLM, Qwen2MoeConfig
from transformers import Qwen2MoeForCausalLM as Qwen2Moe

import fusechat_merge
from fusechat_merge import cli, kernel, sce
from tests.helpers.merge_checkpoints import read, recipe, write_family
from tests.helpers.tiny_models import SIZES, tiny_model

pytestmark = pytest.mark.slow

QUIET = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
EXPERTS = {**SIZES, "moe_intermediate_size": 8, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
GROUPS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
MODELS = {
    "bias": lambda: tiny_model(attention_bias=True),
    "experts behind a dense layer": lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**EXPERTS, **LATENT, **GROUPS)),
    "experts": lambda: Qwen2Moe(Qwen2MoeConfig(**EXPERTS, shared_expert_intermediate_size=8, num_experts=4)),
}


@pytest.fixture(autouse=True)
def registered():
    fusechat_merge.register()


@pytest.fixture
def models(tmp_path):
    return write_family(tmp_path / "models")


def merge(config, out, options=QUIET):
    run_merge(MergeConfiguration.model_validate(config), str(out), options)
    return read(out)


def save_shards(directory, weights, **elsewhere):
    """`weights` in one shard, what is in `elsewhere` (by shard) in others, and an index that names all."""
    place = dict.fromkeys(weights, "model-1.safetensors")
    save_file(weights, directory / "model-1.safetensors")
    for shard, others in elsewhere.items():
        save_file(others, directory / f"{shard}.safetensors")
        place |= dict.fromkeys(others, f"{shard}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))


# --- what is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("an older save", r"weights in .*target1: expected one save, got model.safetensors, which transformers reads"),
        ("a tensor twice", r"tensor lm_head.weight in .*overlay.* one weights file, got it in .*model-1.safetensors"),
        ("a missing shard", r"weights file .*model-1.safetensors: expected it, as the index names it, got none"),
    ],
)
def test_weights_that_are_ambiguous_or_missing_are_refused(fault, message, models, tmp_path):
    pivot, targets = models
    weights = read(targets[1])
    if fault == "an older save":
        save_shards(targets[1], {name: tensor + 1 for name, tensor in weights.items()})
    else:
        (targets[1] / "model.safetensors").unlink()
        save_shards(targets[1], weights, overlay={"lm_head.weight": weights["lm_head.weight"] + 1})
    if fault == "a missing shard":
        (targets[1] / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match=message):
        merge(recipe(pivot, targets), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_that_compute_differently_are_a_warning(models, tmp_path, caplog):
    pivot, targets = models
    changes = [{"rope_theta": 2e7}, {"attention_dropout": 0.1, "eos_token_id": 7, "use_cache": False}, {}]
    for target, change in zip(targets, changes):
        file = target / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    merge(recipe(pivot, targets), tmp_path / "out")
    lines = [line for line in caplog.messages if "differs from the pivot's" in line]
    assert len(lines) == 1
    assert f"config.json of {targets[0]} differs" in lines[0]
    assert lines[0].endswith("in rope_parameters.rope_theta (20000000.0, the pivot's 10000.0).")


def test_a_merged_adapter_that_is_outdated_or_unfinished_is_not_taken(models, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    pivot, targets = models
    adapter, cache = tmp_path / "adapter", tmp_path / "cache"
    options = QUIET.model_copy(update={"lora_merge_cache": str(cache)})
    config = recipe(pivot, [targets[0], f"{pivot}+{adapter}"])

    def train(seed):
        torch.manual_seed(seed)
        settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        peft.get_peft_model(AutoModelForCausalLM.from_pretrained(pivot), settings).save_pretrained(adapter)

    train(1)
    first, again = merge(config, tmp_path / "first", options), merge(config, tmp_path / "again", options)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(first[name], again[name])
    train(2)
    os.utime(adapter / "adapter_model.safetensors", (2e9, 2e9))
    with pytest.raises(ValueError, match=rf"merged adapter in {cache}/.*: .*{adapter} as it is, got an older one"):
        merge(config, tmp_path / "stale", options)
    (merged,) = cache.iterdir()
    os.truncate(merged / "model.safetensors", 1000)  # mergekit was killed
    with pytest.raises(ValueError, match=r"got an unfinished one. Remove it"):
        merge(config, tmp_path / "stale", options)
    shutil.rmtree(merged)
    LoaderCache.loaders.clear()  # as in a new process

    def half(model, folder, **more):
        (Path(folder) / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "save_pretrained", half)
        with pytest.raises(OSError, match="No space left"):
            merge(config, tmp_path / "full", options)
    assert not merged.exists()  # the next run makes it
    os.utime(adapter / "adapter_model.safetensors")
    assert not torch.equal(merge(config, tmp_path / "full", options)[name], first[name])


# --- what would be lost ---------------------------------------------------------------------------------------------


def save_family(kind, tmp_path):
    paths = []
    for index in range(3):
        torch.manual_seed(0)
        model = MODELS[kind]()
        torch.manual_seed(index)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1e-3 * index * torch.randn_like(parameter))
        model.save_pretrained(paths.append(tmp_path / f"m{index}") or paths[-1])
    return paths


@pytest.mark.parametrize(
    ("kind", "count", "lost"),
    [
        ("bias", 8, "model.layers.0.self_attn.q_proj.bias"),
        ("experts behind a dense layer", 2, "model.layers.1.mlp.experts.gate_up_proj"),
    ],
)
def test_a_merge_that_loses_tensors_of_the_model_is_refused(kind, count, lost, tmp_path):
    pivot, *targets = save_family(kind, tmp_path)
    with pytest.raises(ValueError, match=rf"tensors for sce: .*got none for {count} \({lost}, ...\), which mergekit"):
        merge(recipe(pivot, targets), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    states = {path: AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (pivot, *targets)}
    merged = merge_state_dicts(states, sce, base=pivot)  # the remedy
    base, *moved = (state[lost] for state in states.values())
    assert torch.equal(merged[lost], kernel.sce_merge(base, moved))


def test_experts_that_transformers_stacks_and_tensors_of_no_model_are_no_loss(tmp_path):
    pivot, *targets = save_family("experts", tmp_path)
    for path in (pivot, *targets):
        save_file(read(path) | {"v_head.weight": torch.ones(1, 16)}, path / "model.safetensors", {"format": "pt"})
    merge(recipe(pivot, targets), tmp_path / "out")
    base, *moved = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (pivot, *targets))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert merged.keys() == base.keys()
    for name in merged:
        assert torch.equal(merged[name], kernel.sce_merge(base[name], [state[name] for state in moved]))


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([[0, 0], [1, 1]], r"in module default for sce: expected \[FIRST, LAST \+ 1\], got \[0, 0\]"),
        ([[0, 2], [2, 1]], r"got \[2, 1\], which selects no layers. Write \[0, 2\] for all"),
        ([[-1, 1]], r"got \[-1, 1\]"),
        ([[0, 2], [2, 2]], None),  # embeddings of the first slice, output layer of the last
    ],
)
def test_slices_without_layers_are_refused(ranges, message, models, tmp_path):
    pivot, targets = models
    config = recipe(pivot, []) | {"models": None}
    paths = [str(path) for path in (pivot, *targets)]
    config["slices"] = [{"sources": [{"model": path, "layer_range": part} for path in paths]} for part in ranges]
    if message is None:
        whole = merge(recipe(pivot, targets), tmp_path / "whole")
        merged = merge(config, tmp_path / "out")
        assert all(torch.equal(merged[name], whole[name]) for name in whole)
        return
    with pytest.raises(ValueError, match=message):
        merge(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_merge_never_writes_over_its_inputs(index, models, tmp_path):
    pivot, targets = models
    (tmp_path / "link").symlink_to((pivot, *targets)[index])
    before = {file: file.read_bytes() for file in (tmp_path / "models").rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=r"output .*link: expected a directory of its own, got the input .*models/"):
        merge(recipe(pivot, targets), tmp_path / "link")
    assert {file: file.read_bytes() for file in (tmp_path / "models").rglob("*") if file.is_file()} == before


def test_an_output_beside_an_older_one_in_other_shards_is_an_error(models, tmp_path):
    pivot, targets = models
    merge(recipe(pivot, targets), tmp_path / "out")
    merge(recipe(pivot, targets), tmp_path / "out")  # the same files are replaced
    small = QUIET.model_copy(update={"out_shard_size": 2000})
    with pytest.raises(ValueError, match=r"weights in .*out: expected one save.* Remove the older one"):
        merge(recipe(pivot, targets[1:]), tmp_path / "out", small)
    (tmp_path / "out" / "model.safetensors").unlink()
    expected = merge(recipe(pivot, targets[1:]), tmp_path / "whole")
    assert torch.equal(read(tmp_path / "out")["lm_head.weight"], expected["lm_head.weight"])


# --- commands -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a+b", "a@b"])
def test_a_path_that_mergekit_takes_apart_is_explained(name, models, tmp_path, capsys):
    pivot, targets = models
    (tmp_path / "my models").mkdir()
    shutil.move(targets[0], tmp_path / "my models" / name)
    config = recipe(pivot, [tmp_path / "my models" / name, targets[1]])
    file = tmp_path / "r.yml"
    file.write_text(yaml.safe_dump(config))
    assert cli.main(["yaml", str(file), str(tmp_path / "out")]) == 2
    assert "got no such directory. Correct the path (one with + or @ in it is written" in capsys.readouterr().err
    config["models"][0] = {"model": {"model": {"path": config["models"][0]["model"]}}}
    file.write_text(yaml.safe_dump(config))
    assert cli.main(["yaml", str(file), str(tmp_path / "out"), "--quiet", "--no-copy-tokenizer"]) == 0
    assert read(tmp_path / "out").keys() == read(pivot).keys()


def test_an_error_that_is_no_sentence_has_its_class_and_one_line():
    assert cli._sentence(KeyError(684)) == "KeyError: 684"
    assert cli._sentence(RuntimeError("a\n  b")) == "a b"
    assert len(cli._sentence(RuntimeError("x" * 9000))) < 700
