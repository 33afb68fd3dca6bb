"""`fusechat-fuse train`: a pivot and aligned data in, a target checkpoint out.

Everything that can be wrong with the input is found before the weights are loaded. The output directory belongs to one
run (`fusion_run.json` says which); the same command continues a run that was killed, from its last whole checkpoint,
and leaves a finished one alone. The target loads with AutoModelForCausalLM and AutoTokenizer and keeps the pivot's
vocabulary, so all targets of one pivot merge.
"""

import logging
from pathlib import Path

import torch
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import HubStrategy, IntervalStrategy, set_seed

from fusechat_fuse.errors import InputError
from fusechat_fuse.models.loading import check_causal, check_trainable
from fusechat_fuse.training.adapters import add_adapters, try_adapters
from fusechat_fuse.training.config import FusionConfig
from fusechat_fuse.training.dataset import check_rope, load_aligned
from fusechat_fuse.training.log_lines import LogLines
from fusechat_fuse.training.options import TrainArguments
from fusechat_fuse.training.pivot import PivotFiles
from fusechat_fuse.training.run_directory import RunDirectory, leaves_no_empty_directory
from fusechat_fuse.training.target import prepare_saving, push_target, save_target
from fusechat_fuse.training.trainer import FusionTrainer

logger = logging.getLogger(__name__)


def train(model_name_or_path, data_path, config: FusionConfig, **options) -> dict:
    """Train one target: the pivot fine-tuned on aligned data with the loss of pairwise fusion.

    L = lambda mean(L_LM) + (1 - lambda) mean(L_fusion); lambda = `config.lm_loss_weight`; 1.0 is plain fine-tuning.

    Args: those of `TrainArguments`; `config.output_dir` receives the target.

    Returns:
        Metrics of the run (train_loss, train_runtime, eval_* where there is evaluation data), also in fusion_run.json.

    Raises:
        InputError: data that is not aligned, or not to this model's tokenizer, or with ids beyond its vocabulary; a
            model that cannot be read; an output directory with another run's data.

    Source: FuseChat (arXiv 2408.07990), pairwise fusion.
    """
    arguments = TrainArguments(str(model_name_or_path), str(data_path), **options)
    arguments.check()
    _check_config(config, arguments)
    check_trainable(arguments.model_name_or_path)
    data = load_aligned(arguments.data_path)
    eval_data = load_aligned(arguments.eval_data_path) if arguments.eval_data_path else None
    pivot = PivotFiles(arguments.model_name_or_path, trust_remote_code=arguments.trust_remote_code)
    for one, size in ((data, config.train_batch_size), (eval_data, config.eval_batch_size)):
        if one is not None:
            pivot.check_data(one)
            check_rope(pivot.config, one, max_length=config.max_length, batch_size=size)
    if arguments.lora_r:
        try_adapters(pivot.config, arguments)
        config.use_adapter_learning_rate()
    run = RunDirectory(config, arguments, pivot, data, eval_data)
    finished = run.check()
    if finished is not None:
        logger.info("%s holds this very run, finished; nothing to do (--overwrite trains anew).", config.output_dir)
        if config.push_to_hub and config.should_save:
            push_target(config)
        return finished
    with leaves_no_empty_directory(run.path):
        given = {"train_dataset": data, "eval_dataset": eval_data, "processing_class": pivot.tokenizer}
        trainer = FusionTrainer(_load(pivot, arguments, config), config, **given)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(LogLines())
    prepare_saving(trainer)
    if trainer.args.should_save:
        run.claim()
    trainer.accelerator.wait_for_everyone()  # what an earlier run left is cleared before any process looks for it
    metrics = trainer.train(resume_from_checkpoint=run.checkpoint()).metrics
    _check_finished(trainer)
    if eval_data is not None:
        metrics |= trainer.evaluate()
    save_target(trainer, pivot, arguments, metrics)
    if trainer.args.should_save:
        run.finish(metrics)
        if config.push_to_hub:
            push_target(config)
    trainer.accelerator.wait_for_everyone()
    return metrics


def _check_finished(trainer) -> None:
    """Raise RuntimeError where something stopped training before its last step; the same command continues it."""
    step, last = trainer.state.global_step, trainer.state.max_steps
    if step >= last:
        return
    folder = Path(trainer.args.output_dir)
    if not trainer.args.load_best_model_at_end and not (folder / f"checkpoint-{step}").exists():
        trainer._save_checkpoint(trainer.model, trial=None)
    raise RuntimeError(
        f"training for {folder}: expected {last} steps, got {step} before it was stopped. Give the same command again "
        "to continue it."
    )


def _check_config(config: FusionConfig, arguments: TrainArguments) -> None:
    if config.push_to_hub and (strategy := HubStrategy(config.hub_strategy).value) != "end":
        raise InputError(
            f"value for hub_strategy: expected end, got {strategy}, which lays half-trained weights into the target's "
            "directory. Leave it out, or push the checkpoint-* directories with hf upload."
        )
    evaluates = IntervalStrategy(config.eval_strategy)
    if evaluates != IntervalStrategy.NO and not arguments.eval_data_path:
        raise InputError(
            f"eval_data_path: expected aligned data for eval_strategy {evaluates.value}, got none. Give it, or leave "
            "eval_strategy out."
        )


def _load(pivot: PivotFiles, arguments: TrainArguments, config: FusionConfig):
    loading = {"dtype": getattr(torch, arguments.dtype), "attn_implementation": arguments.attn_implementation}
    if arguments.load_in_4bit:  # laid where it stays: it cannot be moved
        loading |= {"load_in": "4bit", "device_map": {"": config.device}}
    model = pivot.load_model(**loading)
    check_causal(model, pivot.name)
    if not arguments.lora_r:
        return model
    if config.activation_checkpointing:
        model.enable_input_require_grads()
    set_seed(config.seed)
    return add_adapters(model, arguments)
