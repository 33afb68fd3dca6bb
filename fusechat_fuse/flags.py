"""Flags of a command and the configuration files that stand for them: unknown names are errors with a suggestion."""

from __future__ import annotations

import argparse
import difflib
import json
from pathlib import Path

from fusechat_fuse.errors import InputError


class FlagParser(argparse.ArgumentParser):
    """Reports bad arguments as InputError: one sentence, and for an unknown flag the nearest known one."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message):
        raise InputError(f"{message}. See {self.prog} --help.")

    def parse_args(self, args=None, namespace=None):
        for arg in args:
            if arg.startswith("--") and (flag := arg.split("=")[0]) not in self._option_string_actions:
                raise InputError(unknown("flag", flag, list(self._option_string_actions)))
        return super().parse_args(args, namespace)


def unknown(kind: str, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"unknown {kind} {name!r}" + (f": did you mean {near[0]!r}?" if near else f": known are {', '.join(known)}.")


def _switch(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() == "true"


def add_flag(parser, name: str, default=None, help: str = "", **kwargs) -> None:
    """One `--name`; a bool default makes it a switch that also takes true or false, as transformers' flags do."""
    if isinstance(default, bool):
        kwargs |= {"type": _switch, "nargs": "?", "const": True}
    elif default is not None and not kwargs.get("type") and not kwargs.get("nargs"):
        kwargs["type"] = type(default)
    if default not in (None, False):
        help = f"{help} (default: {default})"
    parser.add_argument(f"--{name}", default=default, help=help, **kwargs)


def _config_as_flags(path: str, known: list[str]) -> list[str]:
    """The YAML file's entries as the flags they stand for."""
    import yaml

    try:
        entries = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(
            f"--config {path}: expected a readable YAML file, got: {' '.join(str(error).split())}."
        ) from error
    if not isinstance(entries, dict):
        raise InputError(f"--config {path}: expected flag: value pairs, got {type(entries).__name__}.")
    flags = []
    for name, value in entries.items():
        if name not in known:
            raise InputError(f"--config {path}: {unknown('key', str(name), known)}")
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        flags += [f"--{name}", *(json.dumps(v) if isinstance(v, dict | bool) else str(v) for v in values)]
    return flags


def with_config(parser: FlagParser, argv: list[str]) -> list[str]:
    first = FlagParser(prog=parser.prog, add_help=False)
    first.add_argument("--config")
    config, rest = first.parse_known_args(argv)
    if config.config is None:
        return argv
    names = [flag[2:] for flag in parser._option_string_actions if flag.startswith("--")]
    return [*_config_as_flags(config.config, [n for n in names if n not in ("config", "debug", "help")]), *rest]


def command_parser(name: str, description: str, add_flags) -> FlagParser:
    parser = FlagParser(prog=f"fusechat-fuse {name}", description=description)
    parser.add_argument("--config", metavar="FILE.yml", help="flags from a YAML file; flags given here win")
    add_flags(parser)
    if "--debug" not in parser._option_string_actions:
        parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser
