"""`plan`: counts, sizes and warnings from configurations, tokenizers and data, with no weights there."""

import json
import re
import shutil
from collections import namedtuple

import pytest
import transformers

from fusechat_fuse import represent
from fusechat_fuse.capture import distributions
from fusechat_fuse.cli import main, options_of
from fusechat_fuse.errors import InputError
from fusechat_fuse.pipeline import costs
from fusechat_fuse.pipeline.plan import plan
from fusechat_fuse.pipeline.run import run
from fusechat_fuse.pipeline.steps import ranks_of
from fusechat_fuse.training import loss
from tests.helpers.gguf_files import gguf_file
from tests.helpers.recipes import CHATS, recipe_of
from tests.helpers.tiny_models import SIZES, tiny_model


@pytest.fixture
def planned(recipe_models, tmp_path):
    """Plans a recipe of tiny models with some keys changed."""

    def of(gpu=None, sample=10_000, sources=("one",), **changes):
        recipe = recipe_of(recipe_models, tmp_path, sources, **changes)
        return plan(recipe, options_of=options_of, gpu=gpu, sample=sample)

    return of


def without_weights(recipe_models, folder, config):
    """A directory with a configuration and the pivot's tokenizer."""
    shutil.copytree(recipe_models / "pivot", folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config.save_pretrained(folder)
    return str(folder)


def row(found: dict, step: str) -> dict:
    (one,) = (row for row in found["steps"] if row["step"] == step)
    return one


@pytest.mark.parametrize(
    ("command", "ranks"),
    [
        ("python -m fusechat_fuse train", (1, False)),
        ("accelerate launch --num_processes 8 -m fusechat_fuse", (8, False)),
        ("accelerate launch --num_processes=4 --use_fsdp -m fusechat_fuse", (4, True)),
        ("accelerate launch --config_file examples/accelerate/fsdp.yaml -m fusechat_fuse", (8, True)),
        ("accelerate launch --config_file examples/accelerate/ddp.yaml -m fusechat_fuse", (8, False)),
        ("accelerate launch --config_file examples/accelerate/zero3.yaml -m fusechat_fuse", (8, True)),
        ("torchrun --nnodes 2 --nproc-per-node=8 -m fusechat_fuse", (16, False)),
        ("accelerate launch --num_processes auto -m fusechat_fuse", (1, False)),
        ("srun -n 6 python -m fusechat_fuse", (6, False)),
        ("srun --ntasks 6 python -m fusechat_fuse", (6, False)),
    ],
)
def test_ranks_are_what_the_launcher_starts(command, ranks):
    assert ranks_of(command.split()) == ranks


@pytest.mark.parametrize("family", ["Llama", "Llama-tied", "Mixtral", "Gemma2", "Phi3", "Qwen3"])
def test_weights_are_counted_without_weights(family, tmp_path):
    model = tiny_model(family)
    model.config.save_pretrained(tmp_path)
    size = costs.size_of(tmp_path)
    assert size.parameters == model.num_parameters()
    assert size.head == SIZES["vocab_size"] * SIZES["hidden_size"]
    layers = sum(
        p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name and "lm_head" not in name
    )
    idle = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name) / 2  # two of four experts
    assert size.active == layers - idle


@pytest.mark.slow
def test_a_model_of_real_size_on_a_named_gpu(recipe_models, planned, tmp_path):
    config = transformers.LlamaConfig(architectures=["LlamaForCausalLM"], max_position_embeddings=4096)  # Llama-2-7B's
    pivot = without_weights(recipe_models, tmp_path / "7b", config)
    more = {"train": {"bf16": True}, "represent": {"template": "native"}}
    found = planned("h100", pivot=pivot, **more)
    represent, train = row(found, "represent pivot"), row(found, "train target-one")
    assert represent["memory_bytes"] == pytest.approx(6.74e9 * 4, rel=0.1)  # the configuration's float32
    assert train["memory_bytes"] > 16 * 6.74e9
    assert any(
        "train target-one needs about 1" in warning and "h100 has 80" in warning for warning in found["warnings"]
    )
    assert train["disk_bytes"] == pytest.approx(4 * 6.74e9 * 7, rel=0.01)  # the target, two checkpoints with moments
    tokens = train["tokens"] / (1 - train["padding_share"])
    assert train["flops"] == pytest.approx(6 * 3 * (6.476e9 * tokens + 0.131e9 * train["predicted_tokens"]), rel=0.01)
    assert train["seconds"] == pytest.approx(train["flops"] / (989e12 * 0.4))
    assert not train["measured"]
    sharded = f"accelerate launch --config_file {tmp_path / 'fsdp.yaml'}"
    (tmp_path / "fsdp.yaml").write_text("distributed_type: FSDP\nnum_processes: 8\n")
    found = planned("h100", pivot=pivot, **more, launcher={"train": sharded})
    eighth = row(found, "train target-one")
    assert eighth["ranks"] == eighth["gpus"] == 8
    assert eighth["memory_bytes"] < train["memory_bytes"] / 6
    assert eighth["seconds"] == pytest.approx(train["seconds"] / 8)
    assert not any("target-one needs" in warning for warning in found["warnings"])


def test_a_model_over_several_gpus_needs_its_part_of_each(planned):
    one = row(planned("h100"), "represent one")
    spread = row(
        planned("h100", represent={"template": "native", "device_map": "auto"}, devices=[0, 1]), "represent one"
    )
    assert spread["memory_bytes"] == pytest.approx(one["memory_bytes"] / 2, abs=1)
    assert (spread["ranks"], spread["gpus"]) == (1, 2)


def test_a_sample_is_near_and_says_so(planned, recipe_models, tmp_path):
    (tmp_path / "many.json").write_text(json.dumps([{**chat, "id": f"{n}"} for n, chat in enumerate(CHATS * 10)]))
    whole = planned(data=str(tmp_path / "many.json"))
    part = planned(data=str(tmp_path / "many.json"), sample=40)
    assert (whole["exact"], part["exact"]) == (True, False)
    for key in ("conversations", "predicted_tokens", "tokens", "disk_bytes"):
        assert row(part, "represent one")[key] == pytest.approx(row(whole, "represent one")[key], rel=0.05)


def test_what_will_fail_is_said_once_and_the_rest_is_planned(recipe_models, planned, tmp_path):
    plain = tmp_path / "no-template"
    shutil.copytree(recipe_models / "one", plain)
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((plain / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (plain / "tokenizer_config.json").write_text(json.dumps(settings))
    found = planned(sources=("two",), represent={"template": "native"}, pivot=str(plain))
    assert next(w for w in found["warnings"] if "will fail" in w).startswith("represent pivot will fail: chat template")
    assert sum("will fail" in warning for warning in found["warnings"]) == 1
    assert row(found, "represent two")["predicted_tokens"] > 0
    assert "tokens" not in row(found, "train target-two")
    found = planned(train={"lerning_rate": 1})
    assert any("train plain will fail: unknown flag '--lerning_rate'" in warning for warning in found["warnings"])


def test_missing_figures_are_counted_and_end_with_exit_code_1(recipe_models, tmp_path, capsys):
    recipe = recipe_of(recipe_models, tmp_path, ("one",), data=str(tmp_path / "none.json"))
    assert main(["plan", str(recipe)]) == 1
    printed = capsys.readouterr().out
    assert "WARNING  represent pivot will fail: " in printed
    found = plan(recipe, options_of=options_of)
    missing = [entry["step"] for entry in found["steps"] if "memory_bytes" not in entry]
    assert found["failing"] == missing
    assert f"total without {len(missing)} steps that have no figures: " in printed
    assert not found["exact"]
    assert "every conversation was encoded" not in printed


@pytest.mark.parametrize(
    ("stage", "option", "what"),
    [
        ("represent", "shard_size", "shard_size for represent"),
        ("represent", "top_k", "top_k for represent"),
        ("train", "per_device_train_batch_size", "value for per_device_train_batch_size"),
    ],
)
def test_a_value_that_a_stage_refuses_is_said(stage, option, what, planned):
    found = planned(**{stage: {option: 0}})
    assert any(f"will fail: {what}: expected an integer from 1, got 0" in w for w in found["warnings"])


def test_a_pivot_that_cannot_be_trained_is_said(recipe_models, planned, tmp_path):
    shutil.copytree(recipe_models / "pivot", tmp_path / "fp8")
    settings = json.loads((tmp_path / "fp8" / "config.json").read_text())
    (tmp_path / "fp8" / "config.json").write_text(
        json.dumps({**settings, "quantization_config": {"quant_method": "fp8"}})
    )
    found = planned(pivot=str(tmp_path / "fp8"))
    assert any("will fail: pivot for train: expected weights that are not quantised" in w for w in found["warnings"])


def test_adapters_leave_a_whole_target_and_small_checkpoints(planned):
    kept = {"save_strategy": "epoch", "max_steps": 3}
    whole = row(planned(train={**kept}), "train target-one")
    adapters = row(planned(train={**kept, "lora_r": 4}), "train target-one")
    alone = row(planned(train={**kept, "save_strategy": "no"}), "train target-one")
    assert adapters["disk_bytes"] == alone["disk_bytes"] < whole["disk_bytes"] / 2
    assert adapters["flops"] == pytest.approx(whole["flops"] * 2 / 3)


def test_quantised_weights_take_less_and_a_server_takes_all(recipe_models, planned, tmp_path):
    config = transformers.LlamaConfig(architectures=["LlamaForCausalLM"], max_position_embeddings=4096)
    pivot = without_weights(recipe_models, tmp_path / "7b", config)
    same = {"template": "native", "dtype": "bfloat16"}
    whole, four, served = (
        row(planned("h100", pivot=pivot, represent={**same, **more}), "represent pivot")
        for more in ({}, {"load_in_4bit": True}, {"server": "http://there:8000"})
    )
    assert whole["memory_bytes"] - four["memory_bytes"] == pytest.approx((2 - 0.56) * 6.6e9, rel=0.02)
    assert served["predicted_tokens"] == whole["predicted_tokens"]
    assert served["memory_bytes"] < 2**31  # of a process without the model
    assert (served["gpus"], "flops" in served) == (0, False)


def test_a_gguf_file_is_planned_without_its_weights(planned, tmp_path):
    gguf_file(tmp_path / "tiny.gguf")
    found = planned(pivot=str(tmp_path / "tiny.gguf"))
    assert not [warning for warning in found["warnings"] if "will fail" in warning]
    by_option = planned(pivot={"model": str(tmp_path), "represent": {"gguf_file": "tiny.gguf"}})
    assert row(by_option, "represent pivot")["tokens"] == row(found, "represent pivot")["tokens"]


def test_cut_and_refused_conversations_are_counted(planned, tmp_path):
    rows = [*CHATS, {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "<|im_end|>\u0000"}]}]
    rows += [{"conversations": [{"from": "human", "value": "say"}, {"from": "gpt", "value": "the end " * 40}]}]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    found = planned(data=str(tmp_path / "d.json"), represent={"template": "native", "max_length": 30})
    assert any("represent pivot: 1 of 2" in w and "cut at 30 tokens" in w for w in found["warnings"])
    assert any(w.startswith("represent pivot: 1 of 26 conversations are left out, ") for w in found["warnings"])
    assert row(found, "represent pivot")["conversations"] == 25


def test_a_disk_too_small_and_an_unknown_architecture_are_told(recipe_models, planned, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 1000))
    sizes = {"vocab_size": 600, "hidden_size": 16, "n_layer": 2, "n_head": 2}
    config = transformers.BloomConfig(**sizes, architectures=["BloomForCausalLM"])
    found = planned(pivot=without_weights(recipe_models, tmp_path / "bloom", config))
    assert any(warning.startswith("disk: 0.0 GB are still to be written below ") for warning in found["warnings"])
    assert any("mergekit does not know BloomForCausalLM" in warning for warning in found["warnings"])


def test_what_cannot_be_planned_is_a_sentence(recipe_models, planned, tmp_path):
    (tmp_path / "bad.yaml").write_text("a: [")
    (tmp_path / "list.yaml").write_text("- 1")
    for name, message in (
        ("bad.yaml", "a readable YAML file"),
        ("list.yaml", "name: value pairs"),
        ("none", "a readable"),
    ):
        with pytest.raises(InputError, match=f"--config_file .*{name}: expected {message}"):
            planned(launcher={"train": f"accelerate launch --config_file {tmp_path / name}"})
    found = planned(merge={"sce": {"out_dtype": "int3"}})
    assert any("merge sce will fail: dtype of weights: expected one of float32" in w for w in found["warnings"])
    found = planned(pivot=without_weights(recipe_models, tmp_path / "vit", transformers.ViTConfig()))
    assert any("expected one whose weights can be counted, got " in warning for warning in found["warnings"])


def test_what_runs_no_model_is_planned_in_main_memory(planned):
    found = planned("v100")
    for step in ("align one", "merge sce"):
        assert row(found, step)["memory_bytes"] == row(planned(), step)["memory_bytes"]
        assert row(found, step)["gpus"] == 0


def test_chunks_are_those_of_capture_and_loss():
    of_represent, of_train = costs._HEAD_CHUNK["represent"], costs._HEAD_CHUNK["train"]
    assert of_represent == {"cpu": distributions.CHUNK_BYTES["cpu"], "gpu": distributions.CHUNK_BYTES["cuda"]}
    assert of_train == {"cpu": 4 * loss._ROW_BUDGET["cpu"], "gpu": 4 * loss._ROW_BUDGET["other"]}  # float32 logits


def test_padding_is_what_shards_and_budgets_make_of_it(recipe_models, planned, tmp_path):
    rows = [
        {**chat, "id": str(n), "conversations": [chat["conversations"][0], answer(n)]} for n, chat in enumerate(CHATS)
    ]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    options = {"template": "native", "dtype": "float32", "shard_size": 7, "tokens_per_batch": 2000}
    found = planned(data=str(tmp_path / "d.json"), represent=options)
    own = represent(recipe_models / "pivot", str(tmp_path / "d.json"), tmp_path / "r", **options)
    share = own.manifest["counts"]["padding_share"]
    assert share > 0.02
    assert row(found, "represent pivot")["padding_share"] == pytest.approx(share, abs=1e-4)


def answer(n: int) -> dict[str, str]:
    return {"from": "gpt", "value": "the end " * (1 + n * 7 % 11)}


def test_activation_checkpointing_saves_activations(planned):
    whole, less = (
        row(planned("h100", train={"max_steps": 1, **more}), "train target-one")
        for more in ({}, {"activation_checkpointing": True})
    )
    assert less["memory_bytes"] < whole["memory_bytes"]
    assert less["flops"] == pytest.approx(whole["flops"] * 4 / 3)


def test_what_is_finished_needs_no_more_disk(planned, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    needed = planned()["totals"]["disk_bytes"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed - 1))
    assert any(warning.startswith("disk: ") for warning in planned()["warnings"])
    (tmp_path / "out").mkdir()
    entry = {"fingerprint": "", "inputs": {}, "output": "x"}
    (tmp_path / "out" / "stages.json").write_text(json.dumps({"represent pivot": entry}))
    assert not any(warning.startswith("disk: ") for warning in planned()["warnings"])


def test_several_answers_to_a_conversation_are_planned_for_in_the_stages_after(planned, tmp_path):
    more = {"answers": "sources", "sources": ("one", "two")}
    once = planned(**more)
    answer = {"samples": 3, "temperature": 0.7}
    several = planned(**more, answer=answer)
    assert row(several, "answer one")["conversations"] == 24  # questions
    for step in ("represent one", "align one", "train plain"):
        before, after = row(once, step), row(several, step)
        for figure in ("conversations", "predicted_tokens", "tokens"):
            assert after[figure] == 3 * before[figure], (step, figure)
    folder = tmp_path / "out" / "answers" / "assigned"
    folder.mkdir(parents=True)
    assigned = {"conversations": {"pivot": 14, "one": 6, "two": 4}}
    (folder / "assignment.json").write_text(json.dumps(assigned))
    assert row(planned(**more, answer=answer), "represent pivot")["conversations"] == 14 + 3 * 10


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"samples": 4}, "samples for answer: expected 1 but with benchmark data and a temperature above 0, got 4"),
        ({"samples": 0}, "samples for answer: expected an integer from 1, got 0"),
        ({"temperature": -1}, "temperature for answer: expected a number from 0, got -1.0"),
        ({"temperature": ".nan"}, "temperature for answer: expected a number from 0, got nan"),
        ({"batch_size": 0}, "batch_size for answer: expected an integer from 1, got 0"),
        ({"max_new_tokens": -5}, "max_new_tokens for answer: expected an integer from 1, got -5"),
        ({"dtype": "int8"}, "dtype for answer: expected auto, float32, bfloat16 or float16, got 'int8'"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_4bit or load_in_8bit for answer: expected one"),
        ({"server": "localhost"}, "server for answer: expected URLs such as"),
        ({"server": "http://one", "server_kind": "tgi"}, "server_kind for answer: expected one of vllm, sglang"),
        ({"server": "http://one", "server_requests": 0}, "server_requests for answer: expected an integer from 1"),
        ({"server": "http://one", "device_map": "auto"}, "load_in, device_map or gguf_file with a server: expected no"),
        ({"server_model": "x"}, "server_model x for answer: expected server with it, got none"),
        ({"max_new_token": 5}, "unknown flag '--max_new_token': did you mean '--max_new_tokens'"),
    ],
    ids=str,
)
def test_flags_of_answer_that_are_wrong_are_refused_before_anything_runs(
    planned, recipe_models, tmp_path, flags, message
):
    if flags.get("temperature") == ".nan":
        flags = {"temperature": float("nan")}
    found = planned(answers="sources", answer=flags)
    assert "answer one" in found["failing"]
    assert [warning for warning in found["warnings"] if message in warning]
    with pytest.raises(InputError, match=f"answer one of .*: {re.escape(message)}"):
        run(tmp_path / "recipe.yml", options_of=options_of, dry_run=True)


def test_several_processes_are_no_launcher_of_answer(planned):
    with pytest.raises(InputError, match=r"launcher for answer: expected one process, got 4 \(torchrun "):
        planned(answers="sources", launcher={"answer": "torchrun --nproc_per_node 4"})


def test_measured_times_are_taken_and_carried_over(planned, tmp_path):
    (tmp_path / "out").mkdir()
    seconds = {"represent pivot": 8.0, "align one": 3.0}
    record = {key: {"fingerprint": "", "inputs": {}, "seconds": number} for key, number in seconds.items()}
    (tmp_path / "out" / "stages.json").write_text(json.dumps(record))
    found = planned(sources=("one", "two"))
    pivot, two = row(found, "represent pivot"), row(found, "represent two")
    assert (pivot["seconds"], pivot["measured"], two["measured"]) == (8.0, True, False)
    assert two["seconds"] == pytest.approx(8.0 * two["flops"] / pivot["flops"])
    assert row(found, "align two")["seconds"] == pytest.approx(3.0)
    assert "seconds" not in row(found, "train target-one")


def test_the_command_prints_a_table_or_json(recipe_models, tmp_path, capsys):
    recipe = recipe_of(recipe_models, tmp_path, ("one",))
    assert main(["plan", str(recipe), "--gpu", "A100"]) == 0
    told = capsys.readouterr().out
    assert (
        told.splitlines()[0].split()
        == "step conversations predicted padding disk memory/rank FLOPs time GPU hours".split()
    )
    assert "every conversation was encoded" in told
    assert main(["plan", str(recipe), "--json"]) == 0
    assert row(json.loads(capsys.readouterr().out), "merge sce")["disk_bytes"] > 0
    assert main(["plan", str(recipe), "--gpu", "abacus"]) == 2
    assert "gpu for plan: expected one of v100, " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bad_samples(planned):
    with pytest.raises(InputError, match="sample for plan: expected an integer from 1, got 0"):
        planned(sample=0)
