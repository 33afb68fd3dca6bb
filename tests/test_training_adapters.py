"""Training with LoRA: what is refused before any weight is loaded, and what decides the adapters."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file

from fusechat_fuse.errors import InputError
from fusechat_fuse.training import pivot as pivot_module
from fusechat_fuse.training.config import FusionConfig
from fusechat_fuse.training.run import train
from tests.helpers.tiny_runs import aligned_directory, config, pivot_directory

pytestmark = pytest.mark.slow

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def pivot(tmp_path_factory):
    return pivot_directory(tmp_path_factory.mktemp("models") / "pivot")


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return pivot_directory(tmp_path_factory.mktemp("models") / "tied", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return aligned_directory(tmp_path_factory.mktemp("data") / "aligned")


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.setattr(pivot_module, "load_model", lambda *args, **kwargs: pytest.fail("weights were loaded"))


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ("q_proj,lm_head", "adapters for lm_head: expected a weight of its own, .* shares with model.embed_tokens"),
        ("embed_tokens", "adapters for model.embed_tokens: expected a weight of its own, .* with lm_head"),
        (
            "q_porj",
            "adapters for .*tied: expected modules that peft can adapt, got: .*q_porj.* not found",
        ),
        ("q_proj,v_porj", "adapters for 'v_porj': expected a module of LlamaForCausalLM, got none of that name"),
        (
            "input_layernorm",
            "adapters for .*tied: expected modules that peft can adapt, got: .*RMSNorm",
        ),
    ],
)
def test_modules_without_a_place_for_adapters_are_refused(tied, data, tmp_path, modules, message):
    with pytest.raises(InputError, match=message):
        train(tied, data, config(tmp_path / "t"), lora_r=2, lora_target_modules=modules)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("name", ["pivot", "tied"])
def test_the_saved_target_has_the_loss_that_was_evaluated(request, data, tmp_path, name):
    folder = request.getfixturevalue(name)
    modules = "q_proj,lm_head,embed_tokens" if name == "pivot" else "all-linear"
    settings = {"max_steps": 4, "learning_rate": 1e-2}
    options = {"lora_r": 2, "lora_target_modules": modules, "eval_data_path": data}
    adapted = train(folder, data, config(tmp_path / "t", **settings), **options)
    saved = train(tmp_path / "t", data, config(tmp_path / "again", max_steps=1, learning_rate=0.0), eval_data_path=data)
    assert saved["eval_loss"] == pytest.approx(adapted["eval_loss"], rel=1e-4)


def test_the_seed_decides_the_adapters(pivot, data, tmp_path):
    def adapter(name, seed):
        torch.rand(7)  # whatever was drawn before
        train(pivot, data, config(tmp_path / name, max_steps=1, learning_rate=0.0, seed=seed), lora_r=2)
        return load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")

    first, same, other = adapter("a", 1), adapter("b", 1), adapter("c", 2)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(("given", "expected"), [({}, 2e-4), ({"learning_rate": 5e-6}, 5e-6)])
def test_adapters_have_a_learning_rate_of_their_own(pivot, data, tmp_path, caplog, given, expected):
    settings = FusionConfig(
        str(tmp_path / "t"), max_steps=1, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, **given
    )
    with caplog.at_level(logging.INFO, logger="fusechat_fuse"):
        train(pivot, data, settings, lora_r=2)
    assert settings.learning_rate == expected
    run = json.loads((tmp_path / "t" / "fusion_run.json").read_bytes())
    assert run["identity"]["options"]["learning_rate"] == expected
    assert ("learning_rate 0.0002, the default for LoRA adapters." in caplog.text) == (not given)
