"""`plan`: what each step of a recipe costs and which steps will fail, before any weights are read.

Configurations, tokenizers and data are read as the stages read them (`encodings.py`). Disk space follows from counts
and the file formats, memory and FLOPs from `costs.py`, times from what `run` measured of this recipe or from a GPU's
peak.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fusechat_fuse.errors import InputError, check_integer
from fusechat_fuse.models.files import load_config, load_fast_tokenizer, model_file, with_gguf
from fusechat_fuse.models.loading import check_trainable
from fusechat_fuse.pipeline import costs
from fusechat_fuse.pipeline.encodings import DataReader, Encodings
from fusechat_fuse.pipeline.recipe import READING, RECORD_FILE, Recipe, read_recipe
from fusechat_fuse.pipeline.record import Record
from fusechat_fuse.pipeline.serving import steps_now
from fusechat_fuse.pipeline.steps import Step, ranks_of
from fusechat_fuse.store.files import read_json
from fusechat_fuse.text.batches import plan_batches
from fusechat_fuse.text.templates import native_template

Options = dict[str, Any]
_COUNTS = ("max_length", "per_device_train_batch_size", "total_batch_size")  # of train
_TOKENIZER_MEMORY = 13  # memory of a tokenizer and its vocabulary map, relative to the tokenizer's file


def plan(
    recipe, *, options_of: Callable[[list[str]], Options], gpu: str | None = None, sample: int = 10_000
) -> dict[str, Any]:
    """Tokens, disk space, memory, FLOPs and time of every step of a recipe, and what is wrong with it.

    Args:
        recipe: path of the YAML file, see `pipeline.recipe`.
        options_of: the arguments of a subcommand -> all its options; raises InputError for bad ones.
        gpu: one of `costs.GPUS`; None: main memory of processes without a GPU, and only times that were measured.
        sample: at most this many conversations of each data set are encoded, evenly spaced; counts are exact if it has
            no more.

    Returns:
        steps: one entry per step: `step` and, where known, `conversations`, `predicted_tokens`, `tokens`,
            `padding_share`, `disk_bytes`, `memory_bytes` (per rank; of a GPU if `gpu` is given and the step runs a
            model), `ranks`, `gpus`, `flops`, `seconds`, `measured` (whether `seconds` is); of a step that has run also
            `measured_disk_bytes` and `measured_memory_bytes` (main memory of its largest process). A step that will
            fail has no figures.
        totals: of `disk_bytes`, `flops`, `seconds`, and `gpu_seconds`.
        warnings: sentences, also about steps that will fail. notes: sentences about slices, once `compare` has run.
        failing: the names of steps without figures.
        exact: whether every conversation was encoded.

    Raises: InputError for a bad recipe or an unknown GPU.
    """
    check_integer("sample for plan", sample)
    planner = _Planner(read_recipe(recipe), options_of, gpu, DataReader(sample))
    rows = [planner.row(step) for step in planner.steps]
    planner.add_seconds(rows)
    planner.warn_of_full_disk(rows)
    totals = {key: sum(row.get(key, 0) for row in rows) for key in ("disk_bytes", "flops", "seconds")}
    totals["gpu_seconds"] = sum(row.get("seconds", 0) * row["gpus"] for row in rows)
    warnings = [*planner.data.warnings, *planner.warnings]
    failing = [row["step"] for row in rows if "memory_bytes" not in row]
    exact = planner.data.exact and not failing
    found = {"gpu": gpu, "steps": rows, "totals": totals, "warnings": warnings, "notes": planner.notes}
    return {**found, "failing": failing, "exact": exact}


class _Planner:
    def __init__(self, recipe: Recipe, options_of: Callable[[list[str]], Options], gpu: str | None, data: DataReader):
        self.recipe, self.options_of, self.gpu, self.data = recipe, options_of, gpu, data
        self.peak_flops, self.gpu_memory = (0, 0) if gpu is None else costs.gpu_of(gpu)
        self.device = "cpu" if gpu is None else "gpu"
        self.record = Record(recipe.output_dir / RECORD_FILE)
        self.steps, self.warnings, self.notes = steps_now(recipe, self.record)
        self.sizes: dict[str, costs.ModelSize] = {}
        self.gpus = max([len(recipe.devices), *(ranks_of(step.command)[0] for step in self.steps)])
        self.pivot = recipe.pivot.model

    def row(self, step: Step) -> dict[str, Any]:
        """What one step costs, beside what was measured of it; only a warning if it will fail."""
        row: dict[str, Any] = {"step": step.key, "ranks": ranks_of(step.command)[0], "gpus": 0, "disk_bytes": 0}
        entry = self.record.entries.get(step.key, {})
        if "output" in entry:
            row["measured_disk_bytes"] = sum(file.stat().st_size for file in step.output.rglob("*") if file.is_file())
            if entry.get("peak_bytes"):
                row["measured_memory_bytes"] = entry["peak_bytes"]
        if self.record.is_stale(step) and not self.record.starts_anew(step):
            self.warnings.append(
                f"{step.key} may be refused: its options, inputs or output have changed since it ran; `run --overwrite "
                f"{step.stage}` starts it anew."
            )
        try:
            return row | self._figures(step)
        except (InputError, OSError) as error:
            if not any(warning.endswith(str(error)) for warning in self.warnings):  # an earlier step fails of the same
                self.warnings.append(f"{step.key} will fail: {error}")
            return row

    def _figures(self, step: Step) -> dict[str, Any]:
        options = self._options(step)
        ranks, sharded = ranks_of(step.command)
        row: dict[str, Any] = {}
        if step.arguments[0] == "represent":
            row = self._represent(step, options)
        elif step.arguments[0] == "answer":
            row = self._answer(step, options)
        elif step.stage in ("align", "combine"):
            row = self._aligned(step)
        elif step.stage == "train":
            row = self._train(options, ranks, sharded)
        elif step.stage == "merge":
            row = self._merge(step)
        memory = row.get("memory_bytes", 0)
        if self.gpu is None or "flops" not in row:  # main memory
            process = costs.MEMORY_WITHOUT_TORCH.get(step.arguments[0]) or costs.memory_of_imports()
            return row | {"memory_bytes": memory + process}
        gpus_per_rank = self.gpus if options.get("device_map") else 1
        memory //= gpus_per_rank
        if memory > self.gpu_memory:
            self.warnings.append(
                f"{step.key} needs about {memory / 2**30:.0f} GiB on each GPU, and {self.gpu} has "
                f"{self.gpu_memory >> 30}: use more ranks that share the training state, activation_checkpointing, a "
                "smaller batch, or a device_map."
            )
        return row | {"gpus": ranks * gpus_per_rank, "memory_bytes": memory}

    def _options(self, step: Step) -> Options:
        """All options of a step (none of a merge), with the path of a GGUF file as its model.

        The pivot stands for models that this recipe makes.
        """
        options = {} if step.stage == "merge" else self.options_of(step.arguments)
        for name in _COUNTS if step.stage == "train" else ():
            check_integer(f"value for {name}", options[name])
        if step.arguments[0] == "represent" and (first := self._before_answers(step)):
            options |= self._read_by(first)
        if "model" in options:
            options["model_name_or_path"] = options["model"]
        if "model_name_or_path" in options:
            model = str(with_gguf(options["model_name_or_path"], options.get("gguf_file")))
            made_here = Path(model).is_relative_to(self.recipe.output_dir)
            options["model_name_or_path"] = self.pivot if made_here else model
        return options

    @cached_property
    def assigned(self) -> dict[str, int] | None:
        """How many conversations each model answers; None until they are assigned."""
        found = read_json(self.recipe.output_dir / "answers" / "assigned" / "assignment.json", "assignment")
        return found and found["conversations"]

    def _before_answers(self, step: Step) -> str | None:
        """The step that represents the data's own answers, which stand for those to come."""
        if self.recipe.answers == "sources" and step.stage == "represent":
            return f"answer represent-{step.name}"
        return "evaluate pivot" if step.stage == "evaluate" and step.name.startswith("answered-") else None

    def _read_by(self, key: str) -> Options:
        """How a step reads its data."""
        options = self._options(self._step(key))
        return {name: options[name] for name in ("data_path", *READING)}

    def _step(self, key: str) -> Step:
        return next(step for step in self.steps if step.key == key)

    def _size(self, options: Options) -> costs.ModelSize:
        model, trust = options["model_name_or_path"], options["trust_remote_code"]
        if model not in self.sizes:
            self.sizes[model] = costs.size_of(model, trust_remote_code=trust)
            self._warn_of_architecture(model, trust)
        return self.sizes[model]

    @cached_property
    def pivot_data(self) -> tuple[Encodings, Options]:
        """The training conversations in the pivot's tokens, which aligned data and trainings consist of."""
        step = self._step("represent pivot")
        options = self._options(step)
        return self._encodings(step, options), options

    def _encodings(self, step: Step, options: Options) -> Encodings:
        """The conversations of a represent step; of answers to come, several for each of the data."""
        encoded = self.data.encodings(step.key, options)
        if step.stage != "represent" or self.recipe.answers == "data":
            return encoded
        return replace(encoded, scale=encoded.scale * self.answers_per_conversation)

    @cached_property
    def answers_per_conversation(self) -> float:
        """Conversations that sources answer and the pivot keeps, per conversation of the data; the most there may be
        until they are assigned."""
        samples = {name: self._options(self._step(f"answer {name}"))["samples"] for name in self.recipe.sources}
        if self.assigned is None:
            return max(samples.values())
        return sum(samples.get(name, 1) * n for name, n in self.assigned.items()) / sum(self.assigned.values())

    def _represent(self, step: Step, options: Options) -> dict[str, Any]:
        encoded, size = self._encodings(step, options), self._size(options)
        row = {**encoded.counts, "disk_bytes": self._representation_disk(encoded, options)}
        if options["server"]:  # its model, memory and time are not this machine's
            return row
        batches: list[tuple[int, int]] = []  # padded and predicted tokens, made shard by shard
        for first in range(0, len(encoded.lengths), options["shard_size"]):
            shard = slice(first, first + options["shard_size"])
            lengths, predicted = encoded.lengths[shard], encoded.predicted[shard]
            for batch in plan_batches(lengths, options["tokens_per_batch"]):
                batches.append((len(batch) * int(lengths[batch].max()), int(predicted[batch].sum())))
        unpadded, padded = encoded.lengths.sum(), sum(tokens for tokens, _ in batches)
        return {
            **row,
            "padding_share": 1 - unpadded / padded,
            "memory_bytes": costs.represent_memory(size, options, *max(batches), self.device),
            "flops": size.forward_flops(row["tokens"] / unpadded * padded, row["predicted_tokens"]),
        }

    def _answer(self, step: Step, options: Options) -> dict[str, Any]:
        """As if the answers were as long as the data's own; of all conversations until they are assigned."""
        evaluated, model = step.stage == "evaluate", options["model_name_or_path"]
        name = step.name.partition("-")[2] if evaluated else step.name
        remedy = "Save one with its tokenizer (tokenizer.chat_template)"
        native_template(load_fast_tokenizer(model, options["trust_remote_code"]), name, remedy)
        asks_sources = options["benchmark"] == "data"
        represented = self._step(f"answer represent-{name}" if asks_sources else f"evaluate {name}")
        reading = self._read_by("evaluate pivot") if evaluated else {}
        encoded = self.data.encodings(step.key, self._options(represented) | reading)
        size, assigned = self._size(options), None
        if asks_sources:
            assigned = read_json(step.output.parent / "assigned" / "assignment.json", "assignment")
        count = assigned["conversations"][name] if assigned else encoded.conversations
        share = count * options["samples"] / encoded.conversations
        tokens, predicted = encoded.total(encoded.lengths) * share, encoded.total(encoded.predicted) * share
        row = {"conversations": count, "predicted_tokens": round(predicted), "tokens": round(tokens)}
        row["disk_bytes"] = round(8 * tokens)
        if options["server"]:  # its model, memory and time are not this machine's
            return row
        cached = options["batch_size"] * int(encoded.lengths.max()) * size.layers * 2 * size.hidden * size.stored_bytes
        return {
            **row,
            "memory_bytes": costs.represent_memory(size, options, options["batch_size"], 1, self.device) + cached,
            "flops": size.forward_flops(tokens, predicted),
        }

    def _representation_disk(self, encoded: Encodings, options: Options) -> int:
        rows = costs.store_disk(encoded.conversations, encoded.total(encoded.row_bytes), options)
        return rows + _tokenizer_bytes(options["model_name_or_path"])

    def _aligned(self, step: Step) -> dict[str, Any]:
        encoded, options = self.pivot_data
        predicted, combined = encoded.total(encoded.predicted), step.stage == "combine"
        added = costs.source_disk(encoded.conversations, predicted, options["top_k"], combined)
        row = {**encoded.counts, "disk_bytes": self._representation_disk(encoded, options) + added}
        if not combined:
            tokenizers = (self.pivot, self.recipe.sources[step.name].model)
            row["memory_bytes"] = _TOKENIZER_MEMORY * sum(map(_tokenizer_bytes, tokenizers))
        return row

    def _train(self, options: Options, ranks: int, sharded: bool) -> dict[str, Any]:
        check_trainable(self.pivot)
        encoded, _ = self.pivot_data
        size = self._size(options)
        lengths = np.minimum(encoded.lengths, options["max_length"])
        batch = options["per_device_train_batch_size"]
        order = np.random.default_rng(0).permutation(len(lengths))
        rows = [lengths[order[n : n + batch]] for n in range(0, len(lengths), batch)]
        padded = lengths.sum() if options["packing"] else sum(len(row) * int(row.max()) for row in rows)
        epochs = float(options["num_train_epochs"])
        if options["max_steps"] > 0:
            accumulated = options["gradient_accumulation_steps"]
            per_step = batch * ranks * accumulated if accumulated else options["total_batch_size"]
            epochs = options["max_steps"] * per_step / encoded.conversations
        forward = size.forward_flops(padded * encoded.scale, encoded.total(encoded.predicted))
        largest = batch * (options["max_length"] if options["packing"] else int(lengths.max()))
        return {
            **encoded.counts,
            "padding_share": float(1 - lengths.sum() / padded),
            "epochs": round(epochs, 2),
            "disk_bytes": costs.target_disk(size, options) + _tokenizer_bytes(self.pivot),
            "memory_bytes": costs.train_memory(size, options, largest, self.device, ranks if sharded else 1),
            "flops": forward * epochs * costs.train_factor(options),
        }

    def _merge(self, step: Step) -> dict[str, Any]:
        size = self._size(self.pivot_data[1])
        config = json.loads(step.arguments[1])
        dtype = config.get("out_dtype") or config["dtype"]
        models = len(config["models"]) + 1
        return {
            "disk_bytes": size.parameters * costs.bytes_of(dtype) + _tokenizer_bytes(self.pivot),
            "memory_bytes": size.largest * 4 * (models + 2),
        }

    def _warn_of_architecture(self, model: str, trust: bool) -> None:
        from mergekit.architecture import arch_info_for_config

        config = load_config(model, trust_remote_code=trust)
        known = len(config.architectures or []) == 1 and arch_info_for_config(config)
        if model == self.pivot and self.recipe.merges and not known:
            self.warnings.append(
                f"merge: mergekit does not know {(config.architectures or ['an unnamed architecture'])[0]} and goes by "
                "the tensor names in its files; `fusechat-merge inspect` shows what it would merge."
            )

    def warn_of_full_disk(self, rows: list[dict]) -> None:
        """Warn if the disk has too little space for what is still to be written."""
        needed = sum(row["disk_bytes"] for row in rows if "output" not in self.record.entries.get(row["step"], {}))
        home = self.recipe.output_dir.resolve()
        free = shutil.disk_usage(next(place for place in (home, *home.parents) if place.exists())).free
        if needed > free:
            self.warnings.append(
                f"disk: {needed / 1e9:.1f} GB are still to be written below {self.recipe.output_dir}, and "
                f"{free / 1e9:.1f} GB are free."
            )

    def add_seconds(self, rows: list[dict]) -> None:
        """Add times: measured, or else from the rate of measured steps of the stage, or else from the GPU's peak."""
        rates: dict[str, list[float]] = {}  # seconds per FLOP or token, by stage
        for row in rows:
            measured = self.record.entries.get(row["step"], {}).get("seconds")
            row["measured"] = measured is not None
            if measured is not None:
                row["seconds"] = measured
                if amount := row.get("flops") or row.get("tokens"):
                    rates.setdefault(row["step"].split()[0], []).append(measured / amount)
        for row in rows:
            amount, of_stage = row.get("flops") or row.get("tokens"), rates.get(row["step"].split()[0])
            if row["measured"] or not amount:
                continue
            if of_stage:
                row["seconds"] = amount * float(np.median(of_stage))
            elif self.peak_flops and "flops" in row:
                row["seconds"] = row["flops"] / (self.peak_flops * costs.UTILIZATION * row["gpus"])


def _tokenizer_bytes(model: str) -> int:
    file = model_file(model, "tokenizer.json")
    return file.stat().st_size if file else 0
