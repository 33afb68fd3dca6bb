"""FusionConfig: transformers' TrainingArguments plus what pairwise fusion needs; defaults by a preset."""

import logging
import math
import os
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.utils.import_utils import is_torch_bf16_gpu_available

from fusechat_fuse.errors import InputError
from fusechat_fuse.presets import PRESETS, or_preset
from fusechat_fuse.store.cross_entropy import CE_UNITS
from fusechat_fuse.training.choice import CHOICES, FALLBACKS, TAILS
from fusechat_fuse.training.loss import LOSS_KINDS

logger = logging.getLogger(__name__)
LEARNING_RATE, ADAPTER_LEARNING_RATE = 5e-6, 2e-4  # of all weights (the paper), of low-rank adapters


@dataclass
class FusionConfig(TrainingArguments):
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

    preset: str = field(
        default="fusechat",
        metadata={
            "help": "Where an option below says preset: fusechat (ours) or paper (FuseChat's settings).",
            "choices": list(PRESETS),
        },
    )
    lm_loss_weight: float = field(
        default=None,  # pyright: ignore[reportAssignmentType]
        metadata={
            "help": "lambda, weight of the language-model loss; 1.0 is plain fine-tuning (preset: 0.5, paper 0.9)."
        },
    )
    fusion_loss_type: str = field(default="ce", metadata={"help": "ce or kl.", "choices": list(LOSS_KINDS)})
    fusion_function: str = field(
        default=None,  # pyright: ignore[reportAssignmentType]
        metadata={
            "help": "Which distribution to train on: avg_ce_slice (for each slice of the data, by the median "
            "cross-entropies, source and pivot mixed where the source's is lower), min_ce_slice (there the source's "
            "alone), min_ce (lower cross-entropy per conversation), avg_ce (weights exp(-CE)), min_ce_token (per "
            "token), source (always the source's) (preset: avg_ce_slice, paper min_ce).",
            "choices": list(CHOICES),
        },
    )
    fusion_fallback: str = field(
        default=None,  # pyright: ignore[reportAssignmentType]
        metadata={
            "help": "Where a min_ce choice does not take the source: label (no fusion: the label carries the whole "
            "weight) or pivot (its own distribution) (preset: label, paper pivot).",
            "choices": list(FALLBACKS),
        },
    )
    fusion_tail: str = field(
        default=None,  # pyright: ignore[reportAssignmentType]
        metadata={
            "help": "What stands for the entries of a distribution that were not kept: label (where the label is one "
            "of them) or drop (nothing) (preset: label, paper drop).",
            "choices": list(TAILS),
        },
    )
    label_noise: float = field(
        default=0.05,
        metadata={
            "help": "For fusion_tail label: the share of labels that may be wrong; the label's weight is t / (t + it), "
            "where t is the mass that was not kept. 0: an unbiased estimate, for labels that are the source's own."
        },
    )
    slice_column: str = field(
        default="slice",
        metadata={
            "help": "What names the slices of a choice by slice: slice (the data's own) or auto (prompt clusters)."
        },
    )
    slice_pattern: str | None = field(
        default=None, metadata={"help": "A regular expression on the ids that names the slices instead."}
    )
    fuse_temperature: float = field(
        default=1.0, metadata={"help": "T of the fusion distribution; rescales its shape, keeps its mass."}
    )
    ce_unit: str = field(
        default=None,  # pyright: ignore[reportAssignmentType]
        metadata={
            "help": "Compare cross-entropies per byte of text, which is comparable between tokenizers, or per token "
            "(preset: byte, paper token).",
            "choices": list(CE_UNITS),
        },
    )
    max_length: int = field(default=2048, metadata={"help": "Tokens kept of a conversation."})
    packing: bool = field(
        default=False,
        metadata={"help": "Put the conversations of a batch into one row without padding (FlashAttention: no waste)."},
    )
    lean_head: bool = field(
        default=True,
        metadata={"help": "Compute lm_head and loss for labelled positions only, in chunks, where the model allows."},
    )
    head_chunks: int = field(
        default=8,
        metadata={"help": "Calls of lm_head per batch where it is not a plain Linear (adapters): equal on every rank."},
    )
    total_batch_size: int = field(
        default=128,
        metadata={
            "help": "Conversations per optimizer step over all devices; gives gradient_accumulation_steps where that "
            "is not set."
        },
    )
    gradient_accumulation_steps: int | None = field(
        default=None,
        metadata={"help": "Batches per optimizer step on each device; unset: from total_batch_size."},
    )
    num_train_epochs: float = field(default=3.0, metadata={"help": "Total number of training epochs."})
    learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate; unset: 5e-6, and 2e-4 for LoRA adapters."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Steps of linear warm-up, or below 1 their ratio."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of AdamW."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Conversations per device and batch."})
    per_device_eval_batch_size: int = field(default=4, metadata={"help": "Conversations per device in evaluation."})
    bf16: bool | None = field(
        default=None, metadata={"help": "bfloat16 autocast; unset: where the GPU has it. Weights stay float32."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every so many optimizer steps."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide losses that are not numbers."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint: no, steps, epoch, best."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    hub_strategy: str = field(default="end", metadata={"help": "When --push_to_hub pushes: end, the finished target."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: the loss needs all columns."}
    )
    length_column_name: str = field(default="num_tokens", metadata={"help": "Column for group_by_length."})

    def __post_init__(self):
        names = {"lm_loss_weight": "lm_loss_weight", "ce_unit": "ce_unit"}
        names |= {f"fusion_{name}": name for name in ("function", "fallback", "tail")}
        values = or_preset(self.preset, **{name: getattr(self, field_name) for field_name, name in names.items()})
        for field_name, name in names.items():
            setattr(self, field_name, values[name])
        self.check_fusion_values()
        self._default_learning_rate = self.learning_rate is None
        if self.learning_rate is None:
            self.learning_rate = LEARNING_RATE
        steps, asked = None, self.gradient_accumulation_steps
        if asked is None:
            at_a_time = device_count(use_cpu=self.use_cpu) * self.per_device_train_batch_size
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
        return batch_size * self.gradient_accumulation_steps * max(self.world_size, 1)

    def use_adapter_learning_rate(self) -> None:
        """Take the default of adapters where the user set no learning rate: 5e-6 hardly moves them."""
        if self._default_learning_rate:
            self._default_learning_rate = False
            self.learning_rate = ADAPTER_LEARNING_RATE
            logger.info("learning_rate %g, the default for LoRA adapters.", self.learning_rate)

    def fit_accumulation(self, batch_size: int) -> None:
        """Keep the conversations of a step where batches have another size than was set (auto_find_batch_size, trials).

        Args:
            batch_size: conversations of a batch on each process.
        """
        asked, fitted = self._steps
        if self.gradient_accumulation_steps != fitted:
            asked = self.gradient_accumulation_steps  # set since
        processes = max(self.world_size, 1)
        wanted = self.total_batch_size if asked is None else asked * self.train_batch_size * processes
        fitted = max(round(wanted / (batch_size * processes)), 1)
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
        for name, allowed in (
            ("fusion_loss_type", LOSS_KINDS),
            ("fusion_function", CHOICES),
            ("ce_unit", CE_UNITS),
            ("fusion_fallback", FALLBACKS),
            ("fusion_tail", TAILS),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"value for {name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}. Use one."
                )
        accumulated = self.gradient_accumulation_steps
        for name, good, expected in (
            ("lm_loss_weight", 0 <= self.lm_loss_weight <= 1, "0 to 1"),
            ("label_noise", 0 <= self.label_noise < 1, "0 to 1"),
            ("fuse_temperature", 0 < self.fuse_temperature < math.inf, "more than 0"),
            ("learning_rate", 0 <= (self.learning_rate or 0) < math.inf, "a number from 0"),
            ("max_length", self.max_length >= 2, "at least 2"),
            ("head_chunks", self.head_chunks >= 1, "at least 1"),
            ("total_batch_size", self.total_batch_size >= 1, "at least 1"),
            ("per_device_train_batch_size", self.per_device_train_batch_size >= 1, "at least 1"),
            ("per_device_eval_batch_size", self.per_device_eval_batch_size >= 1, "at least 1"),
            ("gradient_accumulation_steps", (accumulated is None or accumulated >= 1), "at least 1"),
            ("remove_unused_columns", not self.remove_unused_columns, "False (the loss needs all columns)"),
            ("label_smoothing_factor", not self.label_smoothing_factor, "0 (the fusion distribution is the smoothing)"),
        ):
            if not good:
                raise InputError(f"value for {name}: expected {expected}, got {getattr(self, name)}. Change it.")


def device_count(*, use_cpu: bool) -> int:
    """Devices that a run takes, told before any is set up: the launch's processes, or all GPUs of this one process."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 or use_cpu or "LOCAL_RANK" in os.environ:
        return processes
    return max(torch.cuda.device_count(), 1)
