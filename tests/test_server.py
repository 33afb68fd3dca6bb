"""`represent --server`: the representation that the model itself would give, whatever happens to the servers."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from fusechat_fuse import represent
from fusechat_fuse.capture.server import ServerRunner, _check_agreement
from fusechat_fuse.capture.server_protocols import PROTOCOLS
from fusechat_fuse.cli import main
from fusechat_fuse.errors import InputError
from fusechat_fuse.models import servers as module
from fusechat_fuse.models.files import load_fast_tokenizer
from fusechat_fuse.pipeline.recipe import read_recipe
from fusechat_fuse.pipeline.steps import steps_of
from tests.helpers.inference_server import LONGEST, InferenceServer
from tests.helpers.recipes import CHATS
from tests.helpers.tiny_runs import pivot_directory


@pytest.fixture(scope="module")
def pivot(tmp_path_factory):
    return pivot_directory(tmp_path_factory.mktemp("served") / "pivot")


@pytest.fixture(scope="module")
def expected(pivot, tmp_path_factory):
    return represent(pivot, CHATS, tmp_path_factory.mktemp("own") / "r", template="native", dtype="float32")


@pytest.fixture
def serving(pivot, monkeypatch):
    """Starts servers of the pivot."""
    monkeypatch.setattr(module, "_BACK_OFF", 0.01)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(pivot), load_fast_tokenizer(pivot)
    started = []

    def start(kind="vllm", **more) -> InferenceServer:
        started.append(InferenceServer(model, tokenizer, kind, **more).__enter__())
        return started[-1]

    yield start
    for one in started:
        one.__exit__()


def same(found, expected):
    for own, other in zip(found, expected, strict=True):
        assert own["input_ids"].tolist() == other["input_ids"].tolist()
        assert own["topk_ids"].tolist() == other["topk_ids"].tolist()
        assert own["ce"] == pytest.approx(other["ce"], abs=1e-3)
        assert own["topk_logprobs"] == pytest.approx(other["topk_logprobs"], abs=1e-2)


def runner_of(served, requests=1):
    servers = module.Servers("represent", served.url, kind=served.kind, model=None, requests=requests)
    return ServerRunner(servers, tokenizer=served.tokenizer, top_k=10, vocab_size=640)


def asked(runner):
    body = runner._body([1, 2, 3], 1)
    return runner.servers.ask(body, body)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_server_gives_what_the_model_gives(kind, pivot, expected, serving, tmp_path):
    served = serving(kind)
    found = represent(pivot, CHATS, tmp_path / "r", template="native", server=served.url, server_kind=kind)
    same(found, expected)
    assert found.manifest["model"] == {**found.manifest["model"], "name": "served", "vocab_size": 640}
    assert found.manifest["options"]["server"] == kind
    before = served.asked
    represent(pivot, CHATS, tmp_path / "r", template="native", server=served.url, server_kind=kind)
    assert served.asked == before + 2  # the probe alone: all shards are there
    with pytest.raises(InputError, match=r"got another run's \(model.fingerprint = "):  # another run's
        represent(pivot, CHATS, tmp_path / "r", template="native")


def test_servers_share_the_work_and_one_may_die(pivot, expected, serving, tmp_path, caplog):
    first, second = serving(), serving()
    urls = f"{first.url},{second.url}/"
    found = represent(pivot, CHATS, tmp_path / "r", template="native", server=urls, server_requests=2)
    same(found, expected)
    assert min(first.asked, second.asked) > 2
    caplog.set_level("WARNING")
    second.lives = second.asked + 4  # it dies after its probe and two conversations
    found = represent(pivot, CHATS, tmp_path / "s", template="native", server=urls, server_requests=2)
    same(found, expected)
    assert f"server {second.url}: " in caplog.text


def test_a_failed_answer_is_asked_for_again(pivot, expected, serving, tmp_path):
    served = serving()
    runner = runner_of(served, requests=4)
    served.fails, served.status = 3, 500
    answer = asked(runner)
    assert len(answer["choices"][0]["prompt_logprobs"]) == 3
    assert served.fails == 0


def test_when_no_server_answers_it_ends_with_what_to_do(pivot, serving, monkeypatch):
    served = serving()
    runner = runner_of(served)
    monkeypatch.setattr(module, "NO_ANSWER_TIMEOUT", 1.0)
    served.fails = 10**9
    with pytest.raises(RuntimeError, match=r"servers http.*: no answer for 1 s \(.*\)\. Start them and run the same"):
        asked(runner)


@pytest.mark.slow
def test_a_killed_client_goes_on_where_it_was(pivot, expected, serving, forked, tmp_path):
    served = serving()
    (tmp_path / "chats.json").write_text(json.dumps(CHATS))
    command = [sys.executable, "-m", "fusechat_fuse", "represent", "--model_name_or_path", str(pivot)]
    command += ["--server", served.url, "--data_path", str(tmp_path / "chats.json"), "--template", "native"]
    command += ["--output_dir", str(tmp_path / "r")]
    command += ["--shard_size", "4", "--server_requests", "1"]
    process = forked.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "r" / "shard-00001.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    forked.wait_until_idle()
    before = served.asked
    done = forked.run(command)
    assert done.returncode == 0, done.stderr[-2000:]
    assert served.asked - before <= 2 + len(CHATS) - 8
    from fusechat_fuse import load_representation

    same(load_representation(tmp_path / "r"), expected)


def test_an_answer_of_a_real_vllm_is_read():
    told = json.loads((Path(__file__).parent / "recorded" / "vllm-0.32.0.json").read_text())  # SmolLM2-135M-Instruct
    ids, found = told["ids"], PROTOCOLS["vllm"].answer(told["answer"], told["ids"], [1, 2, 8], told["top_k"])
    entries = told["answer"]["choices"][0]["prompt_logprobs"]
    assert found.actual == [entries[n][str(ids[n])]["logprob"] for n in (1, 2, 8)]
    for position, own, logprobs in zip((1, 2, 8), found.ids, found.logprobs, strict=True):
        ranks = [entries[position][str(token)]["rank"] for token in own]
        assert ranks == [1, 2, 3]
        assert logprobs == sorted(logprobs, reverse=True)
    stand_in = {"logprob", "rank", "decoded_token"}
    assert all(set(about) == stand_in for entry in entries[1:] for about in entry.values())


def changed(name, value):
    return lambda served: setattr(served, name, value)


def edited(content, ids, *, token=None, logprob=None):
    """An answer with another token or log-probability in place of each least likely candidate."""
    if "meta_info" in content:
        for entry in content["meta_info"]["input_top_logprobs"][1:]:
            entry[-1] = [entry[-1][0] if logprob is None else logprob, token or entry[-1][1], None]
    else:
        for own, entries in zip(ids[1:], content["choices"][0]["prompt_logprobs"][1:], strict=True):
            last = max((name for name in entries if name != str(own)), key=lambda name: entries[name]["rank"])
            entries[str(token or last)] = {**entries.pop(last), **({} if logprob is None else {"logprob": logprob})}
    return content


def every(token):
    return changed("change", lambda ids, content: edited(content, ids, token=token))


@pytest.mark.parametrize(
    ("change", "kind", "options", "message"),
    [
        (changed("silent", True), "vllm", {}, r"expected log-probabilities of the prompt, got .*llama\.cpp"),
        (changed("silent", True), "sglang", {}, r"expected log-probabilities of the prompt, got .*--gguf_file"),
        (changed("bends", True), "vllm", {}, "got some that temperature or a logits processor alters"),
        (changed("bends", True), "sglang", {}, "got some that temperature or a logits processor alters"),
        (
            changed("text_of", lambda token: "?"),
            "vllm",
            {},
            r"expected the given model's tokenizer, got one where token \d+ is '\?'",
        ),
        (
            changed("most", 5),
            "vllm",
            {},
            r"status 400 at /v1/completions: .*greater than max.* vLLM must be started with --max-logprobs 10",
        ),
        (
            changed("babbles", True),
            "vllm",
            {},
            r"kind vllm, got: no JSON at /v1/completions: '<html>'\. Check the addr",
        ),
        (
            changed("kind", "sglang"),
            "vllm",
            {},
            r"got: status 404 at /v1/completions.* Check the address and server_kind",
        ),
        (
            changed("key", "secret"),
            "vllm",
            {},
            r"that it takes, got none \(status 401\)\. Set .*FUSECHAT_SERVER_API_KEY",
        ),
        (
            changed("adapters", ["tuned"]),
            "vllm",
            {},
            r"one of the served models \(served, tuned\), got none\. Choose one\.",
        ),
        (None, "sglang", {"server_model": "tuned"}, r"server_model for http.*served models \(served\), got tuned"),
        (
            None,
            "vllm",
            {"server_model": "tuned", "server": None},
            "server_model tuned for represent: expected server wi",
        ),
        (every(999999), "vllm", {}, "expected token ids below the model's 640, got 999999"),
        (every(640), "sglang", {}, "expected token ids below the model's 640, got 640"),
        (None, "vllm", {"server_kind": "tgi"}, "server_kind for represent: expected one of vllm, sglang, got 'tgi'"),
        (
            None,
            "vllm",
            {"server": "localhost:8000"},
            r"server for represent: expected URLs such as .* got 'localhost:8000'",
        ),
        (None, "vllm", {"server": ""}, "server for represent: expected URLs such as .* got ''"),
        (None, "vllm", {"server": "http://127.0.0.1:abc"}, "server for represent: expected URLs such as .*:abc"),
        (
            None,
            "vllm",
            {"server": "http://127.0.0.1:1"},
            "server http://127.0.0.1:1: expected one of kind vllm, got: .*refused",
        ),
        (None, "vllm", {"server_requests": 0}, "server_requests for represent: expected an integer from 1, got 0"),
        (None, "vllm", {"load_in_8bit": True}, "with a server: expected none"),
    ],
)
def test_what_cannot_be_relied_on_is_refused_in_a_sentence(change, kind, options, message, pivot, serving, tmp_path):
    served = serving(kind)
    if change is not None:
        change(served)
    with pytest.raises(InputError, match=message):
        represent(
            pivot, CHATS, tmp_path / "r", template="native", **{"server": served.url, "server_kind": kind, **options}
        )
    assert not (tmp_path / "r").exists()


MANY = [{**CHATS[n % len(CHATS)], "id": str(n)} for n in range(110)]


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
@pytest.mark.parametrize("logprob", [-9999.0, float(np.finfo(np.float32).min), -65504.0, 0.7, float("nan")])
def test_stand_ins_for_numbers_are_no_measurements(logprob, kind, pivot, serving, tmp_path):
    served = serving(kind)
    served.change = lambda ids, content: edited(content, ids, logprob=logprob) if served.asked == 5 else content
    options = {"template": "native", "server": served.url, "server_kind": kind, "server_requests": 1}
    found = represent(pivot, MANY, tmp_path / "r", **options)
    assert found.manifest["counts"]["skipped"] == {"non_finite": 1}
    assert found.ids == [row["id"] for n, row in enumerate(MANY) if n != 2]  # two requests are the probe's
    assert "are not finite" in json.loads((tmp_path / "r" / "skipped.jsonl").read_text())["detail"]


def of_the_next_token(content):
    """SGLang's most likely tokens one row off."""
    best = content["meta_info"]["input_top_logprobs"]
    best[1:] = [*best[2:], best[1]]


def all_certain(content):
    for entries in content["choices"][0]["prompt_logprobs"][1:]:
        for entry in entries.values():
            entry["logprob"] = -0.01


def of_logits(content):
    """Logits in place of log-probabilities: all of one row moved alike, here below 0."""
    for entries in content["choices"][0]["prompt_logprobs"][1:]:
        for entry in entries.values():
            entry["logprob"] -= 30


@pytest.mark.parametrize(
    ("kind", "spoil", "message"),
    [
        ("sglang", of_the_next_token, "the prompt's token and the most likely ones to agree, got log-prob"),
        ("vllm", all_certain, r"probabilities of at most 1 in all, got 9\.90"),
        ("vllm", of_logits, r"a log-probability of at least -6\.\d\d for the most likely token, got -3\d\.\d\d"),
    ],
)
@pytest.mark.parametrize("probe", [True, False])
def test_answers_that_contradict_themselves_are_refused(kind, spoil, message, probe, pivot, serving, tmp_path):
    served = serving(kind)

    def change(ids, content):
        if probe or served.asked > 2:  # two requests are the probe's
            spoil(content)
        return content

    served.change = change
    with pytest.raises(InputError, match=f"answer of a server: expected {message}.* Serve raw log-probabilities"):
        represent(pivot, CHATS, tmp_path / "r", template="native", server=served.url, server_kind=kind)


def test_a_token_of_its_own_below_the_most_likely_agrees():
    ids, logprobs = np.array([[4, 5], [4, 5]]), np.array([[-0.5, -2.0], [-0.5, -2.0]])
    _check_agreement(ids, logprobs, np.array([9, 5]), np.array([-7.0, -2.0]))
    with pytest.raises(InputError, match=r"got log-probabilities -1\.00 and -2\.00 \(token 9\)"):
        _check_agreement(ids, logprobs, np.array([9, 9]), np.array([-1.0, -7.0]))
    _check_agreement(ids[:0], logprobs[:0], np.array([], int), np.array([]))


@pytest.mark.parametrize("status", [400, 500])
def test_a_prompt_that_is_always_refused_is_counted_and_too_many_end_the_run(status, pivot, serving, tmp_path):
    served, options = serving(), {"template": "native"}
    bad = {"id": "bad", "conversations": [{"from": "human", "value": "say"}, {"from": "gpt", "value": "the " * 60}]}
    refused = represent(pivot, [bad], tmp_path / "own", **options)[0]["input_ids"].tolist()
    served.refuses = lambda ids: status if ids == refused else 0
    found = represent(pivot, [*MANY, bad], tmp_path / "r", server=served.url, **options)
    assert found.ids == [row["id"] for row in MANY]
    entry = json.loads((tmp_path / "r" / "skipped.jsonl").read_text())
    assert (entry["id"], entry["reason"]) == ("bad", "non_finite")
    assert f"refused by the server: status {status} at /v1/completions: " in entry["detail"]
    with pytest.raises(RuntimeError, match=r"1 of 51 conversations .*, the first: refused by the server: status"):
        represent(pivot, [*MANY[:50], bad], tmp_path / "s", server=served.url, **options)


@pytest.mark.parametrize("status", [404, 408, 429, 503])
def test_a_busy_server_is_waited_for_from_the_first_request_on(status, pivot, serving, tmp_path):
    served = serving()
    served.fails, served.status = 2, status
    if status == 404:  # before it has answered once, it is another server
        with pytest.raises(InputError, match="status 404"):
            runner_of(served)
        served.fails = 0
    runner = runner_of(served)
    served.fails = 3
    answer = asked(runner)
    assert len(answer["choices"][0]["prompt_logprobs"]) == 3


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
@pytest.mark.parametrize("first", [False, True])
def test_the_model_is_asked_for_by_name_with_the_key(
    kind, first, pivot, expected, serving, tmp_path, caplog, monkeypatch
):
    served = serving(kind)
    served.adapters, served.adapters_first, served.key = ["tuned"], first, "secret-key"
    options = {"template": "native", "server": served.url, "server_kind": kind}
    monkeypatch.setenv("FUSECHAT_SERVER_API_KEY", "another-key")
    caplog.set_level("DEBUG")
    with pytest.raises(InputError, match=r"an API key that it takes, got another \(status 401\)"):
        represent(pivot, CHATS, tmp_path / "r", server_model="tuned", **options)
    monkeypatch.setenv("FUSECHAT_SERVER_API_KEY", "secret-key\n")
    found = represent(pivot, CHATS, tmp_path / "r", server_model="tuned", **options)
    same(found, expected)
    assert found.manifest["model"]["name"] == "tuned"
    assert (f"server {served.url} has LoRA adapters: vLLM's log-probabilities" in caplog.text) == (kind == "vllm")
    assert served.names_asked == {"tuned"}
    served.names_asked.clear()
    base = represent(pivot, CHATS, tmp_path / "base", server_model="served", **options)
    assert base.manifest["model"]["name"] == "served"
    assert served.names_asked == {"served" if kind == "vllm" else None}
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()).decode(errors="replace")
    assert not [key for key in ("secret-key", "another-key") if key in caplog.text + written]


def test_a_recipe_names_a_sources_served_model(tmp_path):
    source = {"model": "org/tuned", "represent": {"server": "http://one:8000", "server_model": "tuned"}}
    recipe = {"output_dir": str(tmp_path / "out"), "pivot": "org/pivot", "sources": {"tuned": source}, "data": "d.json"}
    (tmp_path / "r.yml").write_text(json.dumps(recipe))
    step = next(step for step in steps_of(read_recipe(tmp_path / "r.yml")) if step.key == "represent tuned")
    assert step.shell.endswith("--server http://one:8000 --server_model tuned")


def test_a_key_that_cannot_be_sent_is_not_quoted(pivot, tmp_path, monkeypatch):
    monkeypatch.setenv("FUSECHAT_SERVER_API_KEY", "geheim-ü")
    with pytest.raises(InputError, match="FUSECHAT_SERVER_API_KEY: expected printable ASCII") as caught:
        represent(pivot, CHATS, tmp_path / "r", template="native", server="http://127.0.0.1:1")
    assert "geheim" not in str(caught.value)


def test_sglang_calls_the_last_id_of_the_vocabulary_0():
    protocol, rest = PROTOCOLS["sglang"], [[None, 5, None], [-1.0, 0, None]]
    told = {
        "meta_info": {"input_token_logprobs": rest, "input_top_logprobs": [None, [[-0.5, 3, None], [-1.0, 639, None]]]}
    }
    assert protocol.answer(told, [5, 639], [1], 2).ids == [[3, 639]]
    with pytest.raises(ValueError, match="entries of other tokens"):
        protocol.answer(told, [6, 639], [1], 2)


def test_two_servers_must_serve_one_model(pivot, serving, tmp_path):
    urls = [serving().url, serving(name="another").url]
    with pytest.raises(InputError, match=r"expected the model of http.* \(served\), got another answer \(another\)"):
        represent(pivot, CHATS, tmp_path / "r", template="native", server=urls)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_conversations_are_cut_to_what_the_server_takes(kind, pivot, serving, tmp_path):
    long = [{"id": "x", "conversations": [{"from": "human", "value": "say"}, {"from": "gpt", "value": "the " * 600}]}]
    found = represent(pivot, long, tmp_path / "r", template="native", server=serving(kind).url, server_kind=kind)
    assert found[0]["input_ids"].shape == (LONGEST,)


def test_the_command(pivot, serving, tmp_path, capsys):
    (tmp_path / "chats.json").write_text(json.dumps(CHATS))
    command = ["represent", "--model_name_or_path", str(pivot), "--data_path", str(tmp_path / "chats.json")]
    command += ["--output_dir", str(tmp_path / "r"), "--server", serving("sglang").url, "--server_kind", "sglang"]
    assert main([*command, "--template", "native", "--top_k", "7"]) == 0
    assert f"conversations: {len(CHATS)}\n" in capsys.readouterr().out
    from fusechat_fuse import load_representation

    assert np.shape(load_representation(tmp_path / "r")[0]["topk_ids"])[1] == 7
