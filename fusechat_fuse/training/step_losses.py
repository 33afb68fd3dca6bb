"""The losses of all steps of a run, over its parts: their mean, and the first one that is not a number."""

import logging
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from fusechat_fuse.errors import InputError

logger = logging.getLogger(__name__)


class StepLosses(TrainerCallback, ExportableState):
    """Sums losses on the device and reads them only when something is logged or saved; kept in every checkpoint."""

    def __init__(self):
        self.total, self.steps, self._log_every_step = 0.0, 0, False
        self._losses: dict[int, torch.Tensor] = {}  # by step (from 1), on the device; not read yet

    def state(self) -> dict:
        return {"args": {}, "attributes": {"total": self.total, "steps": self.steps}}

    def on_train_begin(self, args, state, control, **kwargs):
        kept_states: Any = state.stateful_callbacks  # by the callback's name
        kept = kept_states.get(type(self).__name__) if state.global_step else None
        vars(self).update(kept["attributes"] if kept else {"total": 0.0, "steps": 0}, _losses={})
        self._log_every_step = args.logging_strategy == "steps" and state.max_steps < state.logging_steps
        if self._log_every_step:
            logger.info(
                "%d steps in all, fewer than logging_steps %d: each is logged.", state.max_steps, state.logging_steps
            )
        kept_states[type(self).__name__] = self.state()  # a checkpoint may come without it

    def on_step_end(self, args, state, control, **kwargs):
        if self._log_every_step:
            control.should_log = True

    def add(self, loss: torch.Tensor, step: int) -> None:
        """Add one batch's share of the loss of step `step` (from 1); nothing is read from the device."""
        self._losses[step] = self._losses.get(step, 0.0) + loss.detach().to(torch.float32).mean()

    def read(self, accelerator, global_step: int) -> None:
        """Take in the losses of finished steps; every process must call it.

        A checkpoint may be written within a step (JIT checkpoints): its loss counts when the step is done again.

        Raises: FloatingPointError naming the first step whose loss is not finite, on any process.
        """
        finished = {step: self._losses.pop(step) for step in list(self._losses) if step <= global_step}
        if not finished:
            return
        sums = torch.stack([torch.as_tensor(sum(finished.values())), *finished.values()])
        sums = accelerator.gather(sums[None]).cpu().double()  # [processes, 1 + steps]
        for step, losses in zip(finished, sums[:, 1:].T):
            if not torch.isfinite(losses).all():
                raise FloatingPointError(
                    f"loss for step {step}: expected a number, got one that is not finite. Lower learning_rate, "
                    "clip gradients with max_grad_norm, or check the pivot's weights."
                )
        self.total, self.steps = self.total + sums[:, 0].mean().item(), self.steps + len(finished)

    def check_learned(self, args) -> None:
        """Raise InputError where every loss was 0: no token is predicted with certainty, so none was there."""
        if self.mean() == 0:
            what = "predicted tokens" if args.lm_loss_weight else "predicted tokens with a distribution to fuse"
            raise InputError(
                f"max_length for the training data: expected {what} within it, got none within {args.max_length} "
                f"tokens of any conversation. Raise it{'' if args.lm_loss_weight else ', or lm_loss_weight'}."
            )

    def mean(self) -> float | None:
        """The mean loss of a step; None before the first."""
        return self.total / self.steps if self.steps else None
