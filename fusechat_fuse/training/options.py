"""The options of `fusechat-fuse train` as dataclass fields: type, default, help text, choices. Imports no torch and no
transformers, so that the command's help and its checks start at once."""

from dataclasses import dataclass, field

from fusechat_fuse.presets import LOSS_KINDS, PRESETS
from fusechat_fuse.store.cross_entropy import CE_UNITS
from fusechat_fuse.training.choice import CHOICES, FALLBACKS, TAILS

DTYPES = ("float32", "bfloat16", "float16")

# The flags that `train --help` shows, by section; `--help-all` has the rest.
SECTIONS = {
    "what goes in and out": [
        *("model_name_or_path", "data_path", "eval_data_path", "output_dir", "overwrite", "max_length"),
        *("dtype", "save_dtype", "attn_implementation", "trust_remote_code"),
    ],
    "fusion": [
        *("preset", "lm_loss_weight", "fusion_loss_type", "fusion_function", "fusion_fallback", "fusion_tail"),
        *("label_noise", "slice_column", "slice_pattern", "fuse_temperature", "ce_unit"),
    ],
    "training": [
        *("learning_rate", "num_train_epochs", "max_steps", "total_batch_size", "per_device_train_batch_size"),
        *("lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "seed", "bf16", "activation_checkpointing"),
        *("packing", "lean_head", "head_chunks", "deepspeed"),
    ],
    "adapters and quantisation": ["lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "load_in_4bit"],
    "checkpoints and logs": [
        *(
            "save_strategy",
            "save_steps",
            "save_total_limit",
            "resume_from_checkpoint",
            "logging_steps",
            "eval_strategy",
        ),
        *("eval_steps", "report_to", "push_to_hub", "hub_model_id", "debug"),
    ],
}


@dataclass
class TrainArguments:
    """What `fusechat-fuse train` takes beside FusionConfig."""

    model_name_or_path: str = field(metadata={"help": "The pivot: a directory or a Hub name."})
    data_path: str = field(metadata={"help": "Aligned or combined data, a directory that align or combine wrote."})
    eval_data_path: str | None = field(default=None, metadata={"help": "Aligned data to evaluate on."})
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Precision of the trained weights; steps of 5e-6 vanish in bfloat16, which autocast uses anyway.",
            "choices": list(DTYPES),
        },
    )
    save_dtype: str | None = field(
        default=None,
        metadata={"help": "Precision of the saved target; unset: as trained, so that small task vectors survive."},
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    lora_r: int = field(default=0, metadata={"help": "Rank of LoRA adapters (needs peft); 0 trains all weights."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of the adapters: alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    lora_target_modules: str = field(
        default="all-linear", metadata={"help": "Modules with adapters: all-linear or names with commas."}
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "QLoRA: the pivot's weights in 4 bits (bitsandbytes) below the adapters."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Start anew in a directory that holds another run."})


@dataclass
class FusionOptions:
    """The fields of FusionConfig that transformers' TrainingArguments lacks, or has with another default."""

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
