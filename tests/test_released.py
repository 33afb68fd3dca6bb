"""`import_released`: data of the authors' shape as a representation or an aligned directory.

Golden ids and top-10 are those recorded from the authors' code (`tests/golden`), padded to one length as they are
released; what is exact is tried on a real model, whose full log-softmax is known.
"""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict

import fusechat_fuse
from fusechat_fuse.cli import main
from fusechat_fuse.errors import InputError
from tests.helpers import real_tokenizers, tiny_runs
from tests.helpers.tiny_models import tiny_model

GOLDEN = Path(__file__).parent / "golden"
PAD_TO = 700


def released_row(name, ids, labels, top_ids, logits, metric_ce, **more):
    """One conversation as the authors write it: everything padded on the right to one length."""
    n, K = top_ids.shape
    pad = PAD_TO - n
    return {
        "conv_id": name,
        "input_ids": [*map(int, ids), *[0] * pad],
        "attention_mask": [1] * n + [0] * pad,
        "labels": [*map(int, labels), *[-100] * pad],
        "per_step_logits": [*logits.tolist(), *[[0.0] * K] * pad],
        "per_step_indices": [*top_ids.tolist(), *[[0] * K] * pad],
        "metric_ce": metric_ce,
        **more,
    }


@pytest.fixture(scope="module")
def golden():
    """(recorded samples of openchat, their top-10 ids and seeded logits, the released alignment of qwen's to them)."""
    recorded = json.loads((GOLDEN / "inputs.json").read_text())["openchat"]
    arrays = np.load(GOLDEN / "alignment.npz")
    z = -np.sort(-np.random.default_rng(0).normal(0, 4, (3503, 10)), 1).astype(np.float16).astype(np.float64)
    ends = np.cumsum(arrays["openchat__qwen/row_len"])
    aligned = [row.tolist() for row in np.split(arrays["openchat__qwen/idx"], ends[:-1])]
    return recorded, arrays["openchat/topk_ids"], z, aligned


def labels_of(tokenizer, ids):
    """The answer of one question: what follows `Assistant:`."""
    ids = list(ids)
    first = ids.index(tokenizer.convert_tokens_to_ids("<|end_of_turn|>")) + 1
    first += next(n for n, token in enumerate(ids[first:]) if tokenizer.decode([token]).strip() == ":") + 1
    return [-100] * first + ids[first:]


@pytest.fixture(scope="module")
def rows(golden):
    recorded, top_ids, z, aligned = golden
    tokenizer, found, start = real_tokenizers.openchat(), [], 0
    for n, (name, sample) in enumerate(recorded.items()):
        ids = sample["input_ids"]
        if len(ids) > PAD_TO:
            start += len(ids)
            continue
        part = slice(start, start + len(ids))
        pad = PAD_TO - len(ids)
        fused = [*aligned[part], *[[0]] * pad]
        more = {
            "fused_per_step_indices": fused,
            "fused_per_step_logits": [[8.0 - 0.5 * k for k in range(len(row))] for row in fused],
            "fused_metric_ce": 1.0 + n,
        }
        labels = labels_of(tokenizer, ids)
        found.append(released_row(name, ids, labels, top_ids[part], z[part], 7.0 + n, **more))
        start += len(ids)
    return found


@pytest.fixture(scope="module")
def openchat(tmp_path_factory):
    path = tmp_path_factory.mktemp("openchat")
    real_tokenizers.openchat().save_pretrained(path)
    return path


def saved(rows, path, without=()):
    Dataset.from_list([{k: v for k, v in row.items() if not k.startswith(without)} for row in rows]).save_to_disk(path)
    return path


def test_golden_distributions_become_a_representation(rows, golden, openchat, tmp_path, capsys):
    source = saved(rows, tmp_path / "released", ("fused",))
    argv = ["import", str(source), "--model_name_or_path", str(openchat), "--output_dir", str(tmp_path / "r")]
    assert main([*argv, "--template", "openchat_3.5", "--shard_size", "4", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    found = fusechat_fuse.load_representation(tmp_path / "r")
    given = {row["conv_id"]: row for row in rows}
    assert len(found) + sum(said["skipped"].values()) == len(rows)
    assert len(found) >= len(rows) - 2
    assert said["exact_tokens"] == 0
    assert said["renormalised_tokens"] == sum(len(row["predicted"]) for row in found)
    for row in found:
        one = given[row["id"]]
        np.testing.assert_array_equal(row["input_ids"], one["input_ids"][: len(row["input_ids"])])
        at = row["predicted"] - 1  # a row stands for the prediction of the token after it
        z = torch.tensor(one["per_step_logits"], dtype=torch.float64)[at]
        np.testing.assert_array_equal(row["topk_ids"], np.array(one["per_step_indices"])[at])
        np.testing.assert_allclose(row["topk_logprobs"], torch.log_softmax(z, 1), rtol=1e-3, atol=1e-3)
        labelled = {n for n, label in enumerate(one["labels"]) if label != -100}
        assert set(row["predicted"].tolist()) <= labelled
        assert len(row["predicted"]) >= len(labelled) - 1  # a blank that stands before the answer is none of it
        assert row["ce"].mean() == pytest.approx(one["metric_ce"], rel=1e-4)


def test_golden_alignment_becomes_an_aligned_directory(rows, openchat, tmp_path):
    source = saved(rows, tmp_path / "released")
    found = fusechat_fuse.import_released(source, openchat, tmp_path / "a", template="openchat_3.5")
    given = {row["conv_id"]: row for row in rows}
    answered = 0
    for row in found:
        one = given[row["id"]]
        assert row["source_ce"] == one["fused_metric_ce"]
        assert "source_tokens" not in row
        for p, t in enumerate(row["predicted"]):
            ids, logits = one["fused_per_step_indices"][t - 1], one["fused_per_step_logits"][t - 1]
            kept = row["source_ids"][p] >= 0
            assert row["source_ids"][p][kept].tolist() == ids
            if ids:
                expected = torch.softmax(torch.tensor(logits), 0)
                np.testing.assert_allclose(row["source_probs"][p][kept], expected, rtol=2e-3)
            assert (row["mapped_mass"][p] > 0) == (len(ids) > 1)
            answered += len(ids) > 1
    assert found.manifest["kind"] == "aligned"
    assert found.manifest["released"]["answered_tokens"] == answered > 0
    assert 0.5 < found.manifest["certificate"]["all"]["coverage"] < 1


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """A model's own representation, and the same distributions in the released shape with every cross-entropy."""
    path = tmp_path_factory.mktemp("known")
    model, tokenizer = tiny_model("Llama", seed=3, vocab_size=tiny_runs.VOCAB).eval(), tiny_runs.tokenizer()
    texts = [line for line in real_tokenizers.tiny_corpus() if 20 < len(line) < 60 and "<" not in line][:40]
    messages = [
        [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, texts[n : n + 4])]
        for n in range(0, 40, 4)
    ]
    data = [{"id": str(n), "messages": one} for n, one in enumerate(messages)]
    own = fusechat_fuse.represent(model, data, path / "own", tokenizer=tokenizer, template="openchat_3.5")
    rows = []
    for row in own:
        ids = torch.from_numpy(row["input_ids"].astype(np.int64))
        with torch.inference_mode():
            z = model(input_ids=ids[None]).logits[0].double()
        ce = torch.nn.functional.cross_entropy(z[:-1], ids[1:], reduction="none")
        top, top_ids = z.topk(10)
        labels = np.full(len(ids), -100)
        labels[row["predicted"]] = ids[row["predicted"]]
        more = {"per_step_metric_ce": [*ce.tolist(), *[0.0] * (PAD_TO - len(ids) + 1)]}
        mean = float(row["ce"].mean())
        rows.append(released_row(row["id"], ids, labels, top_ids.numpy(), top.numpy(), mean, **more))
    tokenizer.save_pretrained(path / "tokenizer")
    return path, own, rows


def test_known_cross_entropies_give_true_log_probabilities(known, tmp_path):
    path, own, rows = known
    half = len(rows) // 2
    parts = {"0": Dataset.from_list(rows[:half]), "1": Dataset.from_list(rows[half:])}
    DatasetDict(parts).save_to_disk(tmp_path / "released")
    found = fusechat_fuse.import_released(
        tmp_path / "released", path / "tokenizer", tmp_path / "r", template="openchat_3.5", encoding="compact"
    )
    assert found.ids == own.ids
    exact = 0
    for a, b in zip(own, found):
        np.testing.assert_array_equal(a["predicted"], b["predicted"])
        np.testing.assert_array_equal(a["message"], b["message"])
        np.testing.assert_array_equal(a["end"], b["end"])
        np.testing.assert_allclose(a["ce"], b["ce"], atol=1e-4)
        listed = (b["topk_ids"] == b["input_ids"][b["predicted"]][:, None]).any(1)
        np.testing.assert_allclose(a["topk_logprobs"][listed], b["topk_logprobs"][listed], rtol=2e-3, atol=2e-3)
        assert a["content_hash"] == b["content_hash"]
        exact += int(listed.sum())
    assert found.manifest["released"]["exact_tokens"] == exact > 0
    assert found.manifest["released"]["estimated_ce"] == 0


def test_masked_places_hold_no_cross_entropies(known, tmp_path):
    path, own, rows = known
    masked = {**rows[0], "per_step_metric_ce": [0.0] * len(rows[0]["per_step_metric_ce"])}
    source = saved([masked, rows[1]], tmp_path / "released")
    found = fusechat_fuse.import_released(source, path / "tokenizer", tmp_path / "r", template="openchat_3.5")
    assert found.manifest["released"]["estimated_ce"] == len(found[0]["predicted"])
    assert found[0]["ce"].mean() == pytest.approx(own[0]["ce"].mean(), rel=1e-4)
    np.testing.assert_allclose(np.exp(found[0]["topk_logprobs"].astype(np.float64)).sum(1), 1, atol=5e-3)


def test_a_mean_over_all_labels_is_not_taken_for_that_of_the_answers(known, tmp_path):
    """Without a mask on instructions every token has a label, and the mean is over all of them."""
    path, _, rows = known
    row, n = dict(rows[1]), sum(rows[1]["attention_mask"])
    ce = np.array(row.pop("per_step_metric_ce"))[: n - 1]
    row |= {"labels": [*row["input_ids"][:n], *row["labels"][n:]], "metric_ce": float(ce.mean())}
    found = fusechat_fuse.import_released(
        saved([row], tmp_path / "released"), path / "tokenizer", tmp_path / "r", template="openchat_3.5"
    )[0]
    z = np.array(row["per_step_logits"][: n - 1])
    hit = np.array(row["per_step_indices"][: n - 1]) == np.array(row["input_ids"][1:n])[:, None]
    listed = np.log(np.exp(z).sum(1)) - np.where(hit.any(1), (z * hit).sum(1), z.min(1))
    np.testing.assert_allclose(found["ce"], (listed * ce.mean() / listed.mean())[found["predicted"] - 1], rtol=1e-4)


def shifted(row, by, *columns):
    return {**row, **{name: [*row[name][by:], *row[name][:by]] for name in columns}}


TABLE = ("per_step_logits", "per_step_indices")


@pytest.mark.parametrize(
    ("columns", "by", "expected"),
    [
        (TABLE, 1, r"per_step_indices for released: expected the row of position t .* one row earlier\. Shift"),
        (TABLE, -1, r"the labels among the entries, and \d\d% one row later"),
        ([f"fused_{name}" for name in TABLE], 1, r"fused_per_step_indices for released: .* one row earlier"),
    ],
)
def test_shifted_rows_are_refused(rows, openchat, tmp_path, columns, by, expected):
    source = saved([shifted(row, by, *columns) for row in rows], tmp_path / "released")
    with pytest.raises(InputError, match=expected):
        fusechat_fuse.import_released(source, openchat, tmp_path / "a", template="openchat_3.5")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda row: {"metric_ce": 0.5}, r"metric_ce is 0\.5, and the listed logits allow no less than \d"),
        (lambda row: {"per_step_metric_ce": [1e-3] * PAD_TO}, r"per_step_metric_ce is 0\.001, and the listed"),
        (lambda row: {"per_step_logits": [[float("nan")] * 10] * PAD_TO}, r"logits for token \d+ of \d+ are not fin"),
    ],
)
def test_distributions_that_cannot_be_those_of_the_tokens_are_refused(known, tmp_path, change, expected):
    path, _, rows = known
    bad = rows[1] | change(rows[1])
    many = saved([rows[0], bad], tmp_path / "many")
    with pytest.raises(InputError, match=f"distributions for many: .*1% of the conversations .first: {expected}"):
        fusechat_fuse.import_released(many, path / "tokenizer", tmp_path / "r", template="openchat_3.5")
    assert not (tmp_path / "r" / "manifest.json").exists()


def test_few_conversations_may_be_refused(known, tmp_path, monkeypatch):
    from fusechat_fuse.capture import imported_rows, manifest

    for module in (manifest, imported_rows):
        monkeypatch.setattr(module, "MAX_NON_FINITE_SHARE", 0.2)
    path, own, rows = known
    source = saved([*rows[:9], rows[9] | {"metric_ce": 0.5}], tmp_path / "released")
    found = fusechat_fuse.import_released(source, path / "tokenizer", tmp_path / "r", template="openchat_3.5")
    assert found.ids == own.ids[:9]
    assert found.manifest["counts"]["skipped"] == {"metric": 1}


def test_negative_and_doubled_rows_are_left_out(known, tmp_path):
    path, own, rows = known
    by_token = [-0.25, *rows[3]["per_step_metric_ce"][1:]]
    odd = [rows[2] | {"metric_ce": -1.0}, rows[3] | {"per_step_metric_ce": by_token}, rows[0] | {"metric_ce": 7.0}]
    source = saved([*rows[:2], *odd], tmp_path / "released")
    found = fusechat_fuse.import_released(source, path / "tokenizer", tmp_path / "r", template="openchat_3.5")
    assert found.manifest["counts"]["skipped"] == {"metric": 2, "repeated": 1}
    assert [row["ce"].mean() for row in found] == pytest.approx([row["ce"].mean() for row in own][:2], rel=1e-4)
    details = [json.loads(line)["detail"] for line in (tmp_path / "r" / "skipped.jsonl").read_text().splitlines()]
    assert details == ["a cross-entropy of -1, below 0", "a cross-entropy of -0.25, below 0", "the same ids as row 0"]


@pytest.mark.parametrize(
    ("size", "got"), [(-8, r"[\d,]+ bytes without its end"), (100, "100 bytes without"), (0, "nothing")]
)
def test_a_cut_file_is_named(known, tmp_path, size, got):
    path, _, rows = known
    (file,) = saved(rows, tmp_path / "released").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(InputError, match=f"data for .*{file.name}: expected a whole file, got {got}.* Download it"):
        fusechat_fuse.import_released(tmp_path / "released", path / "tokenizer", tmp_path / "r")


def test_imported_data_align_and_train(known, tmp_path):
    path, _, rows = known
    pivot = tiny_runs.pivot_directory(tmp_path / "pivot")
    for name, part in (("pivot_r", rows), ("source_r", rows[:-1])):
        released = saved(part, tmp_path / f"released_{name}", ("per_step_metric",))
        fusechat_fuse.import_released(released, path / "tokenizer", tmp_path / name, template="openchat_3.5")
    fusechat_fuse.align(tmp_path / "pivot_r", tmp_path / "source_r", tmp_path / "aligned")
    argv = ["train", "--model_name_or_path", str(pivot), "--data_path", str(tmp_path / "aligned"), "--max_steps", "2"]
    assert main([*argv, "--output_dir", str(tmp_path / "target"), "--total_batch_size", "4"]) == 0
    assert (tmp_path / "target" / "config.json").exists()


def test_aligned_data_train(rows, openchat, tmp_path):
    found = fusechat_fuse.import_released(
        saved(rows, tmp_path / "released"), openchat, tmp_path / "a", template="openchat_3.5"
    )
    model = tiny_model("Llama", vocab_size=32_002)

    def trainer(**changes):
        options = {"max_steps": 1, "max_length": PAD_TO, **changes}
        return fusechat_fuse.FusionTrainer(model, tiny_runs.config(tmp_path / "out", **options), train_dataset=found)

    assert np.isfinite(trainer(ce_unit="token").train().training_loss)
    for function in ("avg_ce_slice", "min_ce"):  # the number of the source's tokens was not released
        with pytest.raises(InputError, match=r"per byte for conversation 'p00_short': .* Set ce_unit to token\."):
            trainer(fusion_function=function)


def test_imported_data_are_inspected_and_combined(rows, openchat, tmp_path, capsys):
    for name, shift in (("a", 0.0), ("b", 1.5)):
        changed = [{**row, "fused_metric_ce": row["fused_metric_ce"] + shift} for row in rows]
        source = saved(changed, tmp_path / f"released_{name}")
        fusechat_fuse.import_released(source, openchat, tmp_path / name, template="openchat_3.5")
    assert main(["inspect", str(tmp_path / "a")]) == 0
    assert ", 0 exact tokens, " in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "a"), "--html", str(tmp_path / "page.html")]) == 2
    assert "got imported data" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"expected source_tokens and source_bytes, got a row without .*to token\."):
        fusechat_fuse.combine([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert not (tmp_path / "c").exists()
    fusechat_fuse.combine([tmp_path / "a", tmp_path / "b"], tmp_path / "c", function="min_ce", ce_unit="token")
    combined = fusechat_fuse.load_representation(tmp_path / "c")
    assert {int(row["source_index"][0]) for row in combined} == {0}  # of the smaller cross-entropy


@pytest.fixture(scope="module")
def plain_texts(known):
    """FuseLLM's data, as its released code writes them: ids without padding, a label at every token, an EOS at the end,
    float16; (ids, top-10 logits, their ids, every token's cross-entropy) of each text."""
    path, _, _ = known
    tokenizer, model = tiny_runs.tokenizer(), tiny_model("Llama", seed=3, vocab_size=tiny_runs.VOCAB).eval()
    found = []
    for text in [line for line in real_tokenizers.tiny_corpus() if 20 < len(line) < 60 and "<" not in line][:6]:
        ids = torch.tensor(tokenizer(text + tokenizer.eos_token, add_special_tokens=False)["input_ids"])
        with torch.inference_mode():
            z = model(input_ids=ids[None]).logits[0].half().double()
        ce = torch.nn.functional.cross_entropy(z[:-1], ids[1:], reduction="none").half()
        top, top_ids = z.topk(10)
        found.append((text, ids.tolist(), top.tolist(), top_ids.tolist(), ce.tolist()))
    return path / "tokenizer", found


def plain_text_rows(texts, by_token, sources):
    rows = []
    for n, (_, ids, top, top_ids, ce) in enumerate(texts):
        row = {"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)}
        row |= {"per_step_logits": top, "per_step_indices": top_ids}
        row |= {"per_step_metric_ce": [*ce, 0.0]} if by_token else {"metric_ce": float(np.mean(ce))}
        for number in sources:
            kept = [[], [5]] + [each[: 3 + number] for each in top_ids[2:]]
            row[f"per_step_aligned_indices_{number}"] = kept
            row[f"per_step_aligned_logits_{number}"] = [z[: len(each)] for z, each in zip(top, kept)]
            own_ce = [1.5 + n + number] * 7 + [0.0] * 9  # of the source's own tokens, padded
            mean = {f"per_step_metric_ce_aligned_{number}": own_ce} if by_token else {}
            row |= mean or {f"metric_ce_aligned_{number}": own_ce[0]}
        rows.append(row)
    return rows


@pytest.mark.parametrize("by_token", [False, True])
def test_plain_text_and_columns_of_fusellm_are_taken(plain_texts, tmp_path, by_token):
    tokenizer, texts = plain_texts
    source = saved(plain_text_rows(texts, by_token, sources=(0, 1)), tmp_path / "released")
    argv = ["import", str(source), "--model_name_or_path", str(tokenizer), "--template", "text", "--source_number", "1"]
    assert main([*argv, "--output_dir", str(tmp_path / "a")]) == 0
    found = fusechat_fuse.load_representation(tmp_path / "a")
    assert found.manifest["kind"] == "aligned"
    assert found.manifest["source"]["model"] == "released (source 1)"
    assert len(found) == len(texts)
    for n, (row, (text, ids, _top, top_ids, ce)) in enumerate(zip(found, texts)):
        size = len(text.encode())
        np.testing.assert_array_equal(row["input_ids"], ids)
        np.testing.assert_array_equal(row["predicted"], np.arange(1, len(ids)))
        assert (row["start"][1:] == row["end"][:-1]).all()
        assert (row["start"][-1], row["end"][-1]) == (size, size + 1)  # the EOS
        np.testing.assert_array_equal(row["topk_ids"], top_ids[:-1])
        assert row["ce"].mean() == pytest.approx(np.mean(ce), rel=1e-3)
        if by_token:
            np.testing.assert_allclose(row["ce"], ce, rtol=1e-3)
        assert row["source_ce"] == 2.5 + n
        assert row["source_ids"][2:, :4].tolist() == [each[:4] for each in top_ids[2:-1]]
        assert row["mapped_mass"].tolist() == [0.0, 0.0] + [1.0] * (len(ids) - 3)
    assert found.manifest["released"]["estimated_ce"] == (
        0 if by_token else found.manifest["counts"]["predicted_tokens"]
    )


def test_a_source_of_several_must_be_named(plain_texts, tmp_path, capsys):
    tokenizer, texts = plain_texts
    source = saved(plain_text_rows(texts, False, sources=(0, 1)), tmp_path / "released")
    for number, got in ((None, "None"), (2, "2")):
        with pytest.raises(InputError, match=f"source_number for the released data: expected one of 0, 1, got {got}"):
            fusechat_fuse.import_released(source, tokenizer, tmp_path / "a", template="text", source_number=number)
    one = saved(plain_text_rows(texts, False, sources=(0,)), tmp_path / "one")
    assert fusechat_fuse.import_released(one, tokenizer, tmp_path / "a", template="text").manifest["kind"] == "aligned"
    with pytest.raises(InputError, match=r"all of it has labels, as plain text has \(template text\)"):
        fusechat_fuse.import_released(one, tokenizer, tmp_path / "b", template="openchat_3.5")


def test_both_sources_of_one_data_set_combine(plain_texts, tmp_path):
    tokenizer, texts = plain_texts
    source = saved(plain_text_rows(texts, False, sources=(0, 1)), tmp_path / "released")
    for number in (0, 1):
        out = tmp_path / f"a{number}"
        fusechat_fuse.import_released(source, tokenizer, out, template="text", source_number=number)
    options = {"function": "min_ce", "ce_unit": "token"}
    made = fusechat_fuse.combine([tmp_path / "a0", tmp_path / "a1"], tmp_path / "c", **options)
    assert datasets.load_from_disk(tmp_path / "c")["source_tokens"][:] == [None] * len(texts)
    assert made["taken"] == {"released (source 0)": len(texts), "released (source 1)": 0}


def test_plain_texts_of_two_models_align(plain_texts, tmp_path):
    tokenizer, texts = plain_texts
    for name, part in (("pivot", texts), ("source", texts[:5])):
        source = saved(plain_text_rows(part, True, sources=()), tmp_path / f"released_{name}")
        fusechat_fuse.import_released(source, tokenizer, tmp_path / name, template="text")
    fusechat_fuse.align(tmp_path / "pivot", tmp_path / "source", tmp_path / "a")
    aligned = fusechat_fuse.load_representation(tmp_path / "a")
    assert len(aligned) == 5
    assert aligned.manifest["certificate"]["all"]["coverage"] == 1


def test_an_unlabelled_answer_is_context(known, tmp_path):
    path, _, rows = known
    first = dict(rows[0])
    places = np.flatnonzero(np.array(first["labels"]) != -100)
    cut = np.flatnonzero(np.diff(places) > 1)[0] + 1
    labels = np.array(first["labels"])
    labels[places[:cut]] = -100
    first["labels"] = labels.tolist()
    found = fusechat_fuse.import_released(
        saved([first], tmp_path / "released"), path / "tokenizer", tmp_path / "r", template="openchat_3.5"
    )
    np.testing.assert_array_equal(found[0]["predicted"], places[cut:])


def test_a_conversation_cut_off_is_taken(known, tmp_path):
    path, own, rows = known
    whole, length = rows[1], len(own[1]["input_ids"]) - 4
    cut = {name: value[:length] if isinstance(value, list) else value for name, value in whole.items()}
    found = fusechat_fuse.import_released(
        saved([cut], tmp_path / "released"),
        path / "tokenizer",
        tmp_path / "r",
        template="openchat_3.5",
        max_length=length,
    )
    np.testing.assert_array_equal(found[0]["input_ids"], own[1]["input_ids"][:length])
    np.testing.assert_array_equal(found[0]["predicted"], own[1]["predicted"][own[1]["predicted"] < length])


def test_an_interrupted_import_goes_on(known, tmp_path, monkeypatch):
    path, _, rows = known
    source = saved(rows, tmp_path / "released")

    def take(name):
        return fusechat_fuse.import_released(
            source, path / "tokenizer", tmp_path / name, template="openchat_3.5", shard_size=2
        )

    from fusechat_fuse.capture import released

    whole, write = take("whole"), released._Writer.write

    def dies(self, shard, *arguments):
        if shard == 3:
            raise KeyboardInterrupt
        write(self, shard, *arguments)

    monkeypatch.setattr(released._Writer, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        take("again")
    monkeypatch.undo()
    again = take("again")
    assert again.manifest["released"] == whole.manifest["released"]
    for file in sorted((tmp_path / "whole").glob("shard-*")):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_what_cannot_be_imported_gets_a_sentence(known, rows, tmp_path):
    path, _, own = known
    tokenizer = path / "tokenizer"
    with pytest.raises(InputError, match="save_to_disk wrote"):
        fusechat_fuse.import_released(tmp_path / "nothing", tokenizer, tmp_path / "r")
    saved(own, tmp_path / "few", ("per_step_logits",))
    with pytest.raises(InputError, match="expected input_ids, attention_mask, labels, per_step_logits"):
        fusechat_fuse.import_released(tmp_path / "few", tokenizer, tmp_path / "r")
    with pytest.raises(InputError, match="shard_size for import: expected an integer from 1, got 0"):
        fusechat_fuse.import_released(tmp_path / "few", tokenizer, tmp_path / "r", shard_size=0)
    saved([{**row, "metric_ce": "1"} for row in own], tmp_path / "words")
    saved(own, tmp_path / "numbers")
    with pytest.raises(InputError, match="expected the same in all splits"):
        fusechat_fuse.import_released([tmp_path / "words", tmp_path / "numbers"], tokenizer, tmp_path / "r")
    saved(rows, tmp_path / "other", ("fused",))
    with pytest.raises(InputError, match="Give the tokenizer and the template that made them"):
        fusechat_fuse.import_released(tmp_path / "other", tokenizer, tmp_path / "r", template="openchat_3.5")
    assert not (tmp_path / "r").exists()


def test_conversations_without_a_finite_cross_entropy_are_left_out(rows, openchat, tmp_path):
    odd = [
        {**rows[0], "metric_ce": float("nan")},
        {**rows[1], "fused_metric_ce": float("inf")},
        {**rows[2], "metric_ce": None},
    ]
    source = saved([*odd, *rows[3:]], tmp_path / "released")
    found = fusechat_fuse.import_released(source, openchat, tmp_path / "a", template="openchat_3.5")
    assert found.manifest["counts"]["skipped"]["no_metric"] == 3
    assert all(np.isfinite(row["source_ce"]) for row in found)


def test_rows_that_do_not_fit_are_skipped_and_counted(known, tmp_path):
    path, own, rows = known
    odd = dict(rows[2])
    odd["labels"] = [label if label == -100 else label + 1 for label in odd["labels"]]
    short = {**rows[3], **{name: rows[3][name][:5] for name in ("per_step_logits", "per_step_indices")}}
    found = fusechat_fuse.import_released(
        saved([*rows[:2], odd], tmp_path / "released"), path / "tokenizer", tmp_path / "r", template="openchat_3.5"
    )
    assert found.ids == own.ids[:2]
    assert found.manifest["counts"]["skipped"] == {"labels": 1}
    again = fusechat_fuse.import_released(
        saved([rows[0], short], tmp_path / "b"), path / "tokenizer", tmp_path / "s", template="openchat_3.5"
    )
    assert again.ids == own.ids[:1]
    assert again.manifest["counts"]["skipped"] == {"positions": 1}
