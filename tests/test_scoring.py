"""What ranks results before bits per byte of the data's answers: the sources' answers, and scores of their own."""

import json

import numpy as np
import pytest

from fusechat_fuse.cli import main
from fusechat_fuse.errors import InputError
from fusechat_fuse.evaluation.comparison import compare, table_lines
from fusechat_fuse.evaluation.scoring import exact_match
from fusechat_fuse.pipeline.recipe import read_recipe
from tests.helpers.recipes import written
from tests.test_compare import many

NAMES, SLICES = ["pivot", "plain", "target", "multi"], ["a"] * 4 + ["b"] * 4
GRADE = """
import neighbour

def grade(answer, reference, row):
    assert row["messages"][-1]["content"] == answer
    return neighbour.CREDIT if answer == "half" else answer == reference and row["topic"] == "any"

CONSTANT = 3
"""


@pytest.fixture
def held_out(tmp_path):
    """Representations of four models, on the data's and on the sources' answers, and their own answers."""

    def represented(folder, **bits):
        return [many(tmp_path / folder, name, SLICES, of) for name, of in bits.items()]

    def answered(name, answers):
        file = tmp_path / "scored" / f"{name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        rows = [
            {"id": f"c{n}", "topic": "any", "data_answer": "yes", "messages": [{"role": "assistant", "content": text}]}
            for n, text in enumerate(answers)
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    data = represented("data", pivot=[3.0] * 8, plain=[1.0] * 8, target=[1.5] * 8, multi=[2.0] * 8)
    sources = represented("sources", pivot=[3.0] * 8, plain=[2.0] * 8, target=[1.0, 2] * 4, multi=[1.25] * 8)
    right = {"pivot": 0, "plain": 4, "target": 8, "multi": 8}
    answers = [answered(name, ["yes "] * count + ["no"] * (8 - count)) for name, count in right.items()]
    return {"data": data, "source_answers": sources, "answers": answers, "baseline": data[1], "folder": tmp_path}


def ranking_of(held_out, *keys, **more):
    chosen = {key: held_out[key] for key in keys}
    return compare(held_out["data"], baseline=held_out["baseline"], **chosen, **more)["ranking"]


def test_the_sources_answers_decide_and_both_are_shown(held_out, capsys):
    assert ranking_of(held_out)["best"] == "target"
    ranking = ranking_of(held_out, "source_answers")
    assert [measure["name"] for measure in ranking["measures"]] == [
        "bits per byte of the sources' answers",
        "bits per byte of the data's answers",
    ]
    assert (ranking["best"], ranking["next"], ranking["clear"]) == ("multi", "target", ["multi", "target"])
    words = ["compare", *map(str, held_out["data"]), "--baseline", str(held_out["baseline"])]
    assert main([*words, "--source_answers", *map(str, held_out["source_answers"])]) == 0
    said = capsys.readouterr().out
    head, _, first, second = said[said.index("| result") :].splitlines()[:4]
    columns = ["bits per byte of the sources' answers", "less plain", "bits per byte of the data's answers"]
    assert head == f"| result | {' | '.join(columns)} | less plain |"
    assert first == "| multi | 1.2500 | -0.7500 ± 0.0000 | 2.0000 | +1.0000 ± 0.0000 |"
    assert second.startswith("| target | 1.5000 | -0.5000 ± 0.4")
    assert "| b | 4 | 3.0000 | 2.0000 | 1.5000 | 1.2500 |" in said
    assert "It has 2.0000 bits per byte of the data's answers, +1.0000 ± 0.0000 against plain." in said


def test_a_score_decides_before_both_and_a_tie_goes_to_fewer_bits(held_out, tmp_path):
    ranking = ranking_of(held_out, "source_answers", "answers", score="exact_match")
    assert [row[:2] for row in ranking["table"][1:]] == [
        *(["multi", "1.0000"], ["target", "1.0000"], ["plain", "0.5000"], ["pivot", "0.0000"])  # multi: by sources
    ]
    assert ranking["measures"][0]["slices"]["b"]["models"]["plain"] == {"mean": 0}
    assert ranking["measures"][0]["higher_is_better"]
    assert ranking["summary"][0].startswith("Best result: multi, 1.0000 exact match (mean over 2 slices), +0.5000 ± ")
    assert "+0.0000 ± 0.0000 against the next, target (95 % intervals, paired)." in ranking["summary"][0]
    assert ranking["summary"][1] == "It is clear of plain, and not of target."
    (tmp_path / "grade.py").write_text(GRADE)
    (tmp_path / "neighbour.py").write_text("CREDIT = 0.5")
    text = held_out["answers"][2].read_text().replace('"yes "', '"half"')
    held_out["answers"][2].write_text(text)
    (tmp_path / "scored" / "multi.jsonl").write_text(text.replace('"half"', '"yes"').replace("any", "other", 1))
    result = compare(
        held_out["data"],
        baseline=held_out["baseline"],
        answers=held_out["answers"],
        score=f"{tmp_path / 'grade.py'}:grade",
    )
    of = result["ranking"]["measures"][0]
    assert of["name"] == "score by grade"
    assert {name: figures["mean"] for name, figures in of["models"].items()} == {
        **{"pivot": 0, "plain": 0, "target": 0.5, "multi": 7 / 8}
    }
    assert "| a | 4 | 0.0000 | 0.0000 | 0.5000 | 0.7500 |" in table_lines(result)


def test_exact_match_leaves_white_space_at_both_ends_aside():
    assert exact_match(" 12\n", "12", {})
    assert not exact_match("1 2", "12", {})


@pytest.mark.parametrize(
    ("body", "got"),
    [
        ("raise KeyError('x')", "got KeyError: 'x'. Correct it."),
        ("return float('nan')", "got nan. Correct it."),
        ("return 'yes'", "got 'yes'. Correct it."),
        ("return None", "got None. Correct it."),
        ("return -1", "got -1. Correct it."),
    ],
    ids=["raises", "nan", "text", "nothing", "below 0"],
)
def test_a_function_that_gives_no_score_names_the_conversation(held_out, tmp_path, body, got):
    (tmp_path / "bad.py").write_text(
        f"def grade(answer, reference, row):\n    if answer == 'no': {body}\n    return 1\n"
    )
    what = rf"score of conversation c0 \(answer of pivot\) by .*bad.py:grade: expected a number from 0 to 1, {got}"
    with pytest.raises(InputError, match=what):
        ranking_of(held_out, "answers", score=f"{tmp_path / 'bad.py'}:grade")


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ("exact", "expected FILE.py:function, got 'exact'. Name a function of a file."),
        ("none.py:grade", "expected Python in .*none.py, got .*No such file or directory"),
        ("torn.py:grade", "expected Python in .*torn.py, got SyntaxError: .*never closed"),
        ("grade.py:other", "expected a function other in .*grade.py, got none. Define it there."),
        ("grade.py:neighbour.CREDIT", "expected FILE.py:function, got '.*grade.py:neighbour.CREDIT'"),
    ],
    ids=["form", "no file", "no Python", "no function", "not in the file"],
)
def test_a_score_that_is_none_is_a_sentence_before_the_work(held_out, tmp_path, monkeypatch, score, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grade.py").write_text(GRADE)
    (tmp_path / "torn.py").write_text("def grade(")
    with pytest.raises(InputError, match=f"score for compare: {message}"):
        ranking_of(held_out, "answers", score=score)
    with pytest.raises(InputError, match=f"key score in .*recipe.yml: {message}"):
        read_recipe(written(tmp_path, score=score, held_out="h.json"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": None}, "baseline for compare: expected one with source_answers, answers or a score, got none"),
        ({"score": None}, "score for compare: expected both answers and a score, got one of them"),
        ({"drop": "answers"}, "answers for compare: expected one for each of 4 models, got 3"),
        ({"drop": "source_answers"}, "source_answers for compare: expected one for each of 4 models, got 3"),
        (
            {"swap": "source_answers"},
            "source_answers for compare: expected those of pivot, plain, .*, got multi, target",
        ),
        ({"empty": "answers"}, "answers for compare: expected some to the same prompts, got none"),
        ({"torn": "answers"}, "answers for .*multi.jsonl: expected what answer --benchmark held_out writes, got"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_the_results_is_refused(held_out, changes, message):
    options = {key: held_out[key] for key in ("baseline", "source_answers", "answers")} | {"score": "exact_match"}
    for how, key in changes.items():
        if how == "drop":
            options[key] = options[key][:-1]
        elif how == "swap":
            options[key] = options[key][::-1]
        elif how in ("empty", "torn"):
            options[key][-1].write_text("" if how == "empty" else '{"id": 1}\n')
        else:
            options[how] = key
    with pytest.raises(InputError, match=message):
        compare(held_out["data"], **options)


def test_scores_of_some_are_of_what_every_model_has_answered(held_out, caplog):
    file = held_out["answers"][0]
    file.write_text("".join(f"{line}\n" for line in file.read_text().splitlines()[:6]))
    ranking = ranking_of(held_out, "answers", score="exact_match")
    assert ranking["measures"][0]["slices"]["b"]["conversations"] == 2
    assert np.isclose(ranking["measures"][0]["models"]["plain"]["mean"], 0.5)
    assert "2 conversations have no score: not every model has answered them." in caplog.text
