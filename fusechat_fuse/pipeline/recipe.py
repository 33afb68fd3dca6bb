"""The recipe of a whole fusion, one YAML file: models, data, options of each stage, how each stage is launched.

    output_dir: fused                       # every output goes below it
    pivot: openchat/openchat_3.5            # a directory or Hub name, or {model: ..., represent: {...}, launcher: ...}
    sources:                                # name: model, given as the pivot is
      starling: berkeley-nest/Starling-LM-7B-alpha
      qwen: {model: Qwen/Qwen1.5-72B-Chat, represent: {device_map: auto}, launcher: {represent: python}}
    data: mixture.json                      # one or a list, as --data_path takes them
    held_out: held-out.json                 # optional: evaluates the pivot and every result
    preset: fusechat                        # or paper
    represent: {dtype: bfloat16}            # flags of a stage without dashes; also align, combine, train
    plain: true                             # the baseline: the same training without fusion
    multi: true                             # one training on all sources, combined
    merge: {sce: {select_topk: 0.1}}        # method: parameters, or NAME: {method: sce, ...}
    launcher: {train: accelerate launch --config_file fsdp.yaml}   # per stage; a single text: all that run models
    devices: [0, 1]                         # GPUs: models are represented side by side, one GPU each

Relative paths start at the directory in which the command runs.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusechat_fuse.errors import InputError
from fusechat_fuse.presets import or_preset
from fusechat_fuse.store.files import read_yaml

FLAGGED = ("represent", "align", "combine", "train")  # stages whose flags a recipe may set
LAUNCHED = (*FLAGGED, "compare", "merge", "evaluate")  # stages that may have a launcher
MODEL_STAGES = ("represent", "train", "evaluate")  # those that run models, perhaps as several processes
KEYS = ("output_dir", "pivot", "sources", "data", "held_out", "preset", *FLAGGED)
KEYS += ("plain", "multi", "merge", "launcher", "devices")
RESERVED = {  # flags that the pipeline sets
    "represent": ("model_name_or_path", "data_path", "output_dir", "pivot_name_or_path"),
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
    """A checked recipe, made by `read_recipe`.

    Attributes:
        flags, launcher: by stage. merges: name -> (method, parameters).
    """

    output_dir: Path
    pivot: Model
    sources: dict[str, Model]
    data: list[str]
    held_out: list[str]
    preset: str
    flags: dict[str, dict[str, Any]]
    plain: bool
    multi: bool
    merges: dict[str, tuple[str, dict[str, Any]]]
    launcher: dict[str, str]
    devices: list[str]


def read_recipe(path) -> Recipe:
    """Read and check a recipe.

    Raises: InputError naming the file and the key.
    """
    return _Reader(str(path), read_yaml(path, "recipe")).recipe()


class _Reader:
    """Checks the entries of one file; every error names the file and the key."""

    def __init__(self, path: str, entries: dict):
        self.path, self.entries = path, entries

    def recipe(self) -> Recipe:
        for key in self.entries:
            if key not in KEYS:
                raise InputError(f"key {key!r} in {self.path}: expected one of {', '.join(KEYS)}. Correct it.")
        for key in ("output_dir", "pivot", "sources", "data"):
            if not self.entries.get(key):
                raise InputError(f"key {key!r} in {self.path}: expected a value, got none. Add it.")
        preset = self._text("preset") if "preset" in self.entries else "fusechat"
        or_preset(preset)
        sources = self._mapping("sources", self.entries["sources"])
        self._check_names("source", sources, ("pivot", "plain", "multi", "compare"))
        return Recipe(
            output_dir=Path(self._text("output_dir")),
            pivot=self._model("pivot", self.entries["pivot"]),
            sources={name: self._model(f"sources.{name}", value) for name, value in sources.items()},
            data=self._texts("data"),
            held_out=self._texts("held_out"),
            preset=preset,
            flags={stage: self._flags(stage, self.entries.get(stage, {})) for stage in FLAGGED},
            plain=self._switch("plain", True),
            multi=self._switch("multi", False),
            merges=self._merges(),
            launcher=self._launcher("launcher", self.entries.get("launcher", "python")),
            devices=self._devices(),
        )

    def _check_names(self, kind: str, names, taken: tuple[str, ...]) -> None:
        """Raise InputError for names that cannot be directories of the run."""
        for name in names:
            if name in taken or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or name.endswith(".yml"):
                raise InputError(
                    f"{kind} {name!r} in {self.path}: expected letters, digits, '-', '_' and '.', and none of "
                    f"{', '.join(taken)}. Rename it."
                )

    def _devices(self) -> list[str]:
        value = self.entries.get("devices", [])
        if not isinstance(value, list) or not all(isinstance(device, int | str) for device in value):
            raise InputError(f"key 'devices' in {self.path}: expected a list of GPUs such as [0, 1], got {value!r}.")
        return [str(device) for device in value]

    def _text(self, key: str) -> str:
        if not isinstance(self.entries[key], str):
            raise InputError(f"key {key!r} in {self.path}: expected text, got {self.entries[key]!r}.")
        return self.entries[key]

    def _mapping(self, key: str, value) -> dict:
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise InputError(f"key {key} in {self.path}: expected name: value pairs, got {value!r}.")
        return value

    def _texts(self, key: str) -> list[str]:
        value = self.entries.get(key) or []
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str) for item in values):
            raise InputError(f"key {key!r} in {self.path}: expected a path or a list of paths, got {value!r}.")
        return values

    def _switch(self, key: str, default: bool) -> bool:
        value = self.entries.get(key, default)
        if not isinstance(value, bool):
            raise InputError(f"key {key!r} in {self.path}: expected true or false, got {value!r}.")
        return value

    def _flags(self, key: str, value) -> dict[str, Any]:
        flags, stage = self._mapping(key, value or {}), key.split(".")[-1]
        for name in flags:
            if name in RESERVED[stage]:
                raise InputError(
                    f"key {key}.{name} in {self.path}: expected no such flag, since the pipeline sets it. Remove it."
                )
        return flags

    def _launcher(self, key: str, value) -> dict[str, str]:
        by_stage: dict[str, str] = {stage: value for stage in MODEL_STAGES} if isinstance(value, str) else value
        for stage, prefix in self._mapping(key, by_stage).items():
            if stage not in LAUNCHED or not isinstance(prefix, str) or not _split(prefix):
                raise InputError(
                    f"key {key}.{stage} in {self.path}: expected one of {', '.join(LAUNCHED)} and a "
                    f"command that takes the stage's command as its arguments, got {prefix!r}."
                )
        return by_stage

    def _model(self, key: str, value) -> Model:
        if isinstance(value, str):
            return Model(value)
        value = self._mapping(key, value)
        known = ("model", "launcher", *FLAGGED)
        if not isinstance(value.get("model"), str) or set(value) - set(known):
            raise InputError(f"key {key} in {self.path}: expected a model or {{{', '.join(known)}}}, got {value!r}.")
        flags = {stage: self._flags(f"{key}.{stage}", value[stage]) for stage in FLAGGED if stage in value}
        return Model(value["model"], flags, self._launcher(f"{key}.launcher", value.get("launcher", {})))

    def _merges(self) -> dict[str, tuple[str, dict[str, Any]]]:
        found = {}
        for name, value in self._mapping("merge", self.entries.get("merge", {"sce": {}}) or {}).items():
            parameters = dict(self._mapping(f"merge.{name}", value or {}))
            found[name] = (parameters.pop("method", name), parameters)
        self._check_names("merge", found, ("reports",))
        return found


def _split(command: str) -> list[str] | None:
    """The words of a shell command; None if a quotation mark is left open."""
    try:
        return shlex.split(command)
    except ValueError:
        return None
