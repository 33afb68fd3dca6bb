"""FusionTrainer: transformers' Trainer with the loss of pairwise fusion, at the price of plain fine-tuning.

What it adds: a collator, one of three ways to the loss sums (lean head, the model's own logits for labelled positions,
full logits), and figures in the logs. What it leaves alone: everything else, so accelerate, PEFT, checkpoints,
callbacks and hyper-parameter search work as they do with Trainer.

Normalisation: sums over labelled tokens divided by their number in the whole step (`num_items_in_batch`, over
accumulated batches and processes), so 8 x 1 and 1 x 8 batches give one loss and one gradient.
"""

import contextlib
import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from fusechat_fuse.errors import InputError, writing
from fusechat_fuse.store.files import write_atomic
from fusechat_fuse.training.choice import BY_SLICE
from fusechat_fuse.training.collator import FusionCollator, first_conversations
from fusechat_fuse.training.config import FusionConfig
from fusechat_fuse.training.dataset import check_length, check_rows, open_dataset, sources_of
from fusechat_fuse.training.head_loss import FusionOutput
from fusechat_fuse.training.lean_head import causal_model, install_lean_head, takes_kept_logits, why_not_lean
from fusechat_fuse.training.loss import IGNORED, row_sums, weighted_loss
from fusechat_fuse.training.meter import FusionMeter
from fusechat_fuse.training.packing import check_packing
from fusechat_fuse.training.slice_choice import lines_of, source_by_slice
from fusechat_fuse.training.step_losses import StepLosses
from fusechat_fuse.training.weights import cast_weights, check_weights

logger = logging.getLogger(__name__)
# Trainer sets these for its own purposes; the target keeps the pivot's
TOKENS_LINE = "new PAD/BOS/EOS tokens"  # says of the model what is not true of the target
PIVOT_CONFIG = ("use_cache", "pad_token_id", "bos_token_id", "eos_token_id")
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")
FUSION_COLUMNS = ("shift_labels", "target_ids", "target_probs")  # which the lean forward takes beside them


class FusionTrainer(Trainer):
    """A `transformers.Trainer` for pairwise fusion.

    L = lambda mean(L_LM) + (1 - lambda) mean(L_fusion) over the labelled tokens of the whole step (`loss.py`).

    Args:
        model: a causal language model of transformers (or a PEFT model around one), or use `model_init`.
        args: FusionConfig.
        data_collator: default: a FusionCollator as `args` says.
        train_dataset, eval_dataset: aligned or combined data: a directory, `load_representation(dir)`,
            `datasets.load_from_disk(dir)`, or a list of rows. eval_dataset may be a dict of these.
        processing_class: the pivot's tokenizer; saved with every checkpoint.
        sources: names of the sources, for the logs; default: as the data's manifest says.
        Everything else as in Trainer.

    Logs, beside Trainer's: lm_loss, fusion_loss (means over labelled tokens), source_share (part of the conversations
    that took the source's distribution; of several sources each on its own), mapped_mass (mean probability mass that
    the alignment could carry over), tokens_per_second (all processes). Evaluation: the same with eval_.

    Raises: InputError for data that is not aligned or does not fit the model.
    """

    args: FusionConfig  # pyright: ignore[reportIncompatibleVariableOverride]: no other kind is taken
    loss_is_scaled_for_ga = True
    save_dtype: torch.dtype | None = None

    def __init__(
        self,
        model=None,
        args=None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        sources=None,
        **kwargs,
    ):
        args = FusionConfig() if args is None else args
        if not isinstance(args, FusionConfig):
            raise InputError(
                f"arguments for FusionTrainer: expected a FusionConfig, got {type(args).__name__}. Build one; "
                "it takes every field of TrainingArguments."
            )
        train_dataset, eval_dataset = open_dataset(train_dataset), open_dataset(eval_dataset)
        check_length(train_dataset, args.max_steps)
        self.sources = list(sources or sources_of(train_dataset if train_dataset is not None else eval_dataset))
        self.meters = {name: FusionMeter(self.sources) for name in ("train", "eval")}
        if kwargs.get("compute_loss_func") is not None:
            raise InputError(
                "compute_loss_func for FusionTrainer: expected none, got one. The loss is that of pairwise fusion: "
                "override compute_loss to change it."
            )
        if model is not None:
            self._prepare_model(model, args)
        self._own_collator = data_collator is None
        if data_collator is None:
            data_collator = _collator(args, processing_class)
        self._sliced_by: dict | None = None  # what the slices' choices were made with
        self.slices: dict | None = None  # and what was chosen: ce_unit, models, slices
        self._packs: set[type] = set()  # classes that were seen to keep packed conversations apart
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = True  # Trainer counts num_items_in_batch for us
        self.add_callback(StepLosses())
        if isinstance(self.data_collator, FusionCollator):
            self._fit_collator(self.data_collator)
            self._choose_by_slice()
            for dataset in (self.train_dataset, self.eval_dataset):
                check_rows(dataset, self.data_collator)
        self._check_packing()

    # -- model --------------------------------------------------------------------------------------------------------

    def call_model_init(self, trial=None):
        model = super().call_model_init(trial)
        self._prepare_model(model, self.args)
        return model

    def _prepare_model(self, model, args) -> None:
        """Choose the way to the loss once, before any wrapping, and say so where it is not the lean one."""
        if not args.lean_head:
            reason = "lean_head is off"
        elif args.n_gpu > 1:
            reason = "one process drives several GPUs (start one process per GPU with torchrun or accelerate)"
        else:
            reason = why_not_lean(model)
        if hasattr(model, "peft_config"):
            if getattr(model.active_peft_config, "is_prompt_learning", False):
                raise InputError(
                    f"adapters for FusionTrainer: expected some that leave the tokens alone (LoRA), got "
                    f"{type(model.active_peft_config).__name__}, which puts others before them. Use LoRA."
                )
            args.use_adapter_learning_rate()
        self._pivot_config = {name: getattr(model.config, name, None) for name in PIVOT_CONFIG}
        if reason is None:
            self.loss_path = "lean"
            install_lean_head(model)
        else:
            self.loss_path = "kept" if args.lean_head and args.n_gpu <= 1 and takes_kept_logits(model) else "full"
            which = {"kept": "the model's own logits of all labelled positions", "full": "full logits"}[self.loss_path]
            logger.warning("The lean head is not used: %s. Training goes through %s.", reason, which)
        low = {p.dtype for p in model.parameters() if p.requires_grad} & {torch.float16, torch.bfloat16}
        if low and getattr(args, "deepspeed_plugin", None) is None and args.learning_rate < 1e-4:
            logger.warning(
                "Trainable weights are %s: steps of %g are mostly rounded away. Load the model in float32 and let bf16 "
                "autocast do the rest.",
                str(low.pop()).removeprefix("torch."),
                args.learning_rate,
            )

    def _fit_collator(self, collator: FusionCollator) -> None:
        """The vocabulary that ids are checked against; a padding id beyond it (it may be any) becomes 0."""
        if collator.vocab_size is None:
            collator.vocab_size = vocabulary_size(self.model)
        if not 0 <= collator.pad_token_id < collator.vocab_size:
            collator.pad_token_id = 0

    def _choose_by_slice(self) -> None:
        """Give the collator the choice of every slice of the training data, where the arguments ask for it."""
        args, collator = self.args, self.data_collator
        data = self.eval_dataset if self.train_dataset is None else self.train_dataset
        if not self._own_collator or args.fusion_function not in BY_SLICE or data is None:
            return
        wanted = {"ce_unit": args.ce_unit, "column": args.slice_column, "pattern": args.slice_pattern}
        if self._sliced_by != wanted:
            self._sliced_by, collator.slice_choice = wanted, source_by_slice(data, **wanted)
            logger.info("\n".join(lines_of(collator.slice_choice, ["pivot", *self.sources], args.ce_unit)))
            self.slices = {
                "ce_unit": args.ce_unit,
                "models": collator.slice_choice.models or ["pivot", *self.sources],
                "slices": collator.slice_choice.choice.table,
            }

    def _check_packing(self) -> None:
        kind = type(causal_model(self.model))
        if getattr(self.data_collator, "packing", False) and kind not in self._packs:
            check_packing(self.model, lambda: self.accelerator.autocast())
            self._packs.add(kind)

    def train(self, *args, **kwargs):
        with _without_line(TOKENS_LINE):
            return super().train(*args, **kwargs)

    # -- loss ---------------------------------------------------------------------------------------------------------

    @property
    def _step_losses(self) -> StepLosses:
        """Found anew each time: a checkpoint that is continued brings its own."""
        return next(one for one in self.callback_handler.callbacks if isinstance(one, StepLosses))

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step_losses.add(loss, self.state.global_step + 1)
        return loss

    def _finalize_training(self, trial, num_train_samples, start_time):
        check_weights(self.model, self.accelerator)
        output = super()._finalize_training(trial, num_train_samples, start_time)
        if self._step_losses.mean() == 0:  # no cross-entropy of a token is; None without a step
            raise InputError(
                f"max_length for the training data: expected predicted tokens within it, got none within "
                f"{self.args.max_length} tokens of any conversation. Raise it."
            )
        return output._replace(training_loss=output.metrics["train_loss"])

    def _save_checkpoint(self, model, trial):
        self._step_losses.read(self.accelerator, self.state.global_step)  # no checkpoint of a loss that is no number
        with writing(self.args.output_dir):
            super()._save_checkpoint(model, trial)

    def create_model_card(self, *args, **kwargs):
        """The run's own card stays; without one, transformers'."""
        if not (Path(str(self.args.output_dir)) / "README.md").exists():
            super().create_model_card(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The batch's share of the step's loss; the sum over batches and the mean over processes is the step's loss."""
        labelled = (inputs["shift_labels"] != IGNORED).sum()
        out, aux = self._loss_sums(model, inputs)
        mode = "train" if model.training else "eval"
        tokens = (
            inputs["attention_mask"].sum()
            if "attention_mask" in inputs
            else inputs["input_ids"].new_tensor(inputs["input_ids"].numel())
        )
        self.meters[mode].add(out.lm_loss, out.fusion_loss, labelled, tokens, inputs["conversation_stats"])
        if num_items_in_batch is None or mode == "eval":
            loss, parts = out.loss / labelled.clamp(min=1), 1
        else:
            if torch.is_tensor(num_items_in_batch):
                num_items_in_batch = num_items_in_batch.flatten()[0]  # DataParallel repeats it per device
            averaged = self.accelerator.num_processes // self.get_tp_size()
            averaged = averaged if self.args.average_tokens_across_devices else 1
            loss = out.loss * averaged / torch.as_tensor(num_items_in_batch, device=out.loss.device).clamp(min=1)
            parts = self.current_gradient_accumulation_steps
        if aux is not None:
            loss = loss + aux / parts
        loss = loss.to(labelled.device)
        return (loss, out) if return_outputs else loss

    def _loss_sums(self, model, inputs) -> tuple[FusionOutput, torch.Tensor | None]:
        """(sums over the batch's labelled positions, auxiliary loss of a mixture of experts or None)."""
        weight, kind = self.args.lm_loss_weight, self.args.fusion_loss_type
        arguments = {name: inputs[name] for name in MODEL_INPUTS if name in inputs}
        if self.loss_path == "lean":
            columns = {name: inputs[name] for name in FUSION_COLUMNS}
            return model(**arguments, **columns, lm_loss_weight=weight, fusion_loss_type=kind), None
        mask = inputs["shift_labels"] != IGNORED
        kept = {"logits_to_keep": mask} if self.loss_path == "kept" else {}
        outputs = model(**arguments, **kept, use_cache=False)
        rows = None if kept else mask.reshape(-1).nonzero(as_tuple=True)[0]
        logits = outputs.logits if kept else outputs.logits.flatten(0, 1)
        labels, ids, probs = (inputs[name][mask] for name in FUSION_COLUMNS)
        lm_sum, fusion_sum = row_sums(logits, labels, ids, probs, kind, rows)
        loss = weighted_loss(lm_sum, fusion_sum, weight)
        aux = getattr(outputs, "aux_loss", None)
        if aux is not None:
            aux = aux * getattr(causal_model(self.model), "router_aux_loss_coef", 0.0)
        return FusionOutput(loss, lm_sum.detach(), fusion_sum.detach()), aux

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._without_repeated(self._prepare_inputs(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
            assert isinstance(loss, torch.Tensor)
            if prediction_loss_only:
                return loss, None, None
            logits = model(**{name: inputs[name] for name in MODEL_INPUTS if name in inputs}).logits
        return loss, logits, inputs["labels"]

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """As Trainer's, with the loss as a mean over labelled tokens (not over batches) and the fusion figures."""
        self.meters["eval"].reset()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        prefix = f"{metric_key_prefix}_"
        figures = self.meters["eval"].read(self.accelerator, self.args.lm_loss_weight, prefix)
        if figures:
            assert output.metrics is not None
            output.metrics[f"{prefix}loss"] = loss = figures.pop(f"{prefix}fused_loss")
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"loss for evaluation ({metric_key_prefix}): expected a number, got {loss}. Check the model's "
                    "weights, or evaluate in float32."
                )
            output.metrics.update(figures)
        return output

    def _without_repeated(self, inputs):
        """So that all processes make equally many steps, accelerate fills the last one up with rows from the start."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return inputs
        here = inputs["conversation_stats"].flatten(0, 1).shape[0]
        return first_conversations(inputs, state.remainder - self.accelerator.process_index * here)

    # -- data ---------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self):
        self.args.fit_accumulation(self._train_batch_size)
        return super().get_train_dataloader()

    def _get_dataloader(self, *args, **kwargs):
        """As Trainer's, with the collator as the arguments are now: a trial or a user may have changed them."""
        self.args.check_fusion_values()
        if self._own_collator and isinstance(self.data_collator, FusionCollator):
            now = collator_options(self.args)
            if any(getattr(self.data_collator, name) != value for name, value in now.items()):
                self.data_collator = dataclasses.replace(self.data_collator, **now)
                self._eval_dataloaders = {}  # which persistent workers keep
            self._choose_by_slice()
        self._check_packing()
        return super()._get_dataloader(*args, **kwargs)

    def _run_epoch(self, *args, **kwargs):
        """As Trainer's, but no step more where a checkpoint of the last one, inside an epoch, is continued."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # -- logs, sampling, saving ---------------------------------------------------------------------------------------

    def log(self, logs, start_time=None):
        """As Trainer's, with the figures of fusion, the whole run's train_loss, and nothing that is not a number.

        Raises: FloatingPointError where the loss of a step since the last call is not finite.
        """
        if self.is_in_train and ("loss" in logs or "train_loss" in logs):
            self._step_losses.read(self.accelerator, self.state.global_step)
            if "train_loss" in logs and (mean := self._step_losses.mean()) is not None:
                logs["train_loss"] = mean  # Trainer's own is of the steps since the run was continued
        if "loss" in logs and self.is_in_train:
            figures = self.meters["train"].read(self.accelerator, self.args.lm_loss_weight)
            figures.pop("fused_loss", None)
            logs.update(figures)
        for name in [name for name, value in logs.items() if isinstance(value, float) and not math.isfinite(value)]:
            del logs[name]  # float16's gradient norm where a step is skipped: JSON has no word for it
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        """As Trainer's; a directory serves too, and a name of the evaluation data where they are several."""
        if not (isinstance(self.eval_dataset, dict) and eval_dataset in list(self.eval_dataset)):
            eval_dataset = open_dataset(eval_dataset)
        with self.meters["train"].paused():
            return super().evaluate(eval_dataset, *args, **kwargs)

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        lengths = getattr(dataset, "num_tokens", None)
        if self.args.train_sampling_strategy == "group_by_length" and lengths is not None:
            size = self.args.conversations_per_step // max(self.args.world_size, 1)
            return LengthGroupedSampler(size, lengths=lengths.tolist())
        return super()._get_train_sampler(train_dataset)

    def merge_adapter(self, base=None) -> None:
        """Replace a PEFT model by the model with its adapters merged into the weights (not for sharded models).

        Args:
            base: the same model with the weights to merge into, where those trained above are quantised; used up.
        """
        adapted: Any = self.accelerator.unwrap_model(self.model)
        if base is not None:
            import peft

            adapters = peft.get_peft_model_state_dict(adapted)
            adapted = peft.get_peft_model(base, adapted.peft_config["default"])
            peft.set_peft_model_state_dict(adapted, adapters)
        self.model = self.model_wrapped = adapted.merge_and_unload()

    def _save(self, output_dir=None, state_dict=None):
        """Weights (in `save_dtype` if set), config as the pivot's, tokenizer; no pickled arguments."""
        folder = Path(output_dir or str(self.args.output_dir))
        model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if self.save_dtype is not None:
            state_dict = model.state_dict() if state_dict is None else state_dict
            state_dict = cast_weights(state_dict, self.save_dtype)
        config = causal_model(model).config
        trained_with = {name: getattr(config, name, None) for name in PIVOT_CONFIG}
        vars(config).update(self._pivot_config)
        try:
            super()._save(str(folder), state_dict)
        finally:
            vars(config).update(trained_with)
        if self.args.should_save:
            (folder / "training_args.bin").unlink(missing_ok=True)
            file = folder / "config.json"
            if self.save_dtype is not None and file.is_file():
                written = json.loads(file.read_bytes()) | {"dtype": str(self.save_dtype).removeprefix("torch.")}
                write_atomic(file, (json.dumps(written, indent=2) + "\n").encode())


@contextlib.contextmanager
def _without_line(text: str):
    """Without transformers' warning that has this text."""
    theirs = logging.getLogger("transformers.trainer_utils")

    def keep(record: logging.LogRecord) -> bool:
        return text not in record.getMessage()

    theirs.addFilter(keep)
    try:
        yield
    finally:
        theirs.removeFilter(keep)


def vocabulary_size(model) -> int:
    """Rows of the embedding, as the configuration says (ZeRO-3 has none of them in memory)."""
    return causal_model(model).config.get_text_config().vocab_size


def collator_options(args: FusionConfig) -> dict[str, Any]:
    """What a FusionCollator takes from the arguments."""
    names = (
        "max_length",
        "fusion_function",
        "fuse_temperature",
        "ce_unit",
        "fusion_fallback",
        "fusion_tail",
        "label_noise",
        "packing",
    )
    return {name: getattr(args, name) for name in names}


def _collator(args: FusionConfig, tokenizer) -> FusionCollator:
    ids = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return FusionCollator(pad_token_id=next((n for n in ids if n is not None), 0), **collator_options(args))
