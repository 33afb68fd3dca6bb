"""The options of `fusechat-fuse train` as dataclass fields: type, default, help text, choices. Imports no torch and no
transformers, so that the command's help and its checks start at once."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from fusechat_fuse.errors import InputError
from fusechat_fuse.flags import Flag, flags_of_fields
from fusechat_fuse.presets import LOSS_KINDS, PRESETS, or_preset
from fusechat_fuse.store.cross_entropy import CE_UNITS
from fusechat_fuse.store.slices import COLUMNS
from fusechat_fuse.training.choice import CHOICES, FALLBACKS, TAILS

DTYPES = ("float32", "bfloat16", "float16")
RARE = "all other arguments of transformers.TrainingArguments"
SECTIONS = {  # of `train --help`; RARE has the rest
    "input and output": [
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
        *("packing", "lean_head", "deepspeed"),
    ],
    "adapters and quantisation": ["lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "load_in_4bit"],
    "checkpoints and logs": [
        *("save_strategy", "save_steps", "save_total_limit", "resume_from_checkpoint", "logging_steps"),
        *("eval_strategy", "eval_steps", "report_to", "push_to_hub", "hub_model_id", "debug"),
    ],
}
HELP = {  # of TrainingArguments' own fields that `--help` shows
    "max_steps": "optimizer steps, in place of num_train_epochs if positive",
    "optim": "optimizer",
    "seed": "random seed",
    "deepspeed": "JSON file with DeepSpeed's configuration",
    "save_steps": "steps between checkpoints, for save_strategy steps; below 1: as a ratio of all steps",
    "resume_from_checkpoint": "checkpoint to continue from; unset: the last whole one of the same run",
    "eval_strategy": "when to evaluate on eval_data_path",
    "eval_steps": "steps between evaluations, for eval_strategy steps; below 1: as a ratio of all steps",
    "report_to": "service that receives the logs, such as wandb or tensorboard",
    "push_to_hub": "upload the finished target to the Hub",
    "hub_model_id": "repository on the Hub; unset: named as the output directory",
    "debug": "show the traceback of an error; with a value: that debugging feature of transformers",
}


def option(default: Any, help: str, choices: Iterable[str] = ()) -> Any:
    """A dataclass field, as transformers' HfArgumentParser reads it."""
    return field(default=default, metadata={"help": help, **({"choices": list(choices)} if choices else {})})


@dataclass
class TrainArguments:
    """What `fusechat-fuse train` takes beside FusionConfig."""

    model_name_or_path: str = field(metadata={"help": "The pivot: a directory or a Hub name."})
    data_path: str = field(metadata={"help": "Aligned or combined data: a directory that align or combine wrote."})
    eval_data_path: str | None = option(None, "Aligned data to evaluate on.")
    dtype: str = option(
        "float32",
        "Precision of the trained weights; bfloat16 would round steps of 5e-6 away, and autocast computes in it "
        "anyway.",
        DTYPES,
    )
    save_dtype: str | None = option(
        None, "Precision of the saved target; unset: as trained, which keeps small task vectors exact.", DTYPES
    )
    attn_implementation: str | None = option(
        None, "Attention implementation: eager, sdpa, flash_attention_2 or another."
    )
    trust_remote_code: bool = option(False, "Run code that comes with the model.")
    lora_r: int = option(0, "Rank of LoRA adapters (needs peft); 0: train all weights.")
    lora_alpha: int = option(16, "Scale of the adapters: alpha / r.")
    lora_dropout: float = option(0.0, "Dropout before the adapters.")
    lora_target_modules: str = option(
        "all-linear", "Modules that get adapters: all-linear, or names separated by commas."
    )
    load_in_4bit: bool = option(False, "QLoRA: quantise the pivot's frozen weights to 4 bits (bitsandbytes).")
    overwrite: bool = option(False, "Start anew in a directory that holds another training run.")

    def check(self) -> None:
        """Raise InputError for a value, or a combination of values, that no run can use."""
        for name, allowed in (("dtype", DTYPES), ("save_dtype", (None, *DTYPES))):
            if (value := getattr(self, name)) not in allowed:
                raise InputError(f"value for {name}: expected one of {', '.join(DTYPES)}, got {value!r}. Use one.")
        if self.dtype == "float16" and not self.lora_r:
            raise InputError(
                "value for dtype: expected float32 or bfloat16 to train all weights, got float16, in which AdamW's "
                "steps go wrong. Train in float32 with --fp16 for float16 arithmetic."
            )
        if self.load_in_4bit and not self.lora_r:
            raise InputError("value for load_in_4bit: expected LoRA adapters to train, got none. Set lora_r too.")
        if self.lora_r < 0:
            raise InputError(f"value for lora_r: expected 0 or more, got {self.lora_r}. Use 0 to train all weights.")


@dataclass
class FusionOptions:
    """The fields of FusionConfig that transformers' TrainingArguments lacks, or has with another default."""

    output_dir: str | None = option(None, "Directory for the target: new, or an interrupted run's, which is continued.")
    preset: str = option(
        "fusechat",
        "Default values of the options whose help names a preset: fusechat (ours) or paper (FuseChat's).",
        PRESETS,
    )
    lm_loss_weight: float = option(
        None, "Weight lambda of the language-model loss; 1.0 is plain fine-tuning (preset: 0.5, paper 0.9)."
    )
    fusion_loss_type: str = option(
        "ce", "Fusion loss: ce (cross-entropy) or kl (Kullback-Leibler divergence).", LOSS_KINDS
    )
    fusion_function: str = option(
        None,
        "Distribution to train on: avg_ce_slice (in each slice whose median cross-entropy is lower for the source, a "
        "mixture of source and pivot), min_ce_slice (in these slices the source's alone), min_ce (of each "
        "conversation, that of the lower cross-entropy), avg_ce (of each conversation, a mixture with weights "
        "exp(-CE)), min_ce_token (min_ce token by token), source (always the source's) (preset: avg_ce_slice, paper "
        "min_ce).",
        CHOICES,
    )
    fusion_fallback: str = option(
        None,
        "Distribution where the source's is not chosen: label (all weight on the label, as in plain fine-tuning) or "
        "pivot (the pivot's own distribution) (preset: label, paper pivot).",
        FALLBACKS,
    )
    fusion_tail: str = option(
        None,
        "What replaces the tail of a distribution, the entries that top-k did not keep: label (the label, where it is "
        "one of them) or drop (nothing) (preset: label, paper drop).",
        TAILS,
    )
    label_noise: float = option(
        0.05,
        "Share e of labels that may be wrong, for fusion_tail label: the label gets weight t / (t + e), where t is "
        "the mass of the tail; 0 is unbiased where the source itself wrote the labels.",
    )
    slice_column: str = option(
        "slice",
        "Slices of avg_ce_slice and min_ce_slice: slice (named in the data, else as auto), auto (clusters of the "
        "prompts) or none (the data set as a whole).",
        COLUMNS,
    )
    slice_pattern: str | None = option(
        None, "Regular expression on the ids that names the slices, in place of slice_column."
    )
    fuse_temperature: float = option(1.0, "Temperature of the fusion distribution; changes its shape, not its mass.")
    ce_unit: str = option(
        None,
        "Unit of the cross-entropies that are compared: byte (comparable between tokenizers) or token (preset: byte, "
        "paper token).",
        CE_UNITS,
    )
    max_length: int = option(2048, "Tokens kept of each conversation; later ones are cut off.")
    packing: bool = option(
        False, "Put the conversations of a batch into one row without padding (best with FlashAttention)."
    )
    lean_head: bool = option(
        True, "Compute lm_head and the loss in chunks and at labelled positions only, where the model allows it."
    )
    total_batch_size: int = option(
        128, "Conversations per optimizer step over all devices; sets gradient_accumulation_steps unless that is given."
    )
    gradient_accumulation_steps: int | None = option(
        None, "Batches per optimizer step on each device; unset: derived from total_batch_size."
    )
    num_train_epochs: float = option(3.0, "Total number of training epochs.")
    learning_rate: float | None = option(None, "Peak learning rate; unset: 5e-6, or 2e-4 for LoRA adapters.")
    lr_scheduler_type: str = option("cosine", "Learning-rate schedule.")
    warmup_steps: float = option(0.03, "Steps of linear warm-up; below 1: as a ratio of all steps.")
    weight_decay: float = option(0.0, "Weight decay of AdamW.")
    per_device_train_batch_size: int = option(4, "Conversations per device and batch in training.")
    per_device_eval_batch_size: int = option(4, "Conversations per device and batch in evaluation.")
    bf16: bool | None = option(None, "bfloat16 autocast; unset: where the GPU supports it. Weights stay float32.")
    activation_checkpointing: bool | None = option(
        None, "Recompute activations in the backward pass: less memory, about 20 % slower."
    )
    logging_steps: float = option(10, "Optimizer steps between two log entries.")
    logging_nan_inf_filter: bool = option(False, "Leave losses that are not finite out of the logs.")
    save_strategy: str = option("epoch", "When to save a checkpoint: no, steps, epoch, best.")
    save_total_limit: int | None = option(2, "Number of checkpoints kept.")
    hub_strategy: str = option("end", "When --push_to_hub uploads: end (the finished target).")
    remove_unused_columns: bool = option(False, "Must stay False: the loss needs all columns.")
    length_column_name: str = option("num_tokens", "Column with the lengths for group_by_length.")


def take_preset(options: Any) -> None:
    """Give each option of FusionConfig or FusionCollator that is None its preset's value."""
    given = {name: getattr(options, name) for name in PRESETS["fusechat"] if hasattr(options, name)}
    vars(options).update(or_preset(options.preset, **given))


def check_choices(options: Any) -> None:
    """Raise InputError where a value, of FusionConfig or FusionCollator, is none of its choices in FusionOptions."""
    for one in fields(FusionOptions):
        value, allowed = getattr(options, one.name, None), one.metadata.get("choices")
        if allowed and hasattr(options, one.name) and value not in allowed:
            raise InputError(f"value for {one.name}: expected one of {', '.join(allowed)}, got {value!r}. Use one.")


def train_flags(of_transformers: list[Flag]) -> dict[str, list[Flag]]:
    """The flags of `fusechat-fuse train` by section: TrainingArguments' own, and FusionOptions', which replace them but
    inherit their choices."""
    found = {flag.name: replace(flag, help=HELP.get(flag.name, flag.help)) for flag in of_transformers}
    for flag in (*flags_of_fields(TrainArguments), *flags_of_fields(FusionOptions)):
        inherited = found[flag.name].choices if flag.name in found else ()
        found[flag.name] = replace(flag, choices=flag.choices or inherited)
    found["output_dir"] = replace(found["output_dir"], required=True)
    found["debug"] = replace(found["debug"], several="*")
    sections = {title: [found.pop(name) for name in names] for title, names in SECTIONS.items()}
    return {**sections, RARE: list(found.values())}
