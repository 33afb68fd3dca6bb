"""The target of a run, written whole: aside first, then moved into its place, the configuration last."""

import logging
import shutil
from pathlib import Path

import torch

from fusechat_fuse.errors import first_line, writing
from fusechat_fuse.store.files import json_bytes, move_in, write_atomic
from fusechat_fuse.training.card import write_model_card

logger = logging.getLogger(__name__)
ASIDE = ".target.tmp"


def prepare_saving(trainer) -> None:
    """Before training: ZeRO-3 will gather the whole weights at the end, else there would be no target."""
    if trainer.is_deepspeed_enabled:
        of_zero = trainer.accelerator.state.deepspeed_plugin.deepspeed_config.get("zero_optimization", {})
        if of_zero.get("stage") == 3:
            of_zero["stage3_gather_16bit_weights_on_model_save"] = True


def save_target(trainer, pivot, arguments, metrics: dict) -> None:
    """Weights (adapters merged in), the pivot's own tokenizer files and the model card, into the output directory.

    Args:
        trainer: FusionTrainer after training; of adapters, its model becomes the one with them merged in.
        pivot: PivotFiles of the pivot.
        arguments: TrainArguments of the run.
        metrics: what the run returns.
    Raises: OSError naming the directory where it cannot be written; then no part of a target is left there.
    """
    output = Path(trainer.args.output_dir)
    aside = output / ASIDE
    trainer.save_dtype = arguments.save_dtype and getattr(torch, arguments.save_dtype)
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    first = trainer.args.should_save
    if first:
        shutil.rmtree(aside, ignore_errors=True)
    try:
        with writing(output):
            if arguments.lora_r and sharded:
                logger.warning(
                    "Adapters of a sharded model are saved as they are: merge them with peft before mergekit-yaml."
                )
            elif arguments.lora_r:
                if first:
                    trainer.model.save_pretrained(aside / "adapter")
                whole = pivot.load_model(dtype=getattr(torch, arguments.dtype)) if arguments.load_in_4bit else None
                trainer.merge_adapter(whole)
            if trainer.is_fsdp_enabled:  # Trainer's save_model writes nothing where checkpoints are sharded
                trainer._save(str(aside), trainer.accelerator.get_state_dict(trainer.model))
            else:
                trainer.save_model(str(aside), _internal_call=True)
            trainer.save_state()
            trainer.accelerator.wait_for_everyone()
            if first:
                pivot.copy_files(aside)
                if trainer.slices is not None:
                    write_atomic(aside / "slices.json", json_bytes(trainer.slices))
                write_model_card(aside, output.resolve().name, trainer, pivot, arguments, metrics)
                move_in(aside, output, last="config.json")
    except BaseException:
        if first:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def push_target(config) -> None:
    """Upload a finished target, whole and once, to the Hub repository that `hub_model_id` names (made if missing).

    Args:
        config: FusionConfig of the run.
    Raises: RuntimeError with the command to repeat by hand; the target is not touched.
    """
    from huggingface_hub import HfApi

    api, folder = HfApi(token=config.hub_token), Path(config.output_dir)
    name = config.hub_model_id or folder.resolve().name
    try:
        name = api.create_repo(name, private=config.hub_private_repo, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message=f"Add {folder.resolve().name}",
            ignore_patterns=[".*", "_*", "checkpoint-*"],
            revision=config.hub_revision,
        )
    except Exception as error:  # of the network, of the Hub, of a token
        raise RuntimeError(
            f"{folder} is finished, and could not be pushed to {name}: {first_line(error)}. Push it by: "
            f"hf upload {name} {folder} . --exclude 'checkpoint-*'"
        ) from error
    logger.info("%s is at %s/%s", folder, api.endpoint, name)
