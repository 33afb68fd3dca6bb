"""Models in other forms: GGUF files, PEFT adapters, weights quantised on loading."""

import json
import logging
import shutil
from importlib.metadata import version

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fusechat_fuse import represent
from fusechat_fuse.cli import main
from fusechat_fuse.errors import InputError
from fusechat_fuse.models import files as models
from fusechat_fuse.models.identity import identify
from fusechat_fuse.training.run import train
from tests.helpers.gguf_files import gguf_file
from tests.helpers.real_tokenizers import tiny_bpe
from tests.helpers.recipes import CHATS
from tests.helpers.tiny_runs import aligned_directory, config, pivot_directory

CE = 1e-4
WIDE = {  # what bitsandbytes can take apart
    **{"hidden_size": 64, "intermediate_size": 128},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16},
}


def nats(path) -> list[np.ndarray]:
    return [row["ce"] for row in path]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A GGUF file, and beside it the directory of the same weights and tokenizer."""
    home = tmp_path_factory.mktemp("gguf")
    model = gguf_file(home / "tiny-F32.gguf")
    plain = home / "plain"
    model.save_pretrained(plain)
    models.load_fast_tokenizer(home / "tiny-F32.gguf").save_pretrained(plain)
    return home


def test_a_gguf_file_is_a_model_like_any_other(made, tmp_path):
    file = made / "tiny-F32.gguf"
    plain = represent(made / "plain", CHATS, tmp_path / "plain", template="native")
    for name, arguments in (("alone", (file,)), ("in-its-directory", (made,))):
        more = {} if name == "alone" else {"gguf_file": file.name}
        found = represent(*arguments, CHATS, tmp_path / name, template="native", **more)
        assert found.manifest["model"]["name"] == "tiny-F32.gguf"
        assert found.manifest["model"]["quantization"] == "gguf"
        for own, expected in zip(found, plain, strict=True):
            assert own["input_ids"].tolist() == expected["input_ids"].tolist()
            assert own["topk_ids"].tolist() == expected["topk_ids"].tolist()
            assert own["ce"] == pytest.approx(expected["ce"], abs=CE)
    text = "the end of 3 words"
    assert models.load_fast_tokenizer(file)(text)["input_ids"] == tiny_bpe()(text)["input_ids"]


def test_a_gguf_pivot_is_trained_into_a_plain_target(made, tmp_path):
    file, data = made / "tiny-F32.gguf", [*CHATS]
    for name, model in (("pivot", file), ("source", made / "plain")):
        represent(model, data, tmp_path / name, template="native")
    pair = ["--pivot_representation", str(tmp_path / "pivot"), "--source_representation", str(tmp_path / "source")]
    assert main(["align", *pair, "--output_dir", str(tmp_path / "aligned")]) == 0
    train(file, tmp_path / "aligned", config(tmp_path / "target", max_steps=3, learning_rate=1e-3))
    before, after = (
        gguf_file(tmp_path / "again.gguf").state_dict(),
        load_file(tmp_path / "target" / "model.safetensors"),
    )
    assert set(after) == set(before)
    assert 0 < max(float((after[name] - before[name]).abs().max()) for name in after) < 0.01
    assert "quantization_config" not in json.loads((tmp_path / "target" / "config.json").read_text())
    assert (
        represent(tmp_path / "target", data, tmp_path / "own", template="native").manifest["counts"]["conversations"]
        == 24
    )


def quantised_on_disk(base, out, *, form: str):
    """(checkpoint, the same weights dequantised) of a model whose projections are laid down in `form`."""
    weights = load_file(base / "model.safetensors")
    stored, meant = dict(weights), dict(weights)
    for name in [name for name in weights if name.endswith("proj.weight")]:
        w = weights[name].float()
        if form == "fp8":  # blocks of 128 x 128
            blocks = w.view(w.shape[0] // 128, 128, w.shape[1] // 128, 128)
            scale = blocks.abs().amax((1, 3), keepdim=True) / 448
            stored[name] = (blocks / scale).to(torch.float8_e4m3fn).view(w.shape)
            stored[name + "_scale_inv"] = scale[:, 0, :, 0].contiguous()
            meant[name] = (stored[name].float().view(blocks.shape) * scale).view(w.shape)
        elif form == "float-quantized":
            scale = w.abs().amax(1, keepdim=True) / 448
            stored[name] = (w / scale).to(torch.float8_e4m3fn)
            stored[name + "_scale"] = scale
            meant[name] = stored[name].float() * scale
        else:  # four bits in groups of 32, eight to an int32, the lowest bits first
            groups = w.view(w.shape[0], -1, 32)
            scale = groups.abs().amax(2, keepdim=True) / 7
            levels = (groups / scale).round().view(w.shape)
            meant[name] = (levels.view(groups.shape) * scale).view(w.shape)
            nibbles = (levels.to(torch.int64) + 8).view(w.shape[0], -1, 8) << (4 * torch.arange(8))
            del stored[name]
            packed = nibbles.sum(2)
            stored[name + "_packed"] = torch.where(packed < 2**31, packed, packed - 2**32).to(torch.int32)
            stored[name + "_scale"], stored[name + "_shape"] = scale[:, :, 0].contiguous(), torch.tensor(w.shape)
    if form == "fp8":
        how = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    else:
        of_weights = {"symmetric": True, "dynamic": False}
        if form == "float-quantized":
            of_weights |= {"num_bits": 8, "type": "float", "strategy": "channel"}
        else:
            of_weights |= {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
        how = {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed"}
        how |= {"ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": of_weights}}}
    for place, tensors in ((out / form, stored), (out / "meant", meant)):
        shutil.copytree(base, place)
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((base / "config.json").read_text())
    (out / form / "config.json").write_text(json.dumps({**settings, "quantization_config": how}))
    return out / form, out / "meant"


@pytest.mark.parametrize("form", ["fp8", "float-quantized", "pack-quantized"])
def test_a_checkpoint_that_is_quantised_is_run_as_it_is(tmp_path, form):
    width = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    base = pivot_directory(tmp_path / "base", **width, num_attention_heads=4, num_key_value_heads=4)
    checkpoint, meant = quantised_on_disk(base, tmp_path, form=form)
    found = represent(checkpoint, CHATS, tmp_path / "r", template="native")
    assert found.manifest["model"]["quantization"] == {"fp8": "fp8"}.get(form, "compressed-tensors")
    expected = represent(meant, CHATS, tmp_path / "m", template="native", dtype="float32")
    whole = represent(base, CHATS, tmp_path / "w", template="native")
    for own, dequantised, without in zip(nats(found), nats(expected), nats(whole), strict=True):
        assert own == pytest.approx(dequantised, abs=CE)
        assert np.abs(own - without).max() > 0.01


def edited(folder, name="config.json", **changes):
    """A model directory whose JSON file has other entries; None takes one out."""
    found = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps({key: value for key, value in found.items() if value is not None}))
    return folder


def cut(folder, name="model.safetensors", size=None):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2 if size is None else size])
    return folder


def unscaled(folder):
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("_scale_inv")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def of_gguf(folder, size):
    shutil.copy(folder.parent / "tiny-F32.gguf", folder / "cut.gguf")
    return cut(folder, "cut.gguf", size) / "cut.gguf"


BROKEN = {
    "a method that is none": (
        ("fp8", lambda f: edited(f, quantization_config={"quant_method": "foo"})),
        "quantization_config for .*fp8: expected a quant_method that transformers knows, got foo",
    ),
    "quantised, and not said": (
        ("fp8", lambda f: edited(f, quantization_config=None)),
        "weights for .*fp8: .* got also .*_scale_inv.* and 1. more, of another quantisation",
    ),
    "without scales": pytest.param(
        ("fp8", unscaled),
        "weights for .*fp8: .* got also .*q_proj.weight without its scale",
        marks=pytest.mark.skipif(version("transformers") < "5.23", reason="missing scales are not told before"),
    ),
    "cut": (("plain", cut), "weights for .*plain: expected a causal language model, got Safe.* are complete"),
    "empty": (("plain", lambda f: cut(f, size=0)), "weights for .*plain: expected a causal language model, got "),
    "of another size": (
        ("plain", lambda f: edited(f, intermediate_size=72)),
        "weights for .*plain: expected a causal language model, got RuntimeError: .*belong together",
    ),
    "a config of no sense": (
        ("plain", lambda f: edited(f, hidden_size="x")),
        "model for .*plain: expected a model directory .*Check the name, and config.json",
    ),
    "a GGUF file's head": (
        ("plain", lambda f: of_gguf(f, 100)),
        "for .*cut.gguf: expected ",
    ),
    "half a GGUF file": (("plain", lambda f: of_gguf(f, None)), "for .*cut.gguf: expected "),
    "adapters of another rank": (
        ("adapters", lambda f: edited(f, "adapter_config.json", r=8)),
        "weights for .*adapters: expected a causal language model, got RuntimeError: ",
    ),
    "adapters beside whole weights": (
        ("adapters", lambda f: (shutil.copy(f.parent / "plain" / "model.safetensors", f), f)[1]),
        "model for .*adapters: expected adapters or whole weights, got both .adapter_config.json beside model.safe",
    ),
    "adapters whose base has moved": (
        ("adapters", lambda f: edited(f, "adapter_config.json", base_model_name_or_path="/nowhere/base")),
        "adapters for .*adapters: expected a whole model at base_model_name_or_path .* got nothing there ./nowhere",
    ),
    "adapters on themselves": (
        ("adapters", lambda f: edited(f, "adapter_config.json", base_model_name_or_path=str(f))),
        "adapters for .*adapters: expected a whole model at base_model_name_or_path of .*, got adapters",
    ),
    "adapters over a GGUF file": (
        (
            "adapters",
            lambda f: edited(f, "adapter_config.json", base_model_name_or_path=str(f.parent / "tiny-F32.gguf")),
        ),
        "adapters for .*adapters: expected a whole model .* got a GGUF file .*tiny-F32.gguf",
    ),
    "adapters of no kind": (
        ("adapters", lambda f: edited(f, "adapter_config.json", peft_type=None)),
        "weights for .*adapters: expected a causal language model, got ",
    ),
    "adapters that lie elsewhere": (
        ("adapters", lambda f: edited(f, "adapter_config.json", target_modules=["q_proj"])),
        "weights for .*adapters: .* got also .*v_proj.lora_",
    ),
    "DoRA's adapters, whose magnitudes transformers leaves out": (
        ("dora", lambda f: f),
        "weights for .*dora: .* without .*lora_magnitude_vector.*Merge the adapters into their base with peft",
    ),
}


@pytest.fixture(scope="module")
def forms(made, tmp_path_factory):
    home = tmp_path_factory.mktemp("forms")
    width = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    quantised_on_disk(
        pivot_directory(home / "base", **width, num_attention_heads=4, num_key_value_heads=4), home, form="fp8"
    )
    shutil.copytree(made / "plain", home / "plain")
    shutil.copy(made / "tiny-F32.gguf", home / "tiny-F32.gguf")
    of = {"r": 4, "init_lora_weights": False, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    for name, dora in (("adapters", False), ("dora", True)):
        model = AutoModelForCausalLM.from_pretrained(home / "plain")
        peft.get_peft_model(model, peft.LoraConfig(**of, use_dora=dora)).save_pretrained(home / name)
    return home


@pytest.mark.parametrize(("form", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_source_is_named_in_a_sentence(forms, tmp_path, form, message):
    kind, change = form
    for name in ("plain", kind):
        shutil.copytree(forms / name, tmp_path / name, dirs_exist_ok=True)
    shutil.copy(forms / "tiny-F32.gguf", tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        represent(change(tmp_path / kind), CHATS, tmp_path / "r", template="native")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "r" / "manifest.json").exists()


@pytest.mark.parametrize("options", [{}, {"lora_r": 4}])
def test_a_quantised_pivot_is_refused(forms, tmp_path, options):
    data = aligned_directory(tmp_path / "aligned")
    with pytest.raises(InputError, match=r"pivot for train: expected weights that are not quantised, got fp8 of .*fp8"):
        train(forms / "fp8", data, config(tmp_path / "t"), **options)
    assert not (tmp_path / "t").exists()


def with_own_code(folder):
    """The model as a repository with its own classes."""
    (folder / "configuration_ours.py").write_text(
        'from transformers import LlamaConfig\n\n\nclass OursConfig(LlamaConfig):\n    model_type = "ours"\n'
    )
    (folder / "modeling_ours.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_ours import OursConfig\n\n\n"
        "class OursForCausalLM(LlamaForCausalLM):\n    config_class = OursConfig\n"
    )
    classes = {"AutoConfig": "configuration_ours.OursConfig", "AutoModelForCausalLM": "modeling_ours.OursForCausalLM"}
    return edited(folder, model_type="ours", auto_map=classes, architectures=["OursForCausalLM"])


def test_a_model_with_its_own_code_is_run_where_it_is_trusted(tmp_path):
    plain = pivot_directory(tmp_path / "plain")
    own = with_own_code(pivot_directory(tmp_path / "own"))
    with pytest.raises(
        InputError, match=r"model for .*own: .*custom code .*give trust_remote_code where you trust it\."
    ):
        represent(own, CHATS, tmp_path / "not", template="native")
    found = represent(own, CHATS, tmp_path / "r", template="native", trust_remote_code=True)
    for ours, expected in zip(
        nats(found), nats(represent(plain, CHATS, tmp_path / "p", template="native")), strict=True
    ):
        assert ours == pytest.approx(expected, abs=CE)
    data, options = aligned_directory(tmp_path / "aligned"), {"max_steps": 2, "learning_rate": 1e-3}
    with pytest.raises(
        InputError, match=r"model for .*own: .*custom code .*give trust_remote_code where you trust it\."
    ):
        train(own, data, config(tmp_path / "not", **options))
    train(own, data, config(tmp_path / "t", **options), trust_remote_code=True)
    train(plain, data, config(tmp_path / "u", **options))
    ours, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("t", "u"))
    for name, tensor in expected.items():  # this class goes through its own logits
        assert (ours[name] - tensor).abs().mean() < 2e-5
    represent(tmp_path / "t", CHATS, tmp_path / "of-target", template="native", trust_remote_code=True)


def test_what_a_gguf_file_is_known_by(made, tmp_path):
    copy = shutil.copy(made / "tiny-F32.gguf", tmp_path / "other-name.gguf")
    assert identify(copy)["fingerprint"] != identify(made / "tiny-F32.gguf")["fingerprint"]  # the name belongs to it
    other = tmp_path / "folder" / "tiny-F32.gguf"
    other.parent.mkdir()
    shutil.copy(made / "tiny-F32.gguf", other)
    assert identify(other) == identify(made / "tiny-F32.gguf")


def test_adapters_count_with_their_base(tmp_path):
    base = pivot_directory(tmp_path / "base")
    torch.manual_seed(3)
    adapted = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM")
    )
    adapted.save_pretrained(tmp_path / "adapters")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    shutil.copy(base / "tokenizer.json", tmp_path / "merged")
    shutil.copy(base / "tokenizer_config.json", tmp_path / "merged")
    for file in base.glob("chat_template*"):
        shutil.copy(file, tmp_path / "merged")
    found = represent(tmp_path / "adapters", CHATS, tmp_path / "a", template="native")
    merged = represent(tmp_path / "merged", CHATS, tmp_path / "m", template="native")
    alone = represent(base, CHATS, tmp_path / "b", template="native")
    for own, expected, without in zip(nats(found), nats(merged), nats(alone), strict=True):
        assert own == pytest.approx(expected, abs=CE)
        assert np.abs(own - without).max() > 0.01
    before = identify(tmp_path / "adapters")["fingerprint"]
    assert before != identify(base)["fingerprint"]
    pivot_directory(tmp_path / "base", seed=1)
    assert identify(tmp_path / "adapters")["fingerprint"] != before
    settings = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    (tmp_path / "adapters" / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        represent(tmp_path / "adapters", CHATS, tmp_path / "c", template="native")
    settings["base_model_name_or_path"] = None
    (tmp_path / "adapters" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"expected base_model_name_or_path in adapter_config\.json, got none"):
        represent(tmp_path / "adapters", CHATS, tmp_path / "c", template="native")


@pytest.mark.parametrize(("bits", "bound"), [("load_in_8bit", 0.3), ("load_in_4bit", 1.5)])
def test_weights_quantised_on_loading(bits, bound, tmp_path):
    pivot = pivot_directory(tmp_path / "pivot", **WIDE)
    whole = represent(pivot, CHATS, tmp_path / "whole", template="native")
    found = represent(pivot, CHATS, tmp_path / "found", template="native", **{bits: True})
    assert found.manifest["model"]["quantization"] == f"bitsandbytes {bits[-4:]}"
    difference = np.mean(np.abs(np.concatenate(nats(found)) - np.concatenate(nats(whole))))
    assert 0 < difference < bound
    with pytest.raises(InputError, match=r"got another run's \(options.load_in = "):
        represent(pivot, CHATS, tmp_path / "found", template="native")


def test_adapters_over_4_bit_weights_are_merged_into_whole_ones(tmp_path):
    pivot, data = pivot_directory(tmp_path / "pivot", **WIDE), aligned_directory(tmp_path / "aligned")
    more = {"lora_r": 4, "lora_target_modules": "q_proj,down_proj", "load_in_4bit": True}
    train(pivot, data, config(tmp_path / "target", max_steps=4, learning_rate=2e-2), **more)
    before, after = load_file(pivot / "model.safetensors"), load_file(tmp_path / "target" / "model.safetensors")
    adapters = load_file(tmp_path / "target" / "adapter" / "adapter_model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("q_proj" in name or "down_proj" in name for name in moved)
    for name in moved:
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        update = adapters[f"{stem}.lora_B.weight"] @ adapters[f"{stem}.lora_A.weight"] * (16 / 4)
        assert torch.allclose(after[name], before[name] + update, atol=1e-6)
    assert "4-bit" in (tmp_path / "target" / "README.md").read_text()
    with pytest.raises(InputError, match="value for load_in_4bit: expected LoRA adapters to train, got none"):
        train(pivot, data, config(tmp_path / "none"), load_in_4bit=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gguf_file": "none.gguf"}, "gguf_file none.gguf: expected a .gguf file in .*, got none"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_4bit or load_in_8bit .* expected one.* got both"),
    ],
)
def test_bad_options_are_one_sentence(options, message, tmp_path):
    pivot_directory(tmp_path / "pivot")
    with pytest.raises(InputError, match=message):
        represent(tmp_path / "pivot", CHATS, tmp_path / "r", template="native", **options)
    assert not (tmp_path / "r").exists()


def test_a_quantised_file_is_not_quantised_again(made, tmp_path):
    with pytest.raises(InputError, match=r"load_in_8bit for .*: expected weights that are not quantised, got quanti"):
        represent(made / "tiny-F32.gguf", CHATS, tmp_path / "r", template="native", load_in_8bit=True)
    with pytest.raises(InputError, match="expected a model directory or a Hub name, got neither"):
        represent(tmp_path / "none.gguf", CHATS, tmp_path / "r", template="native")


@pytest.mark.parametrize("package", ["gguf", "bitsandbytes", "peft"])
def test_a_package_that_is_not_there_is_named(package, made, tmp_path, monkeypatch):
    pivot_directory(tmp_path / "pivot")
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(tmp_path / "pivot")})
    )
    model = {"gguf": made / "tiny-F32.gguf", "bitsandbytes": tmp_path / "pivot", "peft": tmp_path / "adapters"}[package]
    find = models.find_spec
    monkeypatch.setattr(models, "find_spec", lambda name: None if name == package else find(name))
    more = {"load_in_8bit": True} if package == "bitsandbytes" else {}
    with pytest.raises(InputError, match=f"expected the package {package}, got none. Run: pip install {package}"):
        represent(model, CHATS, tmp_path / "r", template="native", **more)


def test_a_model_worse_than_random_bytes_gets_a_warning(tmp_path, caplog):
    pivot = pivot_directory(tmp_path / "pivot", initializer_range=1.0)
    caplog.set_level(logging.WARNING)
    represent(pivot, CHATS, tmp_path / "r", template="native")
    assert "bits per byte, worse than random bytes (8)" in caplog.text


def test_the_command_wants_a_model(tmp_path, capsys):
    assert main(["represent", "--data_path", "x.json", "--output_dir", str(tmp_path / "r")]) == 2
    assert "are required: --model_name_or_path or --gguf_file" in capsys.readouterr().err
