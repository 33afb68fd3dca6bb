"""`assign`, and a recipe with `answers: sources`: who answers what, what stays, kills, and what is refused."""

import json
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from fusechat_fuse.cli import main, options_of
from fusechat_fuse.errors import InputError
from fusechat_fuse.evaluation.assignment import assign
from fusechat_fuse.pipeline.plan import plan
from fusechat_fuse.pipeline.recipe import read_recipe
from fusechat_fuse.pipeline.record import Record
from fusechat_fuse.pipeline.steps import steps_of
from fusechat_fuse.text.messages import content_hash
from tests.helpers.recipes import kill_in_step, recipe_of, written
from tests.test_compare import row, write

SLICES = ["chinese"] * 12 + ["maths"] * 12 + [None] * 4


def chats(folder, slices=SLICES):
    rows = []
    for n, name in enumerate(slices):
        messages = [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]
        rows.append({"id": f"c{n}", "messages": messages, **({"slice": name} if name else {})})
    (folder / "chats.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return rows


def represented(folder, rows, **bits):
    """A representation per model; bits per byte of each conversation."""
    return [
        write(
            folder / name,
            name,
            [
                row(one["id"], one.get("slice"), 4 * bit, content_hash=content_hash(one["messages"]))
                for one, bit in zip(rows, costs)
            ],
        )
        for name, costs in bits.items()
    ]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_conversation_goes_to_the_model_that_is_selected_for_its_slice(tmp_path, capsys):
    rows = chats(tmp_path)
    folders = represented(
        tmp_path,
        rows[:-1],  # the last could not be represented
        pivot=[2.0] * 12 + [1.0] * 12 + [1.0] * 4,
        one=[1.0] * 12 + [3.0] * 12 + [3.0] * 4,
        two=[3.0] * 28,
    )
    command = ["assign", *map(str, folders), "--data_path", str(tmp_path / "chats.jsonl")]
    assert main([*command, "--output_dir", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"pivot": 16, "one": 12, "two": 0}
    assert lines(tmp_path / "out" / "one.jsonl") == [
        {"id": f"c{n}", "slice": "chinese", "messages": rows[n]["messages"]} for n in range(12)
    ]
    kept = lines(tmp_path / "out" / "pivot.jsonl")
    assert [one["id"] for one in kept] == [f"c{n}" for n in range(12, 28)]
    assert {one["answered_by"] for one in kept} == {"data"}
    assert (tmp_path / "out" / "two.jsonl").read_text() == ""
    table = json.loads((tmp_path / "out" / "assignment.json").read_text())["slices"]
    assert {name: entry["best"] for name, entry in table.items()} == {"": 0, "chinese": 1, "maths": 0}


def test_a_pattern_names_the_slices_and_equal_directories_are_refused(tmp_path):
    rows = chats(tmp_path, [None] * 20)
    for n, one in enumerate(rows):
        one["id"] = f"{'ab'[n % 2]}-{n}"
    rows.append({**rows[0], "id": "c", "slice": "own"})
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    folders = represented(tmp_path, rows, pivot=[2.0] * 21, one=[*[1.0, 3.0] * 10, 3.0])
    assign(folders, str(tmp_path / "chats.jsonl"), tmp_path / "out", slice_pattern="^([a-z])-")
    assert {one["slice"] for one in lines(tmp_path / "out" / "one.jsonl")} == {"a"}
    assert {one["slice"] for one in lines(tmp_path / "out" / "pivot.jsonl")} == {"b", ""}  # a pattern's, not the rows'
    assert len(lines(tmp_path / "out" / "pivot.jsonl")) == 11
    twice = represented(tmp_path / "x", rows, pivot=[2.0] * 21)
    with pytest.raises(
        InputError, match="representations for assign: expected directories of different names, got piv"
    ):
        assign([folders[0], *twice], str(tmp_path / "chats.jsonl"), tmp_path / "out")


def test_other_conversations_are_divided_by_the_choice_of_the_first(tmp_path, caplog):
    caplog.set_level("INFO", "fusechat_fuse")
    rows = chats(tmp_path, ["sums"] * 12 + ["colours"] * 12)
    for n, one in enumerate(rows):
        one["messages"][0]["content"] = f"what is {n} plus {n + 1}" if n < 12 else f"which colour has a thing {n}"
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    folders = represented(tmp_path, rows, pivot=[2.0] * 12 + [1.0] * 12, one=[1.0] * 12 + [3.0] * 12)
    assign(folders, str(tmp_path / "chats.jsonl"), tmp_path / "first")
    held = [("named", "sums", "any"), ("pattern-sums", None, "any"), ("other", "arithmetic", "what is 70 plus 71")]
    held += [("unnamed", None, "which colour has the sky"), ("strange", None, "?!")]
    others = [
        {"id": name, "slice": of, "messages": [{"role": r, "content": t} for r, t in (("user", q), ("assistant", "x"))]}
        for name, of, q in held
    ]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(one) + "\n" for one in others))
    command = ["assign", str(tmp_path / "first"), "--data_path", str(tmp_path / "held.jsonl")]
    assert main([*command, "--output_dir", str(tmp_path / "then"), "--slice_pattern", "^pattern-([a-z]+)"]) == 0
    assert {one["id"]: one["slice"] for one in lines(tmp_path / "then" / "one.jsonl")} == {
        **{"named": "sums", "pattern-sums": "sums", "other": "sums"}
    }
    assert {one["id"]: one["slice"] for one in lines(tmp_path / "then" / "pivot.jsonl")} == {
        **{"unnamed": "colours", "strange": ""}
    }
    assert "3 of 5 conversations take the slice of the most similar prompt" in caplog.text
    (tmp_path / "first" / "one.jsonl").unlink()
    with pytest.raises(InputError, match=r"assignment for .*first: expected what assign writes, got another directory"):
        assign([tmp_path / "first"], str(tmp_path / "held.jsonl"), tmp_path / "then")


def test_the_other_stages_of_the_recipe_use_the_answers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    represent = {"limit": 9, "dtype": "bfloat16", "load_in_4bit": True, "messages_column": "m", "template": "qwen"}
    more = {
        "answers": "sources",
        "represent": represent,
        "answer": {"max_new_tokens": 5},
        "train": {"slice_pattern": "^x"},
        "launcher": {"represent": "srun -n 8", "answer": "srun"},
        "multi": True,
        "combine": {"slice_pattern": "^x"},
        "held_out": ["h.json"],
        "score": "exact_match",
    }
    steps = {step.key: step for step in steps_of(read_recipe(written(tmp_path, **more)))}
    assert [key for key in steps if key.startswith("answer")] == [
        *("answer represent-pivot", "answer represent-a", "answer represent-b", "answer assign", "answer a", "answer b")
    ]
    first, then = (steps[key].arguments for key in ("answer represent-a", "represent a"))
    assert first[first.index("--data_path") + 1] == "d.json"
    assert {"--limit", "--messages_column"} <= {*first}
    place = then.index("--data_path")
    assert then[place + 1 : place + 4] == [
        f"out/answers/{name}" for name in ("assigned/pivot.jsonl", "a/answers.jsonl", "b/answers.jsonl")
    ]
    assert not {"--limit", "--messages_column"} & {*then}
    words = steps["answer assign"].arguments
    assert words[:4] == ["assign", *(f"out/answers/representations/{name}" for name in ("pivot", "a", "b"))]
    assert words[-6:] == ["--limit", "9", "--messages_column", "m", "--slice_pattern", "^x"]
    words = steps["answer b"].arguments
    assert words[: words.index("--questions")] == ["answer", "--benchmark", "data", "--model", "two"]
    assert words[-8:] == [
        *("--template", "qwen", "--dtype", "bfloat16", "--load_in_4bit", "true", "--max_new_tokens", "5")
    ]
    patterned = [key for key, step in steps.items() if "--slice_pattern" in step.arguments]
    assert patterned == [
        "answer assign",
        "evaluate assign",
    ]  # it has named the rows, and ids of samples end in #1, #2, ...
    assert steps["answer represent-a"].command[:3] == ["srun", "-n", "8"]
    assert [steps[key].command[0] for key in ("answer a", "answer assign")] == ["srun", sys.executable]
    assert all(steps[key].derived for key in ("represent a", "align b", "train plain", "train target-a"))
    for key in steps:
        if not key.startswith("merge"):
            options_of(steps[key].arguments)
    assert [key for key in steps if key.startswith("evaluate ")] == [
        f"evaluate {kind}{name}"
        for kind, names in (
            ("", ["pivot", "plain", "target-a", "target-b", "multi", "merged-sce", "assign"]),
            ("answer-", "ab"),
            ("answered-", ["pivot", "plain", "target-a", "target-b", "multi", "merged-sce"]),
            ("scored-", ["pivot", "plain", "target-a", "target-b", "multi", "merged-sce"]),
            ("", ["compare"]),
        )
        for name in names
    ]
    words = steps["evaluate assign"].arguments
    assert words[:4] == ["assign", "out/answers/assigned", "--data_path", "h.json"]
    assert words[-6:] == ["--limit", "9", "--messages_column", "m", "--slice_pattern", "^x"]
    words = steps["evaluate answer-b"].arguments
    assert words[words.index("--questions") + 1] == "out/held_out/answers/assigned/b.jsonl"
    words = steps["evaluate answered-plain"].arguments
    place = words.index("--data_path")
    assert words[place + 1 : place + 4] == [
        f"out/held_out/answers/{name}" for name in ("assigned/pivot.jsonl", "a/answers.jsonl", "b/answers.jsonl")
    ]
    assert not {"--limit", "--messages_column"} & {*words}
    words = steps["evaluate scored-plain"].arguments
    assert words[: words.index("--output")] == [
        *("answer", "--benchmark", "held_out", "--model", "out/models/plain", "--questions", "h.json")
    ]
    assert {"--limit", "--messages_column", "--max_new_tokens"} <= {*words}
    words = steps["evaluate compare"].arguments
    assert words[words.index("--source_answers") + 1] == "out/held_out/answered/pivot"
    assert words[words.index("--answers") + 2] == "out/held_out/scored/plain/answers.jsonl"
    assert words[-2:] == ["--score", "exact_match"]
    assert [steps[f"evaluate {name}"].command[0] for name in ("scored-plain", "answer-a")] == ["srun", "srun"]
    with pytest.raises(InputError, match=r"key answers in .*: expected one of data, sources, got 'source'"):
        read_recipe(written(tmp_path, answers="source"))
    with pytest.raises(InputError, match=r"key held_out in .*: expected held-out data, as there is a score, got None"):
        read_recipe(written(tmp_path, score="exact_match"))
    with pytest.raises(InputError, match=r"key answer\.model in .*: expected no flag that the pipeline sets"):
        read_recipe(written(tmp_path, answer={"model": "x"}))


def test_answers_switched_on_remove_nothing_that_was_made_of_the_datas_own(tmp_path):
    def step_of(answers):
        recipe = read_recipe(written(tmp_path, answers=answers, output_dir=str(tmp_path / "out")))
        return next(step for step in steps_of(recipe) if step.key == "represent pivot")

    record, before, after = Record(tmp_path / "stages.json"), step_of("data"), step_of("sources")
    before.output.mkdir(parents=True)
    record.begin(before)
    record.end(before, 1.0, 0)
    assert record.is_stale(after)
    assert not record.starts_anew(after)
    record.begin(after)  # and is refused
    changed = replace(after, arguments=[*after.arguments, "--top_k", "5"])
    assert not record.starts_anew(changed)
    assert record.starts_anew(changed, overwrite=True)
    record.begin(after, overwrite=True)
    assert not before.output.exists()
    after.output.mkdir()
    record.end(after, 1.0, 0)
    assert record.starts_anew(changed)  # made of answers before


@pytest.mark.slow
def test_a_run_with_answers_by_sources_killed_in_the_stage_ends_with_the_same_files(recipe_models, forked, tmp_path):
    more = {"answers": "sources", "answer": {"max_new_tokens": 8, "batch_size": 4}, "plain": False, "merge": {}}
    more |= {"held_out": str(recipe_models / "held.json"), "launcher": {"evaluate": forked.launcher}}
    home = {name: tmp_path / name for name in ("whole", "killed")}
    for folder in home.values():
        folder.mkdir()
    recipes = {name: recipe_of(recipe_models, folder, ("one",), **more) for name, folder in home.items()}
    commands = {name: [sys.executable, "-m", "fusechat_fuse", "run", str(file)] for name, file in recipes.items()}
    planned = plan(recipes["whole"], options_of=options_of)
    assert not planned["failing"]
    done = forked.run(commands["whole"])
    assert done.returncode == 0, done.stderr[-2000:]
    moments = np.random.default_rng(3)
    keys = ("answer-represent-pivot", "answer-represent-one", "answer-assign", "answer-one", "answer-one", "answer-one")
    keys += ("represent-pivot", "represent-one", "align-one", "train-target-one")
    for key in (*keys, "evaluate-answer-one", "evaluate-answered-target-one"):
        log = home["killed"] / "out" / "logs" / f"{key}.log"
        kill_in_step(forked, commands["killed"], log, moments.uniform(0, 0.4))
    done = forked.run(commands["killed"])
    assert done.returncode == 0, done.stderr[-2000:]
    names = ("answers/one/answers.jsonl", "answers/assigned/one.jsonl", "answers/assigned/assignment.json")
    held_out = ("held_out/answers/assigned/assignment.json", "held_out/answers/one/answers.jsonl")
    held_out += ("held_out/compare/compare.json",)
    for name in (*names, "models/target-one/model.safetensors", *held_out):
        whole, killed = ((folder / "out" / name).read_bytes() for folder in home.values())
        assert whole == killed
    assigned = json.loads((home["whole"] / "out" / names[2]).read_text())["conversations"]
    assert sum(assigned.values()) == 24
    answered = [json.loads(line) for line in (home["whole"] / "out" / names[0]).read_text().splitlines()]
    kept = Counter(one["kept_because"] for one in answered if one["answered_by"] == "data")
    assert json.loads((home["whole"] / "out" / "report.json").read_text())["answers"] == {
        "pivot": {"conversations": assigned["pivot"], "kept": {"pivot": assigned["pivot"]}},
        "one": {"conversations": assigned["one"], "kept": dict(kept)},
    }
    result = json.loads((home["whole"] / "out" / held_out[-1]).read_text())
    assert [one["name"].split()[-2] for one in result["ranking"]["measures"]] == ["sources'", "data's"]
    page = (home["whole"] / "out" / "report.html").read_text()
    for heading in ("Who answered the held-out prompts", "bits per byte of the sources&#x27; answers, by slice"):
        assert heading in page
    after = {row["step"]: row for row in plan(recipes["whole"], options_of=options_of)["steps"]}
    assert after["answer one"]["conversations"] == assigned["one"]
