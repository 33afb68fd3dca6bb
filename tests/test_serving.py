"""Trainings that would equal plain fine-tuning: found in what `compare` wrote, said, and left out of a run."""

import json
from pathlib import Path

import pytest

from fusechat_fuse.cli import options_of
from fusechat_fuse.pipeline import run as module
from fusechat_fuse.pipeline.plan import plan
from fusechat_fuse.pipeline.plan_text import plan_lines
from fusechat_fuse.pipeline.recipe import read_recipe
from fusechat_fuse.pipeline.record import Record
from fusechat_fuse.pipeline.run import run
from fusechat_fuse.pipeline.serving import steps_now
from tests.helpers.pages import Page
from tests.helpers.recipes import recipe_of, written


def choices(*shares: float) -> list[dict]:
    """Of compare.json: the share of the conversations that each source serves, and all together."""
    names = [["a"], ["b"], ["a", "b"]]
    undecided = "slice maths (8 conversations, 5 of 8 better): too few to tell, takes the choice of all data"
    return [{"sources": name, "share": share, "summary": ["first", undecided]} for name, share in zip(names, shares)]


@pytest.fixture
def known(tmp_path):
    """What is known of a recipe with some keys changed, after a comparison with these shares."""

    def of(shares, **changes):
        home = tmp_path / "out"
        recipe = read_recipe(written(tmp_path, output_dir=str(home), **changes))
        record = Record(tmp_path / "stages.json")
        (compare,) = (step for step in steps_now(recipe, record).steps if step.stage == "compare")
        record.begin(compare)
        compare.output.mkdir(parents=True, exist_ok=True)
        (compare.output / "compare.json").write_text(json.dumps({"choices": choices(*shares)}))
        record.end(compare, 1.0, 0)
        return steps_now(recipe, record)

    return of


def made(known) -> list[str]:
    return [step.key for step in known.steps if step.stage in ("combine", "train", "merge")]


PLAIN, TARGETS, MULTI = "train plain", ["train target-a", "train target-b"], ["combine", "train multi"]


def test_what_would_equal_plain_is_left_out_and_said(known):
    found = known((0.5, 0.25, 0.75), multi=True)
    assert made(found) == ["combine", PLAIN, *TARGETS, "train multi", "merge sce"]
    assert found.left_out == []
    assert found.notes[0].startswith("a: slice maths (8 conversations, 5 of 8 better): too few")
    assert found.notes[-1].startswith("sources are selected for 75% of the conversations: with answers: sources in")
    assert not any("answers: sources" in note for note in known((0.5, 0, 0.5), answers="sources").notes)
    assert not any("answers: sources" in note for note in known((0, 0, 0)).notes)
    found = known((0, 0.25, 0.25), multi=True)
    assert made(found) == ["combine", PLAIN, "train target-b", "train multi"]
    how = "it is left out (targets: all in the recipe trains it)"
    assert found.left_out == [
        f"target-a would equal plain fine-tuning, as a serves no slice of the data: {how}",
        "merge sce: left out, as fewer than two targets are trained",
    ]
    found = known((0, 0, 0), multi=True)
    assert made(found) == [PLAIN]
    assert f"multi would equal plain fine-tuning, as no source serves a slice of the data: {how}" in found.left_out
    found = known((0, 0, 0), multi=True, targets="all")
    assert made(found) == ["combine", PLAIN, *TARGETS, "train multi", "merge sce"]
    assert len(found.left_out) == 3
    assert all(line.endswith("it is trained all the same (targets: all)") for line in found.left_out)


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({"preset": "paper"}, []),
        ({"train": {"fusion_fallback": "pivot"}}, []),
        ({"train": {"fusion_function": "min_ce"}}, []),
        ({"train": {"fusion_function": "min_ce_slice"}}, ["target-a", "target-b", "multi"]),
        ({"train": {"ce_unit": "token"}}, []),
        ({"combine": {"function": "avg_ce"}}, ["target-a", "target-b"]),
        ({"train": {"slice_pattern": "^x"}}, ["target-a", "target-b"]),  # combine names other slices
        ({"train": {"slice-pattern": "^x"}, "combine": {"slice_pattern": "^x"}}, ["target-a", "target-b", "multi"]),
        ({"sources": {"a": {"model": "one", "train": {"slice_column": "auto"}}, "b": "two"}}, ["target-b", "multi"]),
    ],
    ids=["paper", "pivot", "by conversation", "alone", "token", "mixture", "one pattern", "patterns", "own column"],
)
def test_only_what_the_comparison_can_tell_is_left_out(known, changes, left):
    found = known((0, 0, 0), multi=True, **changes)
    assert [line.split()[0] for line in found.left_out if not line.startswith("merge")] == left


def test_a_comparison_of_other_inputs_says_nothing(known, tmp_path):
    known((0, 0, 0))
    (tmp_path / "out" / "compare" / "compare.json").write_text("{}")
    recipe = read_recipe(tmp_path / "recipe.yml")
    assert steps_now(recipe, Record(tmp_path / "stages.json")).left_out == []


def recorder(ran: list[str], comparisons: dict[str, dict]):
    """In place of a step's process: notes the step, and writes what `compare` finds, by the step's name."""

    def execute(step, log, environment, quiet):
        ran.append(step.key)
        Path(log).write_text("")
        step.output.mkdir(parents=True, exist_ok=True)
        if step.key in comparisons:
            found = {"models": ["pivot", "plain", "target-one", "sce"], "slices": {}, **comparisons[step.key]}
            (step.output / "compare.json").write_text(json.dumps(found))
        return 0, 0

    return execute


def test_a_run_ends_with_its_best_result(monkeypatch, tmp_path, recipe_models, caplog):
    caplog.set_level("INFO", "fusechat_fuse")
    ranking = {"best": "sce", "summary": ["Best result: sce.", "No result is clear of plain."]}
    ranking |= {"baseline": "plain", "models": {"plain": {"to_baseline": [0, 0]}, "sce": {"to_baseline": [-1, 0.5]}}}
    held_out = {"ranking": ranking}
    monkeypatch.setattr(module, "execute", recorder([], {"evaluate compare": held_out}))
    recipe, out = recipe_of(recipe_models, tmp_path, ("one",), held_out="held.json"), tmp_path / "out"
    run(recipe)
    link = out / "best"
    assert link.readlink() == Path("merged/sce")
    assert "Best result: sce.\nNo result is clear of plain." in caplog.text
    assert f"{link} is a link to {out / 'merged' / 'sce'}" in caplog.text
    assert json.loads((out / "report.json").read_text())["best"] == {
        "path": "merged/sce",
        "summary": ranking["summary"],
    }
    page = Page((out / "report.html").read_text())
    assert page.paragraphs[:3] == ["Best result: sce.", "No result is clear of plain.", "It is in merged/sce."]
    ranking["best"] = "target-one"
    (out / "held_out" / "compare" / "compare.json").unlink()  # made anew
    run(recipe, overwrite=["evaluate"])
    assert link.resolve() == (out / "models" / "target-one").resolve()
    link.unlink()
    link.mkdir()
    run(recipe)
    assert f"{link} is no link: it stays, and the best result is {out / 'models' / 'target-one'}" in caplog.text
    caplog.clear()
    (out / "held_out" / "compare" / "compare.json").write_text(json.dumps({"models": [], "slices": {}, **held_out}))
    run(recipe, only="report")  # which evaluates nothing
    assert "best" not in json.loads((out / "report.json").read_text())


@pytest.mark.slow
def test_a_run_leaves_them_out_as_soon_as_it_knows(monkeypatch, tmp_path, recipe_models, caplog):
    ran = []

    monkeypatch.setattr(module, "execute", recorder(ran, {"compare": {"choices": choices(0)}}))
    recipe = recipe_of(recipe_models, tmp_path, ("one",), targets="serving", held_out="held.json")
    run(recipe)
    stages = ["represent pivot", "represent one", "compare", "align one", "train plain"]
    assert ran == [*stages, "evaluate pivot", "evaluate plain", "evaluate compare"]
    said = "target-one would equal plain fine-tuning, as one serves no slice of the data: it is left out"
    assert caplog.text.count(said) == 1
    assert f"<p>{said} (targets" in (tmp_path / "out" / "report.html").read_text()
    found = plan(recipe, options_of=options_of)
    assert "train target-one" not in [row["step"] for row in found["steps"]]
    assert [warning for warning in found["warnings"] if said in warning]
    note = "NOTE  one: slice maths (8 conversations, 5 of 8 better): too few to tell, takes the choice of all data"
    assert note in plan_lines(found)
    ran.clear()
    run(recipe_of(recipe_models, tmp_path, ("one",), targets="all", held_out="held.json"))
    assert ran == ["train target-one", "merge sce", "evaluate target-one", "evaluate merged-sce", "evaluate compare"]
