"""The recipe of a whole fusion, one YAML file: models, data, options of each stage, how each stage is launched.

    output_dir: fused                       # every output goes below it
    pivot: openchat/openchat_3.5            # a directory or Hub name, or {model: ..., represent: {...}, launcher: ...}
    sources:                                # name: model, given as the pivot is
      starling: berkeley-nest/Starling-LM-7B-alpha
      qwen: {model: Qwen/Qwen1.5-72B-Chat, represent: {device_map: auto}, launcher: {represent: python}}
    data: mixture.json                      # one or a list, as --data_path takes them
    held_out: held-out.json                 # optional: evaluates the pivot and every result; {data: ..., split: test}
    score: exact_match                      # optional: of their answers to the held-out prompts; or FILE.py:function
    preset: fusechat                        # or paper
    answers: data                           # or sources: each slice's prompts are answered anew by its best source
    represent: {dtype: bfloat16}            # flags of a stage without dashes; also answer, align, combine, train
    plain: true                             # the baseline: the same training without fusion
    multi: true                             # one training on all sources, combined
    targets: serving                        # or all: also those that would equal plain (their source serves no slice)
    merge: {sce: {select_topk: 0.1}}        # method: parameters, or NAME: {method: sce, ...}
    launcher: {train: accelerate launch --config_file fsdp.yaml}   # per stage; a single text: all that run models
    devices: [0, 1]                         # GPUs: models are represented side by side, one GPU each

Relative paths start at the recipe's own directory. One that is there only from the directory in which the command runs
(where paths started before) is still taken, with a warning.
"""

from __future__ import annotations

import glob
import logging
import os
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusechat_fuse.errors import InputError
from fusechat_fuse.presets import or_preset
from fusechat_fuse.store.files import read_yaml
from fusechat_fuse.user_code import check_function

FLAGGED = ("represent", "answer", "align", "combine", "train")  # stages whose flags a recipe may set
LAUNCHED = (*FLAGGED, "compare", "merge", "evaluate")  # stages that may have a launcher
MODEL_STAGES = ("represent", "train", "evaluate")  # those that run models, perhaps as several processes
KEYS = ("output_dir", "pivot", "sources", "data", "held_out", "score", "preset", "answers", *FLAGGED)
KEYS += ("plain", "multi", "targets", "merge", "launcher", "devices")
TARGETS, ANSWERS = ("serving", "all"), ("data", "sources")
RECORD_FILE = "stages.json"  # in output_dir, of a run that has begun
EXAMPLES = Path(__file__).parent / "examples"
PATHS = ("template", "counts", "cache_dir", "eval_data_path", "deepspeed", "fsdp_config", "resume_from_checkpoint")
# flags of represent: how data are read, and how a model is loaded, or which server runs it
READING = ("split", "limit", "shuffle_seed", "messages_column", "strict")
LOADING = ("dtype", "device_map", "attn_implementation", "gguf_file", "load_in_4bit", "load_in_8bit")
LOADING += ("trust_remote_code", "server", "server_kind", "server_model", "server_requests")
RESERVED = {  # flags that the pipeline sets
    "represent": ("model_name_or_path", "data_path", "output_dir", "pivot_name_or_path"),
    "answer": ("benchmark", "model", "questions", "output", "pivot_name_or_path"),
    "align": ("pivot_representation", "source_representation", "output_dir", "preset"),
    "combine": ("aligned", "output_dir", "preset"),
    "train": ("model_name_or_path", "data_path", "output_dir", "preset", "overwrite"),
}


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """A model of the recipe, with flags and launchers of its own, by stage, which override the recipe's."""

    model: str
    flags: dict[str, dict[str, Any]] = field(default_factory=dict)
    launcher: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A checked recipe, made by `read_recipe`."""

    output_dir: Path
    pivot: Model
    sources: dict[str, Model]
    data: list[str]
    held_out: list[str]
    held_out_flags: dict[str, Any]  # how these data are read, where they are read otherwise
    score: str | None  # of answers to the held-out prompts: exact_match, or FILE.py:function with an absolute path
    preset: str
    answers: str  # whose answers the data have in training: data (their own) or sources
    flags: dict[str, dict[str, Any]]  # by stage
    plain: bool
    multi: bool
    targets: str
    merges: dict[str, tuple[str, dict[str, Any]]]  # name -> (method, parameters)
    launcher: dict[str, str]  # by stage
    devices: list[str]


def read_recipe(path) -> Recipe:
    """Read and check a recipe; raises InputError that names the file and the key."""
    return _Reader(str(path), read_yaml(path, "recipe")).recipe()


def example_recipe(name: str) -> str:
    """The text of a recipe that comes with the package; raises InputError that lists them."""
    known = sorted(file.stem for file in EXAMPLES.glob("*.yml"))
    if name not in known:
        raise InputError(f"example {name!r} for run: expected one of {', '.join(known)}. Use one.")
    return (EXAMPLES / f"{name}.yml").read_text(encoding="utf-8")


class _Reader:
    """Checks the entries of one file; every error names the file and the key."""

    def __init__(self, path: str, entries: dict):
        self.path, self.entries, self.home = path, entries, os.path.dirname(path)

    def recipe(self) -> Recipe:
        for key in self.entries:
            self._check(key in KEYS, key, f"one of {', '.join(KEYS)}", "an unknown key")
        for key in ("output_dir", "pivot", "sources", "data"):
            self._check(self.entries.get(key), key, "a value", self.entries.get(key))
        preset = self._get("preset", str, "text", "fusechat")
        or_preset(preset)
        sources = self._mapping("sources", self.entries["sources"])
        self._check_names("source", sources, ("pivot", "plain", "multi", "compare", "assigned", "representations"))
        pivot = self._model("pivot", self.entries["pivot"])
        models = {name: self._model(f"sources.{name}", value) for name, value in sources.items()}
        for name, model in models.items():
            same = os.path.abspath(model.model) == os.path.abspath(pivot.model) and model.flags == pivot.flags
            self._check(not same, f"sources.{name}", "another model than the pivot", model.model)
        devices = self._get("devices", list, "a list of GPUs such as [0, 1]", [])
        held_out, held_out_flags = self._held_out()
        return Recipe(
            output_dir=Path(self._place("output_dir", self._get("output_dir", str, "text", None), RECORD_FILE)),
            pivot=pivot,
            sources=models,
            data=self._data("data", self.entries["data"]),
            held_out=held_out,
            held_out_flags=held_out_flags,
            score=self._score(),
            preset=preset,
            flags={stage: self._flags(stage, self.entries.get(stage)) for stage in FLAGGED},
            plain=self._get("plain", bool, "true or false", True),
            multi=self._get("multi", bool, "true or false", False),
            targets=self._one_of("targets", TARGETS),
            answers=self._one_of("answers", ANSWERS),
            merges=self._merges(),
            launcher=self._launcher("launcher", self.entries.get("launcher", "python")),
            devices=[str(device) for device in devices],
        )

    def _check(self, holds, key: str, expected: str, value) -> None:
        if not holds:
            raise InputError(f"key {key} in {self.path}: expected {expected}, got {value!r}. Correct it.")

    def _get(self, key: str, kind: type, expected: str, default) -> Any:
        value = self.entries.get(key, default)
        self._check(isinstance(value, kind), key, expected, value)
        return value

    def _one_of(self, key: str, values: tuple[str, ...]) -> str:
        """The value of a key that takes one of some words; the first of them where it is not given."""
        value = self.entries.get(key, values[0])
        self._check(value in values, key, f"one of {', '.join(values)}", value)
        return value

    def _score(self) -> str | None:
        """How answers to held-out prompts are scored; a function's file is checked, and is not run."""
        value = self.entries.get("score")
        if value is None:
            return None
        self._check(self.entries.get("held_out"), "held_out", "held-out data, as there is a score", None)
        self._check(isinstance(value, str), "score", "exact_match or FILE.py:function", value)
        if value == "exact_match":
            return value
        file, _, function = value.rpartition(":")
        value = f"{os.path.abspath(self._place('score', file))}:{function}" if file else value
        check_function(f"key score in {self.path}", value)
        return value

    def _mapping(self, key: str, value) -> dict:
        valid = isinstance(value, dict) and all(isinstance(name, str) for name in value)
        self._check(valid, key, "name: value pairs", value)
        return value

    def _data(self, key: str, value) -> list[str]:
        values = value if isinstance(value, list) else [value]
        self._check(all(isinstance(item, str) for item in values), key, "a path or a list of paths", value)
        return [self._place(key, item) for item in values]

    def _held_out(self) -> tuple[list[str], dict[str, Any]]:
        value = self.entries.get("held_out") or []
        if not isinstance(value, dict):
            return self._data("held_out", value), {}
        known = ("data", *READING)
        valid = value.get("data") and not set(value) - set(known)
        self._check(valid, "held_out", f"data or {{{', '.join(known)}}}", value)
        flags = {name: of for name, of in value.items() if name != "data"}
        return self._data("held_out.data", value["data"]), flags

    def _place(self, key: str, path: str, made: str | None = None) -> str:
        """A path of the recipe, as the commands take it.

        Args:
            path: relative to the recipe's directory, as before to the working directory, or a Hub name.
            made: of a directory that the run makes: the file in it that tells an earlier run's.
        """
        beside = os.path.join(self.home, path)
        same = beside == path or os.path.abspath(beside) == os.path.abspath(path)
        if same or _exists(beside):
            return path if same else beside
        if not _exists(path if made is None else os.path.join(path, made)):
            return path if made is None else beside
        logger.warning(
            "%s in %s: %s is not in the recipe's directory, and is taken from the working directory, where relative "
            "paths started before. Move the recipe there, or give an absolute path.",
            key,
            self.path,
            path,
        )
        return path

    def _check_names(self, kind: str, names, taken: tuple[str, ...]) -> None:
        """Raise InputError for names that cannot be directories of the run."""
        expected = f"a name of letters, digits, '-', '_' and '.', and none of {', '.join(taken)}"
        for name in names:
            valid = re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) and name not in taken and not name.endswith(".yml")
            self._check(valid, kind, expected, name)

    def _flags(self, key: str, value) -> dict[str, Any]:
        stage = key.split(".")[-1]
        flags = {name.replace("-", "_"): of for name, of in self._mapping(key, value or {}).items()}
        for name, of in flags.items():
            self._check(name not in RESERVED[stage], f"{key}.{name}", "no flag that the pipeline sets", of)
            if name in PATHS and isinstance(of, str):
                flags[name] = self._place(f"{key}.{name}", of, "" if name == "cache_dir" else None)
        return flags

    def _launcher(self, key: str, value) -> dict[str, str]:
        by_stage: dict[str, str] = {stage: value for stage in MODEL_STAGES} if isinstance(value, str) else value
        for stage, command in self._mapping(key, by_stage).items():
            self._check(stage in LAUNCHED, f"{key}.{stage}", f"a stage ({', '.join(LAUNCHED)})", stage)
            self._check(_is_command(command), f"{key}.{stage}", "a command that launches the stage's own", command)
        return {stage: self._command(f"{key}.{stage}", command) for stage, command in by_stage.items()}

    def _command(self, key: str, command: str) -> str:
        """A launcher whose words that name a file (a script, `--config_file FILE`) are as the command takes them."""
        words = shlex.split(command)
        for n, word in enumerate(words):
            file = word.rpartition("=")[2]
            is_file = any(os.path.isfile(place) for place in (os.path.join(self.home, file), file))
            if is_file and ("/" in file or Path(file).suffix):
                words[n] = word.removesuffix(file) + self._place(key, file)
        return shlex.join(words) if words != shlex.split(command) else command

    def _model(self, key: str, value) -> Model:
        if isinstance(value, str):
            return Model(self._place(key, value))
        known = ("model", "launcher", *FLAGGED)
        valid = isinstance(value, dict) and isinstance(value.get("model"), str) and not set(value) - set(known)
        self._check(valid, key, f"a model or {{{', '.join(known)}}}", value)
        flags = {stage: self._flags(f"{key}.{stage}", value[stage]) for stage in FLAGGED if stage in value}
        model = self._place(f"{key}.model", value["model"])
        return Model(model, flags, self._launcher(f"{key}.launcher", value.get("launcher", {})))

    def _merges(self) -> dict[str, tuple[str, dict[str, Any]]]:
        found = {}
        for name, value in self._mapping("merge", self.entries.get("merge", {"sce": {}}) or {}).items():
            parameters = dict(self._mapping(f"merge.{name}", value or {}))
            found[name] = (parameters.pop("method", name), parameters)
        self._check_names("merge", found, ("reports",))
        return found


def _exists(path: str) -> bool:
    return os.path.exists(path) or bool(glob.has_magic(path) and glob.glob(path, recursive=True))


def _is_command(value) -> bool:
    try:
        return isinstance(value, str) and bool(shlex.split(value))
    except ValueError:  # an open quotation mark
        return False
