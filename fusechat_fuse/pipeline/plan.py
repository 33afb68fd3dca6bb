"""`plan`: what a recipe costs and what of it will fail, before any weights are read.

Configurations, tokenizers and the data are read as the stages read them (`encodings.py`); sizes on disk follow from
the counts by the format, memory and arithmetic by `costs.py`, times by what `run` measured of this recipe's steps or by
a GPU's peak.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fusechat_fuse.errors import InputError
from fusechat_fuse.models.files import load_config, model_file, with_gguf
from fusechat_fuse.models.loading import check_trainable
from fusechat_fuse.pipeline import costs
from fusechat_fuse.pipeline.encodings import DataReader, Encodings
from fusechat_fuse.pipeline.recipe import Recipe, read_recipe
from fusechat_fuse.pipeline.run import RECORD
from fusechat_fuse.pipeline.steps import Step, ranks_of, steps_of
from fusechat_fuse.store.files import read_json
from fusechat_fuse.text.batches import plan_batches

Options = dict[str, Any]
_SHARD, _ROW, _SOURCE_ROW = 3000, 80, 70  # bytes of a shard's headers, of a row's id, hash and offsets, of a source's
_COMPACT = 0.57  # of plain's bytes, measured on chat data
_STORE, _TARGET = 8000, 12000  # of a store's other files, of a target's beside weights and tokenizer
_KEPT = 0.7  # of top_k entries, those of an aligned position that an alignment keeps
_COUNTS = ("top_k", "max_length", "shard_size", "tokens_per_batch", "per_device_train_batch_size", "total_batch_size")
_OF_TOKENIZER = 13  # times its file, in memory with the vocabulary map that is made of it


def plan(
    recipe, *, options_of: Callable[[list[str]], Options], gpu: str | None = None, sample: int = 10_000
) -> dict[str, Any]:
    """Tokens, disk, memory, arithmetic and time of every step of a recipe, and what is wrong with it.

    Args:
        recipe: path of the YAML file, see `pipeline.recipe`.
        options_of: a subcommand's arguments -> all its options; raises InputError for bad ones.
        gpu: one of `costs.GPUS`; None: main memory of processes without a GPU, and times only as measured.
        sample: conversations encoded of each data set, at even distances; tokens are exact where it has no more.

    Returns: `steps`: of each step its `step` and where known `conversations`, `predicted_tokens`, `tokens`,
        `padding_share`, `disk_bytes`, `memory_bytes` (of one rank; of a GPU where `gpu` is given and a model runs),
        `ranks`, `gpus`, `flops`, `seconds`, `measured` (whether the time is), and of what has run
        `measured_disk_bytes`, `measured_memory_bytes` (main memory of its largest process); `totals`; `warnings`,
        sentences, also on steps that will fail, which have no figures; `exact`, whether every conversation was encoded.

    Raises: InputError for a bad recipe, an unknown GPU.
    """
    if not isinstance(sample, int) or sample < 1:
        raise InputError(f"sample for plan: expected an integer from 1, got {sample!r}.")
    planner = _Planner(read_recipe(recipe), options_of, gpu, DataReader(sample))
    rows = [planner.row(step) for step in planner.steps]
    planner.add_seconds(rows)
    planner.warn_of_room(rows)
    totals = {key: sum(row.get(key, 0) for row in rows) for key in ("disk_bytes", "flops", "seconds")}
    totals["gpu_seconds"] = sum(row.get("seconds", 0) * row["gpus"] for row in rows)
    warnings = [*planner.data.warnings, *planner.warnings]
    return {"gpu": gpu, "steps": rows, "totals": totals, "warnings": warnings, "exact": planner.data.exact}


class _Planner:
    def __init__(self, recipe: Recipe, options_of: Callable[[list[str]], Options], gpu: str | None, data: DataReader):
        self.recipe, self.options_of, self.gpu, self.data = recipe, options_of, gpu, data
        self.peak, self.room = (None, None) if gpu is None else costs.gpu_of(gpu)
        self.record = read_json(recipe.output_dir / RECORD, "record of the run") or {}
        self.steps = steps_of(recipe)
        self.warnings: list[str] = []
        self.sizes: dict[str, costs.ModelSize] = {}
        self.gpus = max([len(recipe.devices), *(ranks_of(step.command)[0] for step in self.steps)])
        self.pivot = recipe.pivot.model

    def row(self, step: Step) -> dict[str, Any]:
        """What one step costs; nothing but a warning where it will fail."""
        row: dict[str, Any] = {"step": step.key, "ranks": ranks_of(step.command)[0], "gpus": 0, "disk_bytes": 0}
        row |= self._measured(step)
        try:
            return row | self._figures(step)
        except InputError as error:
            if not any(warning.endswith(str(error)) for warning in self.warnings):  # what a step before stumbles over
                self.warnings.append(f"{step.key} will fail: {error}")
            return row

    def _measured(self, step: Step) -> dict[str, int]:
        """What a step that has run took, beside which its plan can be looked at."""
        entry = self.record.get(step.key, {})
        if "output" not in entry:
            return {}
        disk = sum(file.stat().st_size for file in step.output.rglob("*") if file.is_file())
        memory = {"measured_memory_bytes": entry["peak_bytes"]} if entry.get("peak_bytes") else {}
        return {"measured_disk_bytes": disk, **memory}

    def _figures(self, step: Step) -> dict[str, Any]:
        options = {} if step.stage == "merge" else self._options(step)
        ranks, sharded = ranks_of(step.command)
        spread = self.gpus if options.get("device_map") else 1  # GPUs under one rank
        device = "cpu" if self.gpu is None else "gpu"
        row: dict[str, Any] = {}
        if step.arguments[0] == "represent":
            row |= self._represent(step, options, device)
        elif step.stage in ("align", "combine"):
            row |= self._aligned(step)
        elif step.stage == "train":
            row |= self._train(options, device, ranks, sharded)
        elif step.stage == "merge":
            row |= self._merge(step)
        memory = row.get("memory_bytes", 0)
        if self.gpu is None or "flops" not in row:  # main memory
            row["memory_bytes"] = memory + (costs.BASE.get(step.arguments[0]) or costs.base_of_models())
            return row
        memory //= spread
        row |= {"gpus": ranks * spread, "memory_bytes": memory}
        if self.room and memory > self.room:
            self.warnings.append(
                f"{step.key} needs about {memory / 2**30:.0f} GiB on each GPU, and {self.gpu} has "
                f"{self.room >> 30}: give more ranks that share the state, activation_checkpointing, a smaller "
                "batch, or a device_map."
            )
        return row

    def _size(self, options: Options) -> costs.ModelSize:
        model, trust = self._known(options), options["trust_remote_code"]
        if model not in self.sizes:
            self.sizes[model] = costs.size_of(model, trust_remote_code=trust)
            self._warn_of_architecture(model, trust)
        return self.sizes[model]

    @cached_property
    def of_pivot(self) -> tuple[Encodings, Options]:
        """The training conversations as the pivot sees them, which what is aligned and trained on is made of."""
        step = next(step for step in self.steps if step.key == "represent pivot")
        options = self._options(step)
        return self._encodings(step, options), options

    def _options(self, step: Step) -> Options:
        options = self.options_of(step.arguments)
        for name in _COUNTS:
            if options.get(name, 1) < 1:
                raise InputError(f"value for {name}: expected an integer from 1, got {options[name]}.")
        return options

    def _represent(self, step: Step, options: Options, device: str) -> dict[str, Any]:
        encoded, size = self._encodings(step, options), self._size(options)
        batches = self._batches(encoded.lengths, options)
        padded = sum(len(batch) * int(encoded.lengths[batch].max()) for batch in batches)
        largest = max(batches, key=lambda batch: len(batch) * encoded.lengths[batch].max())
        of_largest = len(largest) * int(encoded.lengths[largest].max()), int(encoded.predicted[largest].sum())
        predicted, tokens = encoded.total(encoded.predicted), encoded.total(encoded.lengths)
        stored = {**self._tokens(encoded), "disk_bytes": self._stored_bytes(encoded, options)}
        if options["server"]:  # the model, its memory and its time are the server's
            return stored
        return {
            **stored,
            "padding_share": 1 - encoded.lengths.sum() / padded,
            "memory_bytes": costs.represent_memory(size, options, *of_largest, device),
            "flops": size.forward_flops(tokens / encoded.lengths.sum() * padded, predicted),
        }

    @staticmethod
    def _batches(lengths: np.ndarray, options: Options) -> list[np.ndarray]:
        """Batches as they are made, shard by shard."""
        found = []
        for first in range(0, len(lengths), options["shard_size"]):
            part = lengths[first : first + options["shard_size"]]
            found += [batch + first for batch in plan_batches(part, options["tokens_per_batch"])]
        return found

    def _stored_bytes(self, encoded: Encodings, options: Options) -> int:
        shards = -(-encoded.conversations // options["shard_size"])
        rows = encoded.total(encoded.row_bytes) * (_COMPACT if options["encoding"] == "compact" else 1)
        tokenizer = self._tokenizer_bytes(self._known(options))
        return round(rows) + encoded.conversations * _ROW + shards * _SHARD + _STORE + tokenizer

    def _aligned(self, step: Step) -> dict[str, Any]:
        encoded, options = self.of_pivot
        a_token = _KEPT * options["top_k"] * 5 + 9 + (3 if step.stage == "combine" else 0)
        more = encoded.total(encoded.predicted) * a_token + encoded.conversations * _SOURCE_ROW
        row = {**self._tokens(encoded), "disk_bytes": self._stored_bytes(encoded, options) + round(more)}
        if step.stage == "align":
            tokenizers = (self.pivot, self.recipe.sources[step.name].model)
            row["memory_bytes"] = _OF_TOKENIZER * sum(self._tokenizer_bytes(model) for model in tokenizers)
        return row

    def _train(self, options: Options, device: str, ranks: int, sharded: bool) -> dict[str, Any]:
        check_trainable(self.pivot)
        encoded, _ = self.of_pivot
        size = self._size(options)
        lengths = np.minimum(encoded.lengths, options["max_length"])
        batch = options["per_device_train_batch_size"]
        order = np.random.default_rng(0).permutation(len(lengths))
        rows = [lengths[order[n : n + batch]] for n in range(0, len(lengths), batch)]
        padded = lengths.sum() if options["packing"] else sum(len(row) * int(row.max()) for row in rows)
        conversations = encoded.conversations
        epochs = float(options["num_train_epochs"])
        if options["max_steps"] > 0:
            accumulated = options["gradient_accumulation_steps"]
            of_step = batch * ranks * accumulated if accumulated else options["total_batch_size"]
            epochs = options["max_steps"] * of_step / conversations
        forward = size.forward_flops(padded * encoded.scale, encoded.total(encoded.predicted))
        largest = batch * (options["max_length"] if options["packing"] else int(lengths.max()))
        return {
            **self._tokens(encoded),
            "padding_share": float(1 - lengths.sum() / padded),
            "epochs": round(epochs, 2),
            "disk_bytes": self._trained_bytes(size, options),
            "memory_bytes": costs.train_memory(size, options, largest, device, ranks if sharded else 1),
            "flops": forward * epochs * costs.train_factor(options),
        }

    def _trained_bytes(self, size: costs.ModelSize, options: Options) -> int:
        """The target, and the checkpoints that stay beside it: weights and Adam's two moments."""
        saved = size.parameters * costs.bytes_of(options["save_dtype"] or options["dtype"])
        kept = options["save_total_limit"] or int(options["num_train_epochs"])
        kept = 0 if options["save_strategy"] == "no" or options["lora_r"] else kept  # an adapter is small
        moments = 1 if options["save_only_model"] else 3
        state = size.parameters * moments * costs.bytes_of(options["dtype"])
        return saved + kept * state + _TARGET + self._tokenizer_bytes(self.pivot)

    def _merge(self, step: Step) -> dict[str, Any]:
        size = self._size(self.of_pivot[1])
        config = next(iter(yaml.safe_load(text) for text in step.files.values()))
        written = config.get("out_dtype") or config["dtype"]
        models = len(config["models"]) + 1
        return {
            "disk_bytes": size.parameters * costs.bytes_of(written) + self._tokenizer_bytes(self.pivot),
            "memory_bytes": size.largest * 4 * (models + 2),
        }

    def _tokens(self, encoded: Encodings) -> dict[str, int]:
        return {
            "conversations": encoded.conversations,
            "predicted_tokens": encoded.total(encoded.predicted),
            "tokens": encoded.total(encoded.lengths),
        }

    @staticmethod
    def _tokenizer_bytes(model: str) -> int:
        file = model_file(model, "tokenizer.json")
        return file.stat().st_size if file else 0

    def _encodings(self, step: Step, options: Options) -> Encodings:
        return self.data.encodings(step.key, self._known(options), options)

    def _known(self, options: Options) -> str:
        """The model of a step; the pivot for what this recipe makes of it."""
        model = str(with_gguf(options["model_name_or_path"], options.get("gguf_file")))
        return self.pivot if Path(model).is_relative_to(self.recipe.output_dir) else model

    def _warn_of_architecture(self, model: str, trust: bool) -> None:
        from mergekit.architecture import arch_info_for_config

        config = load_config(model, trust_remote_code=trust)
        known = len(config.architectures or []) == 1 and arch_info_for_config(config)
        if model == self.pivot and self.recipe.merges and not known:
            self.warnings.append(
                f"merge: mergekit does not know {(config.architectures or ['an unnamed architecture'])[0]} and goes by "
                "the names in its files; `fusechat-merge inspect` says what it would make of them."
            )

    def warn_of_room(self, rows: list[dict]) -> None:
        """Warn where the disk has not what is still to be written."""
        left = sum(row["disk_bytes"] for row in rows if "output" not in self.record.get(row["step"], {}))
        place = self.recipe.output_dir.resolve()
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        if left > free:
            self.warnings.append(
                f"disk: {left / 1e9:.1f} GB are still to be written below {self.recipe.output_dir}, and "
                f"{free / 1e9:.1f} are free."
            )

    def add_seconds(self, rows: list[dict]) -> None:
        """Times: as measured, by what like steps took for their FLOPs or tokens, or by the GPU's peak."""
        rates: dict[str, list[float]] = {}
        for row in rows:
            measured = self.record.get(row["step"], {}).get("seconds")
            row["measured"] = measured is not None
            if measured is not None:
                row["seconds"] = measured
                if amount := row.get("flops") or row.get("tokens"):
                    rates.setdefault(row["step"].split()[0], []).append(measured / amount)
        for row in rows:
            amount, like = row.get("flops") or row.get("tokens"), rates.get(row["step"].split()[0])
            if row["measured"] or not amount:
                continue
            if like:
                row["seconds"] = amount * float(np.median(like))
            elif self.peak and "flops" in row:
                row["seconds"] = row["flops"] / (self.peak * costs.UTILIZATION * row["gpus"])
