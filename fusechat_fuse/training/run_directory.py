"""A training output directory and the one run it belongs to."""

import hashlib
import json
import logging
import re
import shutil
from pathlib import Path

from fusechat_fuse.errors import InputError
from fusechat_fuse.store.claim import check_claim, check_is_directory
from fusechat_fuse.store.files import read_json, write_atomic

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
        options["conversations_per_step"] = config.conversations_per_step
        for name in ("dtype", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"):
            options[name] = getattr(arguments, name)
        self.identity = {
            "model": pivot.fingerprint,
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
        there = None
        if self.arguments.overwrite:
            check_is_directory(self.path)
            if write:
                self._clear()
        else:
            check_claim(self.path, _names(self.identity), self._names_there, remedy=", or --overwrite to start anew")
            there = self._read()
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
                logger.info("Continuing from %s.", steps[step])
                return str(steps[step])
            logger.warning("%s is not whole (the run was stopped while writing it); it is left out.", steps[step])
        return None

    def finish(self, metrics: dict) -> None:
        """Mark the run as finished; the last file written."""
        self._write({"identity": self.identity, "finished": True, "metrics": metrics})

    def _read(self) -> dict | None:
        return read_json(self.file, "run file")

    def _names_there(self) -> dict | None:
        there = self._read()
        return None if there is None else _names(there["identity"])

    def _write(self, content: dict) -> None:
        write_atomic(
            self.file, (json.dumps(content, indent=2, sort_keys=True, default=str, allow_nan=False) + "\n").encode()
        )

    def _clear(self) -> None:
        """Remove what an earlier run of ours left; other files stay."""
        if self._read() is None:
            return
        for entry in self.path.iterdir():
            if entry.is_dir() and re.fullmatch(r"checkpoint-\d+|adapter", entry.name):
                shutil.rmtree(entry)
            elif entry.suffix == ".safetensors" or entry.name in (RUN_FILE, "model.safetensors.index.json"):
                entry.unlink()


def _names(identity: dict) -> dict:
    """An identity with its options by the names a user gave them."""
    return {"model": identity.get("model"), "data": identity.get("data"), **identity.get("options", {})}


def _plain(value):
    value = getattr(value, "value", value)  # enumerations
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _whole(folder: Path, step: int) -> bool:
    """Whether the Trainer got to the last file of a checkpoint."""
    try:
        return json.loads((folder / "trainer_state.json").read_bytes())["global_step"] == step
    except (OSError, ValueError, KeyError):
        return False
