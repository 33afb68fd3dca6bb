"""A training output directory and the one run it belongs to."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path

from fusechat_fuse.errors import InputError
from fusechat_fuse.store.claim import check_claim, check_is_directory, first_difference
from fusechat_fuse.store.files import read_json, write_atomic

logger = logging.getLogger(__name__)
RUN_FILE = "fusion_run.json"
# what decides the numbers of a run, and so may not change between its parts
DECISIVE = """
    lm_loss_weight fusion_loss_type fusion_function fuse_temperature ce_unit fusion_fallback fusion_tail label_noise
    slice_column slice_pattern max_length packing num_train_epochs max_steps learning_rate lr_scheduler_type
    warmup_steps weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm optim seed data_seed bf16 fp16
    neftune_noise_alpha train_sampling_strategy lr_scheduler_kwargs optim_args optim_target_modules
    dataloader_drop_last average_tokens_across_devices accelerator_config ignore_data_skip
""".split()
DECISIVE_ARGUMENTS = "dtype save_dtype lora_r lora_alpha lora_dropout lora_target_modules load_in_4bit".split()
# what decides which checkpoint becomes the target, or what is told of it, where there is evaluation data
DECISIVE_WITH_EVALUATION = """
    load_best_model_at_end metric_for_best_model greater_is_better eval_strategy eval_steps eval_delay
""".split()


class RunDirectory:
    """`fusion_run.json` in the output directory: which run it is, and at the end its metrics."""

    def __init__(self, config, arguments, pivot, data, eval_data=None):
        self.config, self.arguments = config, arguments
        self.path = Path(config.output_dir)
        self.file = self.path / RUN_FILE
        asked = str(config.resume_from_checkpoint or "")  # a checkpoint, or whether one is taken
        self._asked = None if asked.lower() in ("", "true", "false") else asked
        self._inputs = {"pivot": pivot.name, "data": data.path, "evaluation data": getattr(eval_data, "path", None)}
        names = DECISIVE + (DECISIVE_WITH_EVALUATION if eval_data is not None else [])
        options = {name: _plain(getattr(config, name)) for name in names}
        options["conversations_per_step"] = config.conversations_per_step
        options |= {name: getattr(arguments, name) for name in DECISIVE_ARGUMENTS}
        self.identity = {
            "model": pivot.fingerprint,
            "chat_template": _digest(getattr(pivot.tokenizer, "chat_template", None)),  # the target gets it
            "data": _digest(data.manifest["shards"]),  # what they are, not where they are
            "options": options,
        }
        if eval_data is not None:
            self.identity["eval_data"] = _digest(eval_data.manifest["shards"])

    def check(self) -> dict | None:
        """Whether the directory may be this run's; nothing is made or changed.

        Returns: the metrics of this very run, finished, or None.
        Raises: InputError naming the difference where the directory holds something else. A run without a checkpoint
            has nothing to lose: its directory is free.
        """
        check_is_directory(self.path)
        self._check_apart()
        self._check_asked()
        there = self._read()
        if self.arguments.overwrite:
            if there is None:
                check_claim(self.path, {}, lambda: None)
            return None
        if there is not None and not there.get("finished") and not self._checkpoints():
            return None
        check_claim(
            self.path,
            _names(self.identity),
            lambda: (now := self._read()) and _names(now["identity"]),
            remedy=", or --overwrite to start anew",
        )
        if there is None or not there.get("finished"):
            return None
        if not any(self.path.glob("model*.safetensors")):
            raise InputError(
                f"target for {self.path}: expected the weights of a finished run, got none. Give --overwrite to train "
                "it anew."
            )
        return there["metrics"]

    def claim(self) -> None:
        """Take the directory for this run, after `check`; by one process, before any works in it."""
        if self.arguments.overwrite:
            self._clear()
        self.path.mkdir(parents=True, exist_ok=True)
        self._write({"identity": self.identity, "finished": False})

    def _check_apart(self) -> None:
        """What a run reads may not be what it replaces."""
        here = self.path.resolve()
        for what, name in self._inputs.items():
            if name is not None and os.path.exists(name) and Path(name).resolve().is_relative_to(here):
                raise InputError(
                    f"output directory for {self.path}: expected one apart from the {what}, got {name}, which training "
                    "would replace. Choose another directory."
                )

    def _check_asked(self) -> None:
        """A checkpoint that is asked for must be whole, of a run like this one, and not what --overwrite removes."""
        if (asked := self._asked) is None:
            return
        if not (Path(asked) / "trainer_state.json").is_file():
            raise InputError(
                f"checkpoint for {asked}: expected a whole checkpoint, got one without trainer_state.json. "
                "Leave resume_from_checkpoint out to take the last whole one."
            )
        if self.arguments.overwrite and Path(asked).resolve().is_relative_to(self.path.resolve()):
            raise InputError(
                f"checkpoint for {asked}: expected one outside {self.path}, got one that --overwrite would remove. "
                "Leave one of the two out."
            )
        theirs = read_json(Path(asked).parent / RUN_FILE, "run file")
        if theirs and (difference := first_difference(_names(theirs["identity"]), _names(self.identity))):
            raise InputError(
                f"checkpoint for {asked}: expected one of a run like this, got another's ({difference}). "
                "Leave resume_from_checkpoint out, or give the same options."
            )

    def _checkpoints(self) -> dict[int, Path]:
        """Step -> folder, whole or not; the last step first."""
        found = {int(entry.name[11:]): entry for entry in self.path.glob("checkpoint-*") if entry.name[11:].isdecimal()}
        return dict(sorted(found.items(), reverse=True))

    def checkpoint(self) -> str | None:
        """The checkpoint to continue from: the one asked for, else the last whole one; None: start at the beginning."""
        if str(self.config.resume_from_checkpoint).lower() == "false":
            return None
        if self._asked is not None:
            return self._asked
        for step, folder in self._checkpoints().items():
            if _whole(folder, step):
                logger.info("Continuing after step %d, from %s.", step, folder)
                return str(folder)
            logger.warning(
                "%s is not whole (stopped while it was written, or saved without its optimizer); it is left out.",
                folder,
            )
        return None

    def finish(self, metrics: dict) -> None:
        """Mark the run as finished; the last file written."""
        self._write({"identity": self.identity, "finished": True, "metrics": metrics})

    def _read(self) -> dict | None:
        there = read_json(self.file, "run file")
        if there is not None and not (isinstance(there, dict) and isinstance(there.get("identity"), dict)):
            raise InputError(
                f"run file for {self.file}: expected what a run wrote, got something else. Make the directory anew."
            )
        return there

    def _write(self, content: dict) -> None:
        write_atomic(
            self.file, (json.dumps(content, indent=2, sort_keys=True, default=str, allow_nan=False) + "\n").encode()
        )

    def _clear(self) -> None:
        """Remove what an earlier run of ours left; other files stay. It is unfinished from the first moment on."""
        there = self._read()
        if there is None:
            return
        self._write(there | {"finished": False})
        for entry in self.path.iterdir():
            ours = re.fullmatch(r"checkpoint-\d+", entry.name) and (entry / "trainer_state.json").exists()
            ours = ours or (entry.name == "adapter" and (entry / "adapter_config.json").exists())
            if ours and entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif ours or re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", entry.name):
                entry.unlink()


def _names(identity: dict) -> dict:
    """An identity with its options by the names a user gave them."""
    return {name: value for name, value in identity.items() if name != "options"} | identity.get("options", {})


def _digest(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _plain(value):
    value = getattr(value, "value", value)  # enumerations
    if isinstance(value, str | int | float | bool | None):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    return json.dumps(value, sort_keys=True, default=str)


def _whole(folder: Path, step: int) -> bool:
    """Whether the Trainer got to the last file of a checkpoint, and an optimizer is in it (DeepSpeed: global_step*)."""
    if not any(folder.glob("optimizer*")) and not any(folder.glob("global_step*")):
        return False
    try:
        return json.loads((folder / "trainer_state.json").read_bytes())["global_step"] == step
    except (OSError, ValueError, KeyError):
        return False


@contextlib.contextmanager
def leaves_no_empty_directory(path: Path):
    """Around what makes a directory early: where that fails, it and its parents go again if they are new and empty."""
    new = [place for place in (path, *path.parents) if not place.exists()]
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # the first that is not empty, or not there
            for place in new:
                place.rmdir()
        raise
