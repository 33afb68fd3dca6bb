"""Warnings that are logged once for an output, however many tensors or threads have a reason for them."""

import functools
import logging


@functools.cache
def warn_once(logger: logging.Logger, message: str) -> None:
    """Log a warning that was not logged since `warn_once.cache_clear()`, which is called when an output is planned."""
    logger.warning("%s", message)
