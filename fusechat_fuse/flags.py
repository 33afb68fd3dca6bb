"""Flags of a command and the configuration files that stand for them: unknown names are errors with a suggestion."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusechat_fuse.errors import InputError


class FlagParser(argparse.ArgumentParser):
    """The flags of one subcommand; bad arguments become InputError.

    Args:
        name: of the subcommand. description: its help text.
        add_flags: called with the parser, to put the flags in.
    """

    def __init__(self, name: str, description: str, add_flags: Callable[[FlagParser], None]):
        super().__init__(prog=f"fusechat-fuse {name}", description=description, allow_abbrev=False)
        self.add_argument("--config", metavar="FILE.yml", help="flags from a YAML file; flags given here win")
        add_flags(self)
        if "--debug" not in self.flags:
            self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    @property
    def flags(self) -> list[str]:
        """All flags, with their dashes."""
        return list(self._option_string_actions)

    def flag(self, name: str) -> argparse.Action:
        """The flag `--name`, to change it."""
        return self._option_string_actions[f"--{name}"]

    def adopt(self, other: argparse.ArgumentParser) -> None:
        """Take over the flags of another parser."""
        for action in other._actions:
            self._add_action(action)

    def error(self, message: str):
        raise InputError(f"{message}. See {self.prog} --help.")

    def parse(self, argv: list[str]) -> dict[str, Any]:
        """The options that arguments and configuration file give, by name.

        Raises: InputError for an unknown or bad flag or key; SystemExit after --help.
        """
        argv = self._with_config(argv)
        for argument in argv:
            if argument.startswith("--") and (flag := argument.split("=")[0]) not in self.flags:
                raise InputError(unknown("flag", flag, self.flags))
        options = vars(self.parse_args(argv))
        del options["config"]
        return options

    def _with_config(self, argv: list[str]) -> list[str]:
        """The arguments after those that the configuration file stands for, so that they win."""
        only = argparse.ArgumentParser(prog=self.prog, add_help=False, allow_abbrev=False, exit_on_error=False)
        only.add_argument("--config")
        try:
            found, rest = only.parse_known_args(argv)
        except argparse.ArgumentError as error:
            self.error(str(error))
        if found.config is None:
            return argv
        names = [flag.removeprefix("--") for flag in self.flags if flag.startswith("--")]
        return [*_config_as_flags(found.config, [n for n in names if n not in ("config", "debug", "help")]), *rest]


def unknown(kind: str, name: str, known: list[str]) -> str:
    """A sentence about a name that is none of the known, with the nearest one if any is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"unknown {kind} {name!r}" + (f": did you mean {near[0]!r}?" if near else f": known are {', '.join(known)}.")


def _switch(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() == "true"


def add_flag(parser: FlagParser, name: str, default=None, help: str = "", **kwargs) -> None:
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
    for name in entries:
        if name not in known:
            raise InputError(f"--config {path}: {unknown('key', str(name), known)}")
    return as_flags(entries)


def as_flags(options: dict[str, Any]) -> list[str]:
    """Options as the flags they stand for; null leaves one out."""
    words = []
    for name, value in options.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(json.dumps(v) if isinstance(v, dict | bool) else str(v) for v in values)]
    return words
