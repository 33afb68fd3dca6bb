"""Batches hold what the rows say: padded, packed, cut, from memory or from disk."""

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
