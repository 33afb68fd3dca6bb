"""Batches hold what the rows say: padded, packed, cut, from memory or from disk."""

import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from fusechat_fuse.errors import InputError
from fusechat_fuse.training.collator import STATS, FusionCollator, first_conversations
from tests.helpers.fusion_rows import aligned_row, aligned_rows
from tests.helpers.reference_choice import distribution, reference_choice
from tests.helpers.tiny_runs import aligned_directory


def test_padded_batch_holds_what_the_rows_say():
    rows = aligned_rows(4, seed=3)
    batch = FusionCollator(preset="paper", pad_token_id=2, vocab_size=50)(rows)
    T = max(len(row["input_ids"]) for row in rows)
    assert batch["input_ids"].shape == (4, T)
    for b, row in enumerate(rows):
        n = len(row["input_ids"])
        assert batch["input_ids"][b].tolist() == row["input_ids"].tolist() + [2] * (T - n)
        assert batch["attention_mask"][b].tolist() == [1] * n + [0] * (T - n)
        expected = reference_choice(row, "min_ce", "token", 1.0)
        predicted = row["predicted"].tolist()
        for t in range(T):
            label = int(row["input_ids"][t]) if t in predicted else -100
            assert batch["labels"][b, t].item() == label
            assert batch["shift_labels"][b, t - 1].item() == (label if t else -100)
            if t in predicted:
                got = distribution(batch["target_ids"][b, t - 1], batch["target_probs"][b, t - 1])
                got = {u: x for u, x in got.items() if x > 0}
                assert got == pytest.approx(expected[predicted.index(t)], rel=1e-5)
    unlabelled = batch["shift_labels"] == -100
    assert (batch["target_ids"][unlabelled] == -1).all()
    assert not batch["target_probs"][unlabelled].any()
    assert batch["target_ids"].dtype == torch.int64
    assert batch["target_probs"].dtype == torch.float32


def test_packed_batch_is_the_padded_one_without_padding():
    rows = aligned_rows(3, seed=4)
    padded, packed = (
        FusionCollator(preset="paper")(rows),
        FusionCollator(preset="paper", packing=True, pad_to_multiple_of=16)(rows),
    )
    keep = padded["attention_mask"].bool()
    n = int(keep.sum())
    assert packed["input_ids"].shape[0] == 1
    assert packed["input_ids"].shape[1] % 16 == 0
    for name in ("input_ids", "labels", "shift_labels", "target_ids", "target_probs"):
        assert torch.equal(packed[name][0, :n], padded[name][keep])
    assert (packed["labels"][0, n:] == -100).all()
    starts = [0, *np.cumsum([len(row["input_ids"]) for row in rows])]
    assert (packed["position_ids"][0] == 0).nonzero()[:, 0].tolist() == starts
    assert torch.equal(packed["conversation_stats"][0], padded["conversation_stats"][:, 0])
    assert "attention_mask" not in packed


def test_stored_rows_are_decoded(tmp_path):
    rows = aligned_rows(3, seed=5)
    stored = list(datasets.load_from_disk(str(aligned_directory(tmp_path, rows))))
    collate = FusionCollator(preset="paper", vocab_size=50, fusion_function="source")
    got, expected = collate(stored), collate(rows)
    assert torch.equal(got["shift_labels"], expected["shift_labels"])
    kept = [sorted(x[x >= 0].tolist()) for x in got["target_ids"].flatten(0, 1)]
    assert kept == [sorted(x[x >= 0].tolist()) for x in expected["target_ids"].flatten(0, 1)]
    torch.testing.assert_close(got["target_probs"].sum(-1), expected["target_probs"].sum(-1), rtol=5e-3, atol=0)


def test_truncation_keeps_whole_predicted_tokens():
    row = aligned_row(6, tokens=20, predicted=8)
    cut = int(row["predicted"][4])  # the fifth predicted token is the first one left out
    batch = FusionCollator(preset="paper", max_length=cut)([row])
    assert batch["input_ids"].shape == (1, cut)
    assert (batch["labels"] != -100).sum() == 4
    assert (batch["target_ids"][0] >= 0).any(-1).sum() == (batch["target_probs"][0] > 0).any(-1).sum()
    stats = dict(zip(STATS, batch["conversation_stats"][0, 0].tolist()))
    assert stats["predicted_tokens"] == 4
    assert stats["cut_tokens"] == 20 - cut
    nothing = FusionCollator(preset="paper", max_length=int(row["predicted"][0]))([row, aligned_row(7)])
    assert (nothing["shift_labels"][0] == -100).all()


def test_stats_name_the_source_of_a_combined_row():
    row = aligned_row(8, source_better=True) | {"source_index": np.array([2])}
    mixed = aligned_row(9, source_better=False) | {"source_index": np.array([0, 1])}
    stats = FusionCollator(preset="paper")([row, mixed])["conversation_stats"][:, 0]
    assert stats[:, :2].tolist() == [[2.0, 1.0], [-1.0, 0.0]]
    assert stats[0, 2].item() == pytest.approx(float(row["mapped_mass"].astype(float).sum()))


@pytest.mark.parametrize(("column", "place"), [("input_ids", 3), ("source_ids", (0, 0))])
def test_ids_beyond_the_vocabulary_are_refused(column, place):
    row = aligned_row(10)
    row[column][place] = 64
    with pytest.raises(InputError, match=r"token id for conversation 'c10': expected less than .* of 50, got 64"):
        FusionCollator(preset="paper", vocab_size=50, fusion_function="source")([row])


def changed(column, change):
    row = aligned_row(10, predicted=8)  # of 20 tokens
    row[column] = change(row[column])
    return row


IMPOSSIBLE = {  # what is changed of a column, and what is said of it
    "the first token predicted": ("predicted", lambda x: np.arange(8), "expected indices from 1, got 0"),
    "one beyond the last": (
        "predicted",
        lambda x: x + 20 - x[-1],
        "expected ascending indices into 20 tokens, got .*20",
    ),
    "not ascending": ("predicted", lambda x: x[::-1].copy(), "expected ascending indices into 20 tokens"),
    "a mask": (
        "predicted",
        lambda x: np.ones(20, bool),
        r"expected integers of shape \[P\], got bool of shape \(20,\)",
    ),
    "negative ids": ("input_ids", lambda x: x - 60, "expected ids from 0, got -"),
    "too few distributions": ("source_ids", lambda x: x[:-1], "expected 8 predicted tokens, got 7"),
    "other widths": ("source_probs", lambda x: x[:, :-1], r"expected the shape of source_ids, \(8, 5\), got \(8, 4\)"),
    "log-probabilities for probabilities": ("source_probs", np.log, "expected probabilities from 0 to 1, got -"),
    "probabilities for log-probabilities": ("topk_logprobs", np.exp, "expected log-probabilities, at most 0, got 0"),
    "logarithms to base 10": ("topk_logprobs", lambda x: x / 9, "expected probabilities that add up to 1 at most"),
    "a mass above 1": (
        "source_probs",
        lambda x: x * 0 + 0.6,
        "expected probabilities that add up to 1 at most, got a sum of 3",
    ),
    "no number": ("source_probs", lambda x: x * np.nan, "expected probabilities from 0 to 1, got nan"),
    "percent": ("mapped_mass", lambda x: x * 100, "expected probabilities from 0 to 1, got "),
    "negative ce": ("ce", np.negative, "expected nats, at least 0, got -"),
    "ids as numbers with a point": ("topk_ids", lambda x: x * 1.0, "expected integers of shape .*, got float64"),
    "ragged lists": (
        "topk_ids",
        lambda x: [[1], [1, 2]],
        r"expected integers of shape \[P, K\], got lists that make no array",
    ),
    "one list for all": (
        "topk_ids",
        lambda x: x[0].tolist(),
        r"expected integers of shape \[P, K\], got int32 of shape \(4,\)",
    ),
    "no id": ("id", lambda x: None, "expected an aligned row, got one without it"),
}


@pytest.mark.parametrize(("column", "change", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_rows_whose_values_cannot_be_are_refused(column, change, message):
    with (
        np.errstate(divide="ignore"),
        pytest.raises(InputError, match=f"column '{column}' for conversation .*: {message}"),
    ):
        FusionCollator(preset="paper")([changed(column, change)])


@pytest.mark.parametrize("form", ["numpy", "torch", None])
def test_rows_of_datasets_in_any_format_make_the_same_batch(tmp_path, form):
    rows = aligned_rows(3, seed=5)
    lists = [{k: v.tolist() if hasattr(v, "tolist") else v for k, v in row.items()} for row in rows]
    collate = FusionCollator(preset="paper", vocab_size=50, fusion_tail="label")
    got, expected = collate(list(datasets.Dataset.from_list(lists).with_format(form))), collate(rows)
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-6)
    stored = datasets.load_from_disk(str(aligned_directory(tmp_path, rows)))
    if form is not None:  # numpy cuts binary fields that end in zeros
        with pytest.raises(
            InputError, match=r"stored row for conversation 'c5\d*': .* Read the data without with_format"
        ):
            collate(list(stored.with_format(form)))


def test_a_row_without_predicted_tokens_has_no_label():
    row = {n: v[:0] if hasattr(v, "shape") and n != "input_ids" else v for n, v in aligned_row(3).items()}
    for one in (row, {n: v.tolist() if hasattr(v, "tolist") else v for n, v in row.items()}):
        batch = FusionCollator(preset="paper", fusion_function="source")([one, aligned_row(4)])
        assert (batch["labels"][0] == -100).all()
        assert (batch["labels"][1] != -100).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fusion_function": "mince"}, "value for fusion_function: expected one of min_ce, avg_ce"),
        ({"ce_unit": "word"}, "value for ce_unit: expected one of token, byte"),
        ({"fuse_temperature": 0.0}, "value for fuse_temperature: expected more than 0"),
    ],
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        FusionCollator(preset="paper", **options)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("count", [-2, 0, 2, 4, 9])
def test_the_first_conversations_alone_keep_labels_and_figures(packing, count):
    rows = aligned_rows(4)
    batch = FusionCollator(preset="paper", packing=packing, pad_to_multiple_of=8)(rows)
    kept = first_conversations(batch, count)
    expected = sum(len(row["predicted"]) for row in rows[: max(count, 0)])
    assert [(kept[name] != -100).sum().item() for name in ("labels", "shift_labels")] == [expected] * 2
    assert kept["conversation_stats"].reshape(-1, 5)[:, 3].sum().item() == expected
    assert torch.equal(kept["input_ids"], batch["input_ids"])


def test_the_row_of_the_api_page_makes_the_batch_that_it_names():
    page = (Path(__file__).parents[1] / "docs/api.md").read_text()
    program, _ = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    names = {}
    exec(program, names)
    row, batch = names["row"], names["batch"]
    columns = {
        name for cell in re.findall(r"^\| (`.*?`) \|", page, re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)
    }
    assert columns - {*row} == {"source_token_ce", "content_hash", "source_index"}  # of no need to the defaults
    assert {*row} <= columns
    assert batch["shift_labels"].tolist() == [[-100, -100, -100, 402, 2, -100]]
    pivot, source = 1.31 / 4, 0.127 * 2 / 4  # nats per byte
    share = 1 / (1 + np.exp(4 * (source - pivot)))  # docs/method.md, "Choice", `avg_ce_slice`
    assert distribution(batch["target_ids"][0, 3], batch["target_probs"][0, 3])[402] == pytest.approx(
        share * 0.8 + (1 - share) * np.exp(-1.2), rel=1e-5
    )
