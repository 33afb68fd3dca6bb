"""`represent` end to end on tiny models: the model's own numbers, whatever the batch, however often it is killed."""

import json
import logging
import os
import re
import sys

import numpy as np
import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
)

from fusechat_fuse.capture.distributions import PredictionHead
from fusechat_fuse.capture.run import represent
from fusechat_fuse.errors import InputError
from fusechat_fuse.models.files import load_fast_tokenizer, rope_boundary
from fusechat_fuse.processes import Process
from fusechat_fuse.store.shard_writer import ROWS_PER_SHARD
from fusechat_fuse.store.tokenizers import read_tokenizer
from fusechat_fuse.text.batches import plan_batches
from fusechat_fuse.text.chat import ConversationEncoder
from fusechat_fuse.text.conversations import load_conversations
from fusechat_fuse.text.templates import resolve_template
from tests.helpers.reference_represent import distribution

pytestmark = pytest.mark.slow

SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZE |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512}


class OddHead(LlamaForCausalLM):
    """A model whose logits no known form gives: they are shifted by a function of themselves."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + output.logits.sin()
        return output


class OddHeadAllLogits(OddHead):
    """The same, without `logits_to_keep`."""

    def forward(self, input_ids=None, use_cache=None):
        return super().forward(input_ids=input_ids, use_cache=use_cache)


def make_model(name="llama", vocab_size=600, scale=25.0):
    torch.manual_seed(0)
    build = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **SIZE)),
        "mixtral": lambda: MixtralForCausalLM(MixtralConfig(vocab_size=vocab_size, num_local_experts=4, **SIZE)),
        "gemma2": lambda: Gemma2ForCausalLM(
            Gemma2Config(vocab_size=vocab_size, final_logit_softcapping=3.0, query_pre_attn_scalar=8, **SIZE)
        ),
        "cohere": lambda: CohereForCausalLM(CohereConfig(vocab_size=vocab_size, logit_scale=0.25, **SIZE)),
        "granite": lambda: GraniteForCausalLM(GraniteConfig(vocab_size=vocab_size, logits_scaling=4.0, **SIZE)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=4)),
        "odd": lambda: OddHead(LlamaConfig(vocab_size=vocab_size, **SIZE)),
        "odd_all": lambda: OddHeadAllLogits(LlamaConfig(vocab_size=vocab_size, **SIZE)),
    }[name]
    model = build().eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(scale)
    return model


def conversations(n=23, seed=0):
    rng = np.random.default_rng(seed)
    words = "the of and statement value wörld 你好 if else return x y 12 \n".split(" ")

    def text(longest):
        return " ".join(rng.choice(words, rng.integers(0, longest)))

    rows = []
    for i in range(n):
        messages = [{"role": "system", "content": text(4)}] if i % 3 == 0 else []
        for _ in range(1 + i % 3):
            messages += [{"role": "user", "content": text(12)}, {"role": "assistant", "content": text(25)}]
        rows.append({"id": f"c{i}", "messages": messages})
    return rows


@pytest.fixture
def one_thread():
    """As in a process beside this one that is started with one: sums are then the same to the bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_bpe):
    """A model directory and a data file."""
    path = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(path / "m")
    tiny_bpe.save_pretrained(path / "m")
    (path / "data.json").write_text(json.dumps(conversations()))
    return path


def files(path):
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


def assert_is_plain_forward(stored, model, top_k):
    """Each row against the model's own forward on that conversation alone, in float64 loops for a few positions."""
    for row in stored:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(row["input_ids"][None].astype(np.int64))).logits[0].double()
        logprobs = torch.log_softmax(logits, -1)[row["predicted"] - 1].numpy()
        actual = row["input_ids"][row["predicted"]]
        np.testing.assert_allclose(row["ce"], -logprobs[np.arange(len(actual)), actual], atol=1e-4, rtol=0)
        best = -np.sort(-logprobs, axis=1)[:, :top_k]
        stored_lp = row["topk_logprobs"].astype(np.float64)
        assert (np.abs(stored_lp - best) <= 1e-3 * np.maximum(1, np.abs(best))).all()
        # ids: their true log-probabilities are the best ones, so they are identical except for ties
        np.testing.assert_allclose(np.take_along_axis(logprobs, row["topk_ids"], 1), best, atol=2e-5, rtol=1e-5)
        for p in (0, len(actual) - 1):
            ids, lps, ce = distribution(logits[row["predicted"][p] - 1].tolist(), int(actual[p]), top_k)
            assert abs(ce - row["ce"][p]) < 1e-4
            assert list(row["topk_ids"][p][:3]) == ids[:3] or abs(lps[0] - lps[3]) < 1e-4


@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma2", "cohere", "granite", "gpt2", "odd", "odd_all"])
def test_values_are_the_models_own_in_every_family(tmp_path, tiny_bpe, name):
    model = make_model(name)
    stored = represent(model, conversations(9), tmp_path, tokenizer=tiny_bpe, top_k=7, tokens_per_batch=700)
    assert len(stored) == 9
    assert stored[0]["topk_ids"].shape[1] == 7
    assert_is_plain_forward(stored, model, 7)


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite"])
def test_scaled_and_capped_logits_take_the_short_way(tiny_bpe, name):
    head = PredictionHead(make_model(name), np.arange(16))
    assert head.after is not None
    assert head.after(torch.tensor(2.0)) != 2.0
    assert PredictionHead(make_model("odd"), np.arange(16)).after is None


@pytest.mark.parametrize("name", ["llama", "gemma2", "odd"])
def test_chunks_of_the_head_do_not_show(name):
    model, rng = make_model(name), np.random.default_rng(0)
    sequences = [rng.integers(0, 600, n).astype(np.int32) for n in (30, 17, 5)]
    predicted = [np.arange(3, 30), np.array([2, 3, 16]), np.array([1])]
    whole = PredictionHead(model, np.arange(16))(sequences, predicted, 5)
    small = PredictionHead(model, np.arange(16), chunk_bytes=4 * 600 * 4)(sequences, predicted, 5)
    for a, b in zip(whole, small):
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
        np.testing.assert_allclose(a.ce, b.ce, atol=1e-5)


def test_batches_do_not_change_what_is_stored(tmp_path, folder):
    stores = [
        represent(folder / "m", folder / "data.json", tmp_path / f"{n}-{size}", tokens_per_batch=n, shard_size=size)
        for n, size in ((1, 50), (300, 50), (100000, 50), (300, 4))
    ]
    for store in stores[1:]:
        for a, b in zip(stores[0], store):
            np.testing.assert_array_equal(a["topk_ids"], b["topk_ids"])
            np.testing.assert_allclose(a["ce"], b["ce"], atol=1e-5)
    assert stores[0].manifest["counts"]["padding_share"] == 0


@pytest.mark.parametrize("refused", [2, 8])
def test_template_is_asked_for_a_sample_of_much_data_and_for_all_before_it_is_refused(
    tmp_path, folder, monkeypatch, refused
):
    """A sample of five holds one of the refused, 20 %: of 40 they are 5 %, or 20 %."""
    (tmp_path / "t.jinja").write_text(NO_SYSTEM)
    rows, asked, check = conversations(40), [], ConversationEncoder.check
    sample = np.random.default_rng(0).permutation(40)[:5]
    with_system = {sample[0], *[n for n in range(40) if n not in sample][: refused - 1]}
    for n, row in enumerate(rows):
        row["messages"] = [m for m in row["messages"] if m["role"] != "system"]
        if n in with_system:
            row["messages"].insert(0, {"role": "system", "content": "x"})
    monkeypatch.setattr("fusechat_fuse.capture.run.SAMPLE_SIZE", 5)
    monkeypatch.setattr(ConversationEncoder, "check", lambda *a: (asked.append(1), check(*a))[1])
    options = {"template": str(tmp_path / "t.jinja")}
    if refused == 2:
        stored = represent(folder / "m", rows, tmp_path / "r", **options)
        assert stored.manifest["counts"]["skipped"] == {"template": 2}
    else:
        with pytest.raises(InputError, match=r"got 8 of 40 conversations"):
            represent(folder / "m", rows, tmp_path / "r", **options)
    assert len(asked) == 45
    asked.clear()
    represent(folder / "m", [row for n, row in enumerate(rows) if n not in with_system], tmp_path / "w", **options)
    assert len(asked) == 5


def test_long_and_short_rows_of_a_longrope_model_are_no_batch(tmp_path, tiny_bpe):
    """LongRoPE takes its long factors for a whole batch, where its longest row is above the original length."""
    boundary = 64
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [30.0] * 4, "rope_theta": 10000.0}
    rope["original_max_position_embeddings"] = boundary
    torch.manual_seed(0)
    more = {"original_max_position_embeddings": boundary, "pad_token_id": 0, "rope_parameters": rope}
    model = Phi3ForCausalLM(Phi3Config(vocab_size=600, initializer_range=0.3, **more, **SIZE)).eval()
    stored = represent(model, conversations(), tmp_path, tokenizer=tiny_bpe, top_k=7, tokens_per_batch=100_000)
    lengths = stored.num_tokens
    assert min(lengths) <= boundary < max(lengths)
    assert_is_plain_forward(stored, model, 7)
    assert rope_boundary(LlamaConfig(rope_parameters={"full_attention": rope})) == boundary
    assert rope_boundary(LlamaConfig(rope_parameters={"full_attention": {"rope_type": "default"}})) is None
    assert rope_boundary(make_model().config) is None
    across = plan_batches(np.array([63, 64, 65, 66]), 10_000, boundary)
    assert [batch.tolist() for batch in across] == [[3, 2], [1, 0]]


def test_plan_keeps_the_budget_and_pads_little():
    rng = np.random.default_rng(0)
    tokens = padded = 0
    for _ in range(20):
        lengths = np.clip(rng.lognormal(6, 0.8, 256).astype(int), 4, 2048)
        batches = plan_batches(lengths, 8192)
        assert sorted(np.concatenate(batches)) == list(range(256))
        assert all(len(batch) * lengths[batch].max() <= 8192 or len(batch) == 1 for batch in batches)
        assert [lengths[batch].max() for batch in batches] == sorted((lengths[b].max() for b in batches), reverse=True)
        tokens += lengths.sum()
        padded += sum(len(batch) * lengths[batch].max() for batch in batches)
    assert 1 - tokens / padded < 0.05
    assert plan_batches(np.array([5000, 3]), 100)[0].tolist() == [0]
    assert plan_batches(np.zeros(0, int), 100) == []


def test_directory_holds_all_that_the_contract_names(tmp_path, folder, tiny_bpe):
    import datasets

    rows = conversations(5)
    rows.insert(2, {"id": "bad", "messages": [{"role": "user", "content": "x"}]})
    rows.insert(4, {"id": "special", "messages": [{"role": "user", "content": "<|im_end|>"}, rows[0]["messages"][-1]]})
    rows[0]["slice"] = "code"
    (tmp_path / "data.json").write_text(json.dumps(rows))
    stored = represent(folder / "m", tmp_path / "data.json", tmp_path / "r", top_k=4, max_length=120)
    assert stored.ids == [f"c{i}" for i in range(5)]
    assert stored[0]["slice"] == "code"
    assert len(datasets.load_from_disk(str(tmp_path / "r"))) == 5
    assert read_tokenizer(stored).encode("the x").ids == tiny_bpe("the x").input_ids
    manifest = stored.manifest
    assert manifest["options"] == {
        "top_k": 4,
        "max_length": 120,
        "shard_size": ROWS_PER_SHARD,
        "dtype": "auto",
        "template": "pivot",
    }
    assert manifest["model"]["name"] == "m"
    assert manifest["model"]["vocab_size"] == 600
    assert manifest["tokenizer"]["end_of_turn_id"] == manifest["tokenizer"]["eos_id"] == 2
    counts = manifest["counts"]
    assert counts["conversations"] == 5
    assert counts["rows_read"] == 7
    assert counts["skipped"] == {"no_answer": 1, "special_token": 1}
    assert counts["predicted_tokens"] == sum(len(row["ce"]) for row in stored)
    assert counts["truncated"] == sum(len(row["input_ids"]) == 120 for row in stored) > 0
    lines = [json.loads(line) for line in (tmp_path / "r" / "skipped.jsonl").read_text().splitlines()]
    assert [(e["row"], e["id"], e["reason"], e["action"]) for e in lines] == [
        (2, "bad", "no_answer", "skipped"),
        (4, "special", "special_token", "skipped"),
    ]


def test_source_with_another_tokenizer_sees_the_pivots_template(tmp_path, openchat, qwen):
    rows = conversations(6)
    pivot = represent(make_model("llama", len(openchat)), rows, tmp_path / "p", tokenizer=openchat, pivot=openchat)
    source = represent(make_model("llama", len(qwen)), rows, tmp_path / "s", tokenizer=qwen, pivot=openchat)
    assert pivot.ids == source.ids
    for row, a, b in zip(rows, pivot, source):
        text = openchat.apply_chat_template(row["messages"], tokenize=False)
        assert openchat.decode(a["input_ids"]).replace("<s> ", "<s>") == text.replace(
            "<|end_of_turn|>G", "<|end_of_turn|> G"
        )
        assert qwen.decode(b["input_ids"]) == text.removeprefix("<s>").replace("<|end_of_turn|>", "<|im_end|>")
        assert a["content_hash"] == b["content_hash"]
        ends = [{(m, e) for m, e in zip(r["message"], r["end"])} for r in (a, b)]
        lengths = {(m, len(row["messages"][m]["content"].encode()) + 1) for m in set(a["message"].tolist())}
        assert all(lengths <= found for found in ends)
    assert source.manifest["tokenizer"]["end_of_turn_id"] == qwen.convert_tokens_to_ids("<|im_end|>")
    assert source.manifest["template"]["name"] == "pivot"


def limit_memory(monkeypatch, tokens: int, error: Exception) -> list[int]:
    """Forward passes over more tokens than fit raise; the sizes of all that were tried."""
    sizes, run = [], PredictionHead.__call__

    def limited(self, sequences, *arguments):
        sizes.append(len(sequences) * max(map(len, sequences)))
        if sizes[-1] > tokens:
            raise error
        return run(self, sequences, *arguments)

    monkeypatch.setattr(PredictionHead, "__call__", limited)
    return sizes


def test_out_of_memory_halves_the_budget_and_goes_on(tmp_path, folder, monkeypatch, caplog):
    want = represent(folder / "m", folder / "data.json", tmp_path / "a")
    sizes = limit_memory(monkeypatch, 300, RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB"))
    with caplog.at_level(logging.WARNING):
        got = represent(folder / "m", folder / "data.json", tmp_path / "b", tokens_per_batch=100000)
    assert f"Out of memory at {sizes[0]} tokens per batch; going on with {sizes[0] // 2}." in caplog.text
    assert 2 <= sum(size > 300 for size in sizes) <= np.log2(sizes[0] / 300) + 1
    for a, b in zip(want, got):
        np.testing.assert_array_equal(a["topk_ids"], b["topk_ids"])
        np.testing.assert_allclose(a["ce"], b["ce"], atol=1e-5)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), MemoryError(), RuntimeError("can't allocate memory")]
)
def test_conversation_that_does_not_fit_alone_is_said(tmp_path, folder, monkeypatch, error):
    longest = max(represent(folder / "m", folder / "data.json", tmp_path / "a").num_tokens)
    limit_memory(monkeypatch, 0, error)
    with pytest.raises(InputError, match=f"memory for a conversation of {longest} tokens: expected it to fit alone"):
        represent(folder / "m", folder / "data.json", tmp_path / "c")


def test_other_errors_of_the_model_are_not_taken_for_memory(tmp_path, folder, monkeypatch):
    limit_memory(monkeypatch, 0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        represent(folder / "m", folder / "data.json", tmp_path / "c")


def poisoned(tokenizer):
    """A model that gives NaN from the token '~' on."""
    model = make_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("~")] = float("nan")
    return model


def test_conversation_with_logits_that_are_not_finite_is_left_out(tmp_path, tiny_bpe, caplog):
    rows = [{"id": str(i), "messages": conversations(2, i)[1]["messages"]} for i in range(120)]
    rows[77] = {"id": "77", "messages": [{"role": "user", "content": "a ~"}, {"role": "assistant", "content": "b"}]}
    with caplog.at_level(logging.WARNING):
        stored = represent(poisoned(tiny_bpe), rows, tmp_path / "r", tokenizer=tiny_bpe, shard_size=50)
    assert "0.83 % of the conversations have logits that are not finite" in caplog.text
    assert stored.ids == [str(i) for i in range(120) if i != 77]
    assert stored.manifest["counts"]["skipped"] == {"non_finite": 1}
    rows = map(json.loads, (tmp_path / "r" / "skipped.jsonl").read_text().splitlines())
    (entry,) = (row for row in rows if row["action"] == "skipped")  # answers without text are noted, too
    assert (entry["row"], entry["id"], entry["reason"]) == (77, "77", "non_finite")
    assert all(np.isfinite(row["ce"]).all() for row in stored)


def test_too_many_conversations_with_such_logits_end_the_run_at_once_and_again(tmp_path, tiny_bpe):
    rows = [{"id": str(i), "messages": conversations(2, i)[1]["messages"]} for i in range(50)]
    rows[27] = {"id": "27", "messages": [{"role": "user", "content": "a ~"}, {"role": "assistant", "content": "b"}]}
    for _ in range(2):  # the second time from the finished shards
        with pytest.raises(RuntimeError, match=r"1 of 50 conversations have logits that are not finite \(2.0%"):
            represent(poisoned(tiny_bpe), rows, tmp_path / "e", tokenizer=tiny_bpe)
    with pytest.raises(RuntimeError, match="1 of 50 conversations"):
        represent(poisoned(tiny_bpe), rows, tmp_path / "f", tokenizer=tiny_bpe, shard_size=10)
    assert len(list((tmp_path / "f").glob("shard-*.json"))) == 3


def other_weights(tmp_path, folder):
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight += 1e-3
    model.save_pretrained(tmp_path / "m2")
    load_fast_tokenizer(folder / "m").save_pretrained(tmp_path / "m2")
    return tmp_path / "m2"


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"top_k": 3}, "options.top_k = 10 there and 3 here"),
        ({"max_length": 100}, "options.max_length = 2048 there and 100 here"),
        ({"dtype": "float32"}, "options.dtype = 'auto' there"),
        ({"template": "openchat_3.5"}, "template.name = 'pivot' there and 'openchat_3.5' here"),
        ({"encoding": "compact"}, "encoding = 'plain' there"),
        ({"conversations": conversations(5)}, "data = "),
        ({"model": other_weights}, "model.fingerprint = "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_run_is_refused_before_the_model_is_loaded(tmp_path, folder, monkeypatch, change, difference):
    arguments = {"model": folder / "m", "conversations": folder / "data.json"}
    represent(**arguments, output_dir=tmp_path / "r")
    before = files(tmp_path / "r")
    monkeypatch.setattr("fusechat_fuse.capture.run.load_to_device", lambda *a, **k: pytest.fail("loaded"))
    represent(**arguments, output_dir=tmp_path / "r", tokens_per_batch=10)  # the budget is no difference
    if "model" in change:
        change = {"model": other_weights(tmp_path, folder)}
    with pytest.raises(InputError, match=re.escape(difference)):
        represent(**{**arguments, **change}, output_dir=tmp_path / "r")
    assert files(tmp_path / "r") == before


def test_directory_is_not_continued_once_the_models_end_of_turn_is_another(tmp_path, folder, tiny_bpe, openchat):
    text, names = tiny_bpe.chat_template, {"tokenizer_object": tiny_bpe.backend_tokenizer}
    first, second = (
        PreTrainedTokenizerFast(eos_token=eos, chat_template=text.replace("<|im_end|>", eos), **names)
        for eos in ("<|im_end|>", "<|endoftext|>")
    )
    represent(make_model(), folder / "data.json", tmp_path / "r", tokenizer=first, pivot=openchat)
    with pytest.raises(InputError, match=r"another run's \(end_of_turn_id = "):
        represent(make_model(), folder / "data.json", tmp_path / "r", tokenizer=second, pivot=openchat)


def test_moved_model_and_finished_directory_are_recognised_and_damage_is_mended(tmp_path, folder, caplog):
    represent(folder / "m", folder / "data.json", tmp_path / "r", shard_size=6)
    before = files(tmp_path / "r")
    (folder / "m").rename(tmp_path / "moved")
    try:
        data = bytearray(before["shard-00002.arrow"])
        data[len(data) // 2] ^= 255
        (tmp_path / "r" / "shard-00002.arrow").write_bytes(data)
        with caplog.at_level(logging.WARNING):
            represent(tmp_path / "moved", folder / "data.json", tmp_path / "r", shard_size=6)
        assert "shard-00002.arrow is damaged" in caplog.text
    finally:
        (tmp_path / "moved").rename(folder / "m")
    after = files(tmp_path / "r")
    for name, moved, own in (
        ("manifest.json", b'"moved"', b'"m"'),
        ("README.md", b" of moved", b" of m"),
        ("README.md", b"*moved*", b"*m*"),
    ):
        after[name] = after[name].replace(moved, own)
    assert after == before


def test_a_finished_directory_is_left_alone_beside_another_run_that_ends_there(tmp_path, folder):
    represent(folder / "m", folder / "data.json", tmp_path / "r", shard_size=6)
    for name in (".manifest.json.1.tmp", ".tokenizer.abc.tmp"):  # of the other run, which moves them in a moment
        (tmp_path / "r" / name).write_text("{}")
    before = files(tmp_path / "r")
    written = {
        name: (tmp_path / "r" / name).stat().st_mtime_ns for name in ("manifest.json", "README.md", "state.json")
    }
    represent(folder / "m", folder / "data.json", tmp_path / "r", shard_size=6)
    assert files(tmp_path / "r") == before
    assert written == {name: (tmp_path / "r" / name).stat().st_mtime_ns for name in written}
    (tmp_path / "r" / "README.md").unlink()
    represent(folder / "m", folder / "data.json", tmp_path / "r", shard_size=6)
    assert files(tmp_path / "r") == {name: data for name, data in before.items() if not name.endswith(".tmp")}


def test_data_may_be_a_dataset_and_the_encoding_compact(tmp_path, folder):
    plain = represent(folder / "m", load_conversations(folder / "data.json"), tmp_path / "a")
    compact = represent(folder / "m", load_conversations(folder / "data.json"), tmp_path / "b", encoding="compact")
    assert compact.manifest["counts"]["bytes"] < 0.7 * plain.manifest["counts"]["bytes"]
    for a, b in zip(plain, compact):
        np.testing.assert_array_equal(a["topk_ids"], b["topk_ids"])
        lp = a["topk_logprobs"].astype(np.float64)
        assert (np.abs(b["topk_logprobs"] - lp) <= 1.5e-3 * np.maximum(1, np.abs(lp))).all()
        np.testing.assert_allclose(a["ce"], b["ce"], atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k for represent: expected an integer from 1, got 0"),
        ({"max_length": "long"}, "max_length for represent: expected an integer from 1, got 'long'"),
        ({"tokens_per_batch": -1}, "tokens_per_batch for represent: expected an integer from 1, got -1"),
        ({"shard_size": True}, "shard_size for represent: expected an integer from 1, got True"),
        ({"top_k": 601}, "top_k for represent: expected at most the model's 600 tokens, got 601"),
        ({"dtype": "int8"}, "dtype for represent: expected auto"),
        ({"template": "nonsense"}, "chat template for 'nonsense'"),
        ({"encoding": "zip"}, "encoding for represent: expected plain or compact, got 'zip'"),
        ({"conversations": "no.json"}, "got nothing there"),
        ({"model": "no"}, "expected a model directory or a Hub name, got neither"),
        ({"model": "file"}, "expected a model directory or a Hub name, got neither"),
        ({"model": "bare"}, "expected a model directory, got one without config.json"),
        ({"model": make_model}, "expected one beside a loaded model, got none"),
        ({"output_dir": "file"}, "expected a directory, got a file"),
        ({"output_dir": "full"}, r"expected an empty one, got other files \('notes.txt'\)"),
    ],
)
def test_bad_input_is_one_sentence_before_any_work(tmp_path, folder, options, message):
    (tmp_path / "bare").mkdir()
    (tmp_path / "full").mkdir()
    for file in ("file", "full/notes.txt"):
        (tmp_path / file).write_text("x")
    before = {path.name for path in tmp_path.rglob("*")}
    arguments = {"model": folder / "m", "conversations": folder / "data.json", "output_dir": tmp_path / "r"}
    for name, value in options.items():
        arguments[name] = value() if callable(value) else tmp_path / value if name in arguments else value
    with pytest.raises(InputError, match=message) as caught:
        represent(**arguments)
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.rglob("*")} == before


def test_tokenizer_of_another_model_is_said(tmp_path, folder, openchat):
    with pytest.raises(InputError, match="expected ids below its 600 embedding rows, got 32000"):
        represent(make_model(), folder / "data.json", tmp_path / "t", tokenizer=openchat)


def test_progress_is_a_bar_in_a_terminal_and_lines_in_a_log(tmp_path, folder, monkeypatch, caplog, capsys):
    monkeypatch.setattr("fusechat_fuse.progress.SECONDS", 0.0)
    caplog.set_level("INFO", "fusechat_fuse.progress")
    represent(folder / "m", folder / "data.json", tmp_path / "r", shard_size=10, tokens_per_batch=600)
    lines = [record.getMessage() for record in caplog.records if record.name == "fusechat_fuse.progress"]
    assert re.fullmatch(r"\d+ of 23 conversations after 00:\d\d, (\?|00:\d\d) left \(.*\)", lines[0]), lines
    assert lines[-1].startswith("23 of 23 conversations after 00:")
    assert "conversation" not in capsys.readouterr().err.replace("Loading weights", "")
    caplog.clear()
    monkeypatch.setattr("fusechat_fuse.progress.SECONDS", 60.0)
    represent(folder / "m", folder / "data.json", tmp_path / "s")  # over before a minute is
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    represent(folder / "m", folder / "data.json", tmp_path / "t")
    assert not [record for record in caplog.records if record.name == "fusechat_fuse.progress"]
    assert "23/23" in capsys.readouterr().err


def test_predicted_ids_beyond_the_head_are_said_and_ids_of_the_prompt_are_not(tmp_path, tiny_bpe):
    """Some heads have fewer rows than the embedding: ids of images stand in prompts alone."""
    model, highest = make_model(), 500
    model.lm_head = torch.nn.Linear(32, highest, bias=False)
    rows = conversations(3)
    with pytest.raises(InputError, match=r"top_k for represent: expected at most the model's 500 tokens, got 501"):
        represent(model, rows, tmp_path / "r", tokenizer=tiny_bpe, top_k=501)
    with pytest.raises(InputError, match=r"expected predicted ids below its 500 output rows, got \d+\. Give the tok"):
        represent(model, rows, tmp_path / "r", tokenizer=tiny_bpe)
    prompt = "if the value and statement of else return"
    assert max(tiny_bpe(prompt).input_ids) >= highest
    rows = [{"id": "a", "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": "~"}]}]
    stored = represent(model, rows, tmp_path / "s", tokenizer=tiny_bpe)
    assert_is_plain_forward(stored, model, 10)


def test_one_model_over_several_devices_is_not_for_several_processes(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(Process, "current", classmethod(lambda cls: cls(0, 2)))
    with pytest.raises(InputError, match="device_map for 2 processes: expected none, got 'auto'"):
        represent(folder / "m", folder / "data.json", tmp_path / "r", device_map="auto")


def test_longer_conversations_are_cut_at_the_models_positions(tmp_path, tiny_bpe, caplog):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=600, n_embd=32, n_layer=1, n_head=4, n_positions=64)).eval()
    long = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "value " * 200}]
    with caplog.at_level(logging.WARNING):
        stored = represent(model, [{"id": "a", "messages": long}], tmp_path / "r", tokenizer=tiny_bpe)
    assert "max_length is lowered from 2048 to the model's 64 positions" in caplog.text
    caplog.clear()
    with pytest.raises(InputError, match=r"options\.top_k"):
        represent(model, [{"id": "a", "messages": long}], tmp_path / "r", tokenizer=tiny_bpe, top_k=3)
    assert "max_length" not in caplog.text
    assert len(stored[0]["input_ids"]) == 64
    assert stored.manifest["counts"]["truncated"] == 1


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ('{"model_type": "abacus"}', r"with a configuration that transformers knows, got: .*abacus"),
        (LlamaConfig(**SIZE).to_json_string(), "weights for .*: expected a causal language model, got "),
    ],
    ids=["unknown", "no_weights"],
)
def test_directory_of_no_whole_model_is_said(tmp_path, folder, tiny_bpe, written, message):
    tiny_bpe.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(written)
    with pytest.raises(InputError, match=message):
        represent(tmp_path / "m", folder / "data.json", tmp_path / "r")


THINKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'].split('</think>')[-1] + '<|im_end|>\n' }}{% endfor %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + THINKS


def test_a_model_that_does_not_end_its_turns_is_named(tmp_path, folder, tiny_bpe, caplog):
    class Decided(torch.nn.Module):  # a head that always, or never, has the end of turn among the first
        def __init__(self, head, bias: float):
            super().__init__()
            self.head, self.bias = head, torch.nn.functional.one_hot(torch.tensor(2), len(tiny_bpe)) * bias

        def forward(self, hidden):
            return self.head(hidden) + self.bias

    for bias, said in ((1e3, False), (-1e3, True)):
        model = make_model("llama", len(tiny_bpe))
        model.lm_head = Decided(model.lm_head, bias)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            stored = represent(model, folder / "data.json", tmp_path / f"{bias}", tokenizer=tiny_bpe)
        counts = stored.manifest["counts"]
        ends = sum(int((row["input_ids"][row["predicted"]] == 2).sum()) for row in stored)
        assert (counts["ends"], counts["ends_kept"]) == (ends, 0 if said else ends)
        text = f"end-of-turn token '<|im_end|>' is among its 10 most likely tokens at only 0 of {ends} ends of turn"
        assert (text in caplog.text) == said


def test_answers_that_are_context_only_are_counted_and_said(tmp_path, folder, caplog):
    (tmp_path / "t.jinja").write_text(THINKS)
    with caplog.at_level(logging.WARNING):
        stored = represent(folder / "m", folder / "data.json", tmp_path / "r", template=str(tmp_path / "t.jinja"))
    turns = [sum(m["role"] == "assistant" for m in row["messages"]) for row in conversations()]
    assert len(stored) == len(turns)
    assert [len(set(row["message"].tolist())) for row in stored] == [1] * len(turns)
    assert stored.manifest["counts"]["context_answers"] == sum(turns) - len(turns)
    assert f"{sum(turns) - len(turns)} answers are context only" in caplog.text
    assert stored.manifest["template"]["of"] == "t.jinja"


def test_template_that_refuses_many_conversations_is_said_before_the_model_is_loaded(tmp_path, folder, monkeypatch):
    (tmp_path / "t.jinja").write_text(NO_SYSTEM)
    monkeypatch.setattr("fusechat_fuse.capture.run.load_to_device", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(InputError) as caught:
        represent(folder / "m", folder / "data.json", tmp_path / "r", template=str(tmp_path / "t.jinja"))
    assert str(caught.value) == (
        "chat template for the data: expected to leave out at most 10%, got 8 of 23 conversations that it does not "
        "keep (the chat template refuses the conversation (no system)). Set template to a built-in name or a .jinja "
        "file that keeps them."
    )
    assert not (tmp_path / "r").exists()


def test_template_that_changes_many_contents_is_refused_first_and_few_are_said(tmp_path, folder, caplog, monkeypatch):
    (tmp_path / "t.jinja").write_text(THINKS)
    reason = "the chat template renders the first 2 messages differently once the conversation goes on"
    rows = [{"id": str(n), "messages": conversations(2)[1]["messages"]} for n in range(20)]
    for count, row in enumerate(rows[:3]):
        row["messages"] = [row["messages"][0], {"role": "assistant", "content": "<think>hm</think>yes"}]
        if count == 1:
            with caplog.at_level(logging.WARNING):
                stored = represent(folder / "m", rows, tmp_path / "few", template=str(tmp_path / "t.jinja"))
            assert stored.manifest["counts"]["skipped"] == {"template": 2}
            assert f"2 conversations skipped, as {reason}" in caplog.text
    monkeypatch.setattr("fusechat_fuse.capture.run.load_to_device", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(InputError, match=rf"got 3 of 20 .*\({reason}"):
        represent(folder / "m", rows, tmp_path / "r", template=str(tmp_path / "t.jinja"))
    assert not (tmp_path / "r").exists()


def test_directory_of_a_run_that_failed_before_its_first_shard_is_free(tmp_path, folder):
    data, out = folder / "data.json", tmp_path / "r"
    for made in (False, True):  # a directory of the user's stays
        if made:
            out.mkdir()
        with pytest.raises(InputError, match="weights for"):
            represent(folder / "m", data, out, attn_implementation="nonsense")
        assert out.exists() == made
    # killed while the model was loaded: its claim is all there is
    (out / "identity.json").write_text(json.dumps({"options": {"top_k": 3}}))
    assert represent(folder / "m", data, out)[0]["topk_ids"].shape[1] == 10
    with pytest.raises(InputError, match=r"options\.top_k"):
        represent(folder / "m", data, out, top_k=3)


def test_directory_where_no_conversation_was_usable_is_free_for_the_mended_data(tmp_path, folder):
    rows = conversations(3)
    bad = [{**row, "messages": [{"role": "user", "content": "<|endoftext|>"}, row["messages"][-1]]} for row in rows]
    for data, limit, message in (
        (bad, 99, "special tokens for the data: .*, got 3 of 3 conversations"),
        (rows, 1, r"expected at least one usable conversation, got none \(3 too_long: no predicted token"),
    ):
        for deep in ("r", "new/deep"):
            with pytest.raises(InputError, match=message):
                represent(folder / "m", data, tmp_path / deep, max_length=limit)
            assert not list(tmp_path.iterdir())
    stored = represent(folder / "m", rows, tmp_path / "r")
    assert len(stored) == 3
    assert stored.manifest["counts"]["skipped"] == {}
    assert files(tmp_path / "r") == files(represent(folder / "m", rows, tmp_path / "s").path)


def test_what_is_there_and_which_template_are_said(tmp_path, folder, tiny_bpe, caplog):
    data = folder / "data.json"
    with caplog.at_level(logging.INFO):
        stored = represent(folder / "m", data, tmp_path / "r", shard_size=6)
        assert "Chat template: m's own, as no pivot is given. If this is a source, give its pivot." in caplog.text
        assert "shards there" not in caplog.text
        assert stored.manifest["template"]["of"] == "m"
        (tmp_path / "r" / "shard-00001.json").unlink()
        represent(folder / "m", data, tmp_path / "r", shard_size=6)
        assert f"{tmp_path / 'r'}: 3 of 4 shards there, going on." in caplog.text
        represent(folder / "m", data, tmp_path / "r", shard_size=6)
        assert f"{tmp_path / 'r'} holds this very run, finished: nothing to compute." in caplog.text
        bare = PreTrainedTokenizerFast(tokenizer_object=tiny_bpe.backend_tokenizer, eos_token="<|im_end|>")
        pivot = represent(make_model(), data, tmp_path / "b", tokenizer=bare, pivot=bare)
    assert "the pivot has no chat template: its family's built-in template, qwen, is used." in caplog.text
    assert pivot.manifest["template"]["built_in"] == "qwen"
    assert caplog.text.count("Chat template: ") == 3


def test_strict_names_the_row_that_the_tokenizer_refuses(tmp_path, folder):
    rows = conversations(4)
    rows[2]["messages"][-1]["content"] = "<|endoftext|>"
    with pytest.raises(InputError, match=r"the given rows, row 2: message \d holds the text .*\(special_token\)"):
        represent(folder / "m", rows, tmp_path / "r", strict=True)
    with pytest.raises(InputError, match="at least one usable conversation"):
        represent(folder / "m", rows[2:3], tmp_path / "r2")


def start(forked, script, *arguments, launcher=()):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, *launcher, str(script), *map(str, arguments)]
    return forked.run(command, env=environment)


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch, tqdm.auto
from transformers import AutoModelForCausalLM
from fusechat_fuse.capture import distributions
from fusechat_fuse.capture.run import represent
from fusechat_fuse.text.chat import ConversationEncoder
from fusechat_fuse.models.files import load_fast_tokenizer, rope_boundary

folder, data, out = sys.argv[1:4]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), load_fast_tokenizer(folder)
ConversationEncoder(tokenizer).encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
model.model.register_forward_pre_hook(lambda *_: time.sleep(0.05))  # no machine gets far between two kills
rng, deaths = random.Random(0), 0
for attempt in range(60):
    child = os.fork()
    if child == 0:
        represent(model, data, out, shard_size=4, tokenizer=tokenizer)
        os._exit(0)
    before, started = len(list(Path(out).glob("shard-*.json"))), time.time()
    while time.time() - started < 30:  # until it has written a shard more, then any moment
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended or len(list(Path(out).glob("shard-*.json"))) > before:
            break
        time.sleep(0.0005)
    if not ended:
        time.sleep(rng.random() * 0.02)
        os.kill(child, signal.SIGKILL)
        ended, status = os.waitpid(child, 0)
    deaths += os.WIFSIGNALED(status)
    assert os.WIFSIGNALED(status) or status == 0, status
    if status == 0:
        break
print(deaths)
"""


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
def test_killed_at_any_moment_it_continues_and_ends_with_the_same_files(tmp_path, folder, forked):
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder / "m"), load_fast_tokenizer(folder / "m")
    represent(model, folder / "data.json", tmp_path / "whole", shard_size=4, tokenizer=tokenizer)
    (tmp_path / "run.py").write_text(KILLED)
    ran = start(forked, tmp_path / "run.py", folder / "m", folder / "data.json", tmp_path / "killed")
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) >= 2
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.distributed
def test_two_processes_write_the_files_of_one(tmp_path, folder, forked):
    represent(folder / "m", folder / "data.json", tmp_path / "one", shard_size=3)
    (tmp_path / "run.py").write_text(
        "import sys, fusechat_fuse.capture.run as c\nc.represent(*sys.argv[1:4], shard_size=3)\n"
    )
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", "0")
    ran = start(forked, tmp_path / "run.py", folder / "m", folder / "data.json", tmp_path / "two", launcher=launcher)
    assert ran.returncode == 0, ran.stderr
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_encoder_of_the_directory_is_the_encoder_of_the_run(tmp_path, folder, tiny_bpe):
    stored = represent(folder / "m", folder / "data.json", tmp_path / "r")
    encoder = ConversationEncoder(tiny_bpe, resolve_template("native", tiny_bpe))
    for row, source in zip(stored, conversations()):
        encoded = encoder.encode(source["messages"])
        for name in ("input_ids", "predicted", "message", "start", "end"):
            np.testing.assert_array_equal(row[name], getattr(encoded, name), err_msg=name)
