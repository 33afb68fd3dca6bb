"""Which distribution is fused, against loops written from the definitions."""

import math

import numpy as np
import pytest

from fusechat_fuse.errors import InputError
from fusechat_fuse.store.cross_entropy import pivot_cross_entropy, source_cross_entropy
from fusechat_fuse.training.choice import fusion_distribution
from tests.helpers.fusion_rows import aligned_row
from tests.helpers.reference_choice import distribution, reference_choice


@pytest.mark.parametrize("choice", ["min_ce", "avg_ce", "min_ce_token", "source"])
@pytest.mark.parametrize("unit", ["token", "byte"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_every_choice_equals_the_reference(choice, unit, temperature):
    for seed in range(6):
        row = aligned_row(seed, vocab_size=9)  # a small vocabulary: pivot and source name the same ids
        got = fusion_distribution(row, choice=choice, ce_unit=unit, fuse_temperature=temperature)
        for p, expected in enumerate(reference_choice(row, choice, unit, temperature)):
            mine = {u: x for u, x in distribution(got.ids[p], got.probs[p]).items() if x > 0}
            assert mine == pytest.approx({u: x for u, x in expected.items() if x > 0}, rel=2e-5)


@pytest.mark.parametrize("choice", ["min_ce", "min_ce_token", "min_ce_slice", "avg_ce_slice"])
@pytest.mark.parametrize("fallback", ["pivot", "label"])
@pytest.mark.parametrize("slice_weight", [0.0, 0.7, 1.0])
def test_where_no_source_is_taken_the_fallback_stands(choice, fallback, slice_weight):
    for seed in range(6):
        row = aligned_row(seed, vocab_size=9)
        options = {"fallback": fallback, "slice_weight": slice_weight}
        got = fusion_distribution(row, choice=choice, **options)
        for p, expected in enumerate(reference_choice(row, choice, "token", 1.0, **options)):
            mine = {u: x for u, x in distribution(got.ids[p], got.probs[p]).items() if x > 0}
            assert mine == pytest.approx({u: x for u, x in expected.items() if x > 0}, rel=2e-5)
        if choice == "min_ce_slice":
            assert got.source_share == (slice_weight > 0)


def test_the_unit_of_ce_can_turn_the_choice():
    row = aligned_row(0)
    row |= {
        "ce": np.full(8, 1.0, np.float32),
        "source_ce": 1.5,
        "source_tokens": 4,
        "source_bytes": int(row["end"][-1]),
    }
    assert fusion_distribution(row, ce_unit="token").source_share == 0  # 1.5 nats per (longer) token
    assert fusion_distribution(row, ce_unit="byte").source_share == 1  # 6 nats for the text instead of 8
    num_bytes = row["end"][-1]
    assert pivot_cross_entropy(row, "byte") == pytest.approx(8 / num_bytes)
    assert source_cross_entropy(row, "byte") == pytest.approx(6 / num_bytes)


def test_a_text_of_no_bytes_has_no_ce_per_byte():
    row = aligned_row(0) | {"source_bytes": 0}
    assert math.isnan(source_cross_entropy(row, "byte"))
    assert fusion_distribution(row, ce_unit="byte").source_share == 0
    assert math.isnan(pivot_cross_entropy(row | {"start": row["end"]}, "byte"))


def test_a_tie_and_a_source_without_answer_keep_the_pivot():
    row = aligned_row(1)
    row |= {"ce": np.full(8, 0.75, np.float32), "source_ce": 0.75}
    assert fusion_distribution(row).source_share == 0
    for choice in ("min_ce", "avg_ce"):
        row["source_ce"] = float("nan")
        assert fusion_distribution(row, choice=choice).source_share == 0
    row["source_token_ce"] = np.full(8, 0.1, np.float32)
    row["mapped_mass"] = np.zeros(8, np.float16)
    assert fusion_distribution(row, choice="min_ce_token").source_share == 0


def test_avg_ce_names_each_id_once():
    row = aligned_row(2, vocab_size=7)
    got = fusion_distribution(row, choice="avg_ce")
    for ids in got.ids:
        kept = ids[ids >= 0]
        assert len(set(kept.tolist())) == len(kept)


@pytest.mark.parametrize(
    ("choice", "unit", "column"),
    [
        ("source", "token", "source_ids"),
        ("min_ce", "token", "source_ce"),
        ("min_ce_token", "token", "mapped_mass"),
    ],
)
def test_a_row_without_a_column_is_refused(choice, unit, column):
    row = aligned_row(12)
    del row[column]
    with pytest.raises(InputError, match=rf"column '{column}' for conversation 'c12': expected an aligned row"):
        fusion_distribution(row, choice=choice, ce_unit=unit)


@pytest.mark.parametrize("column", ["source_bytes", "source_tokens"])
def test_a_cross_entropy_per_byte_needs_both_numbers(column):
    row = aligned_row(12) | {column: None}
    with pytest.raises(InputError, match=r"per byte for conversation 'c12': expected source_tokens and source_bytes"):
        fusion_distribution(row, choice="avg_ce", ce_unit="byte")
