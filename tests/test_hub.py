"""What goes to the Hub: nothing unless asked, then the finished target as it lies there; cards with their links."""

import json
import shutil

import datasets
import huggingface_hub
import pytest
from transformers.utils.hub import hf_api

from fusechat_fuse import load_representation
from fusechat_fuse.cli import main
from fusechat_fuse.errors import InputError
from fusechat_fuse.store.card import dataset_card, is_hub_name
from fusechat_fuse.store.rows import decode_row
from fusechat_fuse.training.run import train
from tests.helpers.hub_server import HubServer
from tests.helpers.tiny_runs import aligned_directory, config, pivot_directory


@pytest.fixture
def trained(tmp_path, monkeypatch, capsys):
    """Runs `fusechat-fuse train` with the Hub at an endpoint: its exit code and what it wrote on standard error."""
    pivot_directory(tmp_path / "pivot")
    aligned_directory(tmp_path / "aligned")
    command = ["train", "--model_name_or_path", str(tmp_path / "pivot"), "--data_path", str(tmp_path / "aligned")]
    command += ["--output_dir", str(tmp_path / "target"), "--max_steps", "2", "--use_cpu"]
    command += ["--save_strategy", "steps", "--save_steps", "1"]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_x")

    def run(endpoint: str, *more: str) -> tuple[int, str]:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(hf_api(), "endpoint", endpoint)  # shared by transformers' own calls
        return main([*command, *more]), capsys.readouterr().err

    return run


@pytest.mark.slow
def test_a_target_is_pushed_whole_where_asked_and_only_then(trained, tmp_path):
    with HubServer() as hub:
        code, told = trained(hub.endpoint)
        assert code == 0, told
        assert not hub.files
        assert not hub.repos
        push = ("--push_to_hub", "--hub_model_id", "user/fused", "--hub_private_repo", "true")
        code, told = trained(hub.endpoint, *push)
        assert code == 0, told  # finished before: it is only pushed
        assert hub.repos == [{"name": "fused", "organization": "user", "visibility": "private"}]
        there = {
            str(file.relative_to(tmp_path / "target")): file.read_bytes()
            for file in (tmp_path / "target").rglob("*")
            if file.is_file() and "checkpoint-" not in str(file)
        }
        assert hub.files == there
        assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(there)
        assert not any(name.endswith((".bin", ".pt", ".pth")) for name in there)


@pytest.mark.slow
def test_a_training_that_is_to_be_pushed_is_pushed_at_its_end(trained, tmp_path):
    with HubServer() as hub:
        code, told = trained(hub.endpoint, "--push_to_hub", "--hub_model_id", "user/fused")
        assert code == 0, told
    assert hub.commits == 1  # not at its checkpoints
    finished = json.loads(hub.files["fusion_run.json"])
    assert finished["finished"]
    assert hub.files["model.safetensors"] == (tmp_path / "target" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_push_that_fails_leaves_a_finished_target_and_the_command(trained, tmp_path):
    with HubServer(refuses=True) as hub:
        code, told = trained(hub.endpoint, "--push_to_hub", "--hub_model_id", "user/fused")
    assert code == 1
    last = told.strip().splitlines()[-1]
    assert "is finished, and could not be pushed to user/fused: " in last
    assert f"hf upload user/fused {tmp_path / 'target'} . --exclude 'checkpoint-*'" in last
    assert (tmp_path / "target" / "config.json").exists()


def test_pushing_half_trained_weights_is_refused(tmp_path):
    changed = config(tmp_path / "target", push_to_hub=True, hub_strategy="every_save")
    with pytest.raises(InputError, match="value for hub_strategy: expected end, got every_save"):
        train(tmp_path / "pivot", tmp_path / "aligned", changed)


@pytest.mark.parametrize("kind", ["aligned", "combined"])
def test_the_card_of_a_store_lets_the_hub_read_it(kind, tmp_path):
    names = ["FuseAI/FuseChat-Mixture", "mine.json"]
    store = aligned_directory(
        tmp_path / "store", kind=kind, datasets=names, model={"name": "/x/pivot", "vocab_size": 640}
    )
    card = huggingface_hub.DatasetCard.load(store / "README.md")
    assert card.data.tags == ["fusechat", kind]
    assert card.data.source_datasets == ["FuseAI/FuseChat-Mixture"]
    assert "FuseAI/FuseChat-Mixture, mine.json" in card.text
    assert "/x/" not in card.text
    assert "of strong-source at" in card.text or kind == "combined"
    there = load_representation(store)
    on_the_hub = shutil.copytree(
        store, tmp_path / "hub", ignore=shutil.ignore_patterns("state.json")
    )  # else refused here
    loaded = datasets.load_dataset(str(on_the_hub), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == len(there)
    assert decode_row(loaded[3])["topk_ids"].tolist() == there[3]["topk_ids"].tolist()


@pytest.mark.parametrize(
    ("name", "hub"),
    [
        *[("org/data", True), ("org/data:main", True), ("data/*.json", False), ("./x/y", False), ("x.json", False)],
        *[("/a/b", False), ("a/b/c", False), ("../a", False), ("~/a", False)],
    ],
)
def test_names_of_the_hub(name, hub):
    assert is_hub_name(name) == hub


def test_the_card_of_a_representation_names_model_data_and_columns():
    manifest = {
        **{"kind": "representation", "encoding": "plain", "datasets": [], "options": {"top_k": 10, "dtype": "float32"}},
        **{"model": {"name": "org/model"}, "template": {"name": "native"}, "counts": {"conversations": 3}},
    }
    text = dataset_card(json.loads(json.dumps(manifest)), ["id", "ce"])
    for words in (
        "# Top-10 next-token distributions of org/model",
        "| conversations | 3 |",
        "rows given in Python",
        "id, ce.",
    ):
        assert words in text
