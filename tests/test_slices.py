"""Slices: who is best where, by hand; names by column, pattern and clusters."""

import random

import numpy as np
import pytest

from fusechat_fuse.errors import InputError
from fusechat_fuse.store import slices
from fusechat_fuse.store.shards import load_representation
from fusechat_fuse.store.slices import LEAST, choose_by_slice, cluster, name_slices, prompts
from tests.helpers.fusion_rows import aligned_rows
from tests.helpers.tiny_runs import aligned_directory, tokenizer


def test_the_median_decides_and_not_the_mean():
    """Half of a slice's answers are wrong in a way that only the weaker model finds likely."""
    names = ["math"] * LEAST
    expert = [1.0] * (LEAST // 2 + 1) + [50.0] * (LEAST // 2 - 1)
    choice = choose_by_slice(names, np.array([[2.0] * LEAST, expert]))
    assert np.mean(expert) > 2
    assert choice.of("math") == 1
    assert choice.table["math"] == {"conversations": LEAST, "medians": [2.0, 1.0], "best": 1}


def test_slices_have_their_own_model_and_small_ones_that_of_all():
    names = ["a"] * LEAST + ["b"] * (3 * LEAST) + ["few"] * (LEAST - 1) + [""]
    ces = np.array([[1.0] * LEAST + [3.0] * (len(names) - LEAST), [2.0] * len(names)])
    ces[0, names.index("few") :] = 1.0  # the first model is better there, but too few say so
    choice = choose_by_slice(names, ces)
    assert [choice.of(name) for name in ("a", "b", "few", "", "never seen")] == [0, 1, 1, 1, 1]
    assert choice.table[""] == {"conversations": len(names), "medians": [3.0, 2.0], "best": 1}
    assert choice.table["few"] == {"conversations": LEAST - 1, "medians": [1.0, 2.0], "best": 1}


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
        ({"column": "topic"}, "slice_column: expected slice or auto, got 'topic'"),
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


def test_clusters_are_of_one_skill_each():
    rng = random.Random(0)
    kinds = {
        "add": lambda: f"What is {rng.randrange(90)} plus {rng.randrange(90)}?",
        "reverse": lambda: f"Reverse the words: {rng.choice('sun tree red cat'.split())} {rng.randrange(9)}",
        "capital": lambda: f"Write in capitals: {rng.choice('moon fish blue stone'.split())} {rng.randrange(9)}",
    }
    skills = [rng.choice(list(kinds)) for _ in range(240)]
    names = cluster([kinds[skill]() for skill in skills])
    for name in set(names):
        assert len({skill for skill, of in zip(skills, names) if of == name}) == 1, name
    assert cluster([kinds[skill]() for skill in skills[:30]]) == [""] * 30  # too few to divide
    assert any("reverse" in name for name in names)


def test_clusters_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.cluster", None)
    with pytest.raises(InputError, match=r"pip install 'fusechat\[slices\]'"):
        slices.cluster(["a b"] * 100)
