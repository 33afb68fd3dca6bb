"""`answer --server`: the answers that the model itself would give, whatever happens to the servers."""

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM, GenerationConfig

from fusechat_fuse.cli import main
from fusechat_fuse.errors import InputError
from fusechat_fuse.evaluation import answers as module
from fusechat_fuse.evaluation.answers import answer
from fusechat_fuse.models import servers
from fusechat_fuse.models.files import load_fast_tokenizer
from fusechat_fuse.pipeline.recipe import read_recipe
from fusechat_fuse.pipeline.steps import steps_of
from tests.helpers.inference_server import InferenceServer
from tests.helpers.recipes import written
from tests.helpers.tiny_runs import pivot_directory

TURNS = [["say one", "and again"], ["say two words"], ["what"], ["list them all"], ["the"], ["why not", "so"]]
KINDS = ("vllm", "sglang")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = pivot_directory(tmp_path_factory.mktemp("served") / "pivot")
    # some answers end, some are cut
    settings = GenerationConfig(eos_token_id=list(range(0, 640, 7)), stop_strings=["o"], repetition_penalty=2.0)
    settings.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "d.jsonl"
    rows = [
        {
            "id": f"c{n}",
            "messages": [
                {"role": role, "content": text} for turn in turns for role, text in (("user", turn), ("assistant", "x"))
            ],
        }
        for n, turns in enumerate(TURNS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def serving(model, monkeypatch):
    monkeypatch.setattr(servers, "_BACK_OFF", 0.01)
    loaded, tokenizer, started = AutoModelForCausalLM.from_pretrained(model), load_fast_tokenizer(model), []

    def start(kind="vllm", **more) -> InferenceServer:
        started.append(InferenceServer(loaded, tokenizer, kind, **more).__enter__())
        return started[-1]

    yield start
    for one in started:
        one.__exit__()


OPTIONS = {"benchmark": "data", "max_new_tokens": 12, "batch_size": 2}


def kept(output) -> dict[str, tuple]:
    """key -> (turns, finished, problems), as the run keeps them."""
    _, *entries = output.with_name(f".{output.name}.answers").read_text().splitlines()
    return {entry["key"]: (entry["turns"], entry["finished"], entry["problems"]) for entry in map(json.loads, entries)}


@pytest.fixture(scope="module")
def expected(model, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("own") / "a.jsonl"
    answer(model, data, output, dtype="float32", **OPTIONS)
    found = kept(output)
    ends = [end for _, finished, _ in found.values() for end in finished]
    assert True in ends
    assert False in ends
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_answers_as_the_model_does(kind, model, data, expected, serving, tmp_path, capsys):
    served, output = serving(kind), tmp_path / "a.jsonl"
    command = ["answer", "--benchmark", "data", "--model", str(model), "--questions", str(data), "--server", served.url]
    command += ["--output", str(output), "--max_new_tokens", "12", "--batch_size", "2", "--server_kind", kind, "--json"]
    assert main(command) == 0
    assert kept(output) == expected
    kept_from_data = {json.loads(line)["id"] for line in output.read_text().splitlines() if '"data"}' in line}
    assert kept_from_data <= {
        key for key, (_, finished, problems) in expected.items() if not all(finished) or any(problems)
    }
    assert "refused_prompts" not in json.loads(capsys.readouterr().out)
    run = json.loads(output.with_name(".a.jsonl.answers").read_text().splitlines()[0])["run"]
    assert (run["name"], run["server"]) == ("served", {"vllm": "vllm 0.32.0", "sglang": "sglang 0.5"}[kind])
    assert "fingerprint" not in run
    before = served.asked
    assert main(command) == 0  # all is there
    assert served.asked == before
    with pytest.raises(InputError, match="expected this run's, got another's"):
        answer(model, data, output, dtype="float32", **OPTIONS)


def test_a_killed_run_goes_on_and_a_server_that_went_away_comes_back(
    model, data, expected, serving, tmp_path, monkeypatch, caplog
):
    served, output, real, calls = serving(), tmp_path / "a.jsonl", module._Kept.add, []

    def dies(self, entries):
        if calls:
            raise KeyboardInterrupt
        calls.append(entries)
        real(self, entries)

    monkeypatch.setattr(module._Kept, "add", dies)
    with pytest.raises(KeyboardInterrupt):
        answer(model, data, output, server=served.url, **OPTIONS)
    monkeypatch.setattr(module._Kept, "add", real)
    generated = served.change

    def away(ids, content):
        served.fails, served.change = 3, generated  # the requests after the probe
        return content

    served.change = away
    assert answer(model, data, output, server=served.url, **OPTIONS)["answered_before"] == 2
    assert served.fails == 0
    assert f"server {served.url}: status 503" in caplog.text
    assert kept(output) == expected


def test_samples_have_seeds_of_their_own_the_same_in_every_run(model, data, serving, tmp_path):
    served, seeds = serving(), []
    for name in ("a", "b"):
        served.generations.clear()
        options = {**OPTIONS, "temperature": 0.8, "samples": 2}
        answer(model, data, tmp_path / f"{name}.jsonl", server=served.url, **options)
        probe, *asked = served.generations
        assert probe["temperature"] == 0.0
        given = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # else the model's settings count
        assert {tuple(body[name] for name in given) for body in asked} == {(0.8, 1.0, -1, 0.0, 1.0)}
        seeds.append({body["seed"] for body in asked})
    assert seeds[0] == seeds[1]
    assert len(seeds[0]) == 2 * sum(map(len, TURNS))


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_prompt_is_empty_and_counted(kind, model, data, expected, serving, tmp_path, caplog):
    served = serving(kind)
    served.refuses = lambda ids: 400 if "why not" in served.tokenizer.decode(ids) else 0
    counts = answer(model, data, tmp_path / "a.jsonl", server=served.url, server_kind=kind, **OPTIONS)
    assert counts["refused_prompts"] == 2  # so is the turn after it
    assert "2 prompts were refused by the server" in caplog.text
    assert kept(tmp_path / "a.jsonl") == {**expected, "c5": (["", ""], [False, False], [None, None])}


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_the_server_broke_off_is_asked_for_again(kind, model, data, expected, serving, tmp_path, caplog):
    served, broken = serving(kind), []

    def change(ids, content):
        if len(served.generations) in (3, 5) or "why not" in served.tokenizer.decode(ids):
            broken.append(ids)
            if kind == "vllm":
                content["choices"][0].update(text="bro", token_ids=[5], finish_reason="abort")
            else:
                content.update(text="bro", output_ids=[5], meta_info={"finish_reason": {"type": "abort"}})
        return content

    served.change = change
    counts = answer(model, data, tmp_path / "a.jsonl", server=served.url, server_kind=kind, **OPTIONS)
    assert len(broken) > 2
    assert counts["refused_prompts"] == 2  # always broken off, and the turn after it
    assert "an answer that the server broke off (finish_reason abort)" in caplog.text
    assert kept(tmp_path / "a.jsonl") == {**expected, "c5": (["", ""], [False, False], [None, None])}


@pytest.mark.parametrize("kind", KINDS)
def test_a_models_generation_settings_count_neither_here_nor_at_a_server(
    kind, model, data, expected, serving, tmp_path
):
    """A server takes what it is not given from the settings of the model that it serves."""
    settings = {**json.loads((model / "generation_config.json").read_text()), "repetition_penalty": 1.8, "min_p": 0.2}
    bent = shutil.copytree(model, tmp_path / "bent")
    (bent / "generation_config.json").write_text(json.dumps(settings))
    answer(bent, data, tmp_path / "own.jsonl", dtype="float32", **OPTIONS)
    served = serving(kind)
    answer(bent, data, tmp_path / "served.jsonl", server=served.url, server_kind=kind, **OPTIONS)
    sent = [body.get("sampling_params", body) for body in served.generations]
    assert {(one["repetition_penalty"], one["min_p"]) for one in sent} == {(1.0, 0.0)}
    assert kept(tmp_path / "served.jsonl") == kept(tmp_path / "own.jsonl") == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_leaves_no_room_is_not_asked(kind, model, serving, tmp_path):
    (tmp_path / "q.jsonl").write_text(json.dumps({"id": "long", "prompt": "say " * 300}) + "\n")
    options = {**OPTIONS, "benchmark": "chat", "server": serving(kind).url, "server_kind": kind}
    assert answer(model, tmp_path / "q.jsonl", tmp_path / "a.jsonl", **options)["empty_answers"] == 1


def test_an_adapter_is_asked_for_by_name_with_the_key(model, data, expected, serving, tmp_path, monkeypatch):
    served = serving("sglang")
    served.adapters, served.key = ["tuned"], "secret-key"
    options = {**OPTIONS, "server": served.url, "server_kind": "sglang", "server_model": "tuned"}
    with pytest.raises(InputError, match=r"an API key that it takes, got none \(status 401\)"):
        answer(model, data, tmp_path / "a.jsonl", **options)
    monkeypatch.setenv("FUSECHAT_SERVER_API_KEY", "secret-key")
    answer(model, data, tmp_path / "a.jsonl", **options)
    assert kept(tmp_path / "a.jsonl") == expected
    assert served.names_asked == {"tuned"}


def other_ids(ids, content):
    content["choices"][0]["token_ids"] = [7, 8]
    return content


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"change": other_ids}, {}, r"expected the given model's tokenizer, got one where tokens \[7, 8\] are '"),
        ({"change": lambda ids, content: {"choices": [{}]}}, {}, "expected text and finish_reason, got an answer with"),
        ({"kind": "sglang"}, {}, r"expected one of kind vllm, got: status 404 at /v1/completions"),
        ({}, {"server_kind": "tgi"}, "server_kind for answer: expected one of vllm, sglang, got 'tgi'"),
        ({}, {"server": "localhost"}, "server for answer: expected URLs such as .* got 'localhost'"),
        ({}, {"server_requests": 0}, "server_requests for answer: expected an integer from 1, got 0"),
        ({}, {"load_in_4bit": True}, "load_in, device_map or gguf_file with a server: expected none"),
        ({}, {"device_map": "auto"}, "load_in, device_map or gguf_file with a server: expected none"),
        ({}, {"server": None, "server_model": "x"}, "server_model x for answer: expected server with it, got none"),
    ],
)
def test_what_cannot_be_relied_on_is_refused_in_a_sentence(change, options, message, model, data, serving, tmp_path):
    served = serving()
    for name, value in change.items():
        setattr(served, name, value)
    with pytest.raises(InputError, match=message):
        answer(model, data, tmp_path / "a.jsonl", **{**OPTIONS, "server": served.url, **options})
    assert not (tmp_path / "a.jsonl").exists()


def test_in_a_recipe_a_source_answers_on_the_server_that_represents_it(tmp_path):
    flags = {"server": "http://one:8000", "server_kind": "sglang", "server_model": "tuned", "server_requests": 64}
    sources = {"a": "one", "b": {"model": "two", "represent": flags}}
    steps = {s.key: s for s in steps_of(read_recipe(written(tmp_path, sources=sources, answers="sources")))}
    wanted = "--server http://one:8000 --server_kind sglang --server_model tuned --server_requests 64"
    assert wanted in steps["answer represent-b"].shell
    assert steps["answer b"].shell.endswith(wanted)
    assert "--server" not in steps["answer a"].shell
