"""`best/`: a link to the result that is best on held-out data, with its model card; `compare` has ranked them."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import NamedTuple

from fusechat_fuse.pipeline.record import Record
from fusechat_fuse.pipeline.steps import Step
from fusechat_fuse.store.files import read_json

logger = logging.getLogger(__name__)


class Best(NamedTuple):
    """The directory of the best result, and the comparison that made it so, in sentences."""

    output: Path
    summary: list[str]


def best_of(steps: list[Step], record: Record) -> Best | None:
    """The best of a run's results, from its finished comparison on held-out data; None without one."""
    compared = next((step for step in steps if step.key == "evaluate compare"), None)
    if compared is None or not record.is_done(compared):
        return None
    found = read_json(compared.output / "compare.json", "comparison") or {}
    ranking = found.get("ranking")
    if not ranking or ranking["best"] is None:
        return None
    results = [step for step in steps if step.stage in ("train", "merge")]
    return Best(results[found["models"].index(ranking["best"]) - 1].output, ranking["summary"])  # the pivot is model 0


def link_best(home: Path, best: Best | None) -> None:
    """Let `best` in a run's directory be a link to the best result, or nothing where there is none; what lies there and
    is no link stays."""
    link = home / "best"
    if best is None:
        if link.is_symlink():
            link.unlink()
            logger.info("%s is removed: this run has compared no results on held-out data.", link)
        return
    logger.info("%s", "\n".join(best.summary))
    if link.exists() and not link.is_symlink():
        logger.warning("%s is no link: it stays, and the best result is %s", link, best.output)
        return
    aside = home / f".best.{os.getpid()}.tmp"
    try:
        aside.symlink_to(os.path.relpath(best.output, home), target_is_directory=True)
        os.replace(aside, link)
        logger.info("%s is a link to %s", link, best.output)
    except OSError as error:  # a file system without links
        logger.warning("%s could not be made (%s): the best result is %s", link, error.strerror, best.output)
