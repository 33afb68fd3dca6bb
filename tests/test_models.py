"""Opening models as they are on disk, and one identity for each: a directory, a Hub name, loaded weights."""

import importlib.resources
import json
import logging
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from fusechat_fuse.capture.run import represent
from fusechat_fuse.errors import InputError
from fusechat_fuse.models.files import load_config, load_fast_tokenizer, model_file
from fusechat_fuse.models.identity import identify
from fusechat_fuse.models.loading import check_causal, load_model
from fusechat_fuse.store.shards import load_representation
from fusechat_fuse.training.pivot import PivotFiles
from fusechat_fuse.training.run import train
from tests.helpers.hub import COMMIT, cache_model
from tests.helpers.tiny_models import FAMILIES, tiny_model
from tests.helpers.tiny_runs import aligned_directory, config, pivot_directory

NAME = "org/pivot"
CHATS = [{"messages": [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "the value"}]}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model directory."""
    return pivot_directory(tmp_path_factory.mktemp("models") / "pivot")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty Hub cache in place of the user's."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_directory_is_known_by_its_files_wherever_it_lies(folder, tmp_path):
    known = identify(folder)
    assert known["name"] == "pivot"
    assert identify(str(folder)) == known
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    assert identify(moved) == {"name": "moved", "fingerprint": known["fingerprint"]}
    (moved / "README.md").write_text("no part of the model")
    assert identify(moved)["fingerprint"] == known["fingerprint"]
    tiny_model("Llama", seed=1, vocab_size=640).save_pretrained(moved)
    assert identify(moved)["fingerprint"] != known["fingerprint"]


def test_hub_name_is_known_by_its_commit_whatever_is_downloaded(folder, hub):
    cache_model(hub, NAME, folder, leave_out=("model.safetensors",))
    known = identify(NAME)
    assert known == {"name": NAME, "fingerprint": COMMIT[:16]}
    cache_model(hub, NAME, folder)
    assert identify(NAME) == known
    cache_model(hub, NAME, folder, commit=COMMIT[::-1])
    assert identify(NAME)["fingerprint"] == COMMIT[::-1][:16]


def test_loaded_model_is_known_by_its_weights():
    model = tiny_model("Llama")
    known = identify(model)
    assert known["name"] == "LlamaForCausalLM"
    assert identify(tiny_model("Llama")) == known
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert identify(model)["fingerprint"] != known["fingerprint"]


@pytest.mark.parametrize("read", [identify, load_config])
@pytest.mark.parametrize("name", ["nobody/nothing", "./nothing", "/nowhere/at/all"])
def test_name_of_no_model_is_said(hub, read, name):
    with pytest.raises(InputError, match=f"^model for {name}: expected a model directory or a Hub name") as caught:
        read(name)
    assert "\n" not in str(caught.value)


def test_files_are_found_in_a_directory_and_in_the_hubs_cache(folder, hub):
    snapshot = cache_model(hub, NAME, folder)
    assert model_file(NAME, "config.json") == snapshot / "config.json"
    assert model_file(folder, "config.json") == folder / "config.json"
    assert model_file(NAME, "no.json") is model_file(folder, "no.json") is None


def test_weights_that_are_missing_are_said(folder, hub):
    cache_model(hub, NAME, folder, leave_out=("model.safetensors",))
    with pytest.raises(InputError, match=f"weights for {NAME}: expected a causal language model, got"):
        load_model(NAME, dtype="auto")


def without(folder, name, target):
    """A copy of a model directory whose weights lack one tensor."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    del tensors[name]
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_checkpoint_that_lacks_a_tensor_is_refused_by_its_name(folder, tmp_path, name):
    partial = without(folder, name, tmp_path / "partial")
    sentence = f"weights for {partial}: expected every tensor of LlamaForCausalLM, got files without {name}. Give a"
    for read in (load_model, lambda path, dtype: PivotFiles(str(path)).load_model(dtype=dtype)):
        with pytest.raises(InputError, match=re.escape(sentence)):
            read(partial, dtype="auto")
    with pytest.raises(InputError, match=re.escape(sentence)):
        represent(partial, CHATS, tmp_path / "r")


def test_configuration_of_another_architecture_is_refused_with_the_missing_tensors(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    tiny_model("Mixtral", vocab_size=640).config.save_pretrained(tmp_path / "m")
    with pytest.raises(
        InputError, match=r"every tensor of MixtralForCausalLM, got files without model\..* and \d+ more"
    ):
        load_model(tmp_path / "m", dtype="auto")


def looking_ahead(kind):
    """A tiny model whose predictions know what comes next."""
    torch.manual_seed(0)
    size = {"vocab_size": 640, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "pad_token_id": 0}
    masked = {**size, "num_attention_heads": 2, "initializer_range": 0.3}
    bart = {"vocab_size": 640, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "pad_token_id": 0}
    bart |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    return {
        "llama": lambda: tiny_model("Llama", vocab_size=640, is_causal=False),
        "bert": lambda: BertForMaskedLM(BertConfig(**masked)),
        "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**masked)),
        "bart": lambda: BartForConditionalGeneration(BartConfig(**bart)),
    }[kind]()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("llama", "a causal language model, got one whose logits depend on later"),
        ("bert", "a causal language model, got one whose logits depend on later"),
        ("roberta", "a causal language model, got one whose logits depend on later"),
        ("bart", r"a decoder-only language model, got an encoder-decoder \(bart\)"),
    ],
)
def test_models_that_look_ahead_are_refused(kind, message, folder, tmp_path):
    place = tmp_path / "m"
    shutil.copytree(folder, place)
    looking_ahead(kind).save_pretrained(place)
    if kind == "bart":  # with the shared embedding written out, all that its decoder alone lacks is there
        tensors = load_file(place / "model.safetensors")
        tensors["model.decoder.embed_tokens.weight"] = tensors["model.shared.weight"].clone()
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"^model for {place}: expected {message}"):
        represent(place, CHATS, tmp_path / "r")
    with pytest.raises(InputError, match=f"^model for {place}: expected {message}"):
        train(str(place), aligned_directory(tmp_path / "aligned"), config(tmp_path / "target", max_steps=1))
    assert not (tmp_path / "r").exists()
    assert not (tmp_path / "target").exists()
    with pytest.raises(InputError, match=r"for \w+: expected a (causal|decoder-only) language model"):
        represent(looking_ahead(kind).eval(), CHATS, tmp_path / "r", tokenizer=load_fast_tokenizer(folder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_causal_models_of_every_family_pass(family, dtype):
    check_causal(tiny_model(family, dtype=dtype).eval(), family)
    with torch.no_grad():
        broken = tiny_model(family, dtype=dtype).eval()
        broken.get_input_embeddings().weight.fill_(float("nan"))
    check_causal(broken, family)  # not finite: no sign of looking ahead


def test_tied_checkpoint_without_a_head_of_its_own_is_whole(tmp_path):
    tiny_model("Llama-tied").save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = load_model(tmp_path, dtype="float32")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_represent_and_train_know_a_hub_name_by_the_same_identity(folder, hub, tmp_path, caplog):
    cache_model(hub, NAME, folder)
    stored = represent(NAME, CHATS, tmp_path / "r")
    data = aligned_directory(tmp_path / "aligned", model=stored.manifest["model"])
    with caplog.at_level(logging.WARNING):
        PivotFiles(NAME).check_data(load_representation(data))
    assert "another pivot" not in caplog.text
    cache_model(hub, NAME, folder, commit=COMMIT[::-1])
    with caplog.at_level(logging.WARNING):
        PivotFiles(NAME).check_data(load_representation(data))
    assert f"another pivot ({COMMIT[:16]} there, {COMMIT[::-1][:16]} here)" in caplog.text


def test_first_train_on_a_hub_name_that_ended_before_the_weights_came_goes_on(folder, hub, tmp_path):
    cache_model(hub, NAME, folder, leave_out=("model.safetensors",))
    data = aligned_directory(tmp_path / "aligned")
    with pytest.raises(InputError, match="weights for"):
        train(NAME, data, config(tmp_path / "target", max_steps=1))
    assert not (tmp_path / "target").exists()  # nothing is claimed before the weights are there
    cache_model(hub, NAME, folder)
    train(NAME, data, config(tmp_path / "target", max_steps=1))
    run = json.loads((tmp_path / "target" / "fusion_run.json").read_bytes())
    assert run["finished"]
    assert run["identity"]["model"] == COMMIT[:16]


def copy_of(tokenizer, folder, **config):
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def test_llama_class_directory_keeps_the_ids_of_its_tokenizer_json(tmp_path, openchat, caplog):
    folder = copy_of(openchat, tmp_path / "m", tokenizer_class="LlamaTokenizer", legacy=True)
    text = "def f():\n        return 1 <s> x"
    with caplog.at_level(logging.WARNING):
        loaded = load_fast_tokenizer(folder)
    assert not caplog.records
    assert loaded(text).input_ids == openchat(text).input_ids
    assert loaded.chat_template == openchat.chat_template
    # the class named in the directory would change them: this is why it is not used
    assert AutoTokenizer.from_pretrained(folder)(text).input_ids != openchat(text).input_ids


def test_directory_with_a_vocabulary_file_alone_gives_a_warning(tmp_path, caplog):
    folder = tmp_path / "m"
    folder.mkdir()
    with importlib.resources.as_file(importlib.resources.files("mistral_common") / "data" / "tokenizer.model.v1") as f:
        shutil.copy(f, folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": True}))
    with caplog.at_level(logging.WARNING):
        loaded = load_fast_tokenizer(folder)
    assert "has no tokenizer.json" in caplog.text
    assert loaded("Hello").input_ids[-1] == 22557


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nothing", "expected a model directory or a Hub name, got neither"),
        ("bare", "expected tokenizer.json in it, got no tokenizer"),
        ("broken", "expected a readable tokenizer.json, got"),
    ],
)
def test_directory_of_no_tokenizer_is_said(tmp_path, given, message):
    for name in ("bare", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=f"tokenizer for {tmp_path / given}: {message}"):
        load_fast_tokenizer(tmp_path / given)


def test_what_else_is_no_tokenizer_is_said(hub, openchat):
    with pytest.raises(InputError, match="tokenizer for object: expected a fast tokenizer"):
        load_fast_tokenizer(object())
    with pytest.raises(InputError, match="expected a model directory or a Hub name with a tokenizer"):
        load_fast_tokenizer("nobody/nothing-of-this-name")
    assert load_fast_tokenizer(openchat) is openchat
