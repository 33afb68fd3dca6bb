"""`run`: a recipe is checked, becomes commands, is carried out once, goes on when killed, and grows by a source."""

import contextlib
import errno
import json
import math
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fusechat_fuse.cli import main, options_of
from fusechat_fuse.errors import InputError
from fusechat_fuse.pipeline import record as module
from fusechat_fuse.pipeline.best import Best, link_best
from fusechat_fuse.pipeline.findings import weights
from fusechat_fuse.pipeline.plan import plan
from fusechat_fuse.pipeline.recipe import read_recipe
from fusechat_fuse.pipeline.report import report_page
from fusechat_fuse.pipeline.run import _locked, execute, last_message, run
from fusechat_fuse.pipeline.steps import Step, launched, steps_of
from fusechat_fuse.store.files import file_sha256
from tests.helpers.pages import Page
from tests.helpers.recipes import kill_in_step, recipe_of, written
from tests.test_inspect import CHROMIUM


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sorces": 1}, "key sorces in .*recipe.yml: expected one of output_dir, "),
        ({"data": None}, "key data in .*: expected a value, got None"),
        ({"preset": "best"}, "value for preset: expected fusechat or paper, got 'best'"),
        ({"sources": {"plain": "x"}}, "key source in .*: expected a name of letters.*, got 'plain'"),
        ({"sources": {"a/b": "x"}}, "key source in .*, got 'a/b'"),
        ({"train": {"output_dir": "x"}}, "key train.output_dir in .*: expected no flag that the pipeline sets"),
        ({"train": {"output-dir": "x"}}, "key train.output_dir in .*: expected no flag that the pipeline sets"),
        ({"targets": "some"}, "key targets in .*: expected one of serving, all, got 'some'"),
        ({"plain": "yes"}, "key plain in .*: expected true or false, got 'yes'"),
        ({"launcher": {"trian": "srun"}}, "key launcher.trian in .*: expected a stage"),
        ({"sources": {"a": {"modle": "x"}}}, "key sources.a in .*: expected a model or"),
        ({"merge": {"sce": 3}}, "merge.sce in .*: expected name: value pairs, got 3"),
        ({"merge": {"../elsewhere": {"method": "sce"}}}, r"key merge in .*, got '\.\./elsewhere'"),
        ({"preset": ["paper"]}, r"key preset in .*: expected text, got \['paper'\]"),
        ({"devices": 1}, "key devices in .*: expected a list of GPUs"),
        ({"launcher": "srun 'x"}, 'key launcher.represent in .*: expected a command .* got "srun \'x"'),
        ({"held_out": {"split": "test"}}, r"key held_out in .*: expected data or \{data, split, .*\}, got"),
        ({"held_out": {"data": "h", "dtype": "x"}}, r"key held_out in .*: expected data or \{data, split, .*\}, got"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_bad_recipe_is_one_sentence(changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        read_recipe(written(tmp_path, **changes))


def test_a_recipe_becomes_commands_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sources = {
        "a": "one",
        "b": {"model": "two", "represent": {"device_map": "auto"}, "launcher": {"represent": "srun"}},
    }
    more = {"sources": sources, "represent": {"dtype": "bfloat16"}, "multi": True, "held_out": ["h.json"]}
    steps = steps_of(read_recipe(written(tmp_path, **more, merge={"sce": {"select_topk": 0.1}, "linear": None})))
    represented = ["represent pivot", "represent a", "represent b", "compare", "align a", "align b", "combine"]
    trained = ["train plain", "train target-a", "train target-b", "train multi", "merge sce", "merge linear"]
    made = ("pivot", "plain", "target-a", "target-b", "multi", "merged-sce", "merged-linear", "compare")
    assert [step.key for step in steps] == [*represented, *trained, *(f"evaluate {name}" for name in made)]
    of = {step.key: step for step in steps}
    words = " ".join(of["represent b"].command)
    assert words.startswith("srun ")
    assert "--pivot_name_or_path p --output_dir out/representations/b --dtype bfloat16 --device_map auto" in words
    assert "--device_map" not in " ".join(of["represent a"].command)
    (config,) = of["merge sce"].files.values()
    assert json.loads(config)["parameters"] == {"select_topk": 0.1}
    assert json.loads(config)["base_model"] == "p"
    assert "base_model" not in json.loads(*of["merge linear"].files.values())
    less = steps_of(read_recipe(written(tmp_path, sources={"b": "two"})), plain_of="a")
    assert "train target-a" not in [step.key for step in less]
    assert "aligned/b" in next(step for step in less if step.key == "train plain").shell
    (tmp_path / "out" / "aligned" / "gone").mkdir(parents=True)  # a source that was removed: its data are there yet
    kept = steps_of(read_recipe(written(tmp_path, output_dir=str(tmp_path / "out"))), plain_of="gone")
    assert "aligned/gone" in next(step for step in kept if step.key == "train plain").shell


PLACED = {
    "pivot": "models/pivot",
    "sources": {"a": {"model": "models/a", "train": {"eval_data_path": "eval"}}, "b": "org/b"},
    "data": ["chats.json", "more/*.json", "org/chats"],
    "held_out": "held.json",
    "represent": {"template": "own.jinja"},
    "align": {"cache_dir": "cache"},
    "launcher": {"represent": "accelerate launch --config_file=a.yaml", "train": "./go.sh -n 2", "align": "srun own"},
}
THERE = ("models/pivot", "models/a", "eval", "chats.json", "more/x.json", "held.json", "own.jinja", "a.yaml", "go.sh")


def make_files(home: Path, names) -> None:
    for file in (home / name for name in names):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def test_paths_start_at_the_recipes_own_directory(tmp_path, monkeypatch, caplog):
    make_files(tmp_path / "there", (*THERE, "own"))
    monkeypatch.chdir(tmp_path)
    recipe = read_recipe(written(tmp_path / "there", **PLACED).relative_to(tmp_path))
    assert str(recipe.output_dir) == "there/out"
    assert (recipe.pivot.model, recipe.sources["a"].model, recipe.sources["b"].model) == (
        *("there/models/pivot", "there/models/a", "org/b"),
    )
    assert recipe.data == ["there/chats.json", "there/more/*.json", "org/chats"]
    assert recipe.held_out == ["there/held.json"]
    assert recipe.flags["represent"] == {"template": "there/own.jinja"}
    assert recipe.flags["align"] == {"cache_dir": "there/cache"}
    assert recipe.sources["a"].flags["train"] == {"eval_data_path": "there/eval"}
    assert recipe.launcher == {
        "represent": "accelerate launch --config_file=there/a.yaml",
        "train": "there/./go.sh -n 2",
        "align": "srun own",  # a command's name is none of a file
    }
    assert not caplog.records
    monkeypatch.chdir(tmp_path / "there")
    recipe = read_recipe(tmp_path / "there" / "recipe.yml")
    assert recipe.data == PLACED["data"]
    assert recipe.launcher == PLACED["launcher"]


def test_paths_that_start_at_the_working_directory_are_found_with_a_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "there").mkdir()
    make_files(tmp_path, (*THERE, "out/stages.json", "cache/x"))
    monkeypatch.chdir(tmp_path)
    recipe = read_recipe(written(tmp_path / "there", **PLACED))
    assert (str(recipe.output_dir), recipe.pivot.model, recipe.data) == ("out", "models/pivot", PLACED["data"])
    assert recipe.launcher == PLACED["launcher"]
    assert recipe.flags["align"] == PLACED["align"]
    warned = {message.split(" in ")[0] for message in caplog.messages}
    assert warned == {
        *("pivot", "sources.a.model", "sources.a.train.eval_data_path", "data", "held_out", "represent.template"),
        *("align.cache_dir", "launcher.represent", "launcher.train", "output_dir"),
    }
    assert "models/pivot is not in the recipe's directory, and is taken from the working directory" in caplog.text
    (tmp_path / "out" / "stages.json").unlink()  # a directory of that name, but of no run
    assert read_recipe(tmp_path / "there" / "recipe.yml").output_dir == tmp_path / "there" / "out"


def test_held_out_data_may_be_another_split(tmp_path):
    held_out = {"data": "org/chats", "split": "test"}
    recipe = read_recipe(written(tmp_path, data="org/chats", held_out=held_out, represent={"limit": 9}))
    splits = {step.key: options_of(step.arguments) for step in steps_of(recipe) if step.arguments[0] == "represent"}
    assert {key: options["split"] for key, options in splits.items()} == {
        **dict.fromkeys(("represent pivot", "represent a", "represent b"), "train"),
        **{f"evaluate {name}": "test" for name in ("pivot", "plain", "target-a", "target-b", "merged-sce")},
    }
    assert {(*options["data_path"], options["limit"]) for options in splits.values()} == {("org/chats", 9)}


@pytest.mark.parametrize(
    ("launcher", "begins"),
    [
        ("python", [sys.executable, "-m", "fusechat_fuse", "align"]),
        ("accelerate launch --config_file f.yaml", ["accelerate", "launch", "--config_file", "f.yaml", "-m"]),
        ("torchrun --nproc_per_node 8", ["torchrun", "--nproc_per_node", "8", "-m", "fusechat_fuse", "align"]),
        ("srun -N 1", ["srun", "-N", "1", sys.executable, "-m", "fusechat_fuse", "align"]),
    ],
)
def test_launchers(launcher, begins):
    assert launched(launcher, ["align"])[: len(begins)] == begins


def test_one_launcher_is_for_the_stages_that_run_models(tmp_path):
    launcher = "accelerate launch --num_processes 8"
    steps = steps_of(read_recipe(written(tmp_path, launcher=launcher, held_out="h.json", multi=True)))
    launched_so = {step.key.split()[0] for step in steps if step.command[0] == "accelerate"}
    assert launched_so == {"represent", "train", "evaluate"}
    assert [step.command[0] for step in steps if step.arguments[0] == "compare"] == [sys.executable] * 2


def test_over_ssh_the_command_is_one_word_from_the_same_directory():
    words = launched("ssh host", ["align", "--output_dir", "a b"])
    assert words[:2] == ["ssh", "host"]
    assert len(words) == 3
    assert words[2].startswith(f"cd {Path.cwd()} && ")
    assert words[2].endswith("align --output_dir 'a b'")


def test_the_first_failure_stops_with_the_command_and_the_log(tmp_path):
    recipe = written(tmp_path, output_dir=str(tmp_path / "out"), pivot=str(tmp_path / "none"), data="none.json")
    with pytest.raises(RuntimeError, match="represent pivot ended with exit code 2: fusechat-fuse: error: ") as raised:
        run(recipe)
    told = str(raised.value)
    log = tmp_path / "out" / "logs" / "represent-pivot.log"
    assert f"full log: {log}" in told
    assert "by hand: " + log.read_text().splitlines()[0].removeprefix("$ ") in told


def test_dry_run_does_nothing_and_an_unknown_stage_is_refused(tmp_path, caplog):
    recipe = written(tmp_path, output_dir=str(tmp_path / "out"))
    caplog.set_level("INFO")
    run(recipe, dry_run=True, start="train")
    assert not (tmp_path / "out").exists()
    assert "train target-b: run" in caplog.text
    assert "align a" not in caplog.text
    with pytest.raises(InputError, match=r"stage for run: expected one of answer, represent, .*, got 'trian'"):
        run(recipe, only="trian")
    with pytest.raises(InputError, match="expected --only or --from, got both"):
        run(recipe, only="represent", start="train")


def test_a_flag_that_a_stage_does_not_have_is_told_before_any_begins(tmp_path, capsys):
    recipe = written(tmp_path, output_dir=str(tmp_path / "out"), train={"lerning_rate": 1})
    assert main(["run", str(recipe)]) == 2
    told = capsys.readouterr().err
    assert "train plain of " in told
    assert "unknown flag '--lerning_rate': did you mean '--learning_rate'?" in told
    assert not (tmp_path / "out").exists()


def test_only_what_the_run_made_is_removed(tmp_path):
    recipe = read_recipe(written(tmp_path, output_dir=str(tmp_path / "out")))
    (merge,) = (step for step in steps_of(recipe) if step.stage == "merge")
    train = next(step for step in steps_of(recipe) if step.key == "train plain")
    merge.output.mkdir(parents=True)
    (merge.output / "mine.txt").write_text("precious")
    record = module.Record(tmp_path / "stages.json")
    record.begin(merge)
    assert (merge.output / "mine.txt").exists()  # someone else's: the command refuses it
    record.begin(merge)
    assert not merge.output.exists()  # ours, of a start that did not end
    train.output.mkdir(parents=True)
    record.begin(train)
    record.end(train, 1.0, 0)
    assert record.is_done(train)
    other = steps_of(read_recipe(written(tmp_path, output_dir=str(tmp_path / "out"), train={"seed": 3})))
    changed = next(step for step in other if step.key == "train plain")
    assert not record.is_done(changed)
    record.begin(changed)
    assert changed.output.exists()  # targets are never removed: train refuses another run's directory
    assert module.Record(tmp_path / "stages.json").entries == record.entries


def test_the_last_words_are_of_the_last_command(tmp_path):
    log = tmp_path / "x.log"
    log.write_text("$ first\nfusechat-fuse: error: old\n$ second\nreading\nKilled\n")
    assert last_message(log) == "Killed."


FOUND = {
    "pivot": "p<q",
    "sources": {"a": "one"},
    "preset": "fusechat",
    "answers": {
        "pivot": {"conversations": 7, "kept": {"pivot": 7}},
        "a": {"conversations": 9, "kept": {"cut": 2, "empty": 1}},
    },
    "certificates": {"a": {"mapping": "prefix", "coverage": 0.93, "mean_mapped_mass": 0.5, "gap_bits_per_byte": 0.0}},
    "losses": {"plain": [{"step": 1, "loss": 2.0}, {"step": 9, "loss": 1.0}], "multi": [{"step": 1, "loss": 1.5}]},
    "slices": {
        "multi": {
            "ce_unit": "byte",
            "models": ["pivot", "one"],
            "slices": {
                "code": {
                    "best": 1,
                    "conversations": 30,
                    "medians": [0.5, 0.25],
                    "better": 18,
                    "worse": 11,
                    "decides": False,
                }
            },
        }
    },
    "merges": {
        "sce": {"coefficients_by_kind": {"mlp": {"target-a": 0.25}}, "distance_to_linear": 0.125},
        "lin": {"method": "linear", "parameters": {"weight": 1.0}, "coefficients": {"target-a": 0.5, "target-b": 0.5}},
        "ties": {"method": "ties", "parameters": {"density": 0.5}},
    },
    "held_out": {
        "models": ["pivot", "plain", "multi"],
        "slices": {
            name: {"conversations": 3, "models": {m: {"mean": v} for m, v in zip(("pivot", "plain", "multi"), values)}}
            for name, values in (("all", (1.25, 1.0, 1.125)), ("tied", (2.0, 1.50001, 1.5)))
        },
        "ranking": {
            "baseline": "plain",
            "best": "multi",
            "models": {
                "pivot": {"score": 1.25, "to_baseline": [0.25, 0.125]},
                "plain": {"score": 1.0, "to_baseline": [0.0, 0.0]},
                "multi": {"score": 1.125, "to_baseline": [-0.125, 0.0625]},
            },
        },
    },
    "commands": {"train plain": "run <this>", "evaluate pivot": "that"},
    "seconds": {"train plain": 12.5, "evaluate pivot": 3.0},
    "about": {
        "data": ["chats.json", "more.json"],
        "predicted_tokens": 12345,
        "options": {"train": {"learning_rate": 1e-05}},
        "versions": {"torch": "2.13.0"},
        "date": "2026-12-01",
    },
}


def test_the_page_holds_every_figure_and_asks_for_nothing():
    text = report_page("fused", FOUND)
    page = Page(text)
    assert page.headings == [
        "Held-out results, means",
        *("Who answered the training data", "Alignment", "Training loss"),
        *("Model selected for each slice", "Merge coefficients", "About this run"),
    ]
    held_out = page.table_of("slice", "conversations", "pivot", "plain", "multi")
    assert held_out == {"all": ["3", "1.2500", "1.0000", "1.1250"], "tied": ["3", "2.0000", "1.5000", "1.5000"]}
    bits = [f"{nats / math.log(2):.4f}" for nats in (0.5, 0.25)]  # one unit on the page
    assert page.table_of("slice", "conversations", "pivot", "one") == {"code": ["30", *bits, "one"]}
    assert page.best == ["1.0000", bits[1]]  # of values that look equal none is in bold
    assert "slice code (30 conversations, 18 of 29 better): too even to tell, takes the choice of all data" in (
        page.paragraphs
    )
    answered = page.table_of("selected", "conversations", "answered by it")
    assert answered == {"pivot": ["7", "0", "7", ""], "a": ["9", "6", "3", "2 cut, 1 empty"]}
    assert page.table_of("training") == {"plain": ["9", "2.0000", "1.0000"], "multi": ["1", "1.5000", "1.5000"]}
    assert page.table_of("tensors", "target-a", "target-b") == {"all": ["0.5000", "0.5000"]}
    for sentence in (
        "Distance to linear merging: 12.5% of its task vector.",
        "Method linear (weight 1.0): one coefficient for all tensors of a target.",
        "Method ties (density 0.5): it reports no coefficients.",
    ):
        assert sentence in page.paragraphs
    assert page.table_of("step", "seconds") == {"train plain": ["12.5000"], "evaluate pivot": ["3.0000"]}
    assert dict(page.tables[-2]) == {
        "data": "chats.json, more.json",
        "predicted tokens": "12,345",
        "options": "train: learning_rate 1e-05",
        "versions": "torch 2.13.0",
        "date": "2026-12-01",
    }
    assert "p&lt;q" in text
    assert "run &lt;this&gt;" in text
    assert page.addresses == []
    assert not re.search("https?://", text)
    assert len(page.ids) == len(set(page.ids))
    differences, losses = page.charts
    assert {"multi", "plain", "bits per byte, less plain's"} <= set(differences)
    assert differences.index("multi") < differences.index("plain")  # the best on top
    assert "pivot" not in differences  # far away, it would squeeze the others together
    assert {"optimizer step", "training loss (nats per labelled token)", "plain", "multi"} <= set(losses)


def test_without_matplotlib_the_page_says_so_and_keeps_its_tables(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "fusechat_fuse.pipeline.charts", raising=False)
    monkeypatch.delattr("fusechat_fuse.pipeline.charts", raising=False)
    page = Page(report_page("fused", FOUND))
    assert page.charts == []
    sentence = "There is no chart: matplotlib is not installed (pip install 'fusechat[plot]')."
    assert page.paragraphs.count(sentence) == 2
    assert page.table_of("training")["plain"] == ["9", "2.0000", "1.0000"]


@pytest.mark.parametrize(
    ("merge", "expected"),
    [
        ({"method": "linear"}, {"target-a": 0.5, "target-b": 0.5}),
        ({"method": "linear", "weight": 0.25, "normalize": False}, {"target-a": 0.25, "target-b": 0.25}),
        ({"method": "ties", "density": 0.5}, None),
    ],
    ids=["linear", "not normalised", "ties"],
)
def test_a_merge_without_a_report_is_shown_by_its_configuration(merge, expected, tmp_path):
    sources = {"a": "one", "b": "two"}
    steps = steps_of(read_recipe(written(tmp_path, sources=sources, merge={"other": merge})))
    (step,) = (step for step in steps if step.stage == "merge")
    found = weights(step)
    assert found["method"] == merge["method"]
    assert found.get("coefficients") == expected


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; the structure is checked without it")
def test_the_page_in_chromium(tmp_path):
    file = tmp_path / "report.html"
    look = "<script>document.title = [document.querySelectorAll('table').length, document.body.scrollWidth > "
    look += "document.documentElement.clientWidth, document.querySelector('svg').getBoundingClientRect().width > 300]"
    page = re.sub("<meta http-equiv.*?>", "", report_page("fused", FOUND))  # the policy forbids the script that looks
    file.write_text(page.replace("</body>", f"{look}.join(' ')</script></body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([*command, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr[-2000:]
    assert title[1] == f"{len(Page(page).tables)} false true"


def test_the_link_to_the_best_result_goes_where_there_is_none(tmp_path):
    (tmp_path / "models" / "old").mkdir(parents=True)
    link_best(tmp_path, Best(tmp_path / "models" / "old", ["Best result: old"]))
    assert (tmp_path / "best").resolve() == tmp_path / "models" / "old"
    for _ in range(2):
        link_best(tmp_path, None)
        assert not (tmp_path / "best").is_symlink()
    assert (tmp_path / "models" / "old").is_dir()
    (tmp_path / "best").mkdir()  # the user's
    link_best(tmp_path, None)
    assert (tmp_path / "best").is_dir()


def contents(folder: Path) -> dict[str, str]:
    """What a run made, without what tells of times."""
    kinds = {".arrow", ".safetensors"}
    files = [file for file in sorted(folder.rglob("*")) if file.suffix in kinds]
    return {str(file.relative_to(folder)): file_sha256(file) for file in files}


@pytest.fixture(scope="module")
def finished(recipe_models, tmp_path_factory, forked):
    """A recipe of one source, run; what it made, and its plan before and after. Evaluations are forked."""
    folder = tmp_path_factory.mktemp("finished")
    more = {"held_out": str(recipe_models / "held.json"), "score": "exact_match", "answer": {"max_new_tokens": 4}}
    more |= {"plain": False, "launcher": {"evaluate": forked.launcher, "answer": forked.launcher}}
    recipe = recipe_of(recipe_models, folder, ("one",), **more)
    before = plan(recipe, options_of=options_of)
    run(recipe, options_of=options_of)
    after = plan(recipe, options_of=options_of)
    content = contents(folder / "out")
    return SimpleNamespace(recipe=recipe, folder=folder, before=before, after=after, more=more, content=content)


@pytest.mark.slow
def test_what_was_planned_is_what_was_measured(finished):
    assert finished.before["exact"]
    assert not finished.before["warnings"]
    rows, steps = finished.after["steps"], steps_of(read_recipe(finished.recipe))
    planned = [{**row, "seconds": None, "measured": False} for row in finished.before["steps"]]
    measures = ("measured_disk_bytes", "measured_memory_bytes")
    assert [
        {**{k: v for k, v in row.items() if k not in measures}, "seconds": None, "measured": False} for row in rows
    ] == planned  # what was measured stands beside the plan and does not move it
    for row, step in zip(rows, steps, strict=True):
        if step.stage != "evaluate":  # a forked process holds what it shares as well
            assert row["memory_bytes"] == pytest.approx(row["measured_memory_bytes"], rel=0.25), row["step"]
        if step.stage in ("represent", "align") or step.arguments[0] == "represent":
            counts = json.loads((step.output / "manifest.json").read_text())["counts"]
            for key in ("conversations", "predicted_tokens", "tokens"):
                assert row[key] == counts[key]
            assert row.get("padding_share") == pytest.approx(counts.get("padding_share"), abs=1e-4)
    of_files = [row for row, step in zip(rows, steps) if step.arguments[0] != "compare"]
    disk = sum(row["measured_disk_bytes"] for row in of_files)
    assert sum(row["disk_bytes"] for row in of_files) == pytest.approx(disk, rel=0.1)


@pytest.mark.slow
def test_a_recipe_ends_with_a_merge_and_a_page_and_takes_another_source(
    finished, recipe_models, forked_commands, caplog
):
    caplog.set_level("INFO")
    out, before = finished.folder / "out", finished.content
    report = json.loads((out / "report.json").read_text())
    assert report["compare"]["models"] == ["pivot", "one"]
    assert len(report["held_out"]["models"]) == 3  # pivot, target, the merge
    assert report["certificates"]["one"]["gap_bits_per_byte"] == pytest.approx(0, abs=1e-2)
    assert [len(log) for log in report["losses"].values()] == [3]
    assert report["slices"]["target-one"]["models"] == ["pivot", "one"]
    kinds = report["merges"]["sce"]["coefficients_by_kind"]
    assert all(sum(of.values()) == pytest.approx(1) for of in kinds.values())
    page = (out / "report.html").read_text()
    read = Page(page)
    assert len(read.charts) == 2
    assert read.addresses == []
    assert {"data", "versions", "date"} <= {row[0] for row in read.tables[-2]}
    best = (out / report["best"]["path"]).resolve()
    assert (out / "best").resolve() == best
    assert (best / "README.md").is_file()
    assert (best / "config.json").is_file()
    assert read.paragraphs[0] == report["best"]["summary"][0]
    assert "against pivot" in report["best"]["summary"][0]  # there is no plain
    assert f"{report['certificates']['one']['mean_mapped_mass']:.4f}" in read.table_of("source", "mapping")["one"]
    assert str(out.parent) not in page.split("<h2>")[0]  # models by name, not by place
    assert (out / "logs" / "train-target-one.log").read_text().startswith("$ ")
    caplog.clear()
    run(finished.recipe)
    assert caplog.text.count("finished before") == len(steps_of(read_recipe(finished.recipe)))
    assert contents(out) == before

    for credit in (1, 0.5):  # another score is no other answer, and another content of its file another score
        (finished.folder / "grade.py").write_text(f"def grade(answer, reference, row):\n    return {credit}\n")
        caplog.clear()
        run(recipe_of(recipe_models, finished.folder, ("one",), **{**finished.more, "score": "grade.py:grade"}))
        assert re.findall(r"\] (.*): starts", caplog.text) == ["evaluate compare"]
        ranking = json.loads((out / "report.json").read_text())["held_out"]["ranking"]
        assert f"{credit:.4f} score by grade" in ranking["summary"][0]
    assert "<h3>score by grade, by slice (higher is better)</h3>" in (out / "report.html").read_text()

    recipe = recipe_of(recipe_models, finished.folder, ("one", "two"), plain=False)
    caplog.clear()
    run(recipe)
    assert not (out / "best").exists()  # nothing is held out
    new = ["represent two", "compare", "align two", "train target-two", "merge sce"]
    assert re.findall(r"\] (.*): starts", caplog.text) == new
    after = contents(out)
    assert {name.split("/")[0] for name in before if before[name] != after[name]} <= {"merged"}
    assert len(json.loads((out / "merged" / "sce.yml").read_text())["models"]) == 2


@pytest.mark.slow
def test_a_run_killed_in_every_stage_ends_with_the_same_files(finished, recipe_models, forked, tmp_path):
    recipe = recipe_of(recipe_models, tmp_path, ("one",), plain=False)
    command = [sys.executable, "-m", "fusechat_fuse", "run", str(recipe)]
    moments = np.random.default_rng(13)
    for step in steps_of(read_recipe(recipe)):
        log = tmp_path / "out" / "logs" / f"{step.key.replace(' ', '-')}.log"
        kill_in_step(forked, command, log, moments.uniform(0, 0.4))
    done = forked.run(command)
    assert done.returncode == 0, done.stderr[-2000:]
    assert contents(tmp_path / "out") == {
        name: digest for name, digest in finished.content.items() if not name.startswith("held_out")
    }


def test_what_counts_is_content_not_dates(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"x" * 10)
    first = module.content_digest(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert module.content_digest(tmp_path / "copy") == first
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "x").write_text("y")
    assert module.content_digest(folder) == first
    (folder / "config.json").write_text("{ }")
    assert module.content_digest(folder) != first
    assert module.content_digest(Path("some/hub-name")) is None
    before = module.content_digest(folder)
    (folder / "model.safetensors").write_bytes(b"y" * 10)  # of the same size: another merge, say
    assert module.content_digest(folder) != before
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"x" * 10)
    with monkeypatch.context() as patch:
        patch.setattr(module, "file_sha256", lambda path: pytest.fail("a model's file is not read whole"))
        before = module.content_digest(gguf)
        gguf.write_bytes(b"xy" * 5)
        assert module.content_digest(gguf) != before
    pattern = tmp_path / "*" / "config.json"
    before = module.content_digest(pattern)
    (folder / "config.json").write_text("[]")
    assert module.content_digest(pattern) != before
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nothing")
    assert [module.content_digest(tmp_path / name) for name in ("pipe", "link")] == [None, None]


def steps_in(folder: Path, **changes) -> dict:
    recipe = written(folder, **{"output_dir": str(folder / "out"), "pivot": str(folder / "p"), **changes})
    return {step.key: step for step in steps_of(read_recipe(recipe))}


@pytest.fixture
def recorded(tmp_path):
    """A recipe's `represent pivot`, entered as finished: pivot of adapters on a base, data in a directory."""
    for name in ("p", "base", "data"):
        (tmp_path / name).mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"x" * 10)
    (tmp_path / "p" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "base")})
    )
    (tmp_path / "data" / "a.jsonl").write_bytes(b"x" * 1_600_000)
    step = steps_in(tmp_path, data=str(tmp_path / "data"))["represent pivot"]
    step.output.mkdir(parents=True)
    record = module.Record(tmp_path / "stages.json")
    record.begin(step)
    record.end(step, 1.0, 0)
    assert record.is_done(step)
    return SimpleNamespace(folder=tmp_path, record=record, step=step)


def test_what_a_step_is_made_from_is_seen_whole(recorded):
    data, base = recorded.folder / "data" / "a.jsonl", recorded.folder / "base" / "model.safetensors"
    data.write_bytes(b"x" * 800_003 + b"y" + b"x" * 799_996)  # of the same size, between the samples of a model's file
    assert not recorded.record.is_done(recorded.step)
    data.write_bytes(b"x" * 1_600_000)
    assert recorded.record.is_done(recorded.step)
    base.write_bytes(b"y" * 10)
    assert not recorded.record.is_done(recorded.step)


def test_an_input_that_changes_during_a_step_is_told(recorded):
    recorded.record.begin(recorded.step)
    (recorded.folder / "data" / "a.jsonl").write_bytes(b"y" * 1_600_000)
    with pytest.raises(RuntimeError, match=r"expected its inputs to stay .*data.* --overwrite represent"):
        recorded.record.end(recorded.step, 1.0, 0)
    assert not module.Record(recorded.folder / "stages.json").is_done(recorded.step)
    recorded.record.begin(recorded.step, overwrite=True)
    assert not recorded.step.output.exists()


def test_what_changes_nothing_made_does_not_count(recorded, monkeypatch):
    monkeypatch.chdir(recorded.folder)
    (recorded.folder / "p" / "notes.txt").write_text("mine")
    same = steps_in(recorded.folder, pivot="p/", data="data", represent={"server_requests": 4})["represent pivot"]
    assert recorded.record.is_done(same)
    other = steps_in(recorded.folder, data=str(recorded.folder / "data"), represent={"top_k": 4})["represent pivot"]
    assert not recorded.record.is_done(other)
    first, second = (
        steps_in(recorded.folder, data=str(recorded.folder / "data"), train=options)["train plain"]
        for options in ({"seed": 1, "max_steps": 2}, {"max_steps": 2, "seed": 1, "logging_steps": 3})
    )
    assert module.fingerprint(first, {}) == module.fingerprint(second, {})


def test_a_hub_name_stands_for_its_cached_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for folder, name, data in (("models--a--b", "a/b", False), ("datasets--a--b", "a/b:en", True)):
        (tmp_path / folder / "refs").mkdir(parents=True)
        (tmp_path / folder / "refs" / "main").write_text(folder)
        assert module.content_digest(Path(name), data=data) == folder


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b'{"compare": null}', b'{"compare', b"\0\0", b'{"\xc3'])
def test_a_damaged_record_is_a_sentence_that_loses_nothing(tmp_path, content):
    (tmp_path / "stages.json").write_bytes(content)
    message = (
        r"record of the run for .*stages.json: expected an entry for each step, .* Remove it and .*merged: all other"
    )
    with pytest.raises(InputError, match=message):
        module.Record(tmp_path / "stages.json")


def test_what_was_damaged_since_is_made_anew_where_it_is_asked(recorded):
    (recorded.step.output / "README.md").write_text("# mine")
    (recorded.step.output / "NOTES").write_text("mine")
    assert recorded.record.is_done(recorded.step)
    (recorded.step.output / "shard-00000.arrow").write_text("not what was written")
    for overwrite in (False, True):  # refused at first
        assert recorded.record.is_stale(recorded.step)
        recorded.record.begin(recorded.step, overwrite)
        assert recorded.step.output.exists() != overwrite
    recorded.step.output.mkdir()
    recorded.record.begin(recorded.step, overwrite=True)
    assert recorded.step.output.exists()  # a start that did not end goes on


def test_the_training_on_all_sources_keeps_its_checkpoints_unless_its_data_change(recorded):
    sources = {"sources": {"a": "one", "b": "two"}, "multi": True}
    of_options = [
        steps_in(recorded.folder, **sources, train={"per_device_train_batch_size": n})["train multi"] for n in (4, 2)
    ]
    data = recorded.folder / "out" / "aligned" / "multi"
    data.mkdir(parents=True)
    (data / "shard.arrow").write_text("x")
    of_options[0].output.mkdir(parents=True)
    recorded.record.begin(of_options[0])
    recorded.record.begin(of_options[1])
    assert recorded.record.is_stale(of_options[1])
    assert of_options[1].output.exists()
    (data / "shard.arrow").write_text("y")
    recorded.record.begin(of_options[1])
    assert not of_options[1].output.exists()


def test_a_second_run_in_one_directory_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    recipe = written(tmp_path, output_dir=str(tmp_path / "out"))
    at_work = rf"expected no other run in .*, got one at work \(process {os.getpid()} on {socket.gethostname()} since"
    with _locked(tmp_path / "out"), pytest.raises(InputError, match=at_work):
        run(recipe)


def test_where_files_have_no_locks_a_run_says_so(tmp_path, monkeypatch, caplog):
    def flock(file, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with _locked(tmp_path):
        assert "Function not implemented, so that another run in it would not be refused" in caplog.text


def test_the_ranks_below_a_launcher_end_with_a_killed_run(tmp_path):
    launcher = tmp_path / "launcher.sh"
    launcher.write_text('"$@" --config "$0.0" & "$@" --config "$0.1" & wait\n')
    places = [f"{launcher}.{rank}" for rank in (0, 1)]
    for place in places:
        os.mkfifo(place)  # a rank waits for what is written there
    step = Step("align", "a", ["align"], launched(f"sh {launcher}", ["align"]), tmp_path / "out")
    killed = os.fork()
    if killed == 0:
        execute(step, tmp_path / "log", {}, True)
        os._exit(0)
    ranks = []
    for place in places:
        while True:
            with contextlib.suppress(OSError):  # nobody reads yet
                ranks.append(os.open(place, os.O_WRONLY | os.O_NONBLOCK))
                break
            assert os.waitpid(killed, os.WNOHANG) == (0, 0), (tmp_path / "log").read_text()
            time.sleep(0.01)
    os.kill(killed, signal.SIGKILL)
    os.waitpid(killed, 0)
    ended = select.poll()
    for rank in ranks:
        ended.register(rank, 0)
        assert ended.poll(10_000) == [(rank, select.POLLERR)]  # nobody reads any more
        ended.unregister(rank)
        os.close(rank)


def test_the_pivot_as_its_own_source_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"key sources\.a in .*: expected another model than the pivot, got 'p/'"):
        read_recipe(written(tmp_path, sources={"a": "p/"}))


def test_a_dry_run_tells_what_has_changed(recorded, caplog):
    caplog.set_level("INFO")
    out = recorded.folder / "out"
    shutil.copy(recorded.folder / "stages.json", out / "stages.json")
    changed = written(
        recorded.folder,
        **{"output_dir": str(out), "pivot": str(recorded.folder / "p"), "data": str(recorded.folder / "data")},
        represent={"top_k": 4},
    )
    run(changed, dry_run=True, only="represent")
    assert "represent pivot: run, or be refused if its options or inputs differ; --overwrite represent" in caplog.text
    run(changed, dry_run=True, only="represent", overwrite=["represent"])
    assert "represent pivot: run anew, since its options, inputs or output have changed" in caplog.text
    warnings = plan(changed, options_of=options_of)["warnings"]
    assert "represent pivot may be refused: its options, inputs or output have changed since it ran" in " ".join(
        warnings
    )
    (out / "stages.json").write_text("null")
    with pytest.raises(InputError, match=r"record of the run for .*, got a damaged file"):
        plan(changed, options_of=options_of)
