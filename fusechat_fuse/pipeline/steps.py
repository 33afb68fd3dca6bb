"""The steps of a recipe: one command per stage and model, with its inputs and its output.

represent (pivot, sources) -> compare -> align (each source) -> combine -> train (plain, targets, multi)
-> merge -> evaluate (the results represent the held-out data) -> report

With `answers: sources` a stage comes first: answer (pivot and sources represent the data, `assign` divides them by
slice, each source answers its part). The other stages then use these answers as the data, and evaluate has the held-out
prompts answered by the same choice, represented by every result. With `score` every result answers them itself.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import sysconfig
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from fusechat_fuse.errors import InputError
from fusechat_fuse.flags import as_flags
from fusechat_fuse.pipeline.recipe import LOADING, READING, Model, Recipe
from fusechat_fuse.store.files import read_yaml

_NO_MODEL = Model("")  # without flags and launchers of its own
_PIVOTS_OWN = ("gguf_file", "server", "server_kind", "server_model", "server_requests")  # no flags of what it becomes
_SHARDING = ("use_fsdp", "use_deepspeed")  # flags of accelerate
STAGES = ("answer", "represent", "compare", "align", "combine", "train", "merge", "evaluate", "report")


@dataclass(frozen=True)
class Step:
    """One command of a stage."""

    stage: str
    name: str
    arguments: list[str]  # of `fusechat-fuse`; of a merge `merge`, mergekit's configuration, the models
    command: list[str]
    output: Path
    environment: dict[str, str] = field(default_factory=dict)
    files: dict[Path, str] = field(default_factory=dict)  # path -> text, written before the step runs
    derived: bool = False  # made from answers that the run itself made

    @property
    def key(self) -> str:
        return f"{self.stage} {self.name}".strip()

    @property
    def shell(self) -> str:
        """The command as it would be typed in a shell."""
        return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in self.environment.items()), shlex.join(self.command)])


def steps_of(recipe: Recipe, plain_of: str | None = None, left_out: Collection[str] = ()) -> list[Step]:
    """All steps but the report, in order.

    Args:
        recipe: a checked recipe.
        plain_of: the source whose aligned data `plain` was trained on before, which are used again while they exist
            (the labels are the same in all sources' data).
        left_out: names of trainings that are not made, with what would be made of them alone (`pipeline.serving`).
    """
    return _Steps(recipe, plain_of, left_out).all()


class _Steps:
    def __init__(self, recipe: Recipe, plain_of: str | None, left_out: Collection[str]):
        self.recipe, self.home, self.data = recipe, recipe.output_dir, recipe.data
        self.derived = recipe.answers == "sources"
        self.targets = [name for name in recipe.sources if f"target-{name}" not in left_out]
        self.several = recipe.multi and len(recipe.sources) > 1 and "multi" not in left_out
        exists = plain_of is not None and (self.home / "aligned" / plain_of).exists()
        self.plain_of = plain_of if plain_of is not None and exists else next(iter(recipe.sources))

    def all(self) -> list[Step]:
        represented = {"pivot": self.recipe.pivot, **self.recipe.sources}
        steps = self._answer(represented) if self.derived else []
        steps += [self._represent(name, model) for name, model in represented.items()]
        folders = [self.home / "representations" / name for name in represented]
        named = slice_flags(self.recipe.flags["train"])
        if self.derived:
            named.pop("slice_pattern", None)
        steps.append(self._compare("compare", "", folders, self.home / "compare", named))
        steps += [self._align(name, model) for name, model in self.recipe.sources.items()]
        if self.several:
            steps.append(self._combine())
        if self.recipe.plain:
            steps.append(self._train("plain", self.plain_of, Model("", {"train": {"lm_loss_weight": 1.0}})))
        steps += [self._train(f"target-{name}", name, self.recipe.sources[name]) for name in self.targets]
        if self.several:
            steps.append(self._train("multi", "multi", _NO_MODEL))
        if len(self.targets) >= min(2, len(self.recipe.sources)):  # fewer are left: a target is no merge
            steps += [self._merge(name, *merge) for name, merge in self.recipe.merges.items()]
        results = [step for step in steps if step.stage in ("train", "merge")]
        if self.recipe.held_out and results:
            steps += self._evaluate(results)
        return steps

    def _step(self, stage: str, name: str, model: Model, output: Path, **own) -> Step:
        return self._launched(stage, name, model, self._arguments(stage, model, output, **own), output)

    def _arguments(self, stage: str, model: Model, output: Path, **own) -> list[str]:
        """A stage's command and flags: the pipeline's own, then the recipe's, overridden by the model's."""
        own |= {"output_dir": output, "preset": None if stage == "represent" else self.recipe.preset}
        flags = {**own, **self.recipe.flags[stage], **model.flags.get(stage, {})}
        if self.derived:  # the rows name the slices that the pattern found, and ids of samples end in #1, #2, ...
            flags.pop("slice_pattern", None)
        return [stage, *as_flags(flags)]

    def _launched(self, stage: str, name: str, model: Model, arguments: list[str], output: Path) -> Step:
        """A step of `fusechat-fuse`, with the launcher of the model or else of the recipe."""
        own = stage == "answer" or arguments[0] in ("compare", "assign", "answer")
        launched_as = arguments[0] if own else stage
        launcher = model.launcher.get(launched_as) or self.recipe.launcher.get(launched_as, "python")
        command = launched(launcher, arguments)
        if arguments[0] == "answer" and (count := ranks_of(command)[0]) > 1:
            raise InputError(f"launcher for answer: expected one process, got {count} ({launcher}). Leave it out.")
        derived = self.derived and stage in ("represent", "align", "train")
        return Step(stage, name, arguments, command, output, derived=derived)

    def _answer(self, represented: dict[str, Model]) -> list[Step]:
        """The steps that replace the data by the answers of the model that is selected for each slice."""
        home, common, steps = self.home / "answers", self.recipe.flags["represent"], []
        for name, model in represented.items():
            output = home / "representations" / name
            words = self._arguments("represent", model, output, **self._represented(name, model))
            steps.append(self._launched("answer", f"represent-{name}", model, words, output))
        own = {"data_path": self.recipe.data, "output_dir": home / "assigned"}
        own |= _only(READING, common) | slice_flags(self.recipe.flags["train"])
        words = ["assign", *(str(step.output) for step in steps), *as_flags(own)]
        steps.append(self._launched("answer", "assign", _NO_MODEL, words, home / "assigned"))
        self.data = _answered(home, self.recipe)
        return steps + [self._ask("answer", name, name, home) for name in self.recipe.sources]

    def _ask(self, stage: str, name: str, source: str, home: Path, left_out: tuple[str, ...] = ()) -> Step:
        """A source answers the conversations that `home/assigned` gives it."""
        model, common = self.recipe.sources[source], self.recipe.flags["represent"]
        own = {"benchmark": "data", "model": model.model, "questions": home / "assigned" / f"{source}.jsonl"}
        own |= {"output": home / source / "answers.jsonl", "pivot_name_or_path": self.recipe.pivot.model}
        own |= _only(("template",), {**common, **self.recipe.pivot.flags.get("represent", {})})
        own |= _only(LOADING, {**common, **model.flags.get("represent", {})})
        flags = {**own, **self.recipe.flags["answer"], **model.flags.get("answer", {})}
        words = ["answer", *as_flags({flag: value for flag, value in flags.items() if flag not in left_out})]
        return self._launched(stage, name, model, words, home / source)

    def _represent(self, name: str, model: Model) -> Step:
        output = self.home / "representations" / name
        flags = {**self.recipe.flags["represent"], **model.flags.get("represent", {})}
        if self.derived:  # the data were read before
            flags = {flag: value for flag, value in flags.items() if flag not in READING}
        words = ["represent", *as_flags({**self._represented(name, model), "output_dir": output, **flags})]
        return self._launched("represent", name, model, words, output)

    def _represented(self, name: str, model: Model) -> dict[str, Any]:
        pivot = None if name == "pivot" else self.recipe.pivot.model
        return {"model_name_or_path": model.model, "data_path": self.data, "pivot_name_or_path": pivot}

    def _compare(self, stage: str, name: str, folders: list[Path], output: Path, flags: dict[str, Any]) -> Step:
        arguments = ["compare", *map(str, folders), *as_flags({"output_dir": output, **flags})]
        return self._launched(stage, name, _NO_MODEL, arguments, output)

    def _align(self, name: str, model: Model) -> Step:
        represented = self.home / "representations"
        own = {"pivot_representation": represented / "pivot", "source_representation": represented / name}
        return self._step("align", name, model, self.home / "aligned" / name, **own)

    def _combine(self) -> Step:
        parts = [self.home / "aligned" / name for name in self.recipe.sources]
        return self._step("combine", "", _NO_MODEL, self.home / "aligned" / "multi", aligned=parts)

    def _train(self, name: str, data: str, model: Model) -> Step:
        own = {"model_name_or_path": self.recipe.pivot.model, "data_path": self.home / "aligned" / data}
        return self._step("train", name, model, self.home / "models" / name, **own)

    def _merge(self, name: str, method: str, parameters: dict[str, Any]) -> Step:
        targets = [self.home / "models" / f"target-{source}" for source in self.targets]
        parameters = dict(parameters)
        top = {key: parameters.pop(key) for key in ("dtype", "out_dtype", "tokenizer_source") if key in parameters}
        config = {"merge_method": method, "models": [{"model": str(target.resolve())} for target in targets]}
        if method == "linear":
            parameters.setdefault("weight", 1.0)
        else:
            pivot = Path(self.recipe.pivot.model)  # mergekit takes a relative directory for a Hub name
            config["base_model"] = str(pivot.resolve()) if pivot.exists() else self.recipe.pivot.model
        config |= {"parameters": parameters, "dtype": "float32", **top}
        file, output = self.home / "merged" / f"{name}.yml", self.home / "merged" / name
        launcher = shlex.split(self.recipe.launcher.get("merge", "python"))
        script = str(Path(sysconfig.get_path("scripts")) / "fusechat-merge")
        return Step(
            stage="merge",
            name=name,
            arguments=["merge", json.dumps(config, sort_keys=True), self.recipe.pivot.model, *map(str, targets)],
            command=[*(launcher if launcher != ["python"] else []), script, "yaml", str(file), str(output)],
            output=output,
            environment={"FUSECHAT_MERGE_REPORT": str(self.home / "merged" / "reports" / name)},
            files={file: json.dumps(config, indent=2) + "\n"},  # JSON is YAML
        )

    def _evaluate(self, results: list[Step]) -> list[Step]:
        """The held-out conversations, represented by the pivot and every result, and the comparison."""
        pivot, home = self.recipe.pivot, self.home / "held_out"
        models = {"pivot": pivot.model}
        models |= {f"merged-{s.name}" if s.stage == "merge" else s.name: str(s.output) for s in results}
        common = {**self.recipe.flags["represent"], **pivot.flags.get("represent", {}), **self.recipe.held_out_flags}
        of = {name: {flag: v for flag, v in common.items() if flag not in _PIVOTS_OWN} for name in models}
        of["pivot"], reading = common, _only(READING, common)
        steps = [self._measure(name, m, self.recipe.held_out, home / name, of[name]) for name, m in models.items()]
        named = slice_flags(self.recipe.flags["train"])
        flags = _only(("slice_column",), named)  # the pattern is of the training data's ids
        flags |= {"baseline": home / ("plain" if self.recipe.plain else "pivot")}
        if self.derived:
            answers, answered = home / "answers", home / "answered"
            own = {"data_path": self.recipe.held_out, "output_dir": answers / "assigned", **reading, **named}
            words = ["assign", str(self.home / "answers" / "assigned"), *as_flags(own)]
            steps.append(self._launched("evaluate", "assign", _NO_MODEL, words, answers / "assigned"))
            once = ("samples",)  # each prompt is answered once
            steps += [self._ask("evaluate", f"answer-{name}", name, answers, once) for name in self.recipe.sources]
            data = _answered(answers, self.recipe)
            for name, model in models.items():
                unread = {flag: value for flag, value in of[name].items() if flag not in READING}
                steps.append(self._measure(f"answered-{name}", model, data, answered / name, unread))
            flags["source_answers"] = [answered / name for name in models]
        if self.recipe.score:
            steps += [self._answer_itself(name, m, home / "scored" / name, of[name]) for name, m in models.items()]
            flags["answers"] = [home / "scored" / name / "answers.jsonl" for name in models]
            flags["score"] = self.recipe.score
        return [*steps, self._compare("evaluate", "compare", [home / name for name in models], home / "compare", flags)]

    def _measure(self, name: str, model: str, data: list[str], output: Path, flags: dict[str, Any]) -> Step:
        """A result represents held-out conversations."""
        own = {"model_name_or_path": model, "data_path": data, "pivot_name_or_path": self.recipe.pivot.model}
        words = ["represent", *as_flags({**own, "output_dir": output, **flags})]
        return self._launched("evaluate", name, _NO_MODEL, words, output)

    def _answer_itself(self, name: str, model: str, output: Path, flags: dict[str, Any]) -> Step:
        """A result answers the held-out prompts, greedily, for their score."""
        own = {"benchmark": "held_out", "model": model, "questions": self.recipe.held_out}
        own |= {"output": output / "answers.jsonl", **_only((*READING, *LOADING), flags)}
        own |= _only(("max_new_tokens", "batch_size"), self.recipe.flags["answer"])
        return self._launched("evaluate", f"scored-{name}", _NO_MODEL, ["answer", *as_flags(own)], output)


def _answered(home: Path, recipe: Recipe) -> list[str]:
    """The files of conversations that pivot (by the data) and sources have answered."""
    return [str(home / "assigned" / "pivot.jsonl"), *(str(home / name / "answers.jsonl") for name in recipe.sources)]


def _only(names: tuple[str, ...], flags: dict[str, Any]) -> dict[str, Any]:
    return {name: flags[name] for name in names if name in flags}


def slice_flags(flags: dict[str, Any]) -> dict[str, Any]:
    """Those of a stage's flags that name the slices."""
    return {name: flags[name] for name in ("slice_column", "slice_pattern") if flags.get(name) is not None}


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
    flags = {word.lstrip("-").replace("-", "_"): value for word, value in pairwise(words) if word.startswith("-")}
    if "config_file" in flags:
        flags = read_yaml(flags["config_file"], "launcher's --config_file") | flags

    def number(*names: str) -> int:
        texts = [str(flags[name]) for name in names if name in flags]
        return next((int(text) for text in texts if text.isdigit()), 0)

    ranks = number("nproc_per_node") * max(number("nnodes"), 1) or number("num_processes", "ntasks", "n")
    sharded = flags.get("distributed_type") in ("FSDP", "DEEPSPEED") or not flags.keys().isdisjoint(_SHARDING)
    return ranks or 1, sharded
