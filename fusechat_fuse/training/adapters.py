"""Low-rank adapters on the pivot: put there by peft, after they were tried on a model without weights."""

import warnings
from collections import Counter
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from fusechat_fuse.errors import InputError, first_line


def try_adapters(config, arguments) -> None:
    """Raise InputError where `add_adapters` would: on the model's modules without their weights, in no time."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what peft has to say comes with the weights
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=arguments.trust_remote_code)
        add_adapters(model, arguments)


def check_adapters(model) -> None:
    """Raise InputError for a PEFT model whose adapters put tokens of their own before the conversation's."""
    if getattr(model.active_peft_config, "is_prompt_learning", False):
        raise InputError(
            f"adapters for FusionTrainer: expected some that add no tokens (LoRA), got "
            f"{type(model.active_peft_config).__name__}, which puts its own before the conversation. Use LoRA."
        )


def merge_adapters(trainer, base=None) -> None:
    """Replace a trainer's PEFT model by the model with the adapters merged into its weights (not for sharded models),
    or into those of `base`, where training used quantised ones."""
    adapted: Any = trainer.accelerator.unwrap_model(trainer.model)
    if base is not None:
        peft = _import_peft()
        adapters = peft.get_peft_model_state_dict(adapted)
        adapted = peft.get_peft_model(base, adapted.peft_config["default"])
        peft.set_peft_model_state_dict(adapted, adapters)
    trainer.model = trainer.model_wrapped = adapted.merge_and_unload()


def _import_peft():
    try:
        import peft
    except ImportError as error:
        raise InputError("lora_r for training: expected peft, got no such package. Run pip install peft.") from error
    return peft


def add_adapters(model, arguments) -> Any:
    """The PEFT model around `model`, with the adapters of TrainArguments.

    Raises: InputError for modules that are not there, cannot be adapted, or share their weight with another: the
        adapter would be merged into both, while one alone was trained with it.
    """
    peft = _import_peft()
    names = arguments.lora_target_modules
    wanted = names if names == "all-linear" else [name.strip() for name in names.split(",")]
    model.tie_weights()
    weights = [(name.rpartition(".")[0], id(p)) for name, p in model.named_parameters(remove_duplicate=False)]
    times = Counter(weight for _, weight in weights)
    shared = {module for module, weight in weights if times[weight] > 1}
    try:
        lora = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=arguments.lora_r,
            lora_alpha=arguments.lora_alpha,
            lora_dropout=arguments.lora_dropout,
            target_modules=wanted,
        )
        adapted = peft.get_peft_model(model, lora)
    except (ValueError, TypeError) as error:
        raise InputError(
            f"adapters for {arguments.model_name_or_path}: expected modules that peft can adapt, got: "
            f"{first_line(error)}. Change lora_target_modules."
        ) from error
    targeted: Any = adapted.base_model.targeted_module_names
    for name in wanted if isinstance(wanted, list) else []:
        if not any(module == name or module.endswith(f".{name}") for module in targeted):
            raise InputError(
                f"adapters for {name!r}: expected a module of {type(model).__name__}, got none of that name. "
                "Correct lora_target_modules."
            )
    tied = sorted(shared & set(targeted))
    if tied:
        raise InputError(
            f"adapters for {tied[0]}: expected a weight of its own, got one that it shares with "
            f"{', '.join(sorted(shared - {tied[0]}))} (tied embeddings). Leave it out of lora_target_modules."
        )
    return adapted
