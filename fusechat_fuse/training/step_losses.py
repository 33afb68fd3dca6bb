"""The losses of all steps of a run, over its parts: their mean, and the first one that is not a number."""

import logging
import math
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from fusechat_fuse.errors import InputError

logger = logging.getLogger(__name__)


class StepLosses(TrainerCallback, ExportableState):
    """Sums losses on the device and reads them only when something is logged or saved; kept in every checkpoint."""

    def __init__(self):
        self._log_every_step = False
        self._begin(0, total=0.0, steps=0)

    def _begin(self, global_step: int, total: float, steps: int) -> None:
        self.total, self.steps, self._last_step = total, steps, global_step
        self._sum = self._first_bad = self._unfinished = None

    def state(self) -> dict:
        return {"args": {}, "attributes": {"total": self.total, "steps": self.steps}}

    def on_train_begin(self, args, state, control, **kwargs):
        kept_states: Any = state.stateful_callbacks  # by the callback's name
        kept = kept_states.get(type(self).__name__) if state.global_step else None
        self._begin(state.global_step, **(kept["attributes"] if kept else {"total": 0.0, "steps": 0}))
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
        loss = loss.detach().to(torch.float32).mean()
        step_if_bad = torch.where(torch.isfinite(loss), math.inf, float(step))
        self._finish_before(step)
        if self._unfinished is None:
            self._unfinished, self._step = loss.clone(), step
        else:
            self._unfinished = self._unfinished + loss
        self._first_bad = step_if_bad if self._first_bad is None else torch.minimum(self._first_bad, step_if_bad)

    def _finish_before(self, step: int) -> None:
        """Take in the loss of the step that was added to last, if it is before `step`."""
        if self._unfinished is not None and self._step < step:
            self._sum = self._unfinished if self._sum is None else self._sum + self._unfinished
            self._unfinished = None

    def read(self, accelerator, global_step: int) -> None:
        """Take in the losses of finished steps; every process must call it.

        A checkpoint may be written within a step (JIT checkpoints): its loss counts when the step is done again.

        Raises: FloatingPointError naming the first step whose loss is not finite, on any process.
        """
        self._finish_before(global_step + 1)
        if self._sum is None or self._first_bad is None:
            return
        both = accelerator.gather(torch.stack([self._sum, self._first_bad])[None]).double()  # [processes, 2]
        total, first_bad = both[:, 0].mean().item(), both[:, 1].min().item()
        if math.isfinite(first_bad):
            raise FloatingPointError(
                f"loss for step {int(first_bad)}: expected a number, got one that is not finite. Lower learning_rate, "
                "clip gradients with max_grad_norm, or check the pivot's weights."
            )
        self.total, self.steps = self.total + total, self.steps + global_step - self._last_step
        self._sum = self._first_bad = None
        self._last_step = global_step

    def check_learned(self, args) -> None:
        """Raise InputError where every loss was 0: no token is predicted with certainty, so none was there.

        Args:
            args: FusionConfig; without the label's term only tokens that have an entry to fuse count.
        """
        if self.mean() == 0:
            what = "predicted tokens" if args.lm_loss_weight else "predicted tokens with a distribution to fuse"
            raise InputError(
                f"max_length for the training data: expected {what} within it, got none within {args.max_length} "
                f"tokens of any conversation. Raise it{'' if args.lm_loss_weight else ', or lm_loss_weight'}."
            )

    def mean(self) -> float | None:
        """The mean loss of a step; None before the first."""
        return self.total / self.steps if self.steps else None
