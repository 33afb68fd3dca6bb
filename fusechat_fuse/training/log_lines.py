"""What the command `train` shows: a bar in a terminal, and a short line for each logging step."""

import logging

from transformers import TrainerCallback

from fusechat_fuse.progress import progress

logger = logging.getLogger(__name__)
_SHOWN = ("loss", "lm_loss", "fusion_loss", "source_share", "learning_rate", "cut_tokens")  # all: trainer_state.json


class LogLines(TrainerCallback):
    """Takes the place of transformers' own callbacks, which print raw dictionaries."""

    def __init__(self):
        self._bar = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._bar = progress(total=state.max_steps, unit="step", show=not args.disable_tqdm)
            self._bar.update(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and state.is_world_process_zero and "train_runtime" not in logs:  # the whole run's: the result
            if self._bar is not None:
                self._bar.clear()
            logger.info("%s", format_logs(state.global_step, state.max_steps, logs))

    def on_train_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.close()


def format_logs(step: int, last: int, logs: dict) -> str:
    """`step 25 of 812: loss 1.234, ...`, figures with four digits; of an evaluation those that begin with eval_."""
    shown = {name: value for name, value in logs.items() if name.removeprefix("eval_") in _SHOWN}
    figures = (
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items()
    )
    return f"step {step} of {last}: {', '.join(figures)}"
