"""`compare`: bits per byte by hand, who wins where, and what cannot be compared."""

import json
import math

import numpy as np
import pytest

from fusechat_fuse import compare
from fusechat_fuse.cli import main
from fusechat_fuse.errors import InputError
from fusechat_fuse.evaluation.comparison import table_lines
from fusechat_fuse.store.shard_writer import ShardWriter
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
