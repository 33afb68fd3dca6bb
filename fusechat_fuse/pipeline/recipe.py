"""The recipe of a whole fusion, one YAML file: models, data, options of each stage, how each stage is launched.

    output_dir: fused                       # every output goes below it
    pivot: openchat/openchat_3.5            # a directory or Hub name, or {model: ..., represent: {...}, launcher: ...}
    sources:                                # name: model, given as the pivot is
      starling: berkeley-nest/Starling-LM-7B-alpha
      qwen: {model: Qwen/Qwen1.5-72B-Chat, represent: {device_map: auto}, launcher: {represent: python}}
    data: mixture.json                      # one or a list, as --data_path takes them
    held_out: held-out.json                 # optional: evaluates the pivot and every result
    preset: fusechat                        # or paper
    answers: data                           # or sources: each slice's prompts are answered anew by its best source
    represent: {dtype: bfloat16}            # flags of a stage without dashes; also answer, align, combine, train
    plain: true                             # the baseline: the same training without fusion
    multi: true                             # one training on all sources, combined
    targets: serving                        # or all: also those that would equal plain (their source serves no slice)
    merge: {sce: {select_topk: 0.1}}        # method: parameters, or NAME: {method: sce, ...}
    launcher: {train: accelerate launch --config_file fsdp.yaml}   # per stage; a single text: all that run models
    devices: [0, 1]                         # GPUs: models are represented side by side, one GPU each

Relative paths start at the directory in which the command runs.
"""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusechat_fuse.errors import InputError
from fusechat_fuse.presets import or_preset
from fusechat_fuse.store.files import read_yaml

FLAGGED = ("represent", "answer", "align", "combine", "train")  # stages whose flags a recipe may set
LAUNCHED = (*FLAGGED, "compare", "merge", "evaluate")  # stages that may have a launcher
MODEL_STAGES = ("represent", "train", "evaluate")  # those that run models, perhaps as several processes
KEYS = ("output_dir", "pivot", "sources", "data", "held_out", "preset", "answers", *FLAGGED)
KEYS += ("plain", "multi", "targets", "merge", "launcher", "devices")
TARGETS, ANSWERS = ("serving", "all"), ("data", "sources")
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


class _Reader:
    """Checks the entries of one file; every error names the file and the key."""

    def __init__(self, path: str, entries: dict):
        self.path, self.entries = path, entries

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
        return Recipe(
            output_dir=Path(self._get("output_dir", str, "text", None)),
            pivot=pivot,
            sources=models,
            data=self._texts("data"),
            held_out=self._texts("held_out"),
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

    def _mapping(self, key: str, value) -> dict:
        valid = isinstance(value, dict) and all(isinstance(name, str) for name in value)
        self._check(valid, key, "name: value pairs", value)
        return value

    def _texts(self, key: str) -> list[str]:
        value = self.entries.get(key) or []
        values = value if isinstance(value, list) else [value]
        self._check(all(isinstance(item, str) for item in values), key, "a path or a list of paths", value)
        return values

    def _check_names(self, kind: str, names, taken: tuple[str, ...]) -> None:
        """Raise InputError for names that cannot be directories of the run."""
        expected = f"a name of letters, digits, '-', '_' and '.', and none of {', '.join(taken)}"
        for name in names:
            valid = re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) and name not in taken and not name.endswith(".yml")
            self._check(valid, kind, expected, name)

    def _flags(self, key: str, value) -> dict[str, Any]:
        stage = key.split(".")[-1]
        flags = {name.replace("-", "_"): of for name, of in self._mapping(key, value or {}).items()}
        for name in flags:
            self._check(name not in RESERVED[stage], f"{key}.{name}", "no flag that the pipeline sets", flags[name])
        return flags

    def _launcher(self, key: str, value) -> dict[str, str]:
        by_stage: dict[str, str] = {stage: value for stage in MODEL_STAGES} if isinstance(value, str) else value
        for stage, command in self._mapping(key, by_stage).items():
            self._check(stage in LAUNCHED, f"{key}.{stage}", f"a stage ({', '.join(LAUNCHED)})", stage)
            self._check(_is_command(command), f"{key}.{stage}", "a command that launches the stage's own", command)
        return by_stage

    def _model(self, key: str, value) -> Model:
        if isinstance(value, str):
            return Model(value)
        known = ("model", "launcher", *FLAGGED)
        valid = isinstance(value, dict) and isinstance(value.get("model"), str) and not set(value) - set(known)
        self._check(valid, key, f"a model or {{{', '.join(known)}}}", value)
        flags = {stage: self._flags(f"{key}.{stage}", value[stage]) for stage in FLAGGED if stage in value}
        return Model(value["model"], flags, self._launcher(f"{key}.launcher", value.get("launcher", {})))

    def _merges(self) -> dict[str, tuple[str, dict[str, Any]]]:
        found = {}
        for name, value in self._mapping("merge", self.entries.get("merge", {"sce": {}}) or {}).items():
            parameters = dict(self._mapping(f"merge.{name}", value or {}))
            found[name] = (parameters.pop("method", name), parameters)
        self._check_names("merge", found, ("reports",))
        return found


def _is_command(value) -> bool:
    try:
        return isinstance(value, str) and bool(shlex.split(value))
    except ValueError:  # an open quotation mark
        return False
