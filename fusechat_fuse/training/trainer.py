"""FusionTrainer: transformers' Trainer with the loss of pairwise fusion, at the price of plain fine-tuning.

It adds a collator, one of three paths to the loss (`loss_paths.py`), and figures in the logs. The rest is Trainer's.

Normalisation: sums over labelled tokens are divided by the number of labelled tokens in the whole step
(`num_items_in_batch`, over accumulated batches and processes), so 8 x 1 and 1 x 8 batches give one loss and gradient.
"""

import contextlib
import logging
import math
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from fusechat_fuse.errors import InputError, writing
from fusechat_fuse.training import target
from fusechat_fuse.training.adapters import check_adapters
from fusechat_fuse.training.choice import BY_SLICE
from fusechat_fuse.training.collator import FusionCollator, agreed_labels, first_conversations, fitted, make_collator
from fusechat_fuse.training.config import FusionConfig
from fusechat_fuse.training.dataset import check_rope, check_rows, for_sampler, open_dataset, sources_of
from fusechat_fuse.training.lean_head import causal_model
from fusechat_fuse.training.loss import IGNORED
from fusechat_fuse.training.loss_paths import MODEL_INPUTS, choose_loss_path, loss_sums
from fusechat_fuse.training.meter import FusionMeter, search_objective
from fusechat_fuse.training.packing import check_packing
from fusechat_fuse.training.sampling import mark_repeated, set_epoch
from fusechat_fuse.training.slice_choice import format_slice_choice, source_by_slice
from fusechat_fuse.training.step_losses import StepLosses

logger = logging.getLogger(__name__)


class FusionTrainer(Trainer):
    """A `transformers.Trainer` for pairwise fusion.

    L = lambda mean(L_LM) + (1 - lambda) mean(L_fusion) over the labelled tokens of the whole step (`loss.py`).

    Args:
        model: a causal language model of transformers (or a PEFT model around one), or use `model_init`.
        args: FusionConfig.
        data_collator: default: a FusionCollator with the options in `args`. A FusionCollator of your own, or a
            subclass, keeps its own options; one that chooses by slice and has no `slice_choice` gets the one of the
            training data. Any other callable has to make such a batch (docs/trainers.md).
        train_dataset, eval_dataset: aligned or combined data: a directory, `load_representation(dir)`,
            `datasets.load_from_disk(dir)`, or a list of rows. eval_dataset may be a dict of these.
        processing_class: the pivot's tokenizer; saved with every checkpoint.
        sources: names of the sources, for the logs; default: those in the data's manifest.
        Everything else as in Trainer.

    Logs, beside Trainer's: lm_loss, fusion_loss (means over labelled tokens), source_share (share of the conversations
    that took the source's distribution; one for each of several sources), mapped_mass (mean probability mass that the
    alignment mapped), tokens_per_second (all processes). Evaluation: the same with eval_; eval_loss is the mean over
    labelled tokens of what `compute_loss` returns.

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
        train_dataset = open_dataset(train_dataset, args, to_train_on=True)
        eval_dataset = open_dataset(eval_dataset, args)
        self.sources = list(sources or sources_of(train_dataset if train_dataset is not None else eval_dataset))
        self.meters = {name: FusionMeter(self.sources) for name in ("train", "eval")}
        if kwargs.get("compute_loss_func") is not None:
            raise InputError(
                "compute_loss_func for FusionTrainer: expected none, got one. The loss is that of pairwise fusion: "
                "override compute_loss to change it."
            )
        if model is not None:
            self._prepare_model(model, args)
        self._default_collator = data_collator is None
        self._sampler: Any = None  # of the training data
        self._slice_options: dict | None = None  # what the choice by slice was made with
        self.slices: dict | None = None  # the choice: ce_unit, models, slices
        self._packing_checked: set[type] = set()  # model classes that keep packed conversations apart
        data_collator = data_collator or make_collator(args, processing_class)
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, processing_class, **kwargs)
        self.model_accepts_loss_kwargs = True  # Trainer counts num_items_in_batch for us
        self.add_callback(StepLosses())
        self._prepare_collator()
        if isinstance(self.data_collator, FusionCollator):
            for data, size in ((self.train_dataset, args.train_batch_size), (self.eval_dataset, args.eval_batch_size)):
                check_rows(data, self.data_collator)
                max_length = self.data_collator.max_length
                check_rope(causal_model(self.model).config, data, max_length=max_length, batch_size=size)

    # -- model and collator -------------------------------------------------------------------------------------------

    def call_model_init(self, trial=None):
        model = super().call_model_init(trial)
        self._prepare_model(model, self.args)
        return model

    def _prepare_model(self, model, args) -> None:
        """Choose the path to the loss, once and before any wrapping; warn of weights too coarse for small steps."""
        if hasattr(model, "peft_config"):
            check_adapters(model)
            args.use_adapter_learning_rate()
        self._pivot_config = target.pivot_config(model)
        self.loss_path = choose_loss_path(model, args)
        low = {p.dtype for p in model.parameters() if p.requires_grad} & {torch.float16, torch.bfloat16}
        if low and getattr(args, "deepspeed_plugin", None) is None and args.learning_rate < 1e-4:
            logger.warning(
                "Trainable weights are %s: steps of %g are mostly rounded away. Load the model in float32; bf16 "
                "autocast computes in bfloat16 all the same.",
                str(low.pop()).removeprefix("torch."),
                args.learning_rate,
            )

    def _prepare_collator(self) -> None:
        """Fit the collator to arguments, model and data; again when training starts, as a trial changes arguments."""
        if isinstance(self.data_collator, FusionCollator):
            if self._default_collator:
                self._eval_dataloaders = {}  # which hold the former one, with dataloader_persistent_workers
            self.data_collator = fitted(self.data_collator, self.args, is_users=not self._default_collator)
            self.data_collator.fit_vocabulary(causal_model(self.model).config.get_text_config().vocab_size)
            self._choose_by_slice(self.data_collator)
        kind = type(causal_model(self.model))
        if getattr(self.data_collator, "packing", False) and kind not in self._packing_checked:
            check_packing(self.model, lambda: self.accelerator.autocast())
            self._packing_checked.add(kind)

    def _choose_by_slice(self, collator: FusionCollator) -> None:
        """Choose a model for every slice of the training data, where the collator needs the choice and has none."""
        data = self.eval_dataset if self.train_dataset is None else self.train_dataset
        is_users = collator.slice_choice is not None and self._slice_options is None
        if collator.fusion_function not in BY_SLICE or data is None or is_users:
            return
        options = {"ce_unit": collator.ce_unit, "column": self.args.slice_column, "pattern": self.args.slice_pattern}
        if self._slice_options != options:
            self._slice_options, collator.slice_choice = options, source_by_slice(data, **options)
            models = collator.slice_choice.models or ["pivot", *self.sources]
            logger.info(format_slice_choice(collator.slice_choice, models, collator.ce_unit))
            table = collator.slice_choice.choice.table
            self.slices = {"ce_unit": collator.ce_unit, "models": models, "slices": table}

    # -- training -----------------------------------------------------------------------------------------------------

    def train(self, *args, **kwargs):
        """As Trainer's, without its warning of new special tokens in the configuration: targets keep the pivot's."""

        def keep(record: logging.LogRecord) -> bool:
            return "new PAD/BOS/EOS tokens" not in record.getMessage()

        transformers_logger = logging.getLogger("transformers.trainer_utils")
        transformers_logger.addFilter(keep)
        try:
            return super().train(*args, **kwargs)
        finally:
            transformers_logger.removeFilter(keep)

    def hyperparameter_search(self, hp_space=None, compute_objective=None, *args, **kwargs):
        """As Trainer's; the default objective is the evaluation's lm_loss (Trainer's: the sum of all figures)."""
        return super().hyperparameter_search(hp_space, compute_objective or search_objective, *args, **kwargs)

    def get_train_dataloader(self):
        self.meters["train"].reset()  # of an earlier training, or of the time since the trainer was made
        self.args.check_fusion_values()
        self.args.fit_accumulation(self._train_batch_size)
        self._prepare_collator()
        if self.args.process_index == 0:  # on others they may not be loaded yet
            target.check_loaded(self.model)
        return super().get_train_dataloader()

    @property
    def _step_losses(self) -> StepLosses:
        """Looked up each time: a checkpoint that is continued brings its own."""
        return next(one for one in self.callback_handler.callbacks if isinstance(one, StepLosses))

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As Trainer's; what carries no label, and rows that fill up an epoch's last step, are masked beforehand."""
        epoch_iterator = map(agreed_labels, epoch_iterator)
        if not hasattr(self._sampler, "repeated"):
            return super().get_batch_samples(map(self._without_repeated, epoch_iterator), num_batches, device)
        batches = list(islice(epoch_iterator, num_batches))
        if self.accelerator.gradient_state.end_of_dataloader:
            batches = [first_conversations(b, 0) if again else b for b, again in zip(batches, self._sampler.repeated)]
        return super().get_batch_samples(iter(batches), num_batches, device)

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step_losses.add(loss, self.state.global_step + 1)
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The batch's share of the step's loss; the sum over batches and the mean over processes is the step's loss."""
        labelled = (inputs["shift_labels"] != IGNORED).sum()
        weight, kind = self.args.lm_loss_weight, self.args.fusion_loss_type
        out, aux = loss_sums(model, inputs, self.loss_path, lm_loss_weight=weight, kind=kind)
        mode = "train" if model.training else "eval"
        tokens = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).sum()
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
            loss = loss + aux * getattr(causal_model(self.model), "router_aux_loss_coef", 0.0) / parts
        loss = loss.to(labelled.device)
        return (loss, out) if return_outputs else loss

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        """As Trainer's; takes a directory too, and one of the names of the evaluation data where there are several."""
        if not (isinstance(self.eval_dataset, dict) and eval_dataset in list(self.eval_dataset)):
            eval_dataset = open_dataset(eval_dataset, self.args)
        with self.meters["train"].paused():
            return super().evaluate(eval_dataset, *args, **kwargs)

    def predict(self, test_dataset, *args, **kwargs):
        """As Trainer's; takes a directory too."""
        return super().predict(open_dataset(test_dataset, self.args), *args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._without_repeated(agreed_labels(self._prepare_inputs(inputs)))
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
            assert isinstance(loss, torch.Tensor)
            self.meters["eval"].add_loss(loss, (inputs["shift_labels"] != IGNORED).sum())
            if prediction_loss_only:
                return loss, None, None
            logits = model(**{name: inputs[name] for name in MODEL_INPUTS if name in inputs}).logits
        return loss, logits, inputs["labels"]

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """As Trainer's, with the loss as a mean over labelled tokens (not over batches) and the fusion figures."""
        self.meters["eval"].reset()
        rounds = not self.is_in_train and (self.args.bf16_full_eval or self.args.fp16_full_eval)
        with target.unchanged_weights(self.model) if rounds else contextlib.nullcontext():
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
            )
        prefix = f"{metric_key_prefix}_"
        figures = self.meters["eval"].read(self.accelerator, prefix)
        if figures:
            assert output.metrics is not None
            output.metrics.update(figures)
            conversations = output.metrics.pop(f"{prefix}conversations", output.num_samples)  # packed: not rows
            output = output._replace(num_samples=conversations)
            if not math.isfinite(loss := figures[f"{prefix}loss"]):
                raise FloatingPointError(
                    f"loss for evaluation ({metric_key_prefix}): expected a number, got {loss}. Check the model's "
                    "weights, or evaluate in float32."
                )
        return output

    def _without_repeated(self, inputs):
        """Mask the rows with which accelerate fills the last step, so that all processes make equally many steps."""
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return inputs
        here = inputs["conversation_stats"].flatten(0, 1).shape[0]
        return first_conversations(inputs, state.remainder - self.accelerator.process_index * here)

    # -- logs ---------------------------------------------------------------------------------------------------------

    def log(self, logs, start_time=None):
        """As Trainer's, with the figures of fusion, the whole run's train_loss, and only finite numbers.

        Raises: FloatingPointError where the loss of a step since the last call is not finite.
        """
        if self.is_in_train and ("loss" in logs or "train_loss" in logs):
            self._step_losses.read(self.accelerator, self.state.global_step)
            if "train_loss" in logs and (mean := self._step_losses.mean()) is not None:
                logs["train_loss"] = mean  # Trainer's own is of the steps since the run was continued
        if "loss" in logs and self.is_in_train:
            logs.update(self.meters["train"].read(self.accelerator))
        for name in [name for name, value in logs.items() if isinstance(value, float) and not math.isfinite(value)]:
            del logs[name]  # the gradient norm where float16 skips a step: JSON cannot hold it
        super().log(logs, start_time)

    def create_model_card(self, *args, **kwargs):
        """The run's own card stays; without one, transformers'."""
        if not (Path(str(self.args.output_dir)) / "README.md").exists():
            super().create_model_card(*args, **kwargs)

    # -- private methods of transformers' Trainer, overridden: look here first when a new version breaks something -----

    def _get_train_sampler(self, train_dataset=None):
        data = for_sampler(self.train_dataset if train_dataset is None else train_dataset)
        self._sampler = mark_repeated(super()._get_train_sampler(data))
        return self._sampler

    def _get_eval_sampler(self, eval_dataset):
        return super()._get_eval_sampler(for_sampler(eval_dataset))

    def _run_epoch(self, *args, **kwargs):
        """As Trainer's, but without a further step where the checkpoint of the last one, inside an epoch, continues."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        set_epoch(kwargs["train_dataloader"], kwargs["epoch"], seed)
        super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, trial, num_train_samples, start_time):
        """As Trainer's, with the whole run's loss; raises where the weights are not finite or nothing was labelled."""
        target.check_weights(self.model, self.accelerator)
        output = super()._finalize_training(trial, num_train_samples, start_time)
        self._step_losses.check_learned(self.args)
        return output._replace(training_loss=output.metrics["train_loss"])

    def _save_checkpoint(self, model, trial):
        """As Trainer's, after the losses were checked: a checkpoint may not continue from one that is not finite."""
        self._step_losses.read(self.accelerator, self.state.global_step)
        with writing(self.args.output_dir):
            super()._save_checkpoint(model, trial)

    def _save(self, output_dir=None, state_dict=None):
        """As Trainer's, with the pivot's configuration, weights in `save_dtype` if set, and no pickled arguments."""
        folder = Path(output_dir or str(self.args.output_dir))
        model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if self.save_dtype is not None:
            state_dict = target.cast_weights(model.state_dict() if state_dict is None else state_dict, self.save_dtype)
        with target.as_pivot(model, self._pivot_config):
            super()._save(str(folder), state_dict)
        if self.args.should_save:
            target.tidy_saved(folder, self.save_dtype)
