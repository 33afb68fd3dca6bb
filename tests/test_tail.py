"""The label stands for the tail: with labels drawn from the source, the mean of what is fused is its distribution."""

import numpy as np
import pytest

from fusechat_fuse.alignment.candidates import SourceStream, Stream, Vocabularies
from fusechat_fuse.alignment.correspondence import correspond
from fusechat_fuse.alignment.paths import PathTable
from fusechat_fuse.alignment.prefix import prefix_rows
from fusechat_fuse.alignment.run import align
from fusechat_fuse.alignment.single_id import single_id_rows
from fusechat_fuse.errors import InputError
from fusechat_fuse.store.shards import load_representation
from fusechat_fuse.training.choice import fusion_distribution
from tests.helpers.alignment_data import end_of_turn, rows_for, write
from tests.helpers.fusion_rows import aligned_row

# no kept path is the beginning of another: there the prefix mapping gives the shorter one its own probability alone
PIVOT = [b" a", b"x", b"y", b"z", b" b", b"q", b" axy"]
SOURCE = [b" ax", b" ay", b" az", b" b", b" axy", b" aqy", b"q", b" azx"]
PATHS = [[0, 1], [0, 2], [0, 3], [4], [6], [0, 5, 2], [5], [0, 3, 1]]
TO_PIVOT = np.array([0, 0, -1, 4, 6, 2, 4, -1], np.int32)  # as a map of the paper: not all, and some one id
FULL = np.array([0.3, 0.05, 0.1, 0.2, 0.05, 0.05, 0.15, 0.1])  # the source's distribution; the first four are kept


def row_of_label(actual: int, mapping: str) -> dict:
    """An aligned row, by the mapping's own code, of the text that one source token spells: the source keeps four."""
    path, kept = PATHS[actual], np.argsort(-FULL, kind="stable")[:4]
    lengths = np.cumsum([0, *(len(PIVOT[i]) for i in path)])
    none = np.zeros(len(path), np.int64)
    pivot = Stream(np.array(path), lengths[:-1], lengths[1:], none)
    own = {"ce": -np.log(FULL[[actual]]), "topk_ids": kept[None], "topk_logprobs": np.log(FULL[kept])[None]}
    source = SourceStream(np.array([actual]), np.array([0]), lengths[-1:], np.array([0]), **own)
    vocab = Vocabularies(PIVOT, SOURCE, TO_PIVOT, PathTable.of(PATHS), spell=lambda pieces: [[] for _ in pieces])
    match = correspond(pivot.start, pivot.end, source.start, source.end)
    mapped = {"prefix": prefix_rows, "single": single_id_rows}[mapping](pivot, source, match, vocab)
    row = aligned_row(actual, vocab_size=7, tokens=len(path) + 1, predicted=len(path))
    return row | {
        "input_ids": np.array([5, *path], np.int32),
        "predicted": np.arange(1, len(path) + 1, dtype=np.int32),
        "source_ids": mapped.ids,
        "source_probs": mapped.probs.astype(np.float32),
        "mapped_mass": np.where(mapped.answered, mapped.mass, 0),
        "label_tail": mapped.label_tail,
    }


def fused(row: dict, at: int, **options) -> np.ndarray:
    """q of one position over the pivot's seven ids."""
    got, q = fusion_distribution(row, choice="source", tail="label", **options), np.zeros(7)
    np.add.at(q, np.maximum(got.ids[at], 0), np.where(got.ids[at] >= 0, got.probs[at], 0))
    return q


@pytest.mark.parametrize("mapping", ["prefix", "single"])
def test_labels_drawn_from_the_source_make_its_distribution_of_the_mean(mapping):
    expected, mean = np.zeros(7), np.zeros(7)
    for actual, probability in enumerate(FULL):
        becomes = PATHS[actual][0]  # what is told of a source token at its start
        if mapping == "single" and actual in np.argsort(-FULL, kind="stable")[:4] and TO_PIVOT[actual] >= 0:
            becomes = TO_PIVOT[actual]
        expected[becomes] += probability
        mean += probability * fused(row_of_label(actual, mapping), 0)
    np.testing.assert_allclose(mean, expected, rtol=1e-3)  # mapped_mass is stored in halves


def test_inside_a_source_token_too():
    going_on = [actual for actual, path in enumerate(PATHS) if path[0] == 0]  # those that begin with " a"
    total, expected, mean = FULL[going_on].sum(), np.zeros(7), np.zeros(7)
    for actual in going_on:
        expected[PATHS[actual][1]] += FULL[actual] / total
        mean += FULL[actual] / total * fused(row_of_label(actual, "prefix"), 1)
    np.testing.assert_allclose(mean, expected, rtol=1e-3)


def test_of_the_pivot_as_well():
    full, mean = np.random.default_rng(0).dirichlet(np.ones(7)), np.zeros(7)
    kept = np.argsort(-full)[:3]
    for label in range(7):
        row = aligned_row(0, vocab_size=7, tokens=2, predicted=1, k=3, source_better=False)
        row |= {"input_ids": np.array([0, label], np.int32), "topk_ids": kept[None].astype(np.int32)}
        row["topk_logprobs"] = np.log(full[kept])[None].astype(np.float32)
        got = fusion_distribution(row, tail="label")
        assert got.source_share == 0
        np.add.at(mean, np.maximum(got.ids[0], 0), full[label] * np.where(got.ids[0] >= 0, got.probs[0], 0))
    np.testing.assert_allclose(mean, full, rtol=1e-5)


def test_label_noise_weighs_the_label_by_the_tail():
    row = row_of_label(1, "prefix")  # " ay" is not kept; " ax" and " az", which are, begin with " a" too
    kept = FULL[np.argsort(-FULL, kind="stable")[:4]]
    of_label = sum(FULL[i] for i in np.argsort(-FULL, kind="stable")[:4] if PATHS[i][0] == 0)
    tail = 1 - kept.sum()
    assert fused(row, 0)[0] == pytest.approx(1 + of_label, rel=1e-3)
    assert fused(row, 0, label_noise=0.05)[0] == pytest.approx(tail / (tail + 0.05) + of_label, rel=1e-3)
    np.testing.assert_allclose(fused(row, 0, label_noise=0.05)[1:], fused(row, 0)[1:])


@pytest.mark.parametrize(("noise", "weight"), [(0.0, 1.0), (0.05, 0.0)])
@pytest.mark.parametrize("of", ["source", "pivot"])
def test_where_nothing_is_left_out_the_label_stands_if_no_label_is_wrong(of, noise, weight):
    """Kept entries that add up to 1, up to rounding, beside a label that is none of them."""
    rng = np.random.default_rng(0)
    for seed in range(20):
        row = aligned_row(seed, vocab_size=9, tokens=2, predicted=1, k=4, source_k=4, source_better=of == "source")
        kept = rng.dirichlet(np.ones(4))[None].astype(np.float32)
        row |= {"input_ids": np.array([0, 8], np.int32), "topk_ids": np.arange(4, dtype=np.int32)[None]}
        row |= {"source_ids": row["topk_ids"], "source_probs": kept, "topk_logprobs": np.log(kept)}
        row |= {"mapped_mass": np.ones(1, np.float16), "label_tail": np.ones(1, np.float16)}
        got = fusion_distribution(row, tail="label", label_noise=noise)
        assert got.source_share == (of == "source")
        given = dict(zip(got.ids[0].tolist(), got.probs[0].tolist()))
        assert given.get(8, 0.0) == pytest.approx(weight, abs=2e-5)
        assert [given[n] for n in range(4)] == pytest.approx(kept[0].tolist(), rel=1e-4)


def test_label_noise_leaves_a_label_that_stands_alone_as_it_is():
    """Inside a source token whose actual tokens were not all kept, nothing else is known."""
    row = row_of_label(5, "prefix")  # " aqy" is not kept
    assert row["label_tail"][1] < 0
    alone = np.eye(7)[5]
    np.testing.assert_array_equal(fused(row, 1, label_noise=0.05), alone)


def test_align_marks_where_the_actual_token_was_not_kept(tmp_path, tiny_bpe, tiny_unigram):
    pivot = write(tmp_path / "pivot", tiny_bpe, rows_for(tiny_bpe))
    same = write(tmp_path / "same", tiny_bpe, rows_for(tiny_bpe, seed=1))
    other = write(tmp_path / "other", tiny_unigram, rows_for(tiny_unigram, seed=2))
    align(pivot.path, same.path, tmp_path / "a", mapping="statistics", cache_dir=tmp_path / "cache")
    seen = set()
    for row, source in zip(load_representation(tmp_path / "a"), same):
        labels = source["input_ids"][source["predicted"]]
        was_kept = (source["topk_ids"] == labels[:, None]).any(1)
        answered = row["mapped_mass"] > 0
        assert (row["label_tail"][answered] == np.where(was_kept, 0, 1)[answered]).all()
        assert (row["label_tail"][~answered] == 0).all()
        seen |= set(was_kept[answered].tolist())
    assert seen == {True, False}
    align(pivot.path, other.path, tmp_path / "b", cache_dir=tmp_path / "cache")
    marks = np.concatenate([row["label_tail"] for row in load_representation(tmp_path / "b")])
    assert (marks >= 1).any()
    assert (marks == 0).any()
    assert ((marks == 0) | (marks == -1) | (marks >= 1) & (marks <= 2)).all()


@pytest.mark.parametrize("mapping", ["prefix", "statistics"])
def test_where_a_source_does_not_end_the_turn_the_label_stands_alone(tmp_path, tiny_bpe, tiny_unigram, mapping):
    rows, ends = rows_for(tiny_unigram, seed=2), end_of_turn(tiny_unigram)
    for number, row in enumerate(rows):
        row["topk_ids"][row["topk_ids"] == ends] = -1
        if number % 2:
            row["topk_ids"][-1, -1] = ends
    pivot, source = write(tmp_path / "pivot", tiny_bpe, rows_for(tiny_bpe)), write(tmp_path / "s", tiny_unigram, rows)
    align(pivot.path, source.path, tmp_path / "a", mapping=mapping, cache_dir=tmp_path / "cache")
    marks = {}
    for number, row in enumerate(load_representation(tmp_path / "a")):
        assert row["input_ids"][row["predicted"]][-1] == end_of_turn(tiny_bpe)
        q, label = fusion_distribution(row, choice="source", tail="label"), end_of_turn(tiny_bpe)
        given = dict(zip(q.ids[-1].tolist(), q.probs[-1].tolist(), strict=True))
        if row["mapped_mass"][-1] == 0:  # no candidate has a place in the pivot's vocabulary
            continue
        marks.setdefault(number % 2, set()).add(float(row["label_tail"][-1]))
        if number % 2 == 0:
            assert given.pop(label) == pytest.approx(1)
            assert not any(given.values())
        else:
            assert 0 < given[label] <= 1
    assert marks == {0: {-1.0}, 1: {0.0}}


def test_rows_without_the_mark_are_refused_with_what_to_do():
    row = aligned_row(3)
    del row["label_tail"]
    with pytest.raises(InputError, match=r"'label_tail' for conversation 'c3'.*Align again or use --fusion_tail drop"):
        fusion_distribution(row, choice="source", tail="label")
    assert fusion_distribution(row, choice="source").source_share == 1
