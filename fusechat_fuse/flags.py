"""Flags of a command and the configuration files that stand for them: unknown names are errors with a suggestion."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fusechat_fuse.errors import InputError


class FlagParser(argparse.ArgumentParser):
    """The flags of one subcommand in sections; bad arguments become InputError.

    Args:
        name: of the subcommand. description: its help text. example: a whole command line, shown below the flags.
        add_flags: called with the parser, to put the flags in.
    """

    def __init__(self, name: str, description: str, add_flags: Callable[[FlagParser], None], example: str):
        self._rare: list[argparse.Action] = []
        self._section: Any = None
        super().__init__(
            prog=f"fusechat-fuse {name}",
            description=description,
            epilog=f"example:\n  {example}",
            allow_abbrev=False,
            formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=32),
        )
        add_flags(self)
        self.section("configuration and help")
        add_flag(self, "config", metavar="FILE.yml", help="flags from a YAML file; flags given here win")
        if "--debug" not in self.flags:
            self._section.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if self._rare:
            self._section.add_argument("--help-all", action=_HelpAll, help="the rare flags too")
        positionals = [f" {action.metavar}" for action in self._actions if not action.option_strings]
        self.usage = f"%(prog)s{''.join(positionals)} [flags]"

    @property
    def flags(self) -> list[str]:
        """All flags, with their dashes."""
        return list(self._option_string_actions)

    def flag(self, name: str) -> argparse.Action:
        """The flag `--name`, to change it."""
        return self._option_string_actions[f"--{name}"]

    def section(self, title: str) -> None:
        """What `add_flag` adds from here on stands below this title."""
        self._section = self.add_argument_group(title)

    def adopt(self, other: argparse.ArgumentParser, sections: dict[str, list[str]], rest: str) -> None:
        """Take over the flags of another parser, by section; those that no section names are rare and stand in `rest`,
        which `--help` leaves out."""
        left = list(other._actions)
        for title, names in {**sections, rest: [action.dest for action in left]}.items():
            self.section(title)
            chosen = [action for name in dict.fromkeys(names) for action in left if action.dest == name]  # --no_x too
            left = [action for action in left if action not in chosen]
            for action in chosen:
                self._section._add_action(action)
                text = " ".join((action.help or "").replace("%(default)s", str(action.default)).split())
                if title != rest:
                    text = action.help = text.split(". ")[0].removesuffix(".")
                if action.default not in (None, False, "", [], argparse.SUPPRESS) and "default" not in text.lower():
                    action.help = f"{text} (default: {str(action.default).replace('%', '%%')})"
                if title == rest:
                    self._rare.append(action)

    def format_help(self) -> str:
        shown = [(action, action.help) for action in self._rare]
        try:
            for action, _ in shown:
                action.help = argparse.SUPPRESS
            return super().format_help()
        finally:
            for action, text in shown:
                action.help = text

    def help_all(self) -> None:
        """Print the help with the rare flags."""
        self._rare = []
        self.print_help()

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
        return [
            *_config_as_flags(found.config, [n for n in names if n not in ("config", "debug", "help", "help-all")]),
            *rest,
        ]


class _HelpAll(argparse.Action):
    """`--help-all`: the whole help, and nothing else."""

    def __init__(self, option_strings, dest, help=None):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        assert isinstance(parser, FlagParser)
        parser.help_all()
        parser.exit()


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
    elif kwargs.get("required"):
        help = f"{help} (required)"
    (parser._section or parser).add_argument(f"--{name}", default=default, help=help, **kwargs)


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
