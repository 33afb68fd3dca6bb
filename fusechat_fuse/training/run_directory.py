"""A training output directory and the one run it belongs to."""

import hashlib
import json
import logging
import re
import shutil
from pathlib import Path

from fusechat_fuse.errors import InputError
from fusechat_fuse.store.files import write_atomic

logger = logging.getLogger(__name__)
RUN_FILE = "fusion_run.json"
# what decides the numbers of a run, and so may not change between its parts
DECISIVE = (
    "lm_loss_weight",
    "fusion_loss_type",
    "fusion_function",
    "fuse_temperature",
    "ce_unit",
    "max_length",
    "packing",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "optim",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
    "neftune_noise_alpha",
    "train_sampling_strategy",
)


class RunDirectory:
    """`fusion_run.json` in the output directory: which run it is, and at the end its metrics.

    Args:
        config, arguments: FusionConfig and TrainArguments of the run.
        pivot: PivotFiles.
        data: the training data (Representation).
    """

    def __init__(self, config, arguments, pivot, data):
        self.config, self.arguments = config, arguments
        self.path = Path(config.output_dir)
        self.file = self.path / RUN_FILE
        shards = json.dumps(data.manifest["shards"], sort_keys=True)
        options = {name: _plain(getattr(config, name)) for name in DECISIVE}
        options["conversations_per_step"] = (
            config.train_batch_size * config.gradient_accumulation_steps * max(config.world_size, 1)
        )
        for name in ("dtype", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"):
            options[name] = getattr(arguments, name)
        self.identity = {
            "model": pivot.fingerprint(),
            "data": hashlib.sha256(shards.encode()).hexdigest()[:16],
            "options": options,
        }

    def claim(self, *, write: bool) -> dict | None:
        """Take the directory for this run.

        Args:
            write: whether this process makes files (one does).
        Returns: the metrics of a finished run, or None.
        Raises: InputError naming the difference where the directory holds something else.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"output for {self.path}: expected a directory, got a file. Choose another path.")
        there = self._read()
        if self.arguments.overwrite and write:
            self._clear()
            there = None
        if there is not None and (difference := self._difference(there["identity"])):
            raise InputError(
                f"output directory for {self.path}: expected this run's data, got another run's ({difference}). "
                "Choose another directory, or --overwrite to start anew."
            )
        if there is None and not self.arguments.overwrite and self.path.exists() and any(self.path.iterdir()):
            first = min(entry.name for entry in self.path.iterdir())
            raise InputError(
                f"output directory for {self.path}: expected an empty one, got other files ({first!r}). "
                "Choose another directory, or --overwrite to write into this one."
            )
        if there is None and write:
            self.path.mkdir(parents=True, exist_ok=True)
            self._write({"identity": self.identity, "finished": False})
        return there["metrics"] if there is not None and there.get("finished") else None

    def checkpoint(self) -> str | None:
        """The checkpoint to continue from: the one asked for, else the last whole one; None: start at the beginning."""
        asked = self.config.resume_from_checkpoint
        if asked and str(asked).lower() not in ("true", "false"):
            if not (Path(asked) / "trainer_state.json").is_file():
                raise InputError(
                    f"checkpoint for {asked}: expected a whole checkpoint, got one without trainer_state.json. "
                    "Leave resume_from_checkpoint out to take the last whole one."
                )
            return str(asked)
        steps = {}
        for folder in self.path.glob("checkpoint-*"):
            if match := re.fullmatch(r"checkpoint-(\d+)", folder.name):
                steps[int(match[1])] = folder
        for step in sorted(steps, reverse=True):
            if _whole(steps[step], step):
                logger.warning("Continuing from %s.", steps[step])
                return str(steps[step])
            logger.warning("%s is not whole (the run was stopped while writing it); it is left out.", steps[step])
        return None

    def finish(self, metrics: dict) -> None:
        """Mark the run as finished; the last file written."""
        self._write({"identity": self.identity, "finished": True, "metrics": metrics})

    def _read(self) -> dict | None:
        try:
            return json.loads(self.file.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise InputError(f"run file for {self.file}: expected JSON, got {error}. Remove the directory.") from error

    def _write(self, content: dict) -> None:
        write_atomic(self.file, (json.dumps(content, indent=2, sort_keys=True, default=str) + "\n").encode())

    def _difference(self, there: dict) -> str | None:
        mine = {"model": self.identity["model"], "data": self.identity["data"], **self.identity["options"]}
        theirs = {"model": there.get("model"), "data": there.get("data"), **there.get("options", {})}
        for name, value in mine.items():
            if theirs.get(name) != value:
                return f"{name} = {theirs.get(name)!r} there and {value!r} here"
        return None

    def _clear(self) -> None:
        """Remove what an earlier run of ours left; other files stay."""
        if self._read() is None:
            return
        for entry in self.path.iterdir():
            if entry.is_dir() and re.fullmatch(r"checkpoint-\d+|adapter", entry.name):
                shutil.rmtree(entry)
            elif entry.suffix == ".safetensors" or entry.name in (RUN_FILE, "model.safetensors.index.json"):
                entry.unlink()


def _plain(value):
    value = getattr(value, "value", value)  # enumerations
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _whole(folder: Path, step: int) -> bool:
    """Whether the Trainer got to the last file of a checkpoint."""
    try:
        return json.loads((folder / "trainer_state.json").read_bytes())["global_step"] == step
    except (OSError, ValueError, KeyError):
        return False
