"""The measuring examples: the miniature end to end, with models that know nothing, and how figures are made."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import measurement
import paper_in_miniature
import real_models

ROOT = Path(__file__).resolve().parents[1]


def test_an_interval_is_students():
    assert measurement.half_width(np.array([1.0, 2.0, 3.0, 4.0, 5.0])) == pytest.approx(1.9632, abs=1e-4)
    assert np.isnan(measurement.half_width(np.array([1.0])))


def test_the_summary_is_paired_and_rows_may_have_fewer_seeds(tmp_path):
    work = paper_in_miniature.Work(tmp_path, 0, fast=False)
    rows_of = paper_in_miniature.rows_of
    names = [
        name for phase in paper_in_miniature.phases(work, ablations=True) for task in phase for name in rows_of(task)
    ]
    assert len(names) == len(set(names))
    main = {
        name for phase in paper_in_miniature.phases(work, ablations=False) for task in phase for name in rows_of(task)
    }
    assert main < set(names)
    answers = paper_in_miniature.Work(tmp_path, 0, fast=False, part="answers")
    part = {
        name
        for phase in paper_in_miniature.phases(answers, ablations=False)
        for task in phase
        for name in rows_of(task)
    }
    assert {"multi, sources' answers, no wrong answers", "multi, round 2", "sce 1.0"} < part < main
    for seed in range(3):
        folder = tmp_path / f"seed-{seed}" / "results"
        folder.mkdir(parents=True)
        for n, name in enumerate(names if seed < 2 else main):
            (folder / f"{name}.json").write_text(json.dumps({"overall": 0.1 * seed + 0.001 * (n if seed < 2 else 0)}))
    works = [paper_in_miniature.Work(tmp_path, seed, fast=False) for seed in range(3)]
    found = paper_in_miniature.summary(paper_in_miniature.collect(works, 2))
    assert list(found)[: len(names)] == names
    assert len(found["multi"]["seeds"]) == 3
    assert len(found["tail drop"]["seeds"]) == 2
    more = names.index("tail drop") - names.index("plain")
    assert found["tail drop"]["to_plain"] == pytest.approx(0.1 * more, abs=0.01)  # of the same two seeds
    less = names.index("multi, sources' answers") - names.index("plain, sources' answers")
    pair = found["pairs"]["multi, sources' answers less plain, sources' answers"]
    assert pair["mean"] == pytest.approx(0.1 * less * 2 / 3, abs=0.01)  # of three seeds the third is without it
    about = {"seeds": 3, "command": "c", "minutes": 1, "machine": "m", "versions": "v"}
    table = paper_in_miniature.markdown(found, about)
    assert "| tail drop (2) |" in table
    assert "| multi |" in table


@pytest.mark.slow
def test_the_miniature_runs_and_goes_on(tmp_path, forked):
    script = ROOT / "examples" / "paper_in_miniature.py"
    command = [sys.executable, str(script), "--fast", "--seeds", "1", "--jobs", "2"]
    command += ["--ablation_seeds", "0", "--output", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    environment = {**os.environ, "FUSECHAT_CACHE": str(tmp_path / "cache")}
    done = forked.run(command, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "results" / "miniature.json").read_text())
    assert {"pivot", "plain", "paper sce", "multi", "linear", "sce 1.0", "multi, round 3"} <= results["scores"].keys()
    assert all(len(seeds) == 1 and 0 <= seeds[0]["overall"] <= 1 for seeds in results["scores"].values())
    assert (tmp_path / "results" / "miniature.png").read_bytes().startswith(b"\x89PNG")
    again = forked.run(command, env=environment)
    assert again.returncode == 0
    assert "train" not in again.stdout.split("# The paper")[0]
    assert json.loads((tmp_path / "results" / "miniature.json").read_text())["scores"] == results["scores"]


def test_data_of_the_real_pair_are_three_to_one_and_of_other_text(tmp_path):
    rows = [{"id": f"{s}-{n}", "conversations": [], "slice": s} for s in ("chinese", "math") for n in range(40)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    chosen = json.loads(real_models.training_data(tmp_path / "train.json", tmp_path, 16).read_text())
    assert [row["slice"] for row in chosen] == ["chinese"] * 12 + ["math"] * 4
    (tmp_path / "other.txt").write_text(
        "短，太短\n" + "这是一本很好的书" + "，" + "内容非常丰富" * 8 + "\n", encoding="utf-8"
    )
    held = real_models.held_out_data(tmp_path / "train.json", tmp_path / "other.txt", tmp_path, 5)
    rows = json.loads(held.read_text())
    assert [row["slice"] for row in rows].count("chinese") == 5
    assert [row["slice"] for row in rows].count("other text") == 1
    assert rows[-1]["conversations"][0]["value"] == "这是一本很好的书，"


def test_rows_of_the_real_pair_change_one_option_or_the_paper_s_choice_whole():
    tried = {regime: real_models.rows_of(*regime) for regime in real_models.REGIMES}
    assert all(list(rows)[:4] == list(real_models.ROWS) for rows in tried.values())
    assert {regime: len(rows) for regime, rows in tried.items()} == {(128, 1): 9, (48, 4): 15, (128, 3): 4}
    changed = {n: o for rows in tried.values() for n, o in rows.items() if n.startswith(("ours, ", "min_ce_slice, "))}
    more = {"min_ce_slice": 2, "ours, min_ce per token, pivot": 3}  # that row's own choice, and one change of it
    for name, options in changed.items():
        assert len(options) == more.get(name, more.get(name.split(",")[0], 1)), name
    mappings = {name: real_models.mapping_of(options) for name, options in tried[48, 4].items()}
    assert mappings["ours"] == mappings["min_ce_slice, tail drop"] == "prefix"
    assert mappings["the paper's settings"] == mappings["min_ce_slice, mapping statistics"] == "statistics"


def test_differences_are_paired_over_conversations():
    plain = {f"c{n}": float(n) for n in range(6)}
    own = {f"c{n}": n - 0.5 + 0.1 * (n % 2) for n in range(5)}
    figures = real_models.paired(own, plain)
    assert (figures["to_plain"], figures["conversations"]) == (-0.46, 5)
    assert figures["interval"] == pytest.approx(0.068, abs=1e-3)
