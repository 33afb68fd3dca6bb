"""fusechat-merge inspect, yaml and card; reports of running merges; the recipes that are shipped."""

import csv
import errno
import json
import logging
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors import SafetensorError

import fusechat_merge
from fusechat_fuse.store import card
from fusechat_merge import _autoload, cli, kernel, plots, recipe, report, reporting
from fusechat_merge.once import warn_once
from tests.helpers import reference_merge
from tests.helpers.merge_checkpoints import read, write_family, write_llama
from tests.helpers.merge_checkpoints import recipe as make_recipe

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).resolve().parent.parent / "mergekit_configs"
NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.delenv(reporting.SWITCH, raising=False)
    fusechat_merge.register()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("models"))


@pytest.fixture
def config(models, tmp_path):
    pivot, targets = models
    path = tmp_path / "sce.yml"
    path.write_text(yaml.safe_dump(make_recipe(pivot, targets, select_topk=0.5)))
    return path


def fails(capsys, arguments, code=2):
    """The one sentence a failing command prints."""
    assert cli.main([str(a) for a in arguments]) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("fusechat-merge: ")
    assert "Traceback" not in "".join(lines)
    return lines[-1]


# --- inspect --------------------------------------------------------------------------------------------------------


def test_inspect_writes_what_the_oracle_says(config, models, tmp_path, capsys):
    out = tmp_path / "report"
    assert cli.main(["inspect", str(config), "--output", str(out), "--quiet"]) == 0
    table = capsys.readouterr().out
    assert "all coefficients" in table
    assert "selected share 50.0%" in table
    with (out / "coefficients.csv").open() as stream:
        rows = {row["tensor"]: row for row in csv.DictReader(stream)}
    pivot, targets = models
    base, moved = read(pivot), [read(target) for target in targets]
    assert set(rows) == set(base)
    for name in (NAME, "model.norm.weight"):
        _, deltas = reference_merge.task_vectors(base[name], [m[name] for m in moved])
        keep = reference_merge.selected(deltas, 0.5)
        eta = reference_merge.coefficients(deltas, keep, [1.0] * 3)
        row = rows[name]
        assert [float(row[f"coefficient target{j}"]) for j in range(3)] == pytest.approx(eta, rel=1e-6)
        kept = [[x if k else 0.0 for x, k in zip(d, keep)] for d in deltas]
        norms = [sum(x * x for x in d) ** 0.5 for d in kept]
        assert [float(row[f"norm target{j}"]) for j in range(3)] == pytest.approx(norms, rel=1e-6)
        assert float(row["selected"]) == sum(keep) / len(keep)
        signs = [1 if sum(column) >= 0 else -1 for column in zip(*kept)]
        erased = [sum(x * s < 0 for x, s in zip(d, signs)) for d in kept]
        nonzero = [sum(x != 0 for x in d) for d in kept]
        assert float(row["erased"]) == pytest.approx(sum(erased) / sum(nonzero))
        assert [float(row[f"erased target{j}"]) for j in range(3)] == pytest.approx(
            [e / n for e, n in zip(erased, nonzero)]
        )
        same = sum(x * y > 0 for x, y in zip(kept[0], kept[2])) / sum(x * y != 0 for x, y in zip(kept[0], kept[2]))
        assert float(row["agreement target0 | target2"]) == pytest.approx(same)
    assert (rows[NAME]["layer"], rows[NAME]["kind"]) == ("1", "mlp.up_proj")
    summary = json.loads((out / "summary.json").read_text())
    assert sum(summary["coefficients"].values()) == pytest.approx(1.0)
    assert summary["elements"] == sum(t.numel() for t in base.values())
    assert summary["signs_counted"] == "everywhere"
    vectors = [torch.cat([(of[k].double() - base[k].double()).flatten() for k in base]) for of in moved]
    cosine = float(torch.nn.functional.cosine_similarity(vectors[0], vectors[1], dim=0))
    assert summary["cosines"]["target0 | target1"] == pytest.approx(cosine, abs=1e-6)
    merged = torch.cat([kernel.sce_merge(base[k], [of[k] for of in moved], select_topk=0.5).flatten() for k in base])
    start = torch.cat([base[k].flatten() for k in base])
    linear = (start.double() + torch.stack(vectors).mean(0)).to(start.dtype).double()
    distance = float((merged.double() - linear).norm() / torch.stack(vectors).mean(0).norm())
    assert summary["distance_to_linear"] == pytest.approx(distance, rel=1e-3)
    assert f"distance to linear merging: {distance:.1%} of its task vector" in table
    for picture in ("coefficients.png", "erased.png"):
        assert (out / picture).stat().st_size > 5000
    assert not list(tmp_path.rglob("*.safetensors"))  # no model
    assert "expected a new or empty one" in fails(capsys, ["inspect", config, "--output", out])


def test_inspect_reads_slices_and_varm(models, tmp_path):
    pivot, targets = models
    slices = [{"sources": [{"model": str(m), "layer_range": [0, 1]} for m in (pivot, *targets)]}] * 2
    document = {"merge_method": "varm", "base_model": str(pivot), "slices": slices, "dtype": "bfloat16"}
    (tmp_path / "varm.yml").write_text(yaml.safe_dump(document))
    assert cli.main(["inspect", str(tmp_path / "varm.yml"), "--output", str(tmp_path / "r"), "--quiet"]) == 0
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert sum(summary["coefficients"].values()) == pytest.approx(1.0)
    assert summary["erased_share"] is None
    assert 0.4 < summary["sign_agreement"]["target0 | target1"] < 0.6
    assert not (tmp_path / "r" / "erased.png").exists()


def test_inspect_without_matplotlib_says_so_and_writes_the_numbers(config, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "fusechat_merge.plots")
    monkeypatch.delattr(fusechat_merge, "plots")
    with caplog.at_level(logging.WARNING):
        assert cli.main(["inspect", str(config), "--output", str(tmp_path / "r"), "--quiet"]) == 0
    assert "expected matplotlib, got none. Install fusechat[plot]" in caplog.text
    assert (tmp_path / "r" / "summary.json").exists()


@pytest.mark.parametrize("count", [1, 4])
def test_pictures_of_any_number_of_targets(count, tmp_path):
    names = [f"target{j}" for j in range(count)]
    row = {"elements": 9, "erased": 0.2} | {
        f"{what} {name}": 0.1 for name in names for what in ("coefficient", "erased")
    }
    rows = [row | {"tensor": f"model.layers.{i}.a", "layer": i, "kind": "a"} for i in range(2)]
    for path in plots.draw(rows, names, tmp_path):
        assert path.read_bytes().startswith(b"\x89PNG")


# --- recipes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameters": {"select_top_k": 0.1}}, "got 'select_top_k'. Did you mean select_topk?"),
        (
            {"parameters": {"density": 0.1}},
            "expected one of select_topk, select_scope, int8_mask, normalize, weight, got 'density'",
        ),
        ({"select_topk": 0.1}, "expected select_topk under parameters, got it at the top level"),
        ({"merge_methode": "sce"}, "got 'merge_methode'. Did you mean merge_method?"),
        ({"merge_method": "sec"}, "got 'sec'. Did you mean sce?"),
        ({"merge_method": "SCE"}, "got 'SCE'. Did you mean sce?"),
        ({"dtype": "bf16"}, "dtype in .*: expected one of float32, .*, got 'bf16'. Did you mean bfloat16?"),
        ({"out_dtype": "fp16"}, "out_dtype in .*: expected one of float32, .*, got 'fp16'. Did you mean float16?"),
        ({"dtype": "Bfloat16"}, "got 'Bfloat16'. Did you mean bfloat16?"),
        ({7: 1}, "got 7"),
        ({"chat_template": "chatlm"}, "chat_template in .*expected one of auto, .* got 'chatlm'. Did you mean chatml?"),
        ({"merge_method": "ties", "parameters": {}}, "expected sce or varm, got ties"),
        ({"base_model": None}, "base_model in .*expected the pivot, got none"),
        (
            {"base_model": "/nowhere/pivot"},
            "model /nowhere/pivot in .*: expected a model directory.*got no such directory",
        ),
        ({"models": None}, "Exactly one of 'models', 'slices', or 'modules' must be present"),
        ({"models": [{"path": "x"}]}, "models.0.model: Field required"),
    ],
)
def test_what_mergekit_passes_over_is_an_error(config, tmp_path, capsys, change, message):
    document = yaml.safe_load(config.read_text()) | change
    config.write_text(yaml.safe_dump({k: v for k, v in document.items() if v is not None}))
    assert re.search(message, fails(capsys, ["inspect", config, "--output", tmp_path / "r"]))
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("of", "parameters", "message"),
    [
        ("target", {"select_topk": 0.2}, "expected select_topk under the top-level parameters, got it for one model"),
        ("pivot", {"weight": 1.0}, "expected no weight for the pivot"),
    ],
)
def test_parameters_of_a_model_that_have_no_effect_are_errors(
    config, models, tmp_path, capsys, of, parameters, message
):
    pivot, targets = models
    document = yaml.safe_load(config.read_text())
    model = str(pivot if of == "pivot" else targets[0])
    document["models"][0] = {"model": model, "parameters": parameters}
    config.write_text(yaml.safe_dump(document))
    assert message in fails(capsys, ["yaml", config, tmp_path / "out"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("just words", "expected a mapping with merge_method and models, got str"),
        ("- 1\n- 2", "expected a mapping with merge_method and models, got list"),
        ("a: [1\nb: 2", "expected YAML, got while parsing a flow sequence"),
        (
            "merge_method: sce\ndtype: float32\nmerge_method: ties",
            "expected each key once, got the key 'merge_method' twice",
        ),
        (
            "merge_method: sce\nparameters:\n  select_topk: 1\n  select_topk: 0.1",
            "'select_topk' twice in the mapping at line 3",
        ),
        ("# pr\xe9cis\nmerge_method: sce".encode("latin-1"), "expected UTF-8, got the byte 0xe9 at 4"),
        (None, "No such file"),
    ],
)
def test_what_is_no_configuration_is_named(tmp_path, capsys, text, message):
    if text is not None:
        (tmp_path / "x.yml").write_bytes(text if isinstance(text, bytes) else text.encode())
    sentence = fails(capsys, ["inspect", tmp_path / "x.yml", "--output", tmp_path / "r"])
    assert message in sentence
    assert str(tmp_path / "x.yml") in sentence


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("fuse*.yml")), ids=lambda path: path.stem)
def test_shipped_recipes_merge_stand_ins(path, models, tmp_path):
    document = yaml.safe_load(path.read_text())
    names = [entry["model"] for entry in document["models"]]
    pivot, targets = models
    places = {}
    for index, name in enumerate(names):
        places[name] = str(shutil.copytree(targets[index % 3], tmp_path / f"target{index}"))
    for entry in document["models"]:
        entry["model"] = places[entry["model"]]
    if "base_model" in document:
        document["base_model"] = str(pivot)
    config_path = tmp_path / "recipe.yml"
    config_path.write_text(yaml.safe_dump(document))
    config = recipe.load(config_path)
    options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False, random_seed=0)
    run_merge(config, str(tmp_path / "out"), options)
    merged, base, moved = read(tmp_path / "out"), read(pivot), [read(places[name]) for name in names]
    assert set(merged) == set(base)
    assert document["dtype"] == "float32"  # our targets are; a narrower one rounds them before they are compared
    dtype = getattr(torch, document["out_dtype"])
    assert {t.dtype for t in merged.values()} == {dtype}
    inputs = [m[NAME] for m in moved]
    if document["merge_method"] == "sce":
        topk = document["parameters"]["select_topk"]
        assert torch.equal(merged[NAME], kernel.sce_merge(base[NAME], inputs, select_topk=topk).to(dtype))
    elif document["merge_method"] == "varm":
        assert torch.equal(merged[NAME], kernel.varm_merge(base[NAME], inputs).to(dtype))
    elif document["merge_method"] == "linear":
        assert torch.allclose(merged[NAME].float(), torch.stack(inputs).mean(0), atol=1e-4)


def test_the_released_recipes_are_there():
    documents = {path.stem: yaml.safe_load(path.read_text()) for path in CONFIGS.glob("fuse*.yml")}
    methods = {"fusechat-sce": "sce", "fusechat-linear": "linear", "fusechat-ta": "task_arithmetic"}
    methods |= {"fusechat-ties": "ties", "fusechat-dare": "dare_linear", "fusechat-varm": "varm", "fuseo1-sce": "sce"}
    assert {name: document["merge_method"] for name, document in documents.items()} == methods
    for name in ("fusechat-sce", "fusechat-linear", "fusechat-ta", "fusechat-ties", "fusechat-dare"):
        models = [entry["model"] for entry in documents[name]["models"]]
        sources = ("Starling", "SOLAR", "InternLM", "Mixtral", "Qwen")
        assert models == [f"FuseAI/OpenChat-3.5-7B-{source}-v2.0" for source in sources]


# --- what the checkpoints say ---------------------------------------------------------------------------------------


def as_recipe(config, **changes):
    document = yaml.safe_load(config.read_text()) | changes
    config.write_text(yaml.safe_dump({key: value for key, value in document.items() if value is not None}))
    return config


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"dtype": "bfloat16"},
            "the merged weights are rounded to it. Write `dtype: float32`, with `out_dtype: bfloat16`",
        ),
        ({"dtype": "bfloat16", "merge_method": "linear", "parameters": {"weight": 1}}, "rounds the inputs to it first"),
        ({"dtype": "float16", "merge_method": "linear", "parameters": {"weight": 1}}, "dtype float16 in"),
        ({"dtype": "bfloat16", "out_dtype": "bfloat16"}, None),
        ({"dtype": "float32", "out_dtype": "bfloat16"}, None),
        ({"dtype": None, "out_dtype": "bfloat16"}, None),
    ],
)
def test_a_dtype_narrower_than_the_weights_is_a_warning(config, caplog, changes, said):
    recipe.load(as_recipe(config, **changes))
    assert (said in caplog.text) if said else not caplog.text


@pytest.mark.parametrize("command", ["yaml", "inspect"])
def test_what_cannot_be_merged_is_refused_before_anything_is_written(config, models, tmp_path, capsys, command):
    def refused(directory):
        document = yaml.safe_load(config.read_text())
        document["models"][1]["model"] = str(directory)
        config.write_text(yaml.safe_dump(document))
        before = sorted(tmp_path.rglob("*"))
        out = [tmp_path / "out"] if command == "yaml" else ["--output", tmp_path / "out"]
        sentence = fails(capsys, [command, config, *out])
        assert sorted(tmp_path.rglob("*")) == before
        return sentence

    weights = read(models[1][1])
    narrow = weights | {NAME: weights[NAME].to(torch.float8_e4m3fn)}
    assert f"got F8_E4M3 in {NAME}" in refused(write_llama(tmp_path / "narrow", narrow))
    shallow = {name: tensor for name, tensor in weights.items() if ".layers.1." not in name}
    sentence = refused(write_llama(tmp_path / "shallow", shallow, layers=1))
    assert f"shallow in {config}: expected 2 layers as in {models[0]}, got 1" in sentence
    cut = shutil.copytree(models[1][1], tmp_path / "cut") / "model.safetensors"
    whole = cut.read_bytes()
    for kept in (len(whole) - 5, 300, 8, 3, 0):
        cut.write_bytes(whole[:kept])
        assert str(cut) in refused(cut.parent)
    cut.write_bytes(b"\xff" * 100)
    assert f"weights file {cut}: expected a safetensors file" in refused(cut.parent)
    (cut.parent / "config.json").write_text("{")
    assert f"{cut.parent / 'config.json'}: expected a JSON mapping" in refused(cut.parent)


# --- yaml -----------------------------------------------------------------------------------------------------------


def test_yaml_puts_the_whole_output_in_place(config, models, tmp_path, capsys):
    out = tmp_path / "merged"
    abandoned = tmp_path / ".merged.999999999-old"  # of a killed run
    abandoned.mkdir()
    other = tmp_path / f".merged.{os.getpid()}-running"
    other.mkdir()
    assert cli.main(["yaml", str(config), str(out), "--quiet", "--no-copy-tokenizer", "--out-shard-size", "2K"]) == 0
    merged = read(out)
    pivot, targets = models
    expected = kernel.sce_merge(read(pivot)[NAME], [read(t)[NAME] for t in targets], select_topk=0.5)
    assert torch.equal(merged[NAME], expected)
    assert (out / "config.json").exists()
    assert (out / "mergekit_config.yml").read_text() == config.read_text()
    assert len(list(out.glob("*.safetensors"))) > 1
    assert "# merged" in (out / "README.md").read_text()
    assert not abandoned.exists()
    assert other.exists()
    before = sorted(p.name for p in out.iterdir())
    assert "expected a new or empty directory" in fails(capsys, ["yaml", config, out])
    assert sorted(p.name for p in out.iterdir()) == before


def test_yaml_leaves_nothing_of_a_merge_that_fails(config, models, tmp_path, capsys):
    broken = read(models[1][2])
    broken["model.norm.weight"][0] = float("inf")
    write_llama(tmp_path / "damaged", broken)
    document = yaml.safe_load(config.read_text())
    document["models"][2]["model"] = str(tmp_path / "damaged")
    config.write_text(yaml.safe_dump(document))
    before = sorted(p.name for p in tmp_path.iterdir())
    sentence = fails(capsys, ["yaml", config, tmp_path / "out", "--quiet", "--out-shard-size", "1K"])
    assert f"tensor model.norm.weight of {tmp_path / 'damaged'}: expected finite numbers, got NaN or inf" in sentence
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert "no such option" in fails(capsys, ["yaml", config, tmp_path / "out", "--quite"]).lower()
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize("order", ["CONFIG --transformers-cache CACHE OUT", "--quiet CONFIG OUT", "CONFIG --cuda OUT"])
def test_yaml_refuses_flags_before_its_output(order, config, tmp_path, capsys):
    places = {"CONFIG": str(config), "CACHE": str(tmp_path / "cache"), "OUT": str(tmp_path / "out")}
    before = sorted(tmp_path.iterdir())
    sentence = fails(capsys, ["yaml", *(places.get(word, word) for word in order.split())])
    assert "expected CONFIG OUT before the flags" in sentence
    assert sorted(tmp_path.iterdir()) == before


def test_yaml_follows_an_output_that_is_a_symbolic_link(config, tmp_path):
    (tmp_path / "disk").mkdir()
    for name, real in (("empty", tmp_path / "disk" / "a"), ("dangling", tmp_path / "disk" / "b")):
        link = tmp_path / name
        link.symlink_to(real)
        if name == "empty":
            real.mkdir()
        assert cli.main(["yaml", str(config), str(link), "--quiet", "--no-copy-tokenizer"]) == 0
        assert link.is_symlink()
        assert NAME in read(real)
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["a", "b"]


@pytest.mark.parametrize("place", ["out", "out/reports", "link/reports"])
def test_yaml_refuses_a_report_inside_the_output(config, tmp_path, capsys, monkeypatch, place):
    (tmp_path / "link").symlink_to(tmp_path / "out")
    monkeypatch.setenv(reporting.SWITCH, str(tmp_path / place))
    before = sorted(tmp_path.iterdir())
    sentence = fails(capsys, ["yaml", config, tmp_path / "out"])
    assert f"FUSECHAT_MERGE_REPORT: expected a directory outside the output {tmp_path / 'out'}" in sentence
    assert sorted(tmp_path.iterdir()) == before


def test_yaml_offline_refuses_directories_that_the_model_card_would_look_up(
    config, models, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(recipe, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(models[0].parent)
    document = yaml.safe_load(config.read_text())
    for entry, name in zip(document["models"], ("./target0", "target1", "target2")):
        entry["model"] = name
    config.write_text(yaml.safe_dump(document))
    assert "Write ./target1, or pass --no-write-model-card" in fails(capsys, ["yaml", config, tmp_path / "out"])
    flags = ["--quiet", "--no-copy-tokenizer", "--no-write-model-card"]
    assert cli.main(["yaml", str(config), str(tmp_path / "out"), *flags]) == 0
    config.write_text(config.read_text().replace("model: target", "model: ./target"))
    assert cli.main(["yaml", str(config), str(tmp_path / "dotted"), *flags[:2]]) == 0
    assert torch.equal(read(tmp_path / "dotted")[NAME], read(tmp_path / "out")[NAME])


def test_yaml_refuses_a_mount_point(config, tmp_path, capsys, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: self == tmp_path / "out")
    assert "expected a directory, got a mount point" in fails(capsys, ["yaml", config, tmp_path / "out"])


def test_yaml_refuses_a_symbolic_link_in_a_loop(config, tmp_path, capsys):
    (tmp_path / "out").symlink_to(tmp_path / "back")
    (tmp_path / "back").symlink_to(tmp_path / "out")
    before = sorted(tmp_path.iterdir())
    sentence = fails(capsys, ["yaml", config, tmp_path / "out", "--quiet"])
    assert f"output {tmp_path / 'out'}: expected a directory, got a symbolic link in a loop" in sentence
    assert sorted(tmp_path.iterdir()) == before


FULL = {
    "weights": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "other files": OSError(errno.ENOSPC, "No space left on device"),
    "tokenizer": OSError(errno.ENOSPC, "No space left on device", "pivot/tokenizer.json", None, "out/tokenizer.json"),
}


@pytest.mark.parametrize("part", FULL)
def test_a_full_disk_leaves_no_output_and_the_same_command_goes_on(part, models, tmp_path, capsys, monkeypatch):
    from mergekit.scripts import run_yaml

    pivot = shutil.copytree(models[0], tmp_path / "pivot")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (pivot / name).write_text("{}")
    file = tmp_path / "sce.yml"
    file.write_text(yaml.safe_dump(make_recipe(pivot, models[1])))
    command = ["yaml", file, tmp_path / "out", "--quiet"]

    def full(*arguments, **options):
        raise FULL[part]

    before = sorted(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("mergekit.merge.shutil.copy" if part == "tokenizer" else "safetensors.torch.save_file", full)
        sentence = fails(capsys, command, code=1)
        with pytest.raises(type(FULL[part]), match="No space left"):  # mergekit's own calls that merge successful
            run_yaml.main.main([str(file), str(tmp_path / "plain"), "--quiet"], standalone_mode=False)
    shutil.rmtree(tmp_path / "plain")
    assert sentence.startswith(f"fusechat-merge: output {tmp_path / 'out'}: expected to write all of it, got No space ")
    assert sentence.endswith("Free some room, then run the same command again.")
    assert sorted(tmp_path.iterdir()) == before
    assert cli.main([str(word) for word in command]) == 0
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_an_adapter_without_a_directory_to_merge_it_in_is_refused(config, models, tmp_path, capsys):
    out, document = tmp_path / "merged", yaml.safe_load(config.read_text())
    document["models"][0]["model"] += "+" + str(tmp_path / "adapter")
    out.mkdir()
    for path in (config, out / "mergekit_config.yml"):
        path.write_text(yaml.safe_dump(document))
    before = sorted(tmp_path.rglob("*"))
    for arguments, flag in (
        (["yaml", config, tmp_path / "out"], "--lora-merge-cache"),
        (["inspect", config, "--output", tmp_path / "report"], "--lora_merge_cache"),
        (["card", out], "--lora_merge_cache"),
    ):
        sentence = fails(capsys, arguments)
        assert re.search(r"adapter of .*target0.* in .*: expected a directory to merge it in, got none", sentence)
        assert flag in sentence
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["yaml", "inspect"])
def test_an_interrupted_command_ends_with_130_and_leaves_nothing(config, tmp_path, capsys, monkeypatch, command):
    merged, before = [], sorted(tmp_path.iterdir())

    def interrupted(*arguments, **options):
        if len(merged) == 3:
            raise KeyboardInterrupt
        merged.append(kernel.sce(*arguments, **options))
        return merged[-1]

    monkeypatch.setattr(fusechat_merge.sce, "_compute", lambda *a, int8_mask, normalize, **kw: interrupted(*a, **kw))
    out = [str(tmp_path / "below" / "out")]
    assert cli.main([command, str(config), *(["--output"] if command == "inspect" else []), *out, "--quiet"]) == 130
    assert len(merged) == 3
    assert capsys.readouterr().err.strip().endswith("fusechat-merge: interrupted")
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != "below"] == before
    assert not any(tmp_path.glob("below/*"))


# --- reports of running merges --------------------------------------------------------------------------------------


def test_a_merge_reports_where_the_environment_says(config, tmp_path, monkeypatch):
    monkeypatch.setenv(reporting.SWITCH, str(tmp_path / "reports"))
    document = MergeConfiguration.model_validate(yaml.safe_load(config.read_text()))
    options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
    run_merge(document, str(tmp_path / "a"), options)
    first = tmp_path / "reports" / "001-sce-pivot"
    assert (first / "coefficients.csv").exists()
    assert (first / "summary.json").exists()  # the output is whole
    run_merge(document, str(tmp_path / "b"), options)
    second = tmp_path / "reports" / "002-sce-pivot"
    assert json.loads((second / "summary.json").read_text())["tensors"] == len(read(tmp_path / "a"))
    assert (second / "coefficients.csv").read_text() == (first / "coefficients.csv").read_text()
    assert (second / "coefficients.png").exists()
    monkeypatch.setenv(reporting.SWITCH, "")
    run_merge(document, str(tmp_path / "c"), options)
    assert len(list((tmp_path / "reports").iterdir())) == 2
    name = "model.embed_tokens.weight"
    assert torch.equal(read(tmp_path / "c")[name], read(tmp_path / "a")[name])


@pytest.mark.parametrize("failure", ["plan", "first tensor"])
def test_a_merge_that_fails_at_its_start_leaves_no_report(failure, models, tmp_path, monkeypatch):
    monkeypatch.setenv(reporting.SWITCH, str(tmp_path / "reports"))
    pivot, targets = models
    if failure == "plan":  # the structure is fine, a value for the second layer is not
        document, message = make_recipe(pivot, targets, select_topk=[0.5, 2]), r"expected a number in \[0, 1\], got 2"
    else:
        broken = {name: tensor / 0 for name, tensor in read(targets[0]).items()}
        document = make_recipe(pivot, [write_llama(tmp_path / "damaged", broken), *targets[1:]])
        message = "expected finite numbers"
    options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
    with pytest.raises(ValueError, match=message):
        run_merge(MergeConfiguration.model_validate(document), str(tmp_path / "out"), options)
    assert not (tmp_path / "reports").exists()


def damaged_late(models, directory):
    """A recipe whose third target holds infinity in the last tensor that is merged."""
    pivot, targets = models
    broken = read(targets[2])
    broken["model.norm.weight"][0] = float("inf")
    return make_recipe(pivot, [*targets[:2], write_llama(directory / "damaged", broken)])


def test_a_merge_that_fails_midway_leaves_no_report(models, tmp_path, monkeypatch):
    monkeypatch.setenv(reporting.SWITCH, str(tmp_path / "reports"))
    options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
    document = damaged_late(models, tmp_path)
    with pytest.raises(ValueError, match=r"model.norm.weight of .*damaged: expected finite"):
        run_merge(MergeConfiguration.model_validate(document), str(tmp_path / "out"), options)
    assert not (tmp_path / "reports").exists()
    document["models"] = document["models"][:2]
    run_merge(MergeConfiguration.model_validate(document), str(tmp_path / "mended"), options)
    assert (tmp_path / "reports" / "001-sce-pivot" / "summary.json").exists()


@pytest.mark.parametrize("failure", ["rows", "summary", "pictures"])
def test_a_report_that_fails_is_one_warning(failure, config, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(reporting.SWITCH, str(tmp_path / "reports"))

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    place, name = {"rows": (report.Report, "columns"), "summary": (Path, "replace"), "pictures": (plots, "draw")}[
        failure
    ]
    monkeypatch.setattr(place, name, full)
    document = MergeConfiguration.model_validate(yaml.safe_load(config.read_text()))
    options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
    run_merge(document, str(tmp_path / "out"), options)
    assert NAME in read(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()
    assert [record.message for record in caplog.records if "No space left" in record.message] == [
        record.message
        for record in caplog.records
        if "merge report" in record.message and record.levelname == "WARNING"
    ]
    assert caplog.text.count("No space left") == 1
    summaries = [path.name for path in tmp_path.rglob("summary.json*")]
    assert summaries == (["summary.json"] if failure == "pictures" else [])


@pytest.mark.parametrize("command", ["fusechat-merge yaml", "mergekit-yaml"])
def test_a_merge_that_fails_after_its_weights_leaves_no_report(command, config, tmp_path, capsys, monkeypatch):
    from mergekit.scripts import run_yaml
    from transformers import PretrainedConfig

    monkeypatch.setenv(reporting.SWITCH, str(tmp_path / "reports"))
    with monkeypatch.context() as patch:
        patch.setattr(PretrainedConfig, "save_pretrained", lambda *a, **kw: (tmp_path / "none").read_text())
        if command == "mergekit-yaml":
            with pytest.raises(FileNotFoundError):
                run_yaml.main.main([str(config), str(tmp_path / "plain"), "--quiet"], standalone_mode=False)
        else:
            fails(capsys, ["yaml", config, tmp_path / "out", "--quiet"])
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "reports").exists()
    assert cli.main(["yaml", str(config), str(tmp_path / "out"), "--quiet", "--no-copy-tokenizer"]) == 0
    assert (tmp_path / "reports" / "001-sce-pivot" / "summary.json").exists()


@pytest.mark.parametrize("root", ["file", "file/below", "/dev/full"])
def test_a_report_that_can_be_no_directory_is_refused(root, config, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(reporting.SWITCH, str(tmp_path / root))
    before = sorted(tmp_path.iterdir())
    sentence = fails(capsys, ["yaml", config, tmp_path / "out", "--quiet"])
    assert f"FUSECHAT_MERGE_REPORT: expected a directory, got {tmp_path / root}" in sentence
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("existed", [False, True])
def test_an_inspection_that_fails_midway_leaves_nothing(existed, models, config, tmp_path, capsys):
    config.write_text(yaml.safe_dump(damaged_late(models, tmp_path)))
    if existed:
        (tmp_path / "a" / "r").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    sentence = fails(capsys, ["inspect", config, "--output", tmp_path / "a" / "r", "--quiet"])
    assert "model.norm.weight of" in sentence
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("existed", [False, True])
def test_an_inspection_that_finds_no_room_leaves_nothing_and_goes_on(existed, config, tmp_path, capsys, monkeypatch):
    if existed:
        (tmp_path / "r").mkdir()
    before, draw = sorted(tmp_path.rglob("*")), plots.draw

    def half(rows, names, directory):
        (directory / "coefficients.png").write_bytes(b"half")
        raise FULL["other files"]

    command = ["inspect", config, "--output", tmp_path / "r", "--quiet"]
    monkeypatch.setattr(plots, "draw", half)
    assert f"report {tmp_path / 'r'}: expected to write all of it, got No space" in fails(capsys, command, code=1)
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.setattr(plots, "draw", draw)
    assert cli.main([str(word) for word in command]) == 0


def test_an_inspection_whose_plan_fails_leaves_nothing(config, tmp_path, capsys):
    document = yaml.safe_load(config.read_text()) | {"parameters": {"select_topk": [0.5, 2]}}
    config.write_text(yaml.safe_dump(document))
    assert "expected a number in [0, 1], got 2" in fails(capsys, ["inspect", config, "--output", tmp_path / "r"])
    assert not (tmp_path / "r").exists()


def test_slices_with_another_pivot_or_target_have_a_report_of_their_own(models, tmp_path, monkeypatch):
    monkeypatch.setenv(reporting.SWITCH, str(tmp_path / "reports"))
    pivot, targets = (str(models[0]), [str(target) for target in models[1]])
    merge = kernel.sce(torch.zeros(4), [torch.ones(4)] * 2)
    with reporting.reporter.one_output():
        for base, others in (
            (pivot, targets[:2]),
            (pivot, targets[:1]),
            (targets[0], targets[1:]),
            (pivot, targets[:2]),
        ):
            tensors = [torch.zeros(4), *(torch.ones(4) for _ in others)]
            reporting.reporter.add("sce", base, others, f"layers.{len(others)}", tensors, merge)
        with reporting.reporter.one_output():  # `run_merge` inside `fusechat-merge yaml`
            pass
        assert not (tmp_path / "reports").exists()
    summaries = [json.loads(path.read_text()) for path in sorted((tmp_path / "reports").glob("*/summary.json"))]
    assert [(summary["pivot"], summary["tensors"]) for summary in summaries] == [(pivot, 3), (targets[0], 1)]


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (["a/chat", "other", "b/chat/", "chat"], ["chat#1", "other", "chat#2", "chat#3"]),
        (["org/chat", "./chat-2"], ["chat", "chat-2"]),
    ],
)
def test_targets_bear_the_names_of_the_other_reports(targets, names):
    assert report.Report("sce", "pivot", targets).names == names == card.distinct_names(targets)


def test_a_merge_past_run_merge_warns_that_it_gets_no_report(tmp_path, monkeypatch, caplog):
    merge = kernel.sce(torch.zeros(4), [torch.ones(4)] * 2)
    warn_once.cache_clear()
    for switch, warnings in ((None, 0), (str(tmp_path / "r"), 1)):
        if switch:
            monkeypatch.setenv(reporting.SWITCH, switch)
        for _ in range(2):
            reporting.reporter.add("sce", "p", ["a", "b"], "w", [torch.zeros(4)] * 3, merge)
        assert caplog.text.count("this merge gets no report") == warnings
    assert not (tmp_path / "r").exists()


def test_a_report_counts_the_signs_of_a_sample(monkeypatch):
    monkeypatch.setattr(report, "STRETCH", 1024)
    monkeypatch.setattr(report, "LONG_STRETCH", 4096)
    generator = torch.Generator().manual_seed(0)
    pivot = torch.zeros(64 * 1024)
    targets = [torch.randn(64 * 1024, generator=generator) for _ in range(3)]
    sampled, every = (report.count_signs(pivot, targets, None, step, pivot) for step in (16, 1))
    assert sampled[0].diagonal().tolist() == [4 * 1024] * 3
    assert every[0].diagonal().tolist() == [64 * 1024] * 3
    shares = [(erased / moved.diagonal()).tolist() for moved, _, erased, *_ in (sampled, every)]
    assert shares[0] == pytest.approx(shares[1], abs=0.03)
    signs = torch.stack(targets).sign()
    majority = torch.stack(targets).sum(0).sign()
    assert every[2].tolist() == (signs != majority).sum(1).tolist()
    assert report.count_signs(torch.zeros(0), [torch.zeros(0)] * 2, None, 1, torch.zeros(0))[0].tolist() == [
        [0, 0],
        [0, 0],
    ]
    keep = (torch.arange(64 * 1024) % 4 == 0).byte()
    moved, agreement, *_ = report.count_signs(pivot, targets, keep, 1, pivot)
    assert agreement[0, 1] == (signs[0] * signs[1] * keep).sum()
    assert moved[0, 1] == 16 * 1024


def test_a_merge_with_equal_coefficients_is_called_a_mean(tmp_path, caplog):
    pivot = torch.zeros(1000)
    parallel, longer = torch.ones(1000), torch.full((1000,), 2.0)
    for name, targets, told in (("even", [parallel, parallel.clone()], True), ("uneven", [parallel, longer], False)):
        caplog.clear()
        made = report.Report("sce", "pivot", ["a", "b"], every=1)
        made.add("w", pivot, targets, ["a", "b"], kernel.sce(pivot, targets))
        made.write(tmp_path / name)
        sentence = (
            "all coefficients are within 5 % of equal, so this merge is nearly the mean of its targets (cosines of "
        )
        assert (sentence + "task vectors: a | b 1.00)" in caplog.text) == told
        away = 0 if told else (9 / 5 - 3 / 2) / (3 / 2)  # coefficients 1/5 and 4/5 in place of 1/2
        assert made.summary()["distance_to_linear"] == pytest.approx(away)
        assert made.rows[0]["distance to linear"] == pytest.approx(away)


# --- card -----------------------------------------------------------------------------------------------------------


def test_card_adds_recipe_coefficients_and_metadata_once(config, tmp_path, capsys):
    out = tmp_path / "merged"
    target = Path(yaml.safe_load(config.read_text())["models"][0]["model"])
    other = Path(yaml.safe_load(config.read_text())["models"][1]["model"])
    (target / "README.md").write_text("---\ndatasets: FuseAI/FuseChat-Mixture\n---\n# A target\n")
    (other / "README.md").write_text("---\ndatasets: [a: b\n---\nno YAML\n")
    assert cli.main(["yaml", str(config), str(out), "--quiet", "--no-copy-tokenizer"]) == 0
    for _ in range(2):
        assert cli.main(["card", str(out)]) == 0
    text = (out / "README.md").read_text()
    assert text.count("## How the targets were merged") == 1
    assert "| target2 | 0." in text
    assert "select_topk: 0.5" in text
    assert (out / "coefficients.png").exists()
    assert "(coefficients.png)" in text
    front = yaml.safe_load(text.split("---\n")[1])
    assert {"mergekit", "merge", "fusechat", "sce"} <= set(front["tags"])
    assert front["library_name"] == "transformers"
    assert front["datasets"] == ["FuseAI/FuseChat-Mixture"]  # of the targets' cards
    assert "base_model" not in front  # local directories have no name on the Hub
    assert "expected a directory with mergekit_config.yml" in fails(capsys, ["card", tmp_path])
    assert "expected a directory with summary.json" in fails(capsys, ["card", out, "--report", tmp_path])


def test_a_card_that_finds_no_room_leaves_the_one_that_is_there(config, tmp_path, capsys, monkeypatch):
    merged = tmp_path / "merged"
    assert cli.main(["yaml", str(config), str(merged), "--quiet", "--no-copy-tokenizer"]) == 0
    assert cli.main(["inspect", str(config), "--output", str(tmp_path / "r"), "--quiet"]) == 0
    before = {file: file.read_bytes() for file in merged.iterdir()}

    def full(file, metadata):
        file.write_text("half")
        raise FULL["other files"]

    monkeypatch.setattr("fusechat_merge.card.metadata_save", full)
    sentence = fails(capsys, ["card", merged, "--report", tmp_path / "r"], code=1)
    assert f"model card {merged / 'README.md'}: expected to write all of it" in sentence
    assert {file: file.read_bytes() for file in merged.iterdir()} == before


def test_card_says_which_parameters_had_no_effect(config, tmp_path):
    document = yaml.safe_load(config.read_text())
    document["parameters"] |= {"normalize": True, "int8_mask": False}
    config.write_text(yaml.safe_dump(document))
    assert cli.main(["yaml", str(config), str(tmp_path / "merged"), "--quiet", "--no-copy-tokenizer"]) == 0
    assert cli.main(["card", str(tmp_path / "merged")]) == 0
    text = (tmp_path / "merged" / "README.md").read_text()
    assert "`normalize` in the recipe had no effect." in text


def test_card_names_models_of_the_hub(config, tmp_path):
    out, given = tmp_path / "merged", tmp_path / "report"
    assert cli.main(["inspect", str(config), "--output", str(given), "--quiet"]) == 0
    summary = json.loads((given / "summary.json").read_text())
    summary["pivot"] = "openchat/openchat_3.5"
    summary["targets"] = {name: f"FuseAI/{name}" for name in summary["targets"]}
    (given / "summary.json").write_text(json.dumps(summary))
    out.mkdir()
    shutil.copy(config, out / "mergekit_config.yml")
    (out / "README.md").write_text(
        "---\nlicense: apache-2.0\nbase_model: openchat/openchat_3.5\n---\n# Mine\n\nWords.\n"
    )
    assert cli.main(["card", str(out), "--report", str(given)]) == 0
    text = (out / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["base_model"] == ["openchat/openchat_3.5", *(f"FuseAI/target{j}" for j in range(3))]
    assert front["base_model_relation"] == "merge"
    assert front["license"] == "apache-2.0"
    assert "Words." in text


def test_doctor_says_the_same_after_importing_mergekit(capsys, monkeypatch):
    monkeypatch.setattr(_autoload, "installed", lambda: True)
    monkeypatch.setattr(_autoload, "declared", lambda: _autoload.OWN)
    said = []
    for certain in (cli._served_for_certain, lambda: False):
        monkeypatch.setattr(cli, "_served_for_certain", certain)
        assert cli.main(["doctor"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert "merge_method varm: served by fusechat_merge.method" in said[0]


@pytest.mark.parametrize("doubt", ["none", "hook", "declared", "version", "fork"])
def test_doctor_imports_mergekit_where_in_doubt(doubt, monkeypatch):
    class Mergekit:
        version = "0.1.6" if doubt == "version" else "0.1.5"

        def read_text(self, name):
            return "{}" if doubt == "fork" else None

    monkeypatch.setattr("importlib.metadata.distribution", lambda name: Mergekit())
    monkeypatch.setattr(_autoload, "installed", lambda: doubt != "hook")
    other = {"sce": "other:sce"} if doubt == "declared" else {}
    monkeypatch.setattr(_autoload, "declared", lambda: _autoload.OWN | other)
    assert cli._served_for_certain() == (doubt == "none")


@pytest.mark.parametrize("command", [[], ["inspect"], ["yaml"], ["card"], ["doctor"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(" ".join(["usage: fusechat-merge", *command]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["merge"], "invalid choice: 'merge'"),
        (["inspect", "x.yml"], "required: --output"),
        (["doctor", "--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
