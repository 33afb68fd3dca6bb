"""Progress of a long loop: a bar in a terminal or notebook, elsewhere a line a minute in the log."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterable

import tqdm.auto

logger = logging.getLogger(__name__)
SECONDS = 60.0  # between two lines
_LINE = "{desc}{n_fmt} of {total_fmt} {unit}s after {elapsed}, {remaining} left ({rate_fmt}{postfix})"


class _Lines(tqdm.tqdm):
    """Logs a line where a bar would be drawn."""

    def display(self, msg=None, pos=None) -> None:
        logger.info("%s", self)


def progress(iterable: Iterable | None = None, *, total: int, unit: str, desc: str | None = None, show: bool = True):
    """A tqdm bar, or lines in the log where standard error is no terminal and this is no notebook.

    Args:
        iterable: what to go through; None: `update` is called. total: its length. unit, desc: as tqdm takes them.
        show: False for no progress at all.
    """
    if not show or sys.stderr.isatty() or "ipykernel" in sys.modules:
        return tqdm.auto.tqdm(iterable, total=total, unit=unit, desc=desc, disable=not show)
    lines = {"delay": SECONDS, "mininterval": SECONDS, "miniters": 1, "bar_format": _LINE, "file": io.StringIO()}
    return _Lines(iterable, total=total, unit=unit, desc=desc, **lines)
