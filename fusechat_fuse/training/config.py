"""FusionConfig: transformers' TrainingArguments and the options of pairwise fusion, with defaults from a preset."""

import json
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.utils.import_utils import is_torch_bf16_gpu_available

from fusechat_fuse.errors import InputError
from fusechat_fuse.requirements import check_versions
from fusechat_fuse.training.options import FusionOptions, check_choices, take_preset

logger = logging.getLogger(__name__)
LEARNING_RATE, ADAPTER_LEARNING_RATE = 5e-6, 2e-4  # of all weights (the paper), of low-rank adapters


@dataclass
class FusionConfig(FusionOptions, TrainingArguments):
    """Arguments of `FusionTrainer` and of `fusechat-fuse train`.

    L = lm_loss_weight * L_LM + (1 - lm_loss_weight) * L_fusion, means over the labelled tokens of the whole
    (accumulated, data-parallel) batch. Every field of `transformers.TrainingArguments` is there too.

    Defaults that differ from transformers': num_train_epochs 3, learning_rate 5e-6 (2e-4 for LoRA adapters), cosine
    schedule with warmup_steps 0.03 (a ratio), weight_decay 0, bf16 where the GPU has it, 128 conversations per step
    (`total_batch_size`), 4 per device, save_strategy "epoch" with save_total_limit 2, logging_steps 10,
    remove_unused_columns False and logging_nan_inf_filter False (a loss that is not a number stops the run).

    Raises: InputError for a value that fusion cannot use, before anything starts.
    Source: FuseChat (arXiv 2408.07990), training details.
    """

    def __post_init__(self):
        check_versions("training")
        if not hasattr(TrainingArguments, "activation_checkpointing"):  # transformers before 5.23
            self.activation_checkpointing = bool(self.activation_checkpointing or self.gradient_checkpointing)
            self.gradient_checkpointing = self.activation_checkpointing
        take_preset(self)
        self.check_fusion_values()
        self._default_learning_rate = self.learning_rate is None
        if self.learning_rate is None:
            self.learning_rate = LEARNING_RATE
        steps, asked = None, self.gradient_accumulation_steps
        if asked is None:
            devices = 1 if splits_batches(self.accelerator_config) else device_count(use_cpu=self.use_cpu)
            at_a_time = devices * self.per_device_train_batch_size
            steps = max(round(self.total_batch_size / at_a_time), 1)
            self.gradient_accumulation_steps = steps  # pyright: ignore[reportIncompatibleVariableOverride]
        self._steps = asked, self.gradient_accumulation_steps  # what was set, and what is accumulated for it
        if self.bf16 is None:
            asked_for = os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no"
            wanted = not (self.fp16 or self.use_cpu or asked_for)
            self.bf16 = wanted and is_torch_bf16_gpu_available()  # pyright: ignore[reportIncompatibleVariableOverride]
        if self.use_liger_kernel:  # its fused loss would replace the forward that carries the fusion columns
            own = {"fused_linear_cross_entropy": False, "cross_entropy": False}
            self.liger_kernel_config = {**(self.liger_kernel_config or {}), **own}
        super().__post_init__()
        if steps is not None and self.conversations_per_step != self.total_batch_size:
            logger.warning(
                "%d conversations per step instead of total_batch_size %d: %d at a time x %d accumulated.",
                self.conversations_per_step,
                self.total_batch_size,
                self.conversations_per_step // steps,
                steps,
            )

    @property
    def conversations_per_step(self) -> int:
        """Conversations of one optimizer step, over all devices and accumulated batches."""
        assert self.gradient_accumulation_steps is not None  # set by __post_init__
        batch_size = getattr(self, "_batch_size", None) or self.train_batch_size
        return batch_size * self.gradient_accumulation_steps * self._batches_at_a_time

    @property
    def _batches_at_a_time(self) -> int:
        """Batches that all processes compute together: one each, or one in all where accelerate splits it."""
        return 1 if splits_batches(self.accelerator_config) else max(self.world_size, 1)

    def use_adapter_learning_rate(self) -> None:
        """Take the default of adapters where the user set no learning rate: 5e-6 hardly moves them."""
        if self._default_learning_rate:
            self._default_learning_rate = False
            self.learning_rate = ADAPTER_LEARNING_RATE
            logger.info("learning_rate %g, the default for LoRA adapters.", self.learning_rate)

    def fit_accumulation(self, batch_size: int) -> None:
        """Keep the conversations of a step where batches have another size than set (auto_find_batch_size, trials)."""
        asked, fitted = self._steps
        if self.gradient_accumulation_steps != fitted:
            asked = self.gradient_accumulation_steps  # set since
        batches = self._batches_at_a_time
        wanted = self.total_batch_size if asked is None else asked * self.train_batch_size * batches
        fitted = max(round(wanted / (batch_size * batches)), 1)
        self.gradient_accumulation_steps = fitted  # pyright: ignore[reportIncompatibleVariableOverride]
        self._steps, self._batch_size = (asked, fitted), batch_size
        if batch_size != self.train_batch_size:
            logger.warning(
                "Batches of %d instead of %d conversations fit: %d accumulated, %d conversations per step (%d set).",
                batch_size,
                self.train_batch_size,
                fitted,
                self.conversations_per_step,
                wanted,
            )

    def check_fusion_values(self) -> None:
        """Raise InputError for a value that fusion cannot use; called again at training's start, after late changes."""
        check_choices(self)
        accumulated = self.gradient_accumulation_steps
        for name, good, expected in (
            ("lm_loss_weight", 0 <= self.lm_loss_weight <= 1, "0 to 1"),
            ("label_noise", 0 <= self.label_noise < 1, "0 to 1"),
            ("fuse_temperature", 0 < self.fuse_temperature < math.inf, "more than 0"),
            ("learning_rate", 0 <= (self.learning_rate or 0) < math.inf, "a number from 0"),
            ("max_length", self.max_length >= 2, "at least 2"),
            ("total_batch_size", self.total_batch_size >= 1, "at least 1"),
            ("per_device_train_batch_size", self.per_device_train_batch_size >= 1, "at least 1"),
            ("per_device_eval_batch_size", self.per_device_eval_batch_size >= 1, "at least 1"),
            ("gradient_accumulation_steps", (accumulated is None or accumulated >= 1), "at least 1"),
            ("remove_unused_columns", not self.remove_unused_columns, "False (the loss needs all columns)"),
            ("label_smoothing_factor", not self.label_smoothing_factor, "0 (the fusion distribution is the smoothing)"),
        ):
            if not good:
                raise InputError(f"value for {name}: expected {expected}, got {getattr(self, name)}. Change it.")


def splits_batches(accelerator_config) -> bool:
    """Whether accelerate splits each batch among the processes; the value in any form that TrainingArguments takes."""
    if isinstance(accelerator_config, str):
        text = accelerator_config
        accelerator_config = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text())
    if isinstance(accelerator_config, dict):
        return bool(accelerator_config.get("split_batches"))
    return bool(getattr(accelerator_config, "split_batches", False))


def device_count(*, use_cpu: bool) -> int:
    """Devices that a run takes, told before any is set up: the launch's processes, or all GPUs of this one process."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 or use_cpu or "LOCAL_RANK" in os.environ:
        return processes
    return max(torch.cuda.device_count(), 1)
