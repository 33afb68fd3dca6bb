"""Does a model keep packed conversations apart? Tried on two short ones before training.

Conversations packed into one row are told apart by position ids that start anew. A model that builds its attention mask
without them, or carries a state along the row, lets a conversation see the one before it, and nothing fails: the loss
is merely wrong.
"""

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from fusechat_fuse.errors import InputError, first_line
from fusechat_fuse.training.lean_head import causal_model

logger = logging.getLogger(__name__)
LENGTHS = 12, 20  # tokens of the two conversations
# Of the standard deviation of the logits. Families that keep conversations apart differ by 1e-7 in float32, others by
# 0.07 to 0.7; in half precision the same product in another shape may differ by 0.03.
TOLERANCE = 1e-3
HALF_TOLERANCE = 5e-2


def check_packing(model, autocast: Callable[[], AbstractContextManager] = nullcontext) -> None:
    """Raise InputError where a conversation's logits depend on the one packed before it, or position ids are refused.

    Args:
        model: on its device, not yet wrapped.
        autocast: makes the context of training's arithmetic, for models that cannot run without (FlashAttention).
    """
    name = type(causal_model(model)).__name__
    if any(p.is_meta or hasattr(p, "ds_id") or hasattr(p, "to_local") for p in model.parameters()):  # or ZeRO-3, FSDP2
        logger.warning("Packing was not tried on %s, whose weights are sharded. Try it once on one device.", name)
        return
    exact = next(model.parameters()).dtype in (torch.float32, torch.float64)
    tolerance = TOLERANCE if exact else HALF_TOLERANCE
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            try:
                difference = _difference(model)
            except RuntimeError:
                tolerance = HALF_TOLERANCE
                with autocast():
                    difference = _difference(model)
    except RuntimeError as error:
        logger.warning("Packing could not be tried on %s here (%s). Compare its logits once.", name, first_line(error))
        return
    except TypeError as error:
        raise InputError(
            f"packing for {name}: expected a model that takes position ids, got {first_line(error)}. "
            "Train without packing."
        ) from error
    finally:
        model.train(training)
    if math.isnan(difference):
        raise InputError(
            f"logits for {name}: expected numbers, got some that are not finite. Check the pivot's weights."
        )
    if not difference <= tolerance:
        raise InputError(
            f"packing for {name}: expected conversations that do not see one another, got logits that change by "
            f"{difference:.1%} with the conversation before. Train without packing."
        )


def _difference(model) -> float:
    """Of a conversation's logits, alone and behind two different ones; root mean square by their deviation."""
    generator = torch.Generator().manual_seed(0)
    first_length, length = LENGTHS
    vocab_size = causal_model(model).config.get_text_config().vocab_size
    device = model.get_input_embeddings().weight.device

    def draw(count: int) -> torch.Tensor:
        return torch.randint(vocab_size, (1, count), generator=generator).to(device)

    def logits(*conversations: torch.Tensor) -> torch.Tensor:
        positions = torch.cat([torch.arange(one.shape[1], device=device) for one in conversations])[None]
        row = torch.cat(conversations, 1)
        return model(input_ids=row, position_ids=positions, use_cache=False).logits[0, -length:].float()

    last = draw(length)
    alone, *packed = logits(last), *(logits(draw(first_length), last) for _ in range(2))
    worst = max((one - other).square().mean().sqrt() for one, other in ((packed[0], alone), (packed[0], packed[1])))
    return (worst / alone.std().clamp(min=1e-12)).item()
