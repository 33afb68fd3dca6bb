"""The target of a run: its weights checked, then written whole into a staging directory and moved into place, the
configuration last."""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fusechat_fuse.errors import InputError, first_line, writing
from fusechat_fuse.store.files import json_bytes, replace_into, write_atomic
from fusechat_fuse.training.adapters import merge_adapters
from fusechat_fuse.training.card import write_model_card
from fusechat_fuse.training.lean_head import causal_model

logger = logging.getLogger(__name__)
STAGING_DIR = ".target.tmp"
# Entries of the configuration that Trainer sets for its own purposes; the target keeps the pivot's
PIVOT_CONFIG = ("use_cache", "pad_token_id", "bos_token_id", "eos_token_id")


def prepare_saving(trainer) -> None:
    """Before training: ZeRO-3 will gather the whole weights at the end, else there would be no target."""
    if trainer.is_deepspeed_enabled:
        of_zero = trainer.accelerator.state.deepspeed_plugin.deepspeed_config.get("zero_optimization", {})
        if of_zero.get("stage") == 3:
            of_zero["stage3_gather_16bit_weights_on_model_save"] = True


def save_target(trainer, pivot, arguments, metrics: dict) -> None:
    """Weights (adapters merged in), the pivot's own tokenizer files and the model card, into the output directory.

    Raises: OSError naming the directory where it cannot be written; then no part of a target is left there.
    """
    output = Path(trainer.args.output_dir)
    staging = output / STAGING_DIR
    trainer.save_dtype = arguments.save_dtype and getattr(torch, arguments.save_dtype)
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    first = trainer.args.should_save
    if first:
        shutil.rmtree(staging, ignore_errors=True)
    try:
        with writing(output):
            if arguments.lora_r and sharded:
                logger.warning(
                    "Adapters of a sharded model are saved as they are: merge them with peft before mergekit-yaml."
                )
            elif arguments.lora_r:
                if first:
                    trainer.model.save_pretrained(staging / "adapter")
                whole = pivot.load_model(dtype=getattr(torch, arguments.dtype)) if arguments.load_in_4bit else None
                merge_adapters(trainer, whole)
            if trainer.is_fsdp_enabled:  # Trainer's save_model writes nothing where checkpoints are sharded
                trainer._save(str(staging), trainer.accelerator.get_state_dict(trainer.model))
            else:
                trainer.save_model(str(staging), _internal_call=True)
            trainer.save_state()
            trainer.accelerator.wait_for_everyone()
            if first:
                pivot.copy_files(staging)
                if trainer.slices is not None:
                    write_atomic(staging / "slices.json", json_bytes(trainer.slices))
                write_model_card(staging, output.resolve().name, trainer, pivot, arguments, metrics)
                replace_into(staging, output, last="config.json")
    except BaseException:
        if first:
            shutil.rmtree(staging, ignore_errors=True)
        raise


def pivot_config(model) -> dict[str, Any]:
    """The entries of the pivot's configuration that training changes, before it does."""
    config = causal_model(model).config
    return {name: getattr(config, name, None) for name in PIVOT_CONFIG}


@contextlib.contextmanager
def as_pivot(model, entries: dict[str, Any]) -> Iterator[None]:
    """Around saving: the model's configuration has the pivot's entries (`pivot_config`).

    A generation configuration that transformers loads but refuses to save (temperature without do_sample) is left out;
    the target gets the pivot's file itself.
    """
    inner: Any = causal_model(model)
    trained_with, generation = pivot_config(model), inner.generation_config
    vars(inner.config).update(entries)
    try:
        if generation is not None:
            generation.validate(strict=True)
    except ValueError:
        inner.generation_config = type(generation)()
    try:
        yield
    finally:
        inner.generation_config = generation
        vars(inner.config).update(trained_with)


def tidy_saved(folder: Path, dtype: torch.dtype | None) -> None:
    """After Trainer saved a model: no pickled arguments, and the precision of the weights in config.json."""
    (folder / "training_args.bin").unlink(missing_ok=True)
    file = folder / "config.json"
    if dtype is not None and file.is_file():
        written = json.loads(file.read_bytes()) | {"dtype": str(dtype).removeprefix("torch.")}
        write_atomic(file, (json.dumps(written, indent=2) + "\n").encode())


@contextlib.contextmanager
def unchanged_weights(model) -> Iterator[None]:
    """Around an evaluation that rounds the model in place (--bf16_full_eval): its exact weights come back after it."""
    exact = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in (*model.parameters(), *model.buffers())]
    try:
        yield
    finally:
        for tensor, kept in exact:
            tensor.data = kept.to(tensor.device)


def check_loaded(model) -> None:
    """Raise InputError naming the first weight, frozen or trained, that is not finite before the first step."""
    if (name := _not_finite(model)) is not None:
        raise InputError(f"weights for {name}: expected numbers, got some that are not finite. Get the pivot anew.")


def check_weights(model, accelerator) -> None:
    """Raise FloatingPointError where a weight is not finite: the last update is seen by no loss."""
    bad = _not_finite(model) is not None
    if accelerator.gather(torch.tensor([bad], device=accelerator.device)).any().item():
        raise FloatingPointError(
            "weights after the last step: expected numbers, got some that are not finite. Lower learning_rate, or "
            "clip gradients with max_grad_norm."
        )


def _not_finite(model) -> str | None:
    """The name of the first weight, or of this process's part of it, that holds something else than numbers."""
    for name, parameter in model.named_parameters():
        here: Any = getattr(parameter, "ds_tensor", parameter.detach())  # ZeRO-3's part of it
        here = here.to_local() if hasattr(here, "to_local") else here  # fully_shard's
        if here.is_floating_point() and not here.is_meta and not torch.isfinite(here).all():
            return name
    return None


def cast_weights(state_dict: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights in `dtype`; what shares memory goes on sharing it, so that tied weights are saved once."""
    done: dict[tuple, torch.Tensor] = {}
    cast = {}
    for name, tensor in state_dict.items():
        if not tensor.is_floating_point():
            cast[name] = tensor
            continue
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() == 0 or key not in done:
            done[key] = tensor.to(dtype)
            if dtype == torch.float16 and not torch.isfinite(done[key]).all():
                raise FloatingPointError(
                    f"weights for {name}: expected numbers within float16 (65504), got larger ones. "
                    "Give save_dtype bfloat16 or float32."
                )
        cast[name] = done[key]
    return cast


def push_target(config) -> None:
    """Upload a finished target, whole and once, to the Hub repository that `hub_model_id` names (made if missing).

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
