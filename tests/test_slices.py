"""Slices: who is best where, by hand; names by column, pattern and clusters."""

import math
import random

import numpy as np
import pytest

from fusechat_fuse.errors import InputError
from fusechat_fuse.store import prompt_clusters
from fusechat_fuse.store.prompt_clusters import cluster, prompts
from fusechat_fuse.store.shards import load_representation
from fusechat_fuse.store.slices import choose_by_slice, name_slices, sign_test, undecided_lines
from tests.helpers.fusion_rows import aligned_rows
from tests.helpers.reference_choice import reference_sign_test, reference_slice_models
from tests.helpers.tiny_runs import aligned_directory, tokenizer


def entry(conversations, medians, better, worse, decides, best) -> dict:
    return {
        "conversations": conversations,
        "medians": medians,
        "better": better,
        "worse": worse,
        "decides": decides,
        "best": best,
    }


def test_the_median_decides_and_not_the_mean():
    """Three in ten of a slice's answers are wrong in a way that only the weaker model finds likely."""
    expert = [1.0] * 14 + [50.0] * 6
    choice = choose_by_slice(["math"] * 20, np.array([[2.0] * 20, expert]))
    assert np.mean(expert) > 2
    assert choice.of("math") == 1
    assert choice.table["math"] == entry(20, [2.0, 1.0], 14, 6, False, 1)  # 11.5 %: the choice of all, the same
    assert choose_by_slice(["math"] * 40, np.array([[2.0] * 40, expert * 2])).table["math"]["decides"]  # 1.7 %


@pytest.mark.parametrize(
    ("better", "worse", "p"),
    [
        (0, 0, 1),
        (1, 0, 1),
        (5, 0, 0.0625),
        (0, 6, 0.03125),
        (6, 0, 0.03125),
        (5, 3, 0.7265625),
        (8, 1, 0.0390625),
        (7, 2, 0.1796875),
        (50, 50, 1),
    ],
)
def test_the_sign_test_by_hand(better, worse, p):
    assert sign_test(better, worse) == pytest.approx(p, rel=1e-12)
    assert reference_sign_test(better, worse) == p


def test_the_sign_test_is_that_of_its_definition():
    for n in (7, 64, 401, 1500):
        for better in range(0, n + 1, max(1, n // 9)):
            assert sign_test(better, n - better) == pytest.approx(float(reference_sign_test(better, n - better)))
    assert sign_test(500_000, 500_000) == 1
    assert sign_test(499_000, 501_000) == pytest.approx(math.erfc(1.999 / 2**0.5), rel=1e-5)  # of the normal curve
    assert sign_test(0, 100_000) == 0


@pytest.mark.parametrize(
    ("better", "worse", "equal", "decides"),
    [
        (5, 0, 0, False),
        (6, 0, 0, True),
        (0, 6, 0, True),
        (5, 3, 0, False),
        (6, 0, 30, False),  # ties do not count, and the medians are equal: the pivot's, against the test
        (61, 39, 0, True),
        (60, 40, 0, False),
        (500, 500, 0, False),
    ],
)
def test_a_slice_decides_where_its_conversations_can_tell(better, worse, equal, decides):
    own = [1.0] * better + [3.0] * worse + [2.0] * equal
    for best_of_all, of_others in ((0, 9.0), (1, 0.0)):  # both choices of all data
        others = [of_others] * 5000
        ces = np.array([[2.0] * (len(own) + len(others)), own + others])
        choice = choose_by_slice(["own"] * len(own) + [""] * len(others), ces)
        assert choice.of("") == choice.of("never seen") == best_of_all
        assert choice.of("own") == (int(better > worse) if decides else best_of_all)
        assert choice.medians("own") == choice.table["own" if decides else ""]["medians"]
        found = choice.table["own"]
        assert (found["better"], found["worse"], found["decides"]) == (better, worse, decides)


def test_a_few_conversations_are_not_outvoted():
    """Eight of maths for which the source is much worse, and many in Chinese for which it is better."""
    names = ["maths"] * 8 + ["chinese"] * 40
    pivot, source = [0.56] * 8 + [2.0] * 40, [0.96] * 8 + [1.5] * 40
    choice = choose_by_slice(names, np.array([pivot, source]))
    assert [choice.of(name) for name in ("maths", "chinese", "")] == [0, 1, 1]
    assert not undecided_lines(choice.table)
    source[:5] = [0.5] * 5
    choice = choose_by_slice(names, np.array([pivot, source]))
    assert choice.of("maths") == 1
    assert choice.table["maths"] == entry(8, [0.56, 0.5], 5, 3, False, 1)
    assert undecided_lines(choice.table) == [
        "slice maths (8 conversations, 5 of 8 better): too few to tell, takes the choice of all data"
    ]
    even = choose_by_slice(["all"] * 50, np.array([[2.0] * 50, [1.0] * 25 + [3.0] * 24 + [2.0]]))
    assert undecided_lines(even.table) == [
        "slice all (50 conversations, 25 of 49 better): too even to tell, takes the choice of all data"
    ]


def test_the_choice_is_that_of_its_definition():
    rng = np.random.default_rng(5)
    for models in (2, 3, 4):
        names = [str(rng.choice(["", "a", "bb", "c", "d"], p=[0.1, 0.5, 0.25, 0.1, 0.05])) for _ in range(160)]
        ces = rng.normal(2, 0.5, (models, 160)).round(1)  # with ties
        ces[1:, [n for n, name in enumerate(names) if name in ("bb", "d")]] -= 0.4
        ces[rng.integers(models, size=6), rng.integers(160, size=6)] = np.nan
        choice = choose_by_slice(names, ces)
        expected = reference_slice_models(names, ces.tolist())
        assert {name: (found["best"], found["decides"]) for name, found in choice.table.items()} == expected
        assert {told for _, told in expected.values()} == {True, False}


def test_ties_go_to_the_first_and_what_is_no_number_loses():
    assert choose_by_slice([""], np.array([[1.0], [1.0]])).of("") == 0
    assert choose_by_slice([""], np.array([[np.nan], [np.inf], [7.0]])).of("") == 2


@pytest.fixture
def data(tmp_path):
    rows = aligned_rows(8, vocab_size=500)
    for n, row in enumerate(rows):
        row |= {"id": f"{'gsm' if n % 2 else 'chat'}-{n}", "slice": "odd" if n % 2 else None}
    return load_representation(aligned_directory(tmp_path / "a", rows))


def test_names_come_from_the_column_or_the_ids(data):
    assert name_slices(data) == ["", "odd"] * 4
    assert name_slices(data, pattern="^[a-z]+") == ["chat", "gsm"] * 4
    assert name_slices(data, pattern="^(gsm)-") == ["", "gsm"] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"column": "topic"}, "slice_column: expected one of slice, auto, none, got 'topic'"),
        ({"pattern": "("}, "slice_pattern: expected a regular expression"),
        ({"pattern": "zzz"}, "slice_pattern: expected one that matches ids .* The first id is 'chat-0'"),
    ],
    ids=["column", "bad pattern", "no match"],
)
def test_refusals(data, options, message):
    with pytest.raises(InputError, match=message):
        name_slices(data, **options)


def test_prompts_end_where_the_first_answer_begins(data):
    row = data[0]
    assert prompts(data)[0] == tokenizer().decode(row["input_ids"][: row["predicted"][0]], skip_special_tokens=True)
    assert len(prompts(data)) == len(data)


RNG = random.Random(0)
KINDS = {
    "add": lambda: f"What is {RNG.randrange(90)} plus {RNG.randrange(90)}?",
    "reverse": lambda: f"Reverse the words: {RNG.choice('sun tree red cat'.split())} {RNG.randrange(9)}",
    "capital": lambda: f"Write in capitals: {RNG.choice('moon fish blue stone'.split())} {RNG.randrange(9)}",
    "translate": lambda: f"翻译{RNG.choice('苹果 香蕉 葡萄'.split())}{RNG.randrange(9)}",
}


@pytest.mark.parametrize("fitted", [5000, 60], ids=["all", "from a sample"])
def test_clusters_are_of_one_skill_each_and_have_their_words(monkeypatch, fitted):
    monkeypatch.setattr(prompt_clusters, "FITTED", fitted)
    skills = [RNG.choice(list(KINDS)) for _ in range(240)]
    names = cluster([KINDS[skill]() for skill in skills])
    for name in set(names):
        assert len({skill for skill, of in zip(skills, names) if of == name}) == 1, name
    for word in ("what", "reverse", "capitals", "翻译"):  # the last: a pair of characters
        assert any(word in name.split() for name in names), word
    assert cluster([KINDS[skill]() for skill in skills[:119]]) == [""] * 119  # too few to divide


def test_equal_names_are_numbered_and_digits_name_nothing():
    texts = ["alpha beta"] * 3 + ["alpha gamma"] * 2 + ["12 3"] * 4
    assert prompt_clusters._names(texts, [0, 0, 0, 1, 1, 2, 2, 2, 2]) == {
        2: "others",
        0: "beta alpha",
        1: "gamma alpha",
    }
    assert set(prompt_clusters._names(["alpha"] * 3 + [""] * 2, [0, 0, 1, 2, 2]).values()) == {
        "alpha",
        "alpha #2",
        "others",
    }


@pytest.mark.parametrize("text", ["", "x", "say it"])
def test_prompts_that_are_all_alike_are_no_slices(text):
    assert cluster([text] * 100) == [""] * 100


def test_data_that_name_no_slice_get_automatic_ones(tmp_path, caplog):
    caplog.set_level("INFO", "fusechat_fuse")
    rows = aligned_rows(130, vocab_size=500)
    for n, row in enumerate(rows):
        ids = tokenizer().encode(["What is 2 plus 3?", "Reverse the words: sun"][n % 2])
        row["input_ids"] = np.array([*ids, *row["input_ids"]], np.int32)
        row["predicted"] = row["predicted"] + len(ids) - row["predicted"][0]
    unnamed = load_representation(aligned_directory(tmp_path / "a", rows))
    names = name_slices(unnamed)
    assert len(set(names)) == 2
    assert names == names[:2] * 65
    assert f"{unnamed.path}: no slices are named; these were found among the prompts: {names[0]} (65), " in caplog.text
    assert name_slices(unnamed, column="auto") == names
    assert name_slices(unnamed, column="none") == [""] * 130
    rows[7]["slice"] = "own"
    named = load_representation(aligned_directory(tmp_path / "b", rows))
    assert name_slices(named) == [""] * 7 + ["own"] + [""] * 122  # what is named is the user's
    assert name_slices(named, column="auto") == names
