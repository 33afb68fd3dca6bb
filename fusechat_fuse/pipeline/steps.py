"""The steps of a recipe: one command per stage and model, with its inputs and its output.

represent (pivot, sources) -> compare -> align (each source) -> combine -> train (plain, targets, multi)
-> merge -> evaluate (the results represent the held-out data) -> report
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import sysconfig
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from fusechat_fuse.flags import as_flags
from fusechat_fuse.pipeline.recipe import Model, Recipe
from fusechat_fuse.store.files import read_yaml

STAGES = ("represent", "compare", "align", "combine", "train", "merge", "evaluate", "report")


@dataclass(frozen=True)
class Step:
    """One command of a stage.

    Attributes:
        arguments: of `fusechat-fuse`; of a merge `merge`, mergekit's configuration, the models. command: what is run.
        made_anew: what was made from other inputs is removed before the step runs again, see `Record.starts_anew`.
        parallel: may run beside the other steps of its stage. files: path -> text, written before the step runs.
    """

    stage: str
    name: str
    arguments: list[str]
    command: list[str]
    output: Path
    made_anew: bool = False
    parallel: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    files: dict[Path, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.stage} {self.name}".strip()

    @property
    def shell(self) -> str:
        """The command as it would be typed in a shell."""
        return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in self.environment.items()), shlex.join(self.command)])


def steps_of(recipe: Recipe, plain_of: str | None = None) -> list[Step]:
    """All steps but the report, in order.

    Args:
        recipe: a checked recipe.
        plain_of: the source whose aligned data `plain` was trained on before, which are used again while they exist
            (the labels are the same in all sources' data).
    """
    return _Steps(recipe, plain_of).all()


class _Steps:
    def __init__(self, recipe: Recipe, plain_of: str | None):
        self.recipe, self.home = recipe, recipe.output_dir
        exists = plain_of is not None and (self.home / "aligned" / plain_of).exists()
        self.plain_of = plain_of if plain_of is not None and exists else next(iter(recipe.sources))

    def all(self) -> list[Step]:
        represented = {"pivot": self.recipe.pivot, **self.recipe.sources}
        steps = [self._represent(name, model) for name, model in represented.items()]
        folders = [str(self.home / "representations" / name) for name in represented]
        steps.append(self._compare("compare", "", folders, self.home / "compare"))
        steps += [self._align(name, model) for name, model in self.recipe.sources.items()]
        several = self.recipe.multi and len(self.recipe.sources) > 1
        if several:
            steps.append(self._combine())
        if self.recipe.plain:
            steps.append(self._train("plain", self.plain_of, Model(""), {"lm_loss_weight": 1.0}))
        steps += [self._train(f"target-{name}", name, model, {}) for name, model in self.recipe.sources.items()]
        if several:
            steps.append(self._train("multi", "multi", Model(""), {}, made_anew=True))
        steps += [self._merge(name, *merge) for name, merge in self.recipe.merges.items()]
        if self.recipe.held_out:
            steps += self._evaluate([step for step in steps if step.stage in ("train", "merge")])
        return steps

    def _step(self, stage: str, name: str, model: Model, arguments: list, output: Path, **more) -> Step:
        """A step of `fusechat-fuse`, with the launcher of the model or else of the recipe."""
        words = [str(argument) for argument in arguments]
        launched_as = "compare" if words[0] == "compare" else stage
        launcher = model.launcher.get(launched_as) or self.recipe.launcher.get(launched_as, "python")
        return Step(stage, name, words, launched(launcher, words), output, **more)

    def _flags(self, stage: str, model: Model) -> list[str]:
        """The flags of a stage: the recipe's, overridden by the model's own."""
        return as_flags({**self.recipe.flags[stage], **model.flags.get(stage, {})})

    def _represent(self, name: str, model: Model) -> Step:
        output = self.home / "representations" / name
        own = ["represent", "--model_name_or_path", model.model, "--data_path", *self.recipe.data]
        if name != "pivot":
            own += ["--pivot_name_or_path", self.recipe.pivot.model]
        own += ["--output_dir", output, *self._flags("represent", model)]
        return self._step("represent", name, model, own, output, parallel=True)

    def _compare(self, stage: str, name: str, folders: list[str], output: Path) -> Step:
        own = ["compare", *folders, "--output_dir", output]
        return self._step(stage, name, Model(""), own, output, made_anew=True)

    def _align(self, name: str, model: Model) -> Step:
        pivot, source, output = (
            self.home / "representations" / "pivot",
            self.home / "representations" / name,
            self.home / "aligned" / name,
        )
        own = ["align", "--pivot_representation", pivot, "--source_representation", source, "--output_dir", output]
        own += ["--preset", self.recipe.preset, *self._flags("align", model)]
        return self._step("align", name, model, own, output)

    def _combine(self) -> Step:
        parts = [self.home / "aligned" / name for name in self.recipe.sources]
        output = self.home / "aligned" / "multi"
        own = ["combine", "--aligned", *parts, "--output_dir", output, "--preset", self.recipe.preset]
        own += self._flags("combine", Model(""))
        return self._step("combine", "", Model(""), own, output, made_anew=True)

    def _train(self, name: str, data: str, model: Model, more: dict, made_anew: bool = False) -> Step:
        output, aligned = self.home / "models" / name, self.home / "aligned" / data
        own = ["train", "--model_name_or_path", self.recipe.pivot.model, "--data_path", aligned]
        own += ["--output_dir", output, "--preset", self.recipe.preset]
        own += as_flags({**self.recipe.flags["train"], **model.flags.get("train", {}), **more})
        return self._step("train", name, model, own, output, made_anew=made_anew)

    def _merge(self, name: str, method: str, parameters: dict[str, Any]) -> Step:
        targets = [self.home / "models" / f"target-{source}" for source in self.recipe.sources]
        parameters, top = dict(parameters), {}
        for key in ("dtype", "out_dtype", "tokenizer_source"):
            if key in parameters:
                top[key] = parameters.pop(key)
        config = {"merge_method": method, "models": [{"model": str(target.resolve())} for target in targets]}
        if method != "linear":
            config["base_model"] = absolute(self.recipe.pivot.model)
        if method == "linear" and "weight" not in parameters:
            parameters["weight"] = 1.0
        config |= {"parameters": parameters, "dtype": "float32", **top}
        file, output = self.home / "merged" / f"{name}.yml", self.home / "merged" / name
        text = json.dumps(config, indent=2) + "\n"  # JSON is YAML
        launcher = self.recipe.launcher.get("merge", "python")
        script = str(Path(sysconfig.get_path("scripts")) / "fusechat-merge")
        command = [*([] if launcher == "python" else shlex.split(launcher)), script, "yaml", str(file), str(output)]
        models = [self.recipe.pivot.model, *map(str, targets)]
        return Step(
            *("merge", name, ["merge", json.dumps(config, sort_keys=True), *models], command, output),
            made_anew=True,
            environment={"FUSECHAT_MERGE_REPORT": str(self.home / "merged" / "reports" / name)},
            files={file: text},
        )

    def _evaluate(self, results: list[Step]) -> list[Step]:
        """The held-out conversations, represented by the pivot and every result, and the comparison."""
        folders, steps = [], []
        for name, model in [("pivot", self.recipe.pivot.model), *((s.output.name, str(s.output)) for s in results)]:
            name = f"merged-{name}" if Path(model).parent == self.home / "merged" else name
            output = self.home / "held_out" / name
            own = ["represent", "--model_name_or_path", model, "--data_path", *self.recipe.held_out]
            own += ["--pivot_name_or_path", self.recipe.pivot.model, "--output_dir", output]
            own += self._flags("represent", self.recipe.pivot)
            steps.append(self._step("evaluate", name, Model(""), own, output, made_anew=True, parallel=True))
            folders.append(str(output))
        return [*steps, self._compare("evaluate", "compare", folders, self.home / "held_out" / "compare")]


def launched(launcher: str, arguments: list[str]) -> list[str]:
    """`fusechat-fuse ARGUMENTS` behind a launcher: python, accelerate launch ..., torchrun ..., or another command."""
    words = shlex.split(launcher)
    if words[:1] == ["python"]:
        return [sys.executable, *words[1:], "-m", "fusechat_fuse", *arguments]
    if words[:2] == ["accelerate", "launch"] or words[:1] == ["torchrun"]:
        return [*words, "-m", "fusechat_fuse", *arguments]
    here = shlex.join(["cd", os.getcwd()]) + " && " + shlex.join([sys.executable, "-m", "fusechat_fuse", *arguments])
    return [*words, here] if words[:1] == ["ssh"] else [*words, sys.executable, "-m", "fusechat_fuse", *arguments]


def ranks_of(command: list[str]) -> tuple[int, bool]:
    """How many processes a launcher starts (1 if it does not say), and whether they share the training state."""
    words = [part for word in command for part in word.split("=", 1)]
    after = {word.lstrip("-").replace("-", "_"): value for word, value in pairwise(words) if word.startswith("-")}
    config = read_yaml(after["config_file"], "launcher's --config_file") if "config_file" in after else {}

    def number(*names: str) -> int:
        texts = [str(after[name]) for name in names if name in after]
        return next((int(text) for text in texts if text.isdigit()), 0)

    ranks = number("nproc_per_node") * max(number("nnodes"), 1) or number("num_processes", "ntasks", "n")
    sharded = config.get("distributed_type") in ("FSDP", "DEEPSPEED") or "use_fsdp" in after or "use_deepspeed" in after
    configured = config.get("num_processes")
    return ranks or (configured if isinstance(configured, int) and configured > 0 else 1), sharded


def absolute(model: str) -> str:
    """The absolute path of a directory (mergekit takes a relative one for a Hub name); a Hub name as it is."""
    return str(Path(model).resolve()) if Path(model).exists() else model
