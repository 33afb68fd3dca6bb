"""The quickstart runs as a newcomer runs it; its generator keeps test questions out of the training data."""

import json
import os
import re
import shlex
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from safetensors.torch import load_file

from examples import quickstart, toy_models
from fusechat_fuse.pipeline.recipe import read_recipe
from fusechat_fuse.pipeline.steps import steps_of
from fusechat_merge.kernel import sce_merge

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory, forked):
    output = tmp_path_factory.mktemp("quickstart") / "output"
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), "--fast", "--output", str(output)]
    environment = {**os.environ, "FUSECHAT_CACHE": str(output.parent / "cache")}
    finished = forked.run(command, env=environment)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return output, finished.stdout


def test_prints_the_table_and_writes_it(run):
    output, printed = run
    results = json.loads((output / "results.json").read_text())
    names = ["pivot", "source-numbers", "source-words", "plain", "paper-merged"]
    names += ["target-numbers", "target-words", "merged", "multi", "multi-answers"]
    assert list(results["exact_match"]) == names
    for name in names:
        row = results["exact_match"][name]
        assert list(row) == [*quickstart.SKILLS, "overall"]
        line = next(line for line in printed.splitlines() if line.startswith(f"{name} "))
        assert line.split()[1:] == [f"{100 * value:.1f}" for value in row.values()]
    assert (output / "results.png").read_bytes().startswith(b"\x89PNG")
    page = next(line.split(": ")[-1] for line in printed.splitlines() if line.endswith("inspect.html"))
    assert Path(page).read_text().startswith("<!doctype html>")


def test_shows_a_line_per_stage_and_keeps_what_commands_print_in_logs(run):
    output, printed = run
    stages = re.findall(r"^(\S.*?) +\d+\.\d s$", printed, re.MULTILINE)
    assert [stage.split(" ")[0] for stage in stages] == ["teach", "represent,", "answers", "train", "merge", "ask"]
    assert "{" not in printed
    log = (output / "logs" / "train-multi.log").read_text()
    assert re.search(r"^step 25 of \d+: loss \d\.\d+, .*lm_loss", log, re.MULTILINE)
    assert "{'loss'" not in log
    assert "Loading weights" not in log


def test_lm_eval_finds_the_same_share_of_right_answers(run, forked, tmp_path):
    output, _ = run
    (tmp_path / "quickstart-output").symlink_to(output)
    task = (ROOT / "examples" / "lm_eval" / "quickstart.yaml").read_text()
    command = shlex.split(" ".join(re.findall(r"^#   (.*?)\\?$", task, re.MULTILINE)))
    command[command.index("examples/lm_eval")] = str(ROOT / "examples" / "lm_eval")
    command = [str(Path(sys.executable).parent / command[0]), *command[1:], "--output_path", "scores"]
    done = forked.run(command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "scores").rglob("results_*.json")
    found = json.loads(file.read_text())["results"]["fusechat_quickstart"]["exact_match,none"]
    results = json.loads((output / "results.json").read_text())
    asked, shares = results["test_questions"], results["exact_match"]["merged"]
    assert found == pytest.approx(sum(asked[skill] * shares[skill] for skill in asked) / sum(asked.values()))


def flags(words: list[str]) -> dict[str, str]:
    """Flags that decide what is trained, with their values."""
    values = {
        word: "true" if after.startswith("--") else after for word, after in pairwise([*words, "--"]) if "--" in word
    }
    places = ("--model_name_or_path", "--data_path", "--output_dir", "--preset")  # the preset: the default
    return {flag: value.lower() for flag, value in values.items() if flag not in places}


def test_its_recipe_trains_what_it_trained(run):
    output, _ = run
    logs = [file.read_text() for file in sorted((output / "logs").glob("train-*.log"))]
    lines = [shlex.split(log.splitlines()[0].removeprefix("$ fusechat-fuse ")) for log in logs]
    trained = {Path(words[words.index("--output_dir") + 1]).name: flags(words) for words in lines}
    trained["plain"]["--slice_pattern"] = "^([a-z]+)-"  # without effect: nothing is fused
    steps = [step for step in steps_of(read_recipe(output / "recipe.yml")) if step.stage == "train"]
    assert len(steps) == 4
    for step in steps:
        assert flags(step.arguments) == trained[step.name]


def test_models_learned_and_sources_have_their_own_skills(run):
    scores = json.loads((run[0] / "results.json").read_text())["exact_match"]
    numbers, words = scores["source-numbers"], scores["source-words"]
    assert sum(numbers[skill] for skill in quickstart.NUMBER_SKILLS) > 0.2
    assert sum(words[skill] for skill in quickstart.WORD_SKILLS) > 0.5
    assert all(numbers[skill] == 0 for skill in quickstart.WORD_SKILLS)
    assert all(words[skill] == 0 for skill in quickstart.NUMBER_SKILLS)
    for name in ("plain", "paper-numbers", "paper-words", "target-numbers", "target-words", "multi", "multi-answers"):
        history = json.loads((run[0] / "models" / name / "trainer_state.json").read_text())["log_history"]
        losses = [entry["loss"] for entry in history if "loss" in entry]
        assert sum(losses[-2:]) < sum(losses[:2]), name


def test_alignments_are_of_different_tokenizers_and_exact(run):
    for name in ("fusechat-numbers", "fusechat-words"):
        manifest = json.loads((run[0] / "aligned" / name / "manifest.json").read_text())
        figures = manifest["certificate"]["all"]
        assert manifest["vocabulary"] == "mapped"
        assert figures["coverage"] > 0.9
        assert abs(figures["gap_bits_per_byte"]) < 1e-2


def test_the_merge_is_ours(run):
    models = run[0] / "models"
    for kind, output in (("paper", "paper-merged"), ("target", "merged")):
        names = ("pivot", f"{kind}-numbers", f"{kind}-words", output)
        pivot, *targets, merged = (load_file(models / name / "model.safetensors") for name in names)
        for name, tensor in pivot.items():
            expected = sce_merge(tensor, [target[name] for target in targets])
            assert (merged[name] - expected).abs().max() <= 1e-6, name


def test_the_target_names_who_served_which_skill(run):
    kept = json.loads((run[0] / "models" / "multi" / "slices.json").read_text())
    served = {name: kept["models"][entry["best"]] for name, entry in kept["slices"].items()}
    assert served["capitals"] == "source-words"
    assert served["successor"] == "source-numbers"
    undecided = [entry for entry in kept["slices"].values() if not entry["decides"]]  # 31 of 49 do not tell
    assert all(entry["best"] == kept["slices"][""]["best"] for entry in undecided)


def test_an_output_directory_with_data_is_refused(forked, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), "--output", str(tmp_path)]
    finished = forked.run(command)
    assert finished.returncode == 2
    assert "expected a new or empty directory" in finished.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_no_test_question_is_in_the_training_data():
    asked = {prompt for pairs in quickstart.test_questions(60, 3).values() for prompt, _ in pairs}
    taught = {row["conversations"][0]["value"] for row in quickstart.conversations(quickstart.SKILLS, 5000, 4)}
    assert len(asked) > 300
    assert not asked & taught


def test_every_answer_can_be_checked():
    import random

    rng = random.Random(0)
    for skill in quickstart.SKILLS:
        prompt, answer = toy_models.question(skill, rng)
        words = prompt.replace("?", "").replace(",", "").split()
        numbers = [int(word) for word in words if word.isdigit()]
        said = prompt.split(": ")[-1].split()
        expected = {
            "add": lambda n=numbers: str(sum(n)),
            "successor": lambda n=numbers: str(n[0] + 1),
            "larger": lambda n=numbers: str(max(n)),
            "reverse": lambda s=said: " ".join(s[::-1]),
            "last": lambda s=said: s[-1],
            "capitals": lambda s=said: " ".join(s).upper(),
        }
        assert answer == expected[skill]()
