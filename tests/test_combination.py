"""`combine`: which source a conversation takes, mixtures, and that a combination stands for its sources."""

import logging
import shutil

import numpy as np
import pytest

from fusechat_fuse.alignment.combination import average, combination_lines, combine
from fusechat_fuse.alignment.run import align
from fusechat_fuse.errors import InputError
from fusechat_fuse.store import shard_writer
from fusechat_fuse.store.cross_entropy import source_cross_entropy
from fusechat_fuse.store.shards import load_representation
from tests.helpers.alignment_data import files_of, rows_for, write
from tests.helpers.fusion_rows import aligned_rows
from tests.helpers.tiny_runs import aligned_directory


@pytest.fixture(scope="module")
def three(tmp_path_factory, tiny_bpe, tiny_unigram):
    """Three aligned sources of one pivot; the last lacks two conversations."""
    folder = tmp_path_factory.mktemp("combination")
    pivot = write(folder / "pivot", tiny_bpe, rows_for(tiny_bpe))
    made = []
    for n, tokenizer in enumerate((tiny_unigram, tiny_bpe, tiny_unigram)):
        rows = rows_for(tokenizer, seed=n + 1)
        source = write(folder / f"source{n}", tokenizer, rows[: 8 if n == 2 else 10])
        mapping = "prefix" if n != 1 else "statistics"
        align(pivot.path, source.path, folder / f"aligned{n}", mapping=mapping, cache_dir=folder / "cache")
        made.append(folder / f"aligned{n}")
    return made


def by_id(path) -> dict[str, dict]:
    return {row["id"]: row for row in load_representation(path)}


@pytest.mark.parametrize("ce_unit", ["token", "byte"])
def test_min_ce_takes_the_lowest(ce_unit, three, tmp_path):
    manifest = combine(three, tmp_path / "out", function="min_ce", ce_unit=ce_unit)
    parts, taken = [by_id(path) for path in three], [0, 0, 0]
    combined = by_id(tmp_path / "out")
    assert list(combined) == [f"c{n}" for n in range(10)]
    for name, row in combined.items():
        ces = [source_cross_entropy(part[name], ce_unit) if name in part else np.inf for part in parts]
        best = int(np.argmin(ces))
        taken[best] += 1
        assert row["source_index"].tolist() == [best]
        for column in ("source_ids", "source_token_ce", "mapped_mass"):
            assert (row[column] == parts[best][name][column]).all()
        assert np.allclose(row["source_probs"], parts[best][name]["source_probs"], rtol=0, atol=1e-7)
        assert row["source_ce"] == parts[best][name]["source_ce"]
        assert (row["topk_ids"] == parts[0][name]["topk_ids"]).all()
    assert list(manifest["taken"].values()) == taken
    assert sum(t > 0 for t in taken) > 1
    assert len(manifest["sources"]) == 3


@pytest.mark.parametrize("function", ["min_ce", "avg_ce"])
def test_adding_one_source_equals_combining_all_at_once(function, three, tmp_path):
    options = {"function": function, "ce_unit": "token"}
    combine(three, tmp_path / "all", **options)
    combine(three[:2], tmp_path / "two", **options)
    manifest = combine([tmp_path / "two", three[2]], tmp_path / "added", **options)
    whole, added = by_id(tmp_path / "all"), by_id(tmp_path / "added")
    assert whole.keys() == added.keys()
    for name, row in whole.items():
        other = added[name]
        assert (row["source_index"] == other["source_index"]).all()
        assert row["source_ce"] == pytest.approx(other["source_ce"], rel=1e-9)
        assert row["source_tokens"] == other["source_tokens"]
        assert np.allclose(row["source_token_ce"], other["source_token_ce"], rtol=1e-5)
        for ids, probs, expected in zip(other["source_ids"], other["source_probs"], dense(row)):
            got = {i: p for i, p in zip(ids.tolist(), probs.tolist()) if i >= 0}
            assert got.keys() == expected.keys()
            for i, p in expected.items():
                assert abs(got[i] - p) <= (1e-7 if function == "min_ce" else 0.02 * p)  # float16 is rounded twice
    assert manifest["sources"] == load_representation(tmp_path / "all").manifest["sources"]
    assert manifest["taken"] == load_representation(tmp_path / "all").manifest["taken"]


def dense(row) -> list[dict[int, float]]:
    return [
        {i: p for i, p in zip(ids.tolist(), probs.tolist()) if i >= 0}
        for ids, probs in zip(row["source_ids"], row["source_probs"])
    ]


def test_avg_ce_by_loops(three, tmp_path):
    combine(three, tmp_path / "out", function="avg_ce", ce_unit="token")
    parts = [by_id(path) for path in three]
    for name, row in by_id(tmp_path / "out").items():
        present = [part[name] for part in parts if name in part]
        weights = np.exp([-part["source_ce"] for part in present])
        weights /= weights.sum()
        assert row["source_ce"] == pytest.approx(sum(w * part["source_ce"] for w, part in zip(weights, present)))
        assert row["source_index"].tolist() == [-1]
        for n, got in enumerate(dense(row)):
            expected: dict[int, float] = {}
            for w, part in zip(weights, present):
                for i, p in dense(part)[n].items():
                    expected[i] = expected.get(i, 0.0) + w * p
            assert got.keys() == expected.keys()
            for i, p in expected.items():
                assert got[i] == pytest.approx(p, rel=0.01)
            assert row["mapped_mass"][n] == pytest.approx(
                sum(w * part["mapped_mass"][n] for w, part in zip(weights, present)), abs=2e-3
            )


def test_average_of_a_position_without_an_answer():
    base = {"id": "x", "input_ids": np.array([1, 2]), "source_bytes": 4, "source_tokens": 2}
    one = base | {
        "source_ids": np.array([[3, 4]], np.int32),
        "source_probs": np.array([[0.5, 0.25]], np.float32),
        "source_token_ce": np.array([-np.log(0.5)], np.float32),
        "mapped_mass": np.array([0.75], np.float16),
        "source_ce": 1.0,
    }
    none = base | {
        "source_ids": np.array([[-1, -1]], np.int32),
        "source_probs": np.zeros((1, 2), np.float32),
        "source_token_ce": np.array([np.inf], np.float32),
        "mapped_mass": np.zeros(1, np.float16),
        "source_ce": 1.0,
    }
    mixed = average([one, none], [1.0, 1.0])
    assert mixed["source_probs"][0].tolist()[:2] == [0.25, 0.125]
    assert mixed["source_token_ce"][0] == pytest.approx(-np.log(0.25))
    assert mixed["mapped_mass"][0] == pytest.approx(0.375)
    nobody = average([none, none], [1.0, 2.0])
    assert np.isinf(nobody["source_token_ce"][0])
    assert (nobody["source_ids"] == -1).all()


def test_average_leaves_out_what_has_no_cross_entropy():
    def row(ce, probability):
        return {
            "id": "x",
            "source_ids": np.array([[3]], np.int32),
            "source_probs": np.array([[probability]], np.float32),
            "source_token_ce": np.array([1.0], np.float32),
            "mapped_mass": np.array([probability], np.float16),
            "source_ce": ce,
            "source_bytes": 0,
            "source_tokens": 1,
        }

    rows = [row(1.0, 0.5), row(2.0, 0.25)]
    assert average(rows, [np.nan, 2.0])["source_probs"].tolist() == [[0.25]]
    assert average(rows, [np.nan, np.nan])["source_probs"].tolist() == [[0.375, 0.0]]


def test_combining_goes_on_and_refuses_another_run(three, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(shard_writer, "ROWS_PER_SHARD", 3)
    caplog.set_level(logging.INFO)
    combine(three, tmp_path / "out")
    whole = files_of(tmp_path / "out")
    (tmp_path / "out" / "shard-00001.arrow").unlink()
    (tmp_path / "out" / "manifest.json").unlink()
    assert "shards there" not in caplog.text
    combine(three, tmp_path / "out")
    assert files_of(tmp_path / "out") == whole
    assert f"{tmp_path / 'out'}: 3 of 4 shards there, going on." in caplog.text
    combine(three, tmp_path / "out")
    assert f"{tmp_path / 'out'} holds this very run, finished: nothing to compute." in caplog.text
    with pytest.raises(InputError, match="function = 'min_ce_slice' there and 'avg_ce' here"):
        combine(three, tmp_path / "out", function="avg_ce")


@pytest.mark.parametrize(
    ("directories", "options", "message"),
    [
        ((0, 1), {"function": "max"}, "expected one of min_ce, avg_ce, min_ce_slice, got 'max'"),
        ((0, 1), {"ce_unit": "word"}, "value for ce_unit: expected token or byte, got 'word'"),
        ((0,), {}, "expected at least two, got \\["),
        ((0, 1, 0), {}, "sources for combine: expected each once, got made up"),
        ((0, "pivot"), {}, "expected aligned or combined, got a representation"),
    ],
    ids=["function", "ce_unit", "one", "twice", "representation"],
)
def test_bad_input(directories, options, message, three, tmp_path):
    paths = [three[n] if isinstance(n, int) else three[0].parent / n for n in directories]
    with pytest.raises(InputError, match=message):
        combine(paths, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_path_is_not_several_directories(three, tmp_path):
    with pytest.raises(InputError, match="expected at least two, got '"):
        combine(str(three[0]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_combination_goes_on_by_its_own_function(three, tmp_path):
    combine(three[:2], tmp_path / "mean", function="avg_ce")
    with pytest.raises(InputError, match=r"same options, got function = 'avg_ce' there and 'min_ce_slice' here"):
        combine([tmp_path / "mean", three[2]], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_pivot_is_refused(three, tmp_path, tiny_bpe):
    other = write(tmp_path / "p", tiny_bpe, rows_for(tiny_bpe, seed=9))
    align(other.path, three[0].parent / "source0", tmp_path / "foreign", cache_dir=tmp_path / "cache")
    with pytest.raises(InputError, match="another pivot representation"):
        combine([three[0], tmp_path / "foreign"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_shard_is_named(three, tmp_path):
    shutil.copytree(three[1], tmp_path / "damaged")
    shard = tmp_path / "damaged" / "shard-00000.arrow"
    data = bytearray(shard.read_bytes())
    data[-300] ^= 1
    shard.write_bytes(data)
    with pytest.raises(InputError, match=r"damaged/shard-00000.arrow: expected the file the manifest lists"):
        combine([three[0], tmp_path / "damaged"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def sliced(path, model: str, offsets: dict[str, float], lacking=()):
    """Sixty conversations in three slices, aligned to one pivot; the source's CE is the pivot's and an offset."""
    rows = aligned_rows(60, vocab_size=500)
    for n, row in enumerate(rows):
        row |= {"id": f"{'abc'[n % 3]}-{n}", "slice": "abc"[n % 3]}
        wrong = n < 6  # answers that no expert finds likely
        row["source_ce"] = float(row["ce"].mean()) + (9.0 if wrong else offsets["abc"[n % 3]])
    about = {"pivot": {"model": "p"}, "source": {"model": model}, "options": {"mapping": "prefix", "safe_only": False}}
    return aligned_directory(path, [row for n, row in enumerate(rows) if n not in lacking], **about)


def test_by_slice_the_best_source_serves_all_of_it(tmp_path):
    parts = [
        sliced(tmp_path / "one", "one", {"a": -0.8, "b": -0.1, "c": 0.5}),
        sliced(tmp_path / "two", "two", {"a": -0.1, "b": -0.8, "c": 0.9}, lacking=(1, 59)),
    ]
    manifest = combine(parts, tmp_path / "out", function="min_ce_slice")
    won = {name: set() for name in "abc"}
    for row in by_id(tmp_path / "out").values():
        won[row["slice"]].add(int(row["source_index"][0]))
    assert won["a"] == {0}
    assert won["b"] == {0, 1}  # where the best source lacks a conversation, the next one
    assert by_id(tmp_path / "out")["b-1"]["source_index"].tolist() == [0]
    assert {name: manifest["slices"][name]["best"] for name in "abc"} == {"a": 1, "b": 2, "c": 0}
    assert all(manifest["slices"][name]["decides"] for name in ("", *"abc"))
    assert not any("takes the choice" in line for line in combination_lines(manifest))
    assert won["c"] == {0}  # the pivot is better there: training leaves these rows
    assert manifest["slice_models"] == ["pivot", "one", "two"]
    assert manifest["taken"] == {"one": 41, "two": 19}
    by_pattern = combine(parts, tmp_path / "ids", function="min_ce_slice", slice_pattern="^[ab]")
    assert set(by_pattern["slices"]) == {"", "a", "b"}
    assert by_id(tmp_path / "ids")["c-2"].get("slice") is None
    few = combine(parts, tmp_path / "few", function="min_ce_slice", slice_pattern="^a-1[25]$|^a-[369]$")
    assert combination_lines(few)[-1] == (
        "slice a-9 (1 conversations, 1 of 1 better): too few to tell, takes the choice of all data"
    )
    with pytest.raises(InputError, match="same options, got slice_pattern = "):
        combine([parts[0], tmp_path / "ids"], tmp_path / "more", function="min_ce_slice")
