"""The command: the pipeline end to end on tiny models, configuration files, and one sentence for bad input."""

import errno
import json
import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest
from transformers import HfArgumentParser, PreTrainedTokenizerFast, SchedulerType
from transformers.training_args import OptimizerNames

import fusechat_fuse
from fusechat_fuse import load_representation
from fusechat_fuse.alignment.combination import COMBINATIONS
from fusechat_fuse.alignment.mappings import MAPPINGS
from fusechat_fuse.cli import main, options_of, parser_of
from fusechat_fuse.commands import COMMANDS
from fusechat_fuse.errors import InputError, as_sentence
from fusechat_fuse.evaluation.answers import MAX_NEW_TOKENS
from fusechat_fuse.flags import Flag
from fusechat_fuse.pipeline.costs import GPUS
from fusechat_fuse.pipeline.run import execute
from fusechat_fuse.pipeline.steps import STAGES, Step
from fusechat_fuse.training import transformers_flags
from fusechat_fuse.training.choice import CHOICES
from fusechat_fuse.training.config import FusionConfig
from fusechat_fuse.training.options import TrainArguments, train_flags
from fusechat_fuse.training.transformers_flags import installed_flags, kept_flags, table_is_exact
from tests.helpers.real_tokenizers import tiny_bpe, tiny_unigram
from tests.helpers.recipes import written
from tests.helpers.tiny_models import tiny_model

exact = pytest.mark.skipif(not table_is_exact(), reason="the table has the flags of another version of transformers")

CHATS = [
    {"id": f"c{n}", "conversations": [{"from": "human", "value": f"say {n}"}, {"from": "gpt", "value": f"the {n} is"}]}
    for n in range(12)
]


def model_directory(path, family, tokenizer, seed):
    tiny_model(family, seed=seed, vocab_size=len(tokenizer) + 8).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A pivot, a source of another tokenizer, chat data, and both represented."""
    home = tmp_path_factory.mktemp("world")
    model_directory(home / "pivot", "Llama", tiny_bpe(), 0)
    model_directory(home / "source", "Mistral", tiny_unigram(), 1)
    (home / "chats.json").write_text(json.dumps(CHATS))
    for name in ("pivot", "source"):
        assert main(represent_flags(home, name, home / f"{name}-representation")) == 0
    return home


def represent_flags(home, name, output, data="chats.json", **more):
    flags = {"model_name_or_path": home / name, "data_path": home / data, "output_dir": output, "template": "native"}
    return ["represent", *(part for flag, value in {**flags, **more}.items() for part in (f"--{flag}", str(value)))]


def align_flags(home, output, *more):
    both = ("--pivot_representation", home / "pivot-representation")
    both += ("--source_representation", home / "source-representation", "--cache_dir", home / "cache")
    return ["align", *map(str, both), "--output_dir", str(output), *more]


def sentence(capsys, *arguments, code=2) -> str:
    """The one line on standard error of a command that must fail with `code`."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fusechat-fuse:")]
    assert len(lines) == 1
    return lines[0]


def test_represent_align_combine_train(world, tmp_path, capsys, caplog):
    for mapping in ("prefix", "exact"):
        assert main(align_flags(world, tmp_path / mapping, "--mapping", mapping)) == 0
    assert "coverage" in capsys.readouterr().out
    assert (
        main(
            [
                "combine",
                "--aligned",
                str(tmp_path / "prefix"),
                str(tmp_path / "exact"),
                "--output_dir",
                str(tmp_path / "both"),
            ]
        )
        == 0
    )
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("min_ce_slice by byte of 2 sources: 12 conversations, ")
    assert [line.split(":")[0] for line in said[1:]] == ["source 0", "source 1"]
    train = ["train", "--model_name_or_path", str(world / "pivot"), "--data_path", str(tmp_path / "both")]
    train += [
        "--output_dir",
        str(tmp_path / "target"),
        "--use_cpu",
        "--num_train_epochs",
        "1",
        "--logging_steps",
        "1",
    ]
    assert main(train) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^train_loss: \d+\.\d+$", printed, re.MULTILINE)
    assert re.search(r"step 1 of 1: loss \d+\.\d+, learning_rate .*lm_loss \d", caplog.text)
    assert "{" not in printed + caplog.text
    from transformers import AutoModelForCausalLM

    target = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    assert target.get_input_embeddings().weight.shape[0] == len(tiny_bpe()) + 8


def test_represent_takes_several_files_a_limit_and_a_column_by_name(world, tmp_path):
    rows = [{"id": row["id"], "dialog": row["conversations"]} for row in CHATS]
    for name, part in (("a", rows[:4]), ("b", rows[4:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    flags = represent_flags(world, "pivot", tmp_path / "out", limit=6, messages_column="dialog")
    at = flags.index("--data_path") + 1
    flags[at : at + 1] = [str(tmp_path / "a.json"), str(tmp_path / "[b-z].json")]
    assert main(flags) == 0
    assert load_representation(tmp_path / "out").ids == [row["id"] for row in CHATS[:6]]


def test_represent_that_fails_on_an_argument_leaves_nothing_behind(world, tmp_path, capsys):
    flags = represent_flags(world, "pivot", tmp_path / "out")
    assert "weights for" in sentence(capsys, *flags, "--attn_implementation", "none_such")
    assert not (tmp_path / "out").exists()
    assert main(flags) == 0


def test_flags_win_over_the_configuration_file(world, tmp_path):
    config = tmp_path / "represent.yml"
    flags = represent_flags(world, "pivot", tmp_path / "out")[1:]
    entries = dict(zip((flag[2:] for flag in flags[::2]), flags[1::2]))
    config.write_text(json.dumps({**entries, "top_k": 3, "strict": True}))
    assert main(["represent", "--config", str(config), "--top_k", "5"]) == 0
    representation = load_representation(tmp_path / "out")
    assert representation[0]["topk_ids"].shape[1] == 5


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("maping: prefix\n", "unknown key 'maping': did you mean 'mapping'?"),
        ("- a list\n", "expected name: value pairs, got"),
        ("a: b: c\n", "expected a readable YAML file"),
        (None, "expected a readable YAML file"),
    ],
    ids=["unknown", "list", "no_yaml", "missing"],
)
def test_bad_configuration_files_are_named(tmp_path, capsys, written, told):
    config = tmp_path / "align.yml"
    if written is not None:
        config.write_text(written)
    line = sentence(capsys, "align", "--config", config)
    assert str(config) in line
    assert told in line


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["represnt"], "unknown subcommand 'represnt': did you mean 'represent'?"),
        (["align", "--mappping", "prefix"], "unknown flag '--mappping': did you mean '--mapping'?"),
        (["align", "--mapping", "prefix"], "required: --pivot_representation"),
        (["align", "--config"], "argument --config: expected one argument. See fusechat-fuse align --help."),
        (["represent", "--top_k", "many"], "argument --top_k: invalid int value: 'many'"),
        (
            ["train", "--lr_scheduler_type", "cosin"],
            "scheduler_type: unknown value 'cosin': did you mean 'cosine'? See fuse",
        ),
        (["train", "--save_dtype", "half"], "unknown value 'half': known are float32, bfloat16, float16. See fusechat"),
        (["train", "--bf16", "on"], "argument --bf16: expected true or false, got 'on'."),
    ],
)
def test_bad_arguments_get_one_sentence(capsys, arguments, told):
    assert told in sentence(capsys, *arguments)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"a": 1}', "bad.json"),
        ("not json at all", "bad.json"),
        ('[{"text": "plain text, no chat"}]', "row 0"),
        ('[{"conversations": [{"from": "oracle", "value": "x"}, {"from": "gpt", "value": "y"}]}]', "oracle"),
        ('[{"conversations": []}]', "row 0"),
    ],
)
def test_data_that_is_not_chat_data(world, tmp_path, capsys, content, told):
    (tmp_path / "bad.json").write_text(content)
    flags = represent_flags(world, "pivot", tmp_path / "out", data=tmp_path / "bad.json", strict="true")
    line = sentence(capsys, *flags)
    assert "bad.json" in line
    assert told in line
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_directory_that_is_no_model(world, tmp_path, capsys):
    line = sentence(capsys, *represent_flags(world, "cache", tmp_path / "out", model_name_or_path=tmp_path))
    assert str(tmp_path) in line
    assert "config.json" in line


def test_another_runs_directory_is_left_alone(world, tmp_path, capsys):
    before = {path: path.read_bytes() for path in (world / "pivot-representation").glob("*") if path.is_file()}
    line = sentence(capsys, *represent_flags(world, "pivot", world / "pivot-representation", top_k=3))
    assert "top_k" in line
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ("number", "code", "what", "got"),
    [
        (errno.ENOSPC, 1, "disk", "expected room to write, got none left. Free some"),
        (errno.EROFS, 2, "path", "expected a place to write, got a read-only file system. Choose another path."),
    ],
    ids=["full", "read-only"],
)
def test_a_place_that_cannot_be_written_is_named_and_left_empty(
    world, tmp_path, capsys, monkeypatch, number, code, what, got
):
    def refuse(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    line = sentence(capsys, *align_flags(world, tmp_path / "a"), code=code)
    assert f"error: {what} for {tmp_path / 'a' / 'identity.json'}: {got}" in line
    assert not (tmp_path / "a").exists()


def test_a_file_in_the_way_is_named(world, tmp_path, capsys):
    (tmp_path / "file").touch()
    line = sentence(capsys, *align_flags(world, tmp_path / "file" / "a"))
    assert f"output for {tmp_path / 'file' / 'a'}: expected a directory, got a file ({tmp_path / 'file'})" in line


def test_a_disk_that_fills_up_is_named_and_the_run_goes_on_later(world, tmp_path, capsys, monkeypatch):
    whole, calls = os.fsync, []

    def refuse_the_third(handle):
        calls.append(handle)
        if len(calls) > 2:  # identity.json and its folder are written, the shard is not
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(handle)

    monkeypatch.setattr(os, "fsync", refuse_the_third)
    line = sentence(capsys, *align_flags(world, tmp_path / "a"), code=1)
    assert f"disk for {tmp_path / 'a' / 'shard-00000.arrow'}: expected room to write, got none left" in line
    assert list((tmp_path / "a").glob(".*")) == []
    monkeypatch.setattr(os, "fsync", whole)
    assert main(align_flags(world, tmp_path / "a")) == 0


def outputs_of(world, out) -> dict[str, list]:
    """Commands, by the file for which they will find no room."""
    both = [world / "pivot-representation", world / "source-representation"]
    questions = out / "questions.json"
    questions.write_text(json.dumps([{"instruction": f"say {n}"} for n in range(4)]))
    answer = ["answer", "--benchmark", "alpaca_eval", "--model", world / "pivot", "--questions", questions]
    return {
        "compare.png": ["compare", *both, "--output_dir", out],
        "page.html": ["inspect", out / "aligned", "--html", out / "page.html"],
        ".answers.json.answers": [*answer, "--output", out / "answers.json", "--max_new_tokens", "2"],
        "tokenizer": ["represent", *represent_flags(world, "pivot", out / "r")[1:]],
    }


@pytest.mark.parametrize("name", ["compare.png", "page.html", ".answers.json.answers", "tokenizer"])
def test_an_output_for_which_there_is_no_room_is_named_and_made_later(world, tmp_path, capsys, monkeypatch, name):
    pytest.importorskip("matplotlib")
    if name == "page.html":
        assert main(align_flags(world, tmp_path / "aligned")) == 0
    command, whole, sync = outputs_of(world, tmp_path)[name], PreTrainedTokenizerFast.save_pretrained, os.fsync

    def full(handle):
        if name in os.readlink(f"/proc/self/fd/{handle}") and os.fstat(handle).st_size > 300:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    def half_written(tokenizer, folder):
        whole(tokenizer, folder)
        raise Exception("No space left on device (os error 28)")  # of tokenizers, which is written in Rust

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", half_written)
        line = sentence(capsys, *command, code=1)
    file = next(tmp_path.rglob(name), tmp_path / ("r" if name == "tokenizer" else "") / name)
    assert f"error: disk for {file}: expected room to write, got none left. Free some, then" in line
    assert file.exists() == (name == ".answers.json.answers")  # what is answered is kept
    assert not list(tmp_path.rglob("*.tmp"))
    assert main([str(word) for word in command]) == 0
    assert file.exists()


def test_a_copy_for_which_there_is_no_room_is_named_and_not_its_source():
    error = OSError(errno.ENOSPC, "No space left on device", "/pivot/tokenizer.json", None, "/out/tokenizer.json")
    assert as_sentence(error) == (
        "error: disk for /out/tokenizer.json: expected room to write, got none left. Free some, then run the same "
        "command again.",
        1,
    )
    unreadable = OSError(errno.EACCES, "Permission denied", "/pivot/tokenizer.json", None, "/out/tokenizer.json")
    assert as_sentence(unreadable)[0].startswith("error: path for /pivot/tokenizer.json: expected read and write")


def test_a_run_whose_log_has_no_room_names_it(tmp_path):
    (tmp_path / "full.log").symlink_to("/dev/full")
    step = Step("represent", "a", [], ["true"], tmp_path / "out")
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as caught:
        execute(step, tmp_path / "full.log", {}, quiet=True)
    assert as_sentence(caught.value)[0].startswith(f"error: disk for {tmp_path / 'full.log'}: expected room to write")


def test_an_unknown_mapping(world, tmp_path, capsys):
    assert "prefix" in sentence(capsys, *align_flags(world, tmp_path / "a", "--mapping", "dtw"))


def test_low_coverage_fails_the_run(world, tmp_path, capsys):
    flags = align_flags(world, tmp_path / "a", "--mapping", "exact", "--fail_under_coverage", "1.0", "--safe_only")
    assert "coverage" in sentence(capsys, *flags, code=1)


def test_debug_shows_the_traceback(capsys):
    assert main(["represnt", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(COMMANDS))
def test_help(name, capsys):
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--debug" in shown
    assert "\nexample:\n  fusechat-fuse " in shown
    assert len(shown.splitlines()) < 200  # at 80 columns


@pytest.mark.parametrize("name", list(COMMANDS))
def test_the_example_of_every_command_is_one_that_it_takes(name):
    subcommand, *argv = shlex.split(COMMANDS[name].example)
    assert subcommand == name
    assert parser_of(name).parse(argv)


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("align", [name for mapping in MAPPINGS.values() for name in (mapping.name, mapping.summary)]),
        ("combine", COMBINATIONS),
        ("plan", GPUS),
        ("run", STAGES),
        ("answer", MAX_NEW_TOKENS),
        ("represent", [".zst", "flash_attention_2, ..."]),
        pytest.param("train", [*CHOICES, *SchedulerType, *OptimizerNames], marks=exact),
    ],
)
def test_help_names_all_values_of_an_option(command, names, capsys):
    assert main([command, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert not [name for name in names if name not in shown]


def test_rare_flags_are_shown_on_request_and_always_taken(capsys):
    assert main(["train", "--help"]) == 0
    short = capsys.readouterr().out
    assert main(["train", "--help-all"]) == 0
    whole = capsys.readouterr().out
    assert "--torch_compile_backend" not in short
    assert "--torch_compile_backend" in whole
    assert "--lm_loss_weight" in short.split("training:")[0]
    parser = parser_of("train")
    flags = {flag for flag in parser.flags if flag.startswith("--")}
    assert all(flag in whole for flag in flags)
    argv = shlex.split(COMMANDS["train"].example)[1:]
    assert parser.parse([*argv, "--lean_head", "false"])["lean_head"] is False
    assert parser.parse([*argv, "--adam_beta1", "0.5"])["adam_beta1"] == 0.5
    assert "--data-path" not in whole  # as transformers also spells it: taken, not shown
    other = ["--model-name-or-path", "PIVOT", "--data-path=aligned/source", "--output-dir", "target", "--no-lean-head"]
    assert parser.parse(other) == parser.parse([*argv, "--lean_head", "false"])


@exact
def test_flags_of_train_are_those_of_the_installed_transformers():
    assert kept_flags() == installed_flags(), "run python -m fusechat_fuse.training.transformers_flags"
    assert table_is_exact()


@exact
def test_train_reads_flags_as_transformers_does():
    """The same values as from its own parser, for the defaults and for one other value of every flag."""
    argv = shlex.split(COMMANDS["train"].example)[1:]
    ours, theirs = parser_of("train"), HfArgumentParser([TrainArguments, FusionConfig])  # pyright: ignore
    values = {"int": "7", "float": "0.25", "bool": "yes", "str": "text"}
    flags = [flag for flags in train_flags(kept_flags()).values() for flag in flags if not flag.required]
    of_python = {"parallelism_config", "liger_kernel_config"}  # which transformers reads from no text
    given = [[], *([f"--{flag.name}={flag.choices[-1] if flag.choices else values[flag.kind]}"] for flag in flags)]
    assert len(given) > 120
    for more in given:
        read, expected = ours.parse([*argv, *more]), vars(theirs.parse_args([*argv, *more]))
        assert {name: read[name] for name in expected if name not in of_python} == {
            name: value for name, value in expected.items() if name not in of_python
        }, more


@exact
def test_other_versions_of_transformers_are_asked_for_their_own_flags(monkeypatch, capsys):
    argv = shlex.split(COMMANDS["train"].example)
    kept = [flag for flag in kept_flags() if flag.name != "data_seed"]
    monkeypatch.setattr(transformers_flags, "kept_flags", lambda: [*kept, Flag("removed")])
    assert options_of([*argv, "--removed", "x"])["removed"] == "x"
    with pytest.raises(InputError, match="unknown flag '--data_seed'"):
        options_of([*argv, "--data_seed", "3"])
    monkeypatch.setattr(transformers_flags, "table_is_exact", lambda: False)
    assert options_of([*argv, "--data_seed", "3"])["data_seed"] == 3
    assert "unknown flag '--removed'" in sentence(capsys, *argv, "--removed", "x")


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"fusechat {version('fusechat')}, torch ")


@pytest.mark.parametrize(
    ("arguments", "package", "found", "told"),
    [
        ("train", "transformers", "5.9.0", "transformers for training: expected 5.10 or later, got 5.9.0. Run"),
        (
            "train",
            "torch",
            "2.6.0+cu124",
            "torch for training: expected 2.7 or later, got 2.6.0+cu124. Run pip install",
        ),
        ("represent", "torch", "2.6.0", "expected 2.7 or later, got 2.6.0. Run pip install -U 'torch>=2.7'."),
        ("align", "torch", None, "torch for fusechat_fuse: expected 2.7 or later, got none."),
    ],
)
def test_what_merging_alone_does_not_need_is_told_when_it_is_used(monkeypatch, capsys, arguments, package, found, told):
    def version_of(name):
        if name == package and found is None:
            raise PackageNotFoundError(name)
        return found if name == package else version(name)

    monkeypatch.setattr("fusechat_fuse.requirements.version", version_of)
    assert told in sentence(capsys, *shlex.split(COMMANDS[arguments].example))
    with pytest.raises(InputError, match=f"^{package} for "):
        FusionConfig("target")
    if package == "torch":
        with pytest.raises(InputError, match=r"^torch for fusechat_fuse: expected"):
            getattr(fusechat_fuse, "align")  # noqa: B009


def test_a_misspelt_subcommand_gets_a_suggestion(capsys):
    assert main(["alingn", "--output_dir", "x"]) == 2
    assert "did you mean 'align'?" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(COMMANDS))
def test_an_interrupted_command_says_that_the_same_command_continues(name, capsys, monkeypatch):
    def interrupt(name, options):
        raise KeyboardInterrupt

    monkeypatch.setattr("fusechat_fuse.cli._call", interrupt)
    line = sentence(capsys, *shlex.split(COMMANDS[name].example), code=130)
    assert line == "fusechat-fuse: interrupted. Give the same command again to continue."


def test_a_signal_while_importing_is_one_sentence(world, tmp_path):
    program = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
from fusechat_fuse.cli import main
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "transformers":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
sys.exit(main({represent_flags(world, "pivot", tmp_path / "out")!r}))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 130
    assert ended.stderr == "fusechat-fuse: interrupted. Give the same command again to continue.\n"


def test_python_m_runs_the_same_command():
    command = [sys.executable, "-m", "fusechat_fuse"]
    finished = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert all(name in finished.stdout for name in COMMANDS)
    assert subprocess.run(command, capture_output=True, check=False).returncode == 2


@exact
def test_help_dry_runs_and_bad_input_import_neither_torch_nor_transformers(tmp_path):
    recipe, broken, bad_flag = written(tmp_path, multi=True), tmp_path / "broken.yml", tmp_path / "bad_flag.yml"
    broken.write_text("pivots: p\n")
    bad_flag.write_text(f"{recipe.read_text()}train: {{optim: sdg}}\n")
    commands = [["--help"], *([name, "--help"] for name in COMMANDS), ["train", "--help-all"]]
    commands += [["run", str(recipe), "--dry_run"]]
    bad = [["plan", str(broken)], ["run", str(bad_flag)], ["train", "--lr_scheduler_type", "cosin"]]
    program = f"""
import sys
from fusechat_fuse.cli import main
for argv in {commands + bad!r}:
    print("RAN", *argv, main(argv), *{{"torch", "transformers"}} & sys.modules.keys(), flush=True)
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    ran = [line.removeprefix("RAN ") for line in finished.stdout.splitlines() if line.startswith("RAN")]
    expected = [f"{' '.join(argv)} {2 if argv in bad else 0}" for argv in commands + bad]
    assert ran == expected, finished.stderr


@pytest.mark.parametrize(("rank", "waits"), [("0", []), ("1", [3.0])])
def test_of_several_processes_the_first_one_tells_the_error(monkeypatch, capsys, rank, waits):
    """The others wait for it to end the launch: what all of them find is told once."""
    slept = []
    monkeypatch.setattr("fusechat_fuse.cli.time.sleep", slept.append)
    monkeypatch.setenv("RANK", rank)
    assert main(["represent", "--modle_name_or_path", "m"]) == 2
    assert slept == waits
    assert "did you mean" in capsys.readouterr().err
