"""`compare`: bits per byte by hand, who wins where, and what cannot be compared."""

import json
import math

import numpy as np
import pytest
from scipy.stats import t as student

from fusechat_fuse import compare
from fusechat_fuse.cli import main
from fusechat_fuse.errors import InputError
from fusechat_fuse.evaluation.comparison import table_lines
from fusechat_fuse.evaluation.ranking import Measure, paired_difference, rank
from fusechat_fuse.store.shard_writer import ShardWriter
from fusechat_fuse.training.slice_choice import source_by_slice
from tests.helpers.tiny_runs import aligned_directory

SLICES = ("code", "code", "code", "prose")


def row(name: str, slice_name: str | None, bits: float, *, num_bytes: int = 4, content_hash: str = "h") -> dict:
    """Two predicted tokens that cover `num_bytes` bytes and cost `bits` bits together."""
    nats = bits * math.log(2)
    return {
        "id": name,
        "content_hash": content_hash,
        "slice": slice_name,
        "input_ids": np.array([1, 2, 3], np.int32),
        "predicted": np.array([1, 2], np.int32),
        "message": np.array([1, 1], np.int16),
        "start": np.array([0, 1], np.int32),
        "end": np.array([1, num_bytes], np.int32),
        "topk_ids": np.array([[2], [3]], np.int32),
        "topk_logprobs": np.array([[-0.5], [-0.5]], np.float16),
        "ce": np.array([nats / 4, 3 * nats / 4], np.float32),
    }


def write(path, model: str, rows: list[dict]):
    writer = ShardWriter(path, {"model": model}, kind="representation")
    writer.write(0, rows)
    writer.finish(1, {"model": {"name": model}})
    return path


def models(folder, **bits):
    """One representation per model; bits of the four conversations each."""
    return [
        write(folder / name, name, [row(f"c{n}", of, bit) for n, (of, bit) in enumerate(zip(SLICES, costs))])
        for name, costs in bits.items()
    ]


def test_medians_means_and_wins_by_hand(tmp_path):
    result = compare(models(tmp_path, pivot=(4, 8, 12, 4), source=(8, 4, 8, 16)))
    assert (result["models"], result["conversations"], result["left_out"]) == (["pivot", "source"], 4, 0)
    code, prose, whole = (result["slices"][name] for name in ("code", "prose", "all"))
    assert (code["conversations"], code["bytes"], code["best"]) == (3, 12, "pivot")  # medians are equal: the first
    assert code["models"]["pivot"] == pytest.approx({"median": 2, "mean": 2, "wins": 1 / 3})
    assert code["models"]["source"] == pytest.approx({"median": 2, "mean": 5 / 3, "wins": 2 / 3})
    assert (prose["best"], prose["models"]["source"]["median"]) == ("pivot", pytest.approx(4))
    assert whole["models"]["pivot"] == pytest.approx({"median": 1.5, "mean": 1.75, "wins": 0.5})
    assert whole["models"]["source"] == pytest.approx({"median": 2, "mean": 2.25, "wins": 0.5})


def test_bytes_and_not_tokens_are_what_counts(tmp_path):
    pivot = write(tmp_path / "p", "pivot", [row("c", None, 8, num_bytes=16)])
    one_token = row("c", None, 4, num_bytes=16)
    for name in ("predicted", "message", "topk_ids", "topk_logprobs"):
        one_token[name] = one_token[name][1:]
    one_token |= {"start": np.array([0], np.int32), "end": np.array([16], np.int32)}
    one_token["ce"] = np.array([4 * math.log(2)], np.float32)  # more nats per token, fewer per byte
    result = compare([pivot, write(tmp_path / "s", "source", [one_token])])
    assert result["slices"] == {"all": result["slices"]["all"]}  # no slices named: the whole alone
    figures = result["slices"]["all"]["models"]
    assert (figures["pivot"]["median"], figures["source"]["median"]) == (pytest.approx(0.5), pytest.approx(0.25))
    assert result["slices"]["all"]["best"] == "source"


def test_what_is_not_the_same_text_everywhere_is_left_out_and_counted(tmp_path, caplog):
    pivot = [row("same", "x", 4), row("shorter", "x", 4), row("changed", "x", 4), row("only", "x", 4)]
    source = [row("same", "x", 2), row("shorter", "x", 2, num_bytes=3), row("changed", "x", 2, content_hash="other")]
    result = compare([write(tmp_path / "p", "p", pivot), write(tmp_path / "s", "s", source)])
    assert (result["conversations"], result["left_out"]) == (1, 4)
    assert "4 conversations are left out: not every representation has them" in caplog.text


def test_equal_names_are_told_apart(tmp_path):
    paths = [write(tmp_path / name, "llama", [row("c", None, bits)]) for name, bits in (("a", 4), ("b", 8))]
    assert compare(paths)["models"] == ["llama#1", "llama#2"]


def many(folder, name: str, slices: list[str], bits: list[float]):
    return write(folder / name, name, [row(f"c{n}", of, 4 * bit) for n, (of, bit) in enumerate(zip(slices, bits))])


def test_what_training_will_take_of_each_source_is_said(tmp_path):
    """Bits per byte: the pivot 2; `one` knows chinese, `two` nothing; of maths, 8 conversations, neither tells."""
    slices = ["chinese"] * 30 + ["maths"] * 8 + ["code"] * 10
    paths = [
        many(tmp_path, "pivot", slices, [2.0] * 48),
        many(tmp_path, "one", slices, [1.0] * 30 + [1.0] * 5 + [3.0] * 3 + [3.0] * 10),
        many(tmp_path, "two", slices, [3.0] * 48),
    ]
    result = compare(paths)
    one, two, both = result["choices"]
    assert [choice["sources"] for choice in result["choices"]] == [["one"], ["two"], ["one", "two"]]
    assert {name: entry["best"] for name, entry in one["table"].items()} == {"": 1, "chinese": 1, "maths": 1, "code": 0}
    assert one["table"]["maths"] == {
        **{"conversations": 8, "medians": pytest.approx([2, 1]), "better": 5, "worse": 3},
        **{"decides": False, "best": 1},
    }
    assert (one["share"], two["share"], both["share"]) == (38 / 48, 0, 38 / 48)
    assert table_lines(result)[-6:] == [
        "",
        "- one serves chinese, maths (79 % of the conversations)",
        "  - slice maths (8 conversations, 5 of 8 better): too few to tell, takes the choice of all data",
        "- two serves no slice: training on it by slices would equal plain fine-tuning",
        "- one or two serves chinese, maths (79 % of the conversations)",
        "  - slice maths (8 conversations, 5 of 8 better): too few to tell, takes the choice of all data",
    ]
    whole = compare(paths, slice_column="none")
    assert list(whole["slices"]) == ["all"]
    assert table_lines(whole)[-3] == "- one serves all data (100 % of the conversations)"


def test_the_choice_is_the_one_that_training_makes(tmp_path):
    """Truncated elsewhere, a conversation counts in training, and so it does in the choice; one that lacks does not."""
    rng = np.random.default_rng(2)
    slices = [str(rng.choice(["a", "b", ""])) for _ in range(60)]
    pivot = [row(f"c{n}", of, float(rng.uniform(3, 9))) for n, of in enumerate(slices)]
    source = [row(f"c{n}", of, float(rng.uniform(2, 9)), num_bytes=3 + n % 2) for n, of in enumerate(slices)][:50]
    result = compare([write(tmp_path / "p", "p", pivot), write(tmp_path / "s", "s", source)])
    joined = []
    for own, other in zip(pivot, source):
        size = int((other["end"] - other["start"]).sum())
        joined.append({**own, "source_ce": float(other["ce"].mean()), "source_tokens": 2, "source_bytes": size})
    expected = source_by_slice(joined, ce_unit="byte").choice.table
    found = result["choices"][0]["table"]
    assert result["left_out"] == 35
    assert found[""]["conversations"] == 50
    for name, entry in expected.items():
        assert found.pop(name) == entry | {"medians": pytest.approx([m / math.log(2) for m in entry["medians"]])}
    assert not found


def test_the_best_result_with_its_intervals(tmp_path, capsys):
    slices = ["a"] * 2 + ["b"] * 3
    bits = {"pivot": [9.0] * 5, "plain": [4.0] * 5, "target": [3.0, 1, 4, 2, 0], "merged": [4.0, 4, 4, 4, 3]}
    paths = [many(tmp_path, name, slices, of) for name, of in bits.items()]
    result = compare(paths, baseline=paths[1])
    ranking = result["ranking"]
    assert "choices" not in result
    (measure,) = ranking["measures"]
    assert [row[0] for row in ranking["table"]] == ["result", "target", "merged", "plain", "pivot"]
    assert measure["models"]["target"]["mean"] == pytest.approx(2)
    assert measure["slices"]["b"] == {
        "conversations": 3,
        "models": {n: {"mean": pytest.approx(v)} for n, v in zip(bits, (9, 4, 2, 11 / 3))},
    }
    variance = (2 / 2 + 4 / 3) / 4  # d: -1, -3 of a; 0, -2, -4 of b
    freedom = variance**2 / ((1 / 4) ** 2 / 1 + (1 / 3) ** 2 / 2)
    expected = [-2, student.ppf(0.975, freedom) * variance**0.5]
    assert measure["models"]["target"]["to_baseline"] == pytest.approx(expected)
    assert measure["models"]["plain"]["to_baseline"] == [0, 0]
    assert (ranking["baseline"], ranking["best"], ranking["next"]) == ("plain", "target", "merged")
    assert ranking["clear"] == []
    variance = (2 / 2 + 7 / 3 / 3) / 4  # -1, -3; 0, -2, -3
    freedom = variance**2 / ((1 / 4) ** 2 / 1 + (7 / 36) ** 2 / 2)
    to_next = student.ppf(0.975, freedom) * variance**0.5
    args = ["compare", *map(str, paths), "--baseline", str(paths[1])]
    assert main(args) == 0
    said = capsys.readouterr().out.splitlines()
    of_merged = student.ppf(0.975, 2) / 6  # d: 0, 0, -1 of b alone
    assert said[-9:-5] == [
        "| result | bits per byte | less plain |",
        "|---|---:|---:|",
        f"| target | 2.0000 | -2.0000 ± {expected[1]:.4f} |",
        f"| merged | 3.8333 | -0.1667 ± {of_merged:.4f} |",
    ]
    assert said[-2:] == [
        f"Best result: target, 2.0000 bits per byte (mean over 2 slices), -2.0000 ± {expected[1]:.4f} against plain, "
        f"-1.8333 ± {to_next:.4f} against the next, merged (95 % intervals, paired).",
        "No result is clear of plain: these conversations cannot tell them apart.",
    ]
    assert main([*args[:-1], str(tmp_path)]) == 2
    assert "baseline for compare: expected one of the compared directories" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("differences", "half_width"),
    [([1.0, 3, 1, 3], 3.182446 * (4 / 3 / 4) ** 0.5), ([2.0] * 4, 0), ([2.0], math.nan)],
    ids=["one slice", "all equal", "one conversation"],
)
def test_intervals_by_hand(differences, half_width):
    found = paired_difference([""] * len(differences), np.array(differences))
    assert found == pytest.approx((2, half_width), nan_ok=True, rel=1e-6)


def test_what_is_clear_of_plain_and_what_is_not():
    noise, slices = np.tile([-1, 1], 25), [""] * 50
    steady, best = -0.1 + 0.01 * noise, -0.2 + noise
    bits = 5 + np.array([0 * noise + 3, 0 * noise, steady, best])

    def ranked(names, bits, baseline, higher=False):
        return rank(names, [Measure("bits per byte", slices, bits, higher)], baseline)

    ranking = ranked(["pivot", "plain", "steady", "best"], bits, 1)
    assert (ranking["best"], ranking["clear"]) == ("best", ["steady"])
    assert ranking["summary"][1] == "It is not clear of plain; steady would be."
    clear = "It is clear of plain, and not of steady."
    ranking = ranked(["pivot", "plain", "steady", "best"], bits + np.array([[0], [0.5], [0], [0]]), 1)
    assert ranking["summary"][1] == clear
    ranking = ranked(["pivot", "plain", "steady", "best"], -bits - np.array([[0], [0.5], [0], [0]]), 1, higher=True)
    assert (ranking["best"], ranking["clear"], ranking["summary"][1]) == ("best", ["best", "steady"], clear)
    alone = ranked(["pivot", "one"], bits[[0, 2]], 0)
    assert alone["summary"] == [
        "Best result: one, 4.9000 bits per byte (the held-out data), -3.1000 ± 0.0029 against pivot (95 % intervals, "
        "paired)."
    ]
    assert ranked(["pivot", "plain"], bits[:2], 1)["summary"] == []


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (("one",), "expected at least two directories"),
        (("one", "aligned"), "expected what represent wrote, got aligned data"),
        (("one", "other"), "expected some that all of them have, got none"),
        (("one", "nothing"), "expected a finished directory"),
        (("one", "one"), "expected each directory once, got .*one twice"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else None,
)
def test_refusals(tmp_path, kinds, message):
    write(tmp_path / "one", "p", [row("c", None, 4)])
    write(tmp_path / "other", "s", [row("d", None, 4)])
    aligned_directory(tmp_path / "aligned")
    with pytest.raises(InputError, match=message):
        compare([tmp_path / kind for kind in kinds], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_prints_the_table_and_writes_it(tmp_path, capsys):
    paths = models(tmp_path, pivot=(4, 8, 12, 4), source=(8, 4, 4, 16))
    assert main(["compare", *map(str, paths), "--output_dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "| code | 3 | 2.000 (33 %) | **1.000 (67 %)** |" in printed
    assert (tmp_path / "out" / "compare.md").read_text() == printed
    assert "\n".join(table_lines(json.loads((tmp_path / "out" / "compare.json").read_text()))) + "\n" == printed
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert main(["compare", str(paths[0])]) == 2
    assert "expected at least two" in capsys.readouterr().err
