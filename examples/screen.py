"""The quickstart's terminal: a line and a bar per stage; what the commands print goes to log files."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

EVERY_SECONDS = 15  # a line, where there is no terminal for a bar


def print_into(log: Path) -> None:
    """Append all that this process prints from now on to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


class Screen:
    """Takes the terminal for stages; everything else that is printed goes to `log`."""

    def __init__(self, log: Path):
        self.start, self._out = time.monotonic(), os.fdopen(os.dup(1), "w", buffering=1)
        self._is_terminal = self._out.isatty()
        print_into(log)

    def line(self, text: str = "") -> None:
        print(text, file=self._out, flush=True)

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator:
        """Show a stage of `total` tasks; yields a function to be called after each of them."""
        started, ended, done = time.monotonic(), threading.Event(), []
        form = "{desc:45}{bar:20} {n_fmt} of {total_fmt}, {elapsed}"
        bar = tqdm(desc=title, total=total, file=self._out, leave=False, bar_format=form, disable=not self._is_terminal)

        def tick() -> None:
            while not ended.wait(1 if self._is_terminal else EVERY_SECONDS):
                if self._is_terminal:
                    bar.refresh()
                else:
                    self.line(f"    {title}: {len(done)} of {total} after {time.monotonic() - started:.0f} s")

        def one_done(*_) -> None:
            done.append(1)
            bar.update()

        ticking = threading.Thread(target=tick, daemon=True)
        ticking.start()
        try:
            yield one_done
        finally:
            ended.set()
            ticking.join()
            bar.close()
        self.line(f"{title:45}{time.monotonic() - started:6.1f} s")
