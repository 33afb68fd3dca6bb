"""`import` of others' captures: DistillKit's compressed log-probabilities, and stored answers of vLLM and SGLang.

The compressed rows are written here, from DistillKit's published rules, by code that shares nothing with the reader.
"""

import gzip
import json
import math
import struct
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
import yaml

import fusechat_fuse
from fusechat_fuse.capture.compressed import CONFIGURATION, read_compression
from fusechat_fuse.cli import main
from fusechat_fuse.errors import InputError
from fusechat_fuse.text.chat import ConversationEncoder
from tests.helpers import real_tokenizers, tiny_runs
from tests.helpers.tiny_models import tiny_model

V = 640  # of the tiny model
RECOMMENDED = {
    "d": V,
    "k": 50,
    "exact_k": 16,
    "exact_dtype": "bfloat16",
    "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"],
    "term_dtype": "float32",
    "residual_bins": [],
    "delta_encoding": False,
    "error_diffusion": False,
}
PUBLISHED = {  # as for the released captures of Qwen3-235B
    **RECOMMENDED,
    "k": 60,
    "exact_k": 32,
    "exact_dtype": "float32",
    "polynomial_terms": [0, 1, 2],
    "delta_encoding": True,
}
BINS = {
    **RECOMMENDED,
    "exact_k": 12,
    "exact_dtype": "float16",
    "polynomial_terms": [0, "exp"],
    "normalize_t": True,
    "residual_bins": [
        {"scale_dtype": "float16", "element_bits": 7, "num_elements": 11},
        {"scale_dtype": "float32", "element_bits": 2, "num_elements": 5},
        {"scale_dtype": "bfloat16", "element_bits": 1, "num_elements": 9},
    ],
}
LOSSLESS = {**RECOMMENDED, "k": 64, "exact_k": 64, "exact_dtype": "float64", "polynomial_terms": None}
LEGACY = {"vocab_size": V, "k": 50, "exact_k": 12, "polynomial_degree": 4, "with_sqrt_term": True}
CONFIGURATIONS = {"recommended": RECOMMENDED, "published": PUBLISHED, "bins": BINS, "lossless": LOSSLESS}


def bits_of(values, width):
    """Numbers as bytes, `width` bits each, the most significant bit first, zeros at the end."""
    text = "".join(format(int(value), f"0{width}b") for value in values)
    text += "0" * (-len(text) % 8)
    return [int(text[n : n + 8], 2) for n in range(0, len(text), 8)]


def as_type(value, dtype):
    """(the bytes of a number, little-endian, and the number that they hold)"""
    if dtype == "bfloat16":
        raw = struct.pack("<f", float(torch.tensor(float(value)).bfloat16()))[2:]
        return [*raw], struct.unpack("<f", b"\0\0" + raw)[0]
    code = {"float16": "<e", "float32": "<f", "float64": "<d"}[dtype]
    raw = struct.pack(code, float(value))
    return [*raw], struct.unpack(code, raw)[0]


def compress(logprobs, c):
    """One token's log-probabilities, descending, as bytes, and what they hold: the rules, number by number."""
    values = [float(x) for x in logprobs]
    if c["delta_encoding"]:
        values = [values[0], *[b - a for a, b in pairwise(values)]]
    out, held = [], []
    for value in values[: c["exact_k"]]:
        raw, kept = as_type(value, c["exact_dtype"])
        out += raw
        held.append(kept)
    rest = values[c["exact_k"] : c["k"]]
    approximated = [0.0] * len(rest)
    if c["polynomial_terms"]:
        ts = [n / (len(rest) - 1) if c.get("normalize_t") else float(n) for n in range(len(rest))]
        of = {"sqrt": math.sqrt, "exp": math.exp}
        table = [[of[i](t) if isinstance(i, str) else t**i for i in c["polynomial_terms"]] for t in ts]
        fitted = np.linalg.lstsq(np.array(table), np.array(rest), rcond=None)[0]
        coefficients = []
        for coefficient in fitted:
            raw, kept = as_type(coefficient, c["term_dtype"])
            out += raw
            coefficients.append(kept)
        approximated = [sum(a * x for a, x in zip(coefficients, row)) for row in table]
    first = 0
    for one in c["residual_bins"]:
        bits, count = one["element_bits"], one["num_elements"]
        residual = [rest[first + n] - approximated[first + n] for n in range(count)]
        largest = max(abs(x) for x in residual) or 1.0
        raw, scale = as_type(largest / (1.0 if bits == 1 else 2 ** (bits - 1)), one["scale_dtype"])
        low, high = (0, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        numbers = [min(max(round(x / scale), low), high) - low for x in residual]
        out += raw + bits_of(numbers, bits)
        for n, number in enumerate(numbers):
            approximated[first + n] += (2 * number - 1 if bits == 1 else number + low) * scale
        first += count
    held += approximated
    return out, [sum(held[: n + 1]) for n in range(len(held))] if c["delta_encoding"] else held


def legacy_row(values, ids, c):
    exact, rest = [float(np.float16(x)) for x in values[: c["exact_k"]]], values[c["exact_k"] : c["k"]]
    table = [
        [n ** -float(i) for i in range(c["polynomial_degree"] + 1)] + [math.sqrt(n)] for n in range(1, len(rest) + 1)
    ]
    coefficients = np.linalg.lstsq(np.array(table), np.array(rest, float), rcond=None)[0] if table else np.zeros(0)
    width, packed = math.ceil(math.log2(c["vocab_size"])), []
    for n in range(0, c["k"], 64 // width):
        packed.append(sum(int(i) << width * m for m, i in enumerate(ids[n : n + 64 // width])))
    return packed, exact, coefficients.tolist()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(a model, its directory, conversations as rows, its own representation of them)"""
    path = tmp_path_factory.mktemp("captures")
    made, tokenizer = tiny_model("Llama", seed=3, vocab_size=V).eval(), tiny_runs.tokenizer()
    with torch.no_grad():
        made.lm_head.weight *= 2.5 / made(torch.arange(V)[None]).logits.std()  # neither flat nor all on one token
    texts = [line for line in real_tokenizers.tiny_corpus() if 20 < len(line) < 60 and "<" not in line][:24]
    rows = [
        {
            "id": str(n // 4),
            "messages": [{"role": r, "content": t} for r, t in zip(("user", "assistant") * 2, texts[n:])],
        }
        for n in range(0, 24, 4)
    ]
    rows[1]["messages"].insert(0, {"role": "system", "content": "Be brief."})
    made.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return made, path, rows, fusechat_fuse.represent(path, rows, path / "own")


@pytest.fixture(scope="module")
def dense(model):
    """Of each conversation: its ids, and the log-probabilities [T, V] of position t for token t + 1."""
    made, _, _, own = model
    found = []
    for row in own:
        ids = torch.from_numpy(row["input_ids"].astype(np.int64))
        with torch.inference_mode():
            found.append((ids.tolist(), torch.log_softmax(made(input_ids=ids[None]).logits[0].double(), -1).numpy()))
    return found


PAD = 0  # <|endoftext|>


def capture(path, packed, c=RECOMMENDED, last=True, **columns):
    """A capture of rows, each several (ids, log-probabilities) one after another, written as DistillKit writes it."""
    path.mkdir(parents=True, exist_ok=True)
    k, table = c["k"], {"input_ids": []}
    legacy = "vocab_size" in c
    names = ("packed_indices", "exact_values", "coeffs") if legacy else ("compressed_logprobs", "bytepacked_indices")
    table |= {name: [] for name in names}
    for row in packed:
        table["input_ids"].append([token for ids, _ in row for token in ids])
        entries = []
        for values in np.concatenate([logprobs for _, logprobs in row])[: None if last else -1]:
            top = np.argsort(-values, kind="stable")[:k]
            if legacy:
                entries.append(legacy_row(values[top], top, c))
            else:
                entries.append((compress(values[top], c)[0], bits_of(top, math.ceil(math.log2(c["d"])))))
        for name, column in zip(names, zip(*entries)):
            table[name].append(list(column))
    types = {"packed_indices": pa.uint64(), "exact_values": pa.float32(), "coeffs": pa.float32()}
    arrays = {name: pa.array(table[name], pa.list_(pa.list_(types.get(name, pa.uint8())))) for name in names}
    arrays["input_ids"] = pa.array(table["input_ids"], pa.list_(pa.uint64()))
    parquet.write_table(pa.table(arrays | columns), path / "data_0.parquet")
    (path / CONFIGURATION).write_text(yaml.safe_dump(c))
    return path


def take(source, model, output, **options):
    return fusechat_fuse.import_released(source, model[1], output, **options)


@pytest.mark.parametrize("name", list(CONFIGURATIONS))
def test_compressed_log_probabilities_are_decoded_by_the_published_rules(name, dense, tmp_path):
    c = CONFIGURATIONS[name]
    (tmp_path / CONFIGURATION).write_text(yaml.safe_dump({"teacher": {"logprob_compressor": c}}))
    compression = read_compression(tmp_path / CONFIGURATION)
    values = dense[0][1][:20]
    top = np.argsort(-values, 1)[:, : c["k"]]
    both = [compress(row[order], c) for row, order in zip(values, top)]
    packed = np.array([bits_of(order, 10) for order in top], np.uint8)
    ids, logprobs = compression.decode(np.array([raw for raw, _ in both], np.uint8), packed)
    np.testing.assert_array_equal(ids, top)
    np.testing.assert_allclose(logprobs, [held for _, held in both], rtol=1e-5, atol=1e-5)
    exact = logprobs[:, : c["exact_k"]] - np.take_along_axis(values, top, 1)[:, : c["exact_k"]]
    assert np.abs(exact).max() < {"float16": 0.01, "bfloat16": 0.07}.get(c["exact_dtype"], 1e-4)
    assert compression.widths == (len(both[0][0]), len(packed[0]))


@pytest.mark.parametrize("name", ["recommended", "published", "bins", "lossless", "legacy"])
def test_a_capture_becomes_the_models_own_representation(name, model, dense, tmp_path):
    own, c = model[3], CONFIGURATIONS.get(name, LEGACY)
    source = capture(tmp_path / "c", [[one] for one in dense], c, last=name != "published")
    found = take(source, model, tmp_path / "r")
    assert len(found) == len(own)
    fine, unlisted = name in ("published", "lossless"), 0
    for mine, row, (ids, logprobs) in zip(own, found, dense):
        for column in ("input_ids", "predicted", "message", "start", "end", "topk_ids"):
            if column != "topk_ids" or fine:
                np.testing.assert_array_equal(mine[column], row[column])
        tolerance = 2e-3 if fine else 0.05
        np.testing.assert_allclose(mine["topk_logprobs"], row["topk_logprobs"], rtol=tolerance, atol=tolerance)
        ranks = [(logprobs[t - 1] > logprobs[t - 1][ids[t]]).sum() for t in row["predicted"]]
        listed = np.array(ranks) < c["k"]
        if fine:
            rtol, atol = (1e-4, 1e-4) if name == "lossless" else (0.02, 0.1)  # the published one fits its tail
            np.testing.assert_allclose(mine["ce"][listed], row["ce"][listed], rtol=rtol, atol=atol)
        unlisted += (~listed).sum()
    again = fusechat_fuse.represent(model[1], tmp_path / "r" / "conversations.jsonl", tmp_path / "again")
    assert [row["content_hash"] for row in again] == [row["content_hash"] for row in found]
    counts = found.manifest["released"]
    assert counts["estimated_ce"] == unlisted > 0
    assert counts["exact_tokens"] == sum(len(row["predicted"]) for row in own)
    assert found.manifest["counts"]["rows_read"] == len(own)


def test_logits_of_the_older_format_are_renormalised_and_counted(model, dense, tmp_path):
    logits = [[(ids, logprobs + 30.0)] for ids, logprobs in dense]
    found = take(capture(tmp_path / "c", logits, {**LEGACY, "exact_k": 50}), model, tmp_path / "r")
    assert found.manifest["released"]["exact_tokens"] == 0
    for row in found:
        assert np.exp(row["topk_logprobs"].astype(np.float64)).sum(1).max() < 1.01


@pytest.mark.parametrize("by", ["padding", "mask", "system"])
def test_packed_rows_are_cut_into_their_conversations(by, model, dense, tmp_path):
    own, end = model[3], ([PAD], dense[0][1][:1])
    first, second, third = dense[:3]
    row, columns = [first, second], {}
    if by == "padding":
        row = [first, end, third, end, second, end]
    if by == "mask":
        row, numbers = [first, third], [1] * len(first[0]) + [2] * len(third[0])
        columns["attention_mask"] = pa.array([numbers], pa.list_(pa.int64()))
    found = take(capture(tmp_path / "c", [row], LOSSLESS, **columns), model, tmp_path / "r")
    expected = {"padding": (0, 2, 1), "mask": (0, 2), "system": (0, 1)}[by]
    assert found.ids == [f"0.{n}" for n in ((0, 1, 2) if by == "padding" else (0, 1))]
    for n, row in zip(expected, found):
        np.testing.assert_array_equal(row["topk_ids"], own[n]["topk_ids"])
        np.testing.assert_allclose(row["topk_logprobs"], own[n]["topk_logprobs"], rtol=2e-3, atol=2e-3)


def test_top_k_and_max_length_of_a_capture(model, dense, tmp_path):
    source = capture(tmp_path / "c", [[one] for one in dense], LOSSLESS)
    found = take(source, model, tmp_path / "r", top_k=25, max_length=40)
    assert found[0]["topk_ids"].shape[1] == 25
    assert len(found[0]["input_ids"]) == 40
    few = take(
        capture(tmp_path / "d", [[one] for one in dense], {**LOSSLESS, "k": 4, "exact_k": 4}), model, tmp_path / "s"
    )
    assert few[0]["topk_ids"].shape[1] == 4


def shifted(dense):
    """Of a model that knows these texts, one row later than they are."""
    found = []
    for ids, logprobs in dense:
        knowing = logprobs.copy()
        knowing[np.arange(len(ids) - 1), ids[1:]] += 12
        knowing -= np.logaddexp.reduce(knowing, 1)[:, None]
        found.append((ids, np.roll(knowing, 1, 0)))
    return found


REFUSED = {
    "no configuration": (None, lambda d: d, {}, r"expected DistillKit's compression_config.yaml, .* got none"),
    "not yaml": ("{", lambda d: d, {}, r"compression .*: expected a readable YAML file"),
    "unknown type": ({**RECOMMENDED, "exact_dtype": "int8"}, lambda d: d, {}, "unknown type or term int8"),
    "other k": (
        {**RECOMMENDED, "k": 40},
        lambda d: d,
        {},
        "expected 50 numbers in bytepacked_indices per token .* got 63",
    ),
    "other d": ({**RECOMMENDED, "d": 5000}, lambda d: d, {}, "expected 82 numbers in bytepacked_indices per token"),
    "older columns": (LEGACY, lambda d: d, {}, "expected input_ids, exact_values, coeffs, packed_indices, got"),
    "small vocabulary": (
        {**RECOMMENDED, "d": 520},
        lambda d: d,
        {},
        r"expected at most the capture's 520 ids \(d\), got",
    ),
    "not deltas": ({**PUBLISHED, "delta_encoding": False}, lambda d: d, {}, "probabilities of .* in all for one token"),
    "shifted": (LOSSLESS, shifted, {}, "labels among the entries, and .* one row later. Shift the rows back"),
    "template": (
        LOSSLESS,
        lambda d: d,
        {"template": "openchat_3.5"},
        "got none in 6 rows: the template renders no such",
    ),
    "source": (LOSSLESS, lambda d: d, {"source_number": 1}, "source_number for c: expected none"),
    "top_k": (LOSSLESS, lambda d: d, {"top_k": 0}, "top_k for import: expected an integer from 1, got 0"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_a_capture_that_does_not_fit_is_refused_with_a_sentence(case, model, dense, tmp_path):
    configuration, change, options, expected = REFUSED[case]
    written = {"not deltas": PUBLISHED}.get(case, LOSSLESS if configuration == LOSSLESS else RECOMMENDED)
    source = capture(tmp_path / "c", [[one] for one in change(dense)], written)
    (source / CONFIGURATION).unlink()
    if configuration is not None:
        text = configuration if isinstance(configuration, str) else yaml.safe_dump(configuration)
        (source / CONFIGURATION).write_text(text)
    with pytest.raises(InputError, match=expected) as caught:
        take(source, model, tmp_path / "r", **options)
    assert "\n" not in str(caught.value)


def test_what_is_not_a_whole_capture_is_refused(model, dense, tmp_path):
    source = capture(tmp_path / "c", [[dense[0]]])
    raw = (source / "data_0.parquet").read_bytes()
    (source / "data_0.parquet").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(InputError, match=r"expected a Parquet file, got .*Download it again"):
        take(source, model, tmp_path / "r")
    parquet.write_table(pa.table({"input_ids": pa.array([[1]]), "messages": ["x"]}), source / "data_0.parquet")
    with pytest.raises(InputError, match="got input_ids, messages, without bytepacked_indices, compressed_logprobs"):
        take(source / "data_0.parquet", model, tmp_path / "r")


# --- answers of servers ---


def vllm_entries(ids, logprobs, k=12, texts=None):
    entries = [None]
    for n, token in enumerate(ids[1:]):
        top = np.argsort(-logprobs[n], kind="stable")[:k].tolist()
        ranks = {token: int((logprobs[n] > logprobs[n][token]).sum()) + 1, **{t: r for r, t in enumerate(top, 1)}}
        entries.append(
            {str(t): {"logprob": float(logprobs[n][t]), "rank": r, "decoded_token": "x"} for t, r in ranks.items()}
        )
    return entries


def sglang_answer(ids, logprobs, k=12, start=0):
    own, best = [[None, ids[start], None]], [None]
    for n in range(start + 1, len(ids)):
        row = logprobs[n - 1]
        top = np.argsort(-row, kind="stable")[:k].tolist()
        own.append([float(row[ids[n]]), ids[n], None])
        best.append([[float(row[t]), t, None] for t in top])
    return {"meta_info": {"input_token_logprobs": own, "input_top_logprobs": best, "finish_reason": {"type": "length"}}}


def dumped(n, ids, logprobs, row):
    """vLLM's RequestOutput, as JSON."""
    return {"request_id": n, "prompt": "", "prompt_token_ids": ids, "prompt_logprobs": vllm_entries(ids, logprobs)}


def batch(n, ids, logprobs, row):
    """A line of `vllm run-batch`."""
    body = {"choices": [{"prompt_logprobs": vllm_entries(ids, logprobs), "prompt_token_ids": ids, "text": "x"}]}
    return {"id": f"vllm-{n}", "custom_id": row["id"], "response": {"status_code": 200, "body": body}, "error": None}


def beside_messages(n, ids, logprobs, row):
    return {**row, "choices": [{"prompt_logprobs": vllm_entries(ids, logprobs)}]}


def sglang(n, ids, logprobs, row):
    return {"text": "", **sglang_answer(ids, logprobs)}


def sglang_later(n, ids, logprobs, row):
    return {**row, **sglang_answer(ids, logprobs, start=5)["meta_info"]}


def sglang_ids(n, ids, logprobs, row):
    return {"input_ids": ids, "response": sglang_answer(ids, logprobs, start=3)}


FORMS = [dumped, batch, beside_messages, sglang, sglang_later, sglang_ids]


def lines(path, form, model, dense, change=lambda n, line: line):
    rows = [change(n, form(n, *one, row)) for n, (one, row) in enumerate(zip(dense, model[2]))]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_stored_answers_become_the_models_own_representation(form, model, dense, tmp_path):
    own = model[3]
    source = lines(tmp_path / ("d.jsonl.gz" if form is batch else "d.jsonl"), form, model, dense)
    found = take(source, model, tmp_path / "r", shard_size=2)
    assert len(found) == len(own)
    for mine, row in zip(own, found):
        for column in ("input_ids", "predicted", "message", "start", "end", "topk_ids"):
            np.testing.assert_array_equal(mine[column], row[column])
        np.testing.assert_allclose(mine["topk_logprobs"], row["topk_logprobs"], rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(mine["ce"], row["ce"], atol=1e-4)
        assert mine["content_hash"] == row["content_hash"]
    tokens = sum(len(row["predicted"]) for row in own)
    assert found.manifest["released"] == {"exact_tokens": tokens, "renormalised_tokens": 0, "estimated_ce": 0}


@pytest.mark.parametrize("form", [dumped, sglang, sglang_ids], ids=lambda form: form.__name__)
def test_answers_may_be_cut_at_max_length(form, model, dense, tmp_path):
    found = take(lines(tmp_path / "d.jsonl", form, model, dense), model, tmp_path / "r", max_length=40, top_k=3)
    assert [len(row["input_ids"]) for row in found] == [40] * len(found)
    own = {row["id"]: row for row in model[3]}
    assert len(found) >= 4
    for row in found:
        mine = own[row["id"]]
        assert mine["content_hash"] == row["content_hash"]
        np.testing.assert_array_equal(mine["topk_ids"][: len(row["topk_ids"]), :3], row["topk_ids"])


def test_tool_calls_beside_stored_answers_are_rendered(model, dense, tmp_path):
    made, path, _, _ = model
    knows = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{{ m.tool_calls or '' }}"
    (tmp_path / "t.jinja").write_text(knows + "{{ '<|im_end|>\n' }}{% endfor %}")
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    ends = [{"role": "user", "content": "Go"}, {"role": "assistant", "content": "Done"}]
    messages = [ends[0], call, {"role": "tool", "content": "ok"}, ends[1]]
    own = fusechat_fuse.represent(path, [{"messages": messages}], tmp_path / "own", template=str(tmp_path / "t.jinja"))
    ids = torch.from_numpy(own[0]["input_ids"].astype(np.int64))
    with torch.inference_mode():
        logprobs = torch.log_softmax(made(input_ids=ids[None]).logits[0].double(), -1).numpy()
    line = {
        "messages": messages,
        "prompt_token_ids": ids.tolist(),
        "prompt_logprobs": vllm_entries(ids.tolist(), logprobs),
    }
    (tmp_path / "d.jsonl").write_text(json.dumps(line))
    found = take(tmp_path / "d.jsonl", model, tmp_path / "r", template=str(tmp_path / "t.jinja"))
    np.testing.assert_array_equal(found[0]["topk_ids"], own[0]["topk_ids"])
    assert found.manifest["counts"]["tool_call_turns"] == 1


def other_ids(n, line):
    return {**line, "prompt_token_ids": [*line["prompt_token_ids"][:-3], 300, 301, 302]}


def without(name):
    return lambda n, line: {key: value for key, value in line.items() if key != name}


def other_text(n, line):
    return {**line, "messages": [line["messages"][0], {"role": "assistant", "content": "another answer"}]}


def changed(entries, change):
    return [None, *[{token: change(token, one) for token, one in entry.items()} for entry in entries[1:]]]


def raised(n, line):
    return {**line, "prompt_logprobs": changed(line["prompt_logprobs"], lambda token, one: {**one, "logprob": -0.1})}


def beyond(n, line):
    entries = [
        entry and {"9000" if e["rank"] == 2 else token: e for token, e in entry.items()}
        for entry in line["prompt_logprobs"]
    ]
    return {**line, "prompt_logprobs": entries}


MISFITS = {
    "no log-probabilities": (dumped, without("prompt_logprobs"), {}, "got a file without. Ask the server"),
    "no ids": (
        dumped,
        without("prompt_token_ids"),
        {},
        "expected prompt_token_ids or input_ids or token_ids, or messages",
    ),
    "other ids": (dumped, other_ids, {}, r"of other tokens than the text's \(token 300\)"),
    "other messages": (beside_messages, other_text, {}, "log-probabilities of .* tokens, the text has"),
    "template": (
        dumped,
        lambda n, line: line,
        {"template": "openchat_3.5"},
        "got none in 6 rows: the template renders no",
    ),
    "more than one": (dumped, raised, {}, "expected probabilities of at most 1 in all"),
    "vocabulary": (dumped, beyond, {}, "expected token ids below the model's 640, got 9000"),
    "other form": (dumped, lambda n, line: {**line, "prompt_logprobs": [None, {"5": -1.0}]}, {}, "got a file without"),
}


@pytest.mark.parametrize("case", list(MISFITS))
def test_answers_that_do_not_fit_are_refused_with_a_sentence(case, model, dense, tmp_path):
    form, change, options, expected = MISFITS[case]
    with pytest.raises(InputError, match=expected) as caught:
        take(lines(tmp_path / "d.jsonl", form, model, dense, change), model, tmp_path / "r", **options)
    assert "\n" not in str(caught.value)


def test_lines_that_do_not_fit_among_others_are_counted(model, dense, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fusechat_fuse.capture.imported_rows.MAX_NON_FINITE_SHARE", 0.5)
    monkeypatch.setattr("fusechat_fuse.capture.manifest.MAX_NON_FINITE_SHARE", 0.5)

    def change(n, line):
        if n == 1:
            return other_ids(n, line)
        if n == 2:
            return without("prompt_logprobs")(n, line)
        if n == 3:  # asked with a smaller k
            return {**line, "prompt_logprobs": vllm_entries(line["prompt_token_ids"], dense[3][1], k=5)}
        return line

    source = lines(tmp_path / "d.jsonl", dumped, model, dense, change)
    argv = ["import", str(source), "--model_name_or_path", str(model[1]), "--output_dir", str(tmp_path / "r"), "--json"]
    assert main(argv) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["skipped"] == {"entries": 1, "ids": 1, "no_logprobs": 1}
    assert said["rows_read"] == 6


def test_an_encoder_knows_how_conversations_begin(model, openchat):
    tokenizer = tiny_runs.tokenizer()
    (opening,) = ConversationEncoder(tokenizer).openings()
    assert tokenizer.decode(opening) == "<|im_start|>system"
    assert ConversationEncoder(openchat).openings()[0].tolist() == [openchat.bos_token_id]
