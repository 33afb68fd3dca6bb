"""The command `fusechat-fuse SUBCOMMAND`: flags, configuration files and exit codes around the library's functions.

Each subcommand is one library function; its flags are that function's options. A `--config FILE.yml` gives the same
names as flags would; flags on the command line win, unknown names are errors with a suggestion. Exit codes: 0 done,
1 the run failed, 2 bad arguments or bad input, 130 interrupted (one sentence on standard error; `--debug` shows the
traceback).
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
from dataclasses import fields, replace
from typing import Any

from fusechat_fuse.commands import COMMANDS, Command, library
from fusechat_fuse.errors import InputError, as_sentence
from fusechat_fuse.flags import Flag, FlagParser, flags_of_function, unknown
from fusechat_fuse.processes import end_process_group, is_main_process
from fusechat_fuse.requirements import check_versions
from fusechat_fuse.training import transformers_flags
from fusechat_fuse.training.options import RARE, train_flags

# Seconds that the other ranks of a launch wait before they report an error. The launcher ends them all when the main
# rank exits, so an error that every rank meets is reported once.
ERROR_DELAY_SECONDS = 3.0
OTHERWISE = {"represent": ("--model_name_or_path", "--gguf_file"), "run": ("RECIPE.yml", "--example")}  # one of them
EXAMPLES = "print a recipe that comes with the package, and end: one-gpu or fusechat-7b-v2"


def parser_of(name: str, *, installed: bool = False) -> FlagParser:
    """The flags of a subcommand.

    Args:
        installed: whether the flags of `train` come from the installed transformers (10 s of import) or the table.
    """
    command = COMMANDS[name]
    example = f"fusechat-fuse {command.example}"
    if name == "train":
        known = transformers_flags.installed_flags() if installed else transformers_flags.kept_flags()
        return FlagParser(name, command.what, train_flags(known), example, RARE)
    function, parameters = library(command.function), command.parameters
    sections = {title: flags_of_function(function, texts, parameters) for title, texts in command.help_texts.items()}
    if name == "run":
        sections["input and output"].append(Flag("example", EXAMPLES, "str", None))
    if name in OTHERWISE:
        sections["input and output"][0] = replace(sections["input and output"][0], required=False)
    return FlagParser(name, command.what, sections, example)


def options_of(argv: list[str]) -> dict[str, Any]:
    """All options that a subcommand reads from its arguments; raises InputError for arguments that it would refuse.

    Transformers is imported for the flags of `train` only if its version is not the table's and the table refuses one.
    """
    try:
        options, command = parser_of(argv[0]).parse(argv[1:]), COMMANDS[argv[0]]
    except InputError:
        if argv[0] != "train" or transformers_flags.table_is_exact():
            raise
        return parser_of("train", installed=True).parse(argv[1:])
    if command.check:
        library(command.check)(_parameters(command, options))
    return options


def _parameters(command: Command, options: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a command's function."""
    return {command.parameters.get(flag, flag): value for flag, value in options.items()}


def _call(name: str, options: dict[str, Any]) -> tuple[Any, int]:
    """Call a subcommand's function; returns what is printed (text, or what becomes JSON) and the exit code."""
    command, as_json = COMMANDS[name], options.pop("json")
    check_versions("training" if name == "train" else "fusechat_fuse")
    if name == "train":
        metrics = _train(options)
        return metrics if as_json else count_lines(metrics), 0
    if name == "run" and options["example"] is not None:
        return library("pipeline.recipe.example_recipe")(options["example"]).removesuffix("\n"), 0
    if name in OTHERWISE and all(options[flag.removeprefix("--")] is None for flag in OTHERWISE[name]):
        raise InputError(f"the following arguments are required: {' or '.join(OTHERWISE[name])}.")
    options.pop("example", None)
    options = _parameters(command, options)
    if name in ("run", "plan"):
        options["options_of"] = options_of
    result = library(command.function)(**options)
    code = 1 if name == "plan" and result["failing"] else 0  # `plan && run` stops
    shown = result if command.text_of is None else command.text_of(result)
    if isinstance(shown, dict):
        return shown if as_json else count_lines(shown), code
    return result if as_json else shown, code


def count_lines(counts: dict[str, Any]) -> str:
    """Counts and other figures for a terminal: `name: figure`, one a line."""
    lines = []
    for name, value in counts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {_figure(one)}" for key, one in value.items()) or "none"
        lines.append(f"{name}: {_figure(value)}")
    return "\n".join(lines)


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _train(options: dict[str, Any]) -> dict[str, Any]:
    from fusechat_fuse.training.config import FusionConfig
    from fusechat_fuse.training.run import train

    options["debug"] = " ".join(options["debug"] or ())
    of_config = {field.name for field in fields(FusionConfig) if field.init}
    config = FusionConfig(**{name: options.pop(name) for name in list(options) if name in of_config})
    return train(config=config, **options)


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:10} {command.what}" for name, command in COMMANDS.items()]
        print("usage: fusechat-fuse SUBCOMMAND [flags]", "", *lines, "", sep="\n")
        print("fusechat-fuse SUBCOMMAND --help", "fusechat-fuse --version", sep="\n")
        return 0 if argv else 2
    if argv[0] == "--version":
        from fusechat_fuse.models.identity import library_versions

        print(", ".join(f"{name} {number}" for name, number in library_versions().items()))
        return 0
    try:
        return _run(argv)
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in argv:
            traceback.print_exc()
        text, code = as_sentence(error)
        if not is_main_process():
            time.sleep(ERROR_DELAY_SECONDS)
        print(f"fusechat-fuse: {text}", file=sys.stderr)
        return code


def _run(argv: list[str]) -> int:
    name = argv[0]
    if name not in COMMANDS:
        raise InputError(unknown("subcommand", name, list(COMMANDS)))
    try:
        wants_help = {"-h", "--help", "--help-all"} & {*argv}
        installed = name == "train" and not wants_help and not transformers_flags.table_is_exact()
        options = parser_of(name, installed=installed).parse(argv[1:])
    except SystemExit as end:  # --help
        return int(end.code or 0)
    if name != "train":
        del options["debug"]
    if not sys.stderr.isatty():  # in logs transformers' bars are noise
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("fusechat_fuse").setLevel(logging.INFO if is_main_process() else logging.WARNING)
    result, code = _call(name, options)
    if result is not None and is_main_process():
        print(result if isinstance(result, str) else json.dumps(result, indent=1, default=str), flush=True)
    end_process_group()
    return code
