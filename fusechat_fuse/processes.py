"""The ranks of one launch (`accelerate launch`, `torchrun`); without a launcher there is one."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

DIE_WITH_PARENT = "FUSECHAT_DIE_WITH_PARENT"  # set by `run`: the ranks below a launcher end with it
_LIBRARY = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: a forked child must not load anything
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends: a killed run leaves no step behind, nor ranks of one."""
    if _LIBRARY is not None:
        _LIBRARY.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@dataclass
class Process:
    """This process's rank (`index`) among `count`, its device (None: not assigned), and a barrier (`wait`)."""

    index: int = 0
    count: int = 1
    device: str | None = None
    wait: Callable[[], None] = lambda: None

    @classmethod
    def current(cls) -> Process:
        """This process, after joining the process group of its launch."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        from accelerate import PartialState

        # a rank that is done waits for the slowest one: for days, not the usual ten minutes
        state = PartialState(timeout=timedelta(days=30))
        return cls(state.process_index, state.num_processes, str(state.device), state.wait_for_everyone)

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes what is written once."""
        return self.index == 0


def is_main_process() -> bool:
    """Whether this is rank 0 of its launch, which prints results; connects nothing."""
    return int(os.environ.get("RANK", "0")) == 0


def end_process_group() -> None:
    """Leave the process group, if there is one. At the interpreter's exit gloo's threads could abort it."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None:
        return
    if distributed.is_available() and distributed.is_initialized():
        gc.collect()  # a wrapped model in a cycle of references would keep the group alive
        distributed.destroy_process_group()
