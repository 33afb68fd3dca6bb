"""Fusion functions and batches, against loops written from the definitions."""

import math

import numpy as np
import pytest
import torch

from fusechat_fuse.errors import InputError
from fusechat_fuse.store.rows import encode_row
from fusechat_fuse.training.choice import conversation_ce, row_targets
from fusechat_fuse.training.collator import STATS, FusionCollator
from tests.helpers.fusion_rows import aligned_row, aligned_rows


def distribution(ids, probs):
    out = {}
    for u, p in zip(ids.tolist(), probs.tolist()):
        if u >= 0:
            out[u] = out.get(u, 0.0) + p
    return out


def oracle(row, function, unit, temperature):
    """Per predicted token {id: probability}, in plain Python floats."""
    pivot, source = [], []
    for p in range(len(row["predicted"])):
        weights = [math.exp(float(x) / temperature) for x in row["topk_logprobs"][p]]
        pivot.append({int(u): w / sum(weights) for u, w in zip(row["topk_ids"][p], weights)})
        pairs = [(int(u), float(x)) for u, x in zip(row["source_ids"][p], row["source_probs"][p]) if u >= 0]
        mass, total = sum(x for _, x in pairs), sum(x ** (1 / temperature) for _, x in pairs)
        source.append({u: mass * x ** (1 / temperature) / total for u, x in pairs})
    pivot_ce, source_ce = sum(map(float, row["ce"])) / len(pivot), row["source_ce"]
    if unit == "byte":
        pivot_ce *= len(pivot) / sum(int(e - s) for s, e in zip(row["start"], row["end"]))
        source_ce *= row["source_tokens"] / row["source_bytes"]
    if function == "source" or (function == "min_ce" and source_ce < pivot_ce):
        return source
    if function == "min_ce":
        return pivot
    if function == "min_ce_token":
        better = [s < c and m > 0 for s, c, m in zip(row["source_token_ce"], row["ce"], row["mapped_mass"])]
        return [s if b else p for b, s, p in zip(better, source, pivot)]
    weight = math.exp(-source_ce) / (math.exp(-source_ce) + math.exp(-pivot_ce))
    return [{u: weight * s.get(u, 0.0) + (1 - weight) * p.get(u, 0.0) for u in {*s, *p}} for s, p in zip(source, pivot)]


@pytest.mark.parametrize("function", ["min_ce", "avg_ce", "min_ce_token", "source"])
@pytest.mark.parametrize("unit", ["token", "byte"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_fusion_functions_equal_the_oracle(function, unit, temperature):
    for seed in range(6):
        row = aligned_row(seed, vocab_size=9)  # a small vocabulary: pivot and source name the same ids
        got = row_targets(row, function=function, ce_unit=unit, fuse_temperature=temperature)
        for p, expected in enumerate(oracle(row, function, unit, temperature)):
            mine = {u: x for u, x in distribution(got.ids[p], got.probs[p]).items() if x > 0}
            assert mine == pytest.approx({u: x for u, x in expected.items() if x > 0}, rel=2e-5)


def test_the_unit_of_ce_can_turn_the_choice():
    row = aligned_row(0)
    row |= {
        "ce": np.full(8, 1.0, np.float32),
        "source_ce": 1.5,
        "source_tokens": 4,
        "source_bytes": int(row["end"][-1]),
    }
    assert row_targets(row, ce_unit="token").source_share == 0  # 1.5 nats per (longer) token
    assert row_targets(row, ce_unit="byte").source_share == 1  # 6 nats for the text instead of 8
    pivot, source = conversation_ce(row, "byte")
    assert (pivot, source) == (pytest.approx(8 / row["end"][-1]), pytest.approx(6 / row["end"][-1]))


def test_a_tie_and_a_source_without_answer_keep_the_pivot():
    row = aligned_row(1)
    row |= {"ce": np.full(8, 0.75, np.float32), "source_ce": 0.75}
    assert row_targets(row).source_share == 0
    for function in ("min_ce", "avg_ce"):
        row["source_ce"] = float("nan")
        assert row_targets(row, function=function).source_share == 0
    row["source_token_ce"] = np.full(8, 0.1, np.float32)
    row["mapped_mass"] = np.zeros(8, np.float16)
    assert row_targets(row, function="min_ce_token").source_share == 0


def test_avg_ce_names_each_id_once():
    row = aligned_row(2, vocab_size=7)
    got = row_targets(row, function="avg_ce")
    for ids in got.ids:
        kept = ids[ids >= 0]
        assert len(set(kept.tolist())) == len(kept)


def test_padded_batch_holds_what_the_rows_say():
    rows = aligned_rows(4, seed=3)
    batch = FusionCollator(pad_token_id=2, vocab_size=50)(rows)
    T = max(len(row["input_ids"]) for row in rows)
    assert batch["input_ids"].shape == (4, T)
    for b, row in enumerate(rows):
        n = len(row["input_ids"])
        assert batch["input_ids"][b].tolist() == row["input_ids"].tolist() + [2] * (T - n)
        assert batch["attention_mask"][b].tolist() == [1] * n + [0] * (T - n)
        expected = oracle(row, "min_ce", "token", 1.0)
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
    padded, packed = FusionCollator()(rows), FusionCollator(packing=True, pad_to_multiple_of=16)(rows)
    keep = padded["attention_mask"].bool()
    n = int(keep.sum())
    assert packed["input_ids"].shape[0] == 1
    assert packed["input_ids"].shape[1] % 16 == 0
    for name in ("input_ids", "labels", "shift_labels", "target_ids", "target_probs"):
        assert torch.equal(packed[name][0, :n], padded[name][keep])
        assert not (packed["labels"][0, n:] != -100).any()
    starts = [0, *np.cumsum([len(row["input_ids"]) for row in rows])]
    assert (packed["position_ids"][0] == 0).nonzero()[:, 0].tolist() == starts
    assert torch.equal(packed["conversation_stats"][0], padded["conversation_stats"][:, 0])
    assert "attention_mask" not in packed


def test_stored_rows_are_decoded():
    rows = aligned_rows(3, seed=5)
    stored = [encode_row(row) for row in rows]
    collate = FusionCollator(vocab_size=50, fusion_function="source")
    got, expected = collate(stored), collate(rows)
    assert torch.equal(got["shift_labels"], expected["shift_labels"])
    kept = [sorted(x[x >= 0].tolist()) for x in got["target_ids"].flatten(0, 1)]
    assert kept == [sorted(x[x >= 0].tolist()) for x in expected["target_ids"].flatten(0, 1)]
    torch.testing.assert_close(got["target_probs"].sum(-1), expected["target_probs"].sum(-1), rtol=5e-3, atol=0)


def test_truncation_keeps_whole_predicted_tokens():
    row = aligned_row(6, tokens=20, predicted=8)
    cut = int(row["predicted"][4])  # the fifth predicted token is the first one left out
    batch = FusionCollator(max_length=cut)([row])
    assert batch["input_ids"].shape == (1, cut)
    assert (batch["labels"] != -100).sum() == 4
    assert (batch["target_ids"][0] >= 0).any(-1).sum() == (batch["target_probs"][0] > 0).any(-1).sum()
    stats = dict(zip(STATS, batch["conversation_stats"][0, 0].tolist()))
    assert stats["predicted_tokens"] == 4
    assert stats["cut_tokens"] == 20 - cut
    nothing = FusionCollator(max_length=int(row["predicted"][0]))([row, aligned_row(7)])
    assert (nothing["shift_labels"][0] == -100).all()


def test_stats_name_the_source_of_a_combined_row():
    row = aligned_row(8, source_better=True) | {"source_index": np.array([2])}
    mixed = aligned_row(9, source_better=False) | {"source_index": np.array([0, 1])}
    stats = FusionCollator()([row, mixed])["conversation_stats"][:, 0]
    assert stats[:, :2].tolist() == [[2.0, 1.0], [-1.0, 0.0]]
    assert stats[0, 2].item() == pytest.approx(float(row["mapped_mass"].astype(float).sum()))


def test_ids_beyond_the_vocabulary_are_refused():
    row = aligned_row(10)
    row["input_ids"][3] = 64
    with pytest.raises(InputError, match=r"token id for conversation 'c10': expected less than .* of 50, got 64"):
        FusionCollator(vocab_size=50)([row])
    row = aligned_row(11)
    row["source_ids"][0, 0] = 77
    with pytest.raises(InputError, match="got 77"):
        FusionCollator(vocab_size=50, fusion_function="source")([row])


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
        FusionCollator(**options)


def test_a_row_that_is_not_aligned_is_refused():
    row = aligned_row(12)
    del row["source_ids"]
    with pytest.raises(InputError, match=r"column 'source_ids' for conversation 'c12'"):
        FusionCollator()([row])
