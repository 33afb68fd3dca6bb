"""Flags of a command, read from a function's signature or a dataclass's fields, and YAML files in place of flags."""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace
from functools import partial
from typing import Any

from fusechat_fuse.errors import InputError
from fusechat_fuse.store.files import read_yaml

_KINDS = {"str": str, "int": int, "float": float, "bool": bool}
_YES, _NO = ("true", "yes", "t", "y", "1"), ("false", "no", "f", "n", "0")  # as transformers reads switches
_SHORT = 4  # choices shown in place of the value; more are listed in the help text


@dataclass(frozen=True)
class Flag:
    """One `--name`, or a positional argument where the name is in capitals.

    Attributes:
        name: without dashes. help: a phrase without a full stop; the default, if there is one, is added to it.
        kind: str, int, float or bool (a switch that also takes true or false).
        default: its value where it is not given. required: whether it must be.
        several: `nargs` of argparse: +, * or ?; None: one value.
        choices: the values it takes; none: any.
    """

    name: str
    help: str = ""
    kind: str = "str"
    default: Any = None
    required: bool = False
    several: str | None = None
    choices: tuple[str, ...] = ()


def flags_of_function(function: Callable, help_texts: dict[str, str], parameters: dict[str, str]) -> list[Flag]:
    """The flags of a function's options: types and defaults from its signature.

    Args:
        help_texts: name -> help text, in the order of the help; "NAME ..." takes several values.
        parameters: name -> parameter, where the two differ.
    """
    signature, found = inspect.signature(function).parameters, []
    for written, text in help_texts.items():
        name = written.removesuffix(" ...")
        parameter = signature[parameters.get(name, name)]
        flag = _flag(name, text, parameter.annotation, parameter.default, parameter.empty)
        found.append(flag if name == written else replace(flag, several="+"))
    return found


def flags_of_fields(fields_of: type) -> list[Flag]:
    """The flags of a dataclass: types and defaults of its fields, `help` and `choices` from their metadata."""
    found = []
    for field in fields(fields_of):
        flag = _flag(field.name, as_phrase(field.metadata["help"]), field.type, field.default, MISSING)
        found.append(replace(flag, choices=tuple(field.metadata.get("choices", ()))))
    return found


def _flag(name: str, text: str, annotation, default, missing) -> Flag:
    """A flag of one value; it is required where its default is `missing`."""
    words = re.findall(r"\w+", str(annotation))
    kind = next((kind for kind in _KINDS if kind in words), "str")
    return Flag(name, text, kind, None if default is missing else default, default is missing)


def as_phrase(sentence: str) -> str:
    """A help text as argparse shows them: one line, a small letter first, no full stop."""
    words = sentence.split()
    if words and words[0][1:].islower():
        words[0] = words[0].lower()
    text = " ".join(words)
    return text if text.endswith("...") else text.removesuffix(".")


class FlagParser(argparse.ArgumentParser):
    """The flags of one subcommand in sections; bad arguments become InputError.

    Args:
        name: of the subcommand. description: what it does. example: a whole command line, shown below the flags.
        sections: title -> flags, in the order of the help.
        rare: title of the section that only `--help-all` shows; None: there is none.
    """

    def __init__(
        self, name: str, description: str, sections: dict[str, list[Flag]], example: str, rare: str | None = None
    ):
        super().__init__(
            prog=f"fusechat-fuse {name}",
            description=description,
            epilog=f"example:\n  {example}",
            allow_abbrev=False,
            formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=32),
        )
        self._rare: list[tuple[argparse.Action, str | None]] = []  # with their help texts
        self._switches: set[str] = set()
        for title, flags in sections.items():
            group = self.add_argument_group(title)
            for action in [self._add(group, flag) for flag in flags]:
                if title == rare:
                    self._rare.append((action, action.help))
                    action.help = argparse.SUPPRESS
        last = self.add_argument_group("configuration and help")
        last.add_argument("--config", metavar="FILE.yml", help="YAML file with flags; flags of the command line win")
        last.add_argument("--json", action="store_true", help="print the result as JSON")
        if "--debug" not in self.flags:
            last.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if self._rare:
            last.add_argument("--help-all", action="store_true", help="show all flags, the rare ones too")
        positionals = [flag.name for flags in sections.values() for flag in flags if not flag.name.islower()]
        self.usage = " ".join(["%(prog)s", *positionals, "[flags]"])

    @property
    def flags(self) -> list[str]:
        """All flags, with their dashes."""
        return list(self._option_string_actions)

    def _add(self, group, flag: Flag) -> argparse.Action:
        text, long = flag.help, len(flag.choices) > _SHORT
        if long and not all(choice in text for choice in flag.choices):
            text += f"; one of {', '.join(flag.choices)}"
        if flag.required and flag.name.islower():
            text += " (required)"
        elif flag.default is not False and flag.default not in (None, "", []):
            text += f" (default: {flag.default})"
        options: dict[str, Any] = {"help": text.replace("%", "%%"), "nargs": flag.several}
        options["type"] = _switch if flag.kind == "bool" else _KINDS[flag.kind]
        options["metavar"] = flag.kind.upper()
        if flag.choices:
            options["type"] = partial(_one_of, flag.choices)
            options["metavar"] = "NAME" if long else f"{{{','.join(flag.choices)}}}"
        if not flag.name.islower():
            count = flag.several if flag.required else "?"
            return group.add_argument(flag.name, **{**options, "metavar": flag.name, "nargs": count})
        if flag.kind == "bool":
            self._switches.add(flag.name)
        if flag.kind == "bool" or flag.several == "?":
            options |= {"nargs": "?", "const": True}
        return group.add_argument(f"--{flag.name}", default=flag.default, required=flag.required, **options)

    def error(self, message: str):
        raise InputError(f"{message.rstrip('.')}{'' if message.endswith('?') else '.'} See {self.prog} --help.")

    def parse(self, argv: list[str]) -> dict[str, Any]:
        """The options that arguments and configuration file give, by name.

        Raises: InputError for an unknown or bad flag or key; SystemExit after --help.
        """
        if self._rare and "--help-all" in argv:
            for action, text in self._rare:
                action.help = text
            self.print_help()
            self.exit()
        options = vars(self.parse_args([self._spelled(word) for word in self._with_config(argv)]))
        return {name: value for name, value in options.items() if name not in ("config", "help_all")}

    def _spelled(self, word: str) -> str:
        """A flag as it is declared, also where it is spelled as transformers may: --top-k, --no_packing."""
        flag, equals, value = word.partition("=")
        if not flag.startswith("--") or flag in self.flags:
            return word
        name = flag[2:].replace("-", "_")
        if f"--{name}" in self.flags:
            return f"--{name}{equals}{value}"
        if name.startswith("no_") and name[3:] in self._switches and not equals:
            return f"--{name[3:]}=false"
        raise InputError(unknown("flag", flag, self.flags))

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
        entries = read_yaml(found.config, "--config")
        own = ("config", "json", "debug", "help", "help-all")
        known = [flag[2:] for flag in self.flags if flag.startswith("--") and flag[2:] not in own]
        for name in entries:
            if name not in known:
                raise InputError(f"--config {found.config}: {unknown('key', str(name), known)}")
        return [*as_flags(entries), *rest]


def unknown(kind: str, name: str, known) -> str:
    """A sentence about a name that is none of the known ones, with the nearest one if any is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"unknown {kind} {name!r}" + (f": did you mean {near[0]!r}?" if near else f": known are {', '.join(known)}.")


def _switch(text: str) -> bool:
    if text.lower() not in (*_YES, *_NO):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() in _YES


def _one_of(choices: tuple[str, ...], text: str) -> str:
    if text not in choices:
        raise argparse.ArgumentTypeError(unknown("value", text, choices))
    return text


def as_flags(options: dict[str, Any]) -> list[str]:
    """Options as the flags they stand for; null leaves one out."""
    words = []
    for name, value in options.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(json.dumps(v) if isinstance(v, dict | bool) else str(v) for v in values)]
    return words
