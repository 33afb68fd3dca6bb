"""The trained weights, looked through before they are saved, and cast for saving."""

from typing import Any

import torch


def check_weights(model: torch.nn.Module, accelerator) -> None:
    """Raise FloatingPointError where a weight is not finite: the last update is seen by no loss, and a frozen weight
    that the data never read by none either."""
    bad = 0
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        here: Any = getattr(parameter, "ds_tensor", parameter.detach())  # ZeRO-3's part of it
        here = here.to_local() if hasattr(here, "to_local") else here  # fully_shard's
        bad += int(not torch.isfinite(here).all())
    if accelerator.gather(torch.tensor([bad], device=accelerator.device)).sum().item():
        raise FloatingPointError(
            "weights after the last step: expected numbers, got some that are not finite. Lower learning_rate, or "
            "clip gradients with max_grad_norm."
        )


def cast_weights(state_dict: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights in `dtype`; what shares memory goes on sharing it, so that tied weights are saved once."""
    done: dict[tuple, torch.Tensor] = {}
    cast = {}
    for name, tensor in state_dict.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if not tensor.is_floating_point():
            cast[name] = tensor
        elif tensor.numel() == 0 or key not in done:
            cast[name] = done[key] = tensor.to(dtype)
            if dtype == torch.float16 and not torch.isfinite(done[key]).all():
                raise FloatingPointError(
                    f"weights for {name}: expected numbers within float16 (65504), got larger ones. "
                    "Give save_dtype bfloat16 or float32."
                )
        else:
            cast[name] = done[key]
    return cast
