"""Which merges get a report: those of `run_merge` where FUSECHAT_MERGE_REPORT names a directory, and inspections.

A report is written when the output is whole: a merge that fails leaves none. A report that cannot be written is a
warning.
"""

import contextlib
import logging
import os
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from fusechat_merge.kernel import Merge
from fusechat_merge.once import warn_once
from fusechat_merge.report import Report, distinct_names

logger = logging.getLogger(__name__)
SWITCH = "FUSECHAT_MERGE_REPORT"
NO_REPORT = (
    f"{SWITCH}: this merge gets no report, as it does not use the run_merge that fusechat has patched. Call "
    "fusechat_merge.register() before run_merge is imported."
)


class Reporter:
    """The reports on the output that this process merges; several where its slices have other pivots or targets."""

    def __init__(self):
        self._lock = threading.Lock()  # mergekit may merge on several devices at once
        self._reports: list[Report] | None = None  # None: nothing is recorded
        self._fixed = False  # one report takes everything

    @contextlib.contextmanager
    def recording(self, report: Report | None = None) -> Iterator[list[Report]]:
        """The reports on what the block merges: this one, or those that its tensors need."""
        self._reports, self._fixed = [report] if report else [], report is not None
        try:
            yield self._reports
        finally:
            self._reports = None

    @contextlib.contextmanager
    def one_output(self) -> Iterator[None]:
        """Write reports on the output that the block merges, as FUSECHAT_MERGE_REPORT asks. Nested, the outer one does.

        Raises:
            ValueError: FUSECHAT_MERGE_REPORT cannot be a directory.
        """
        root = os.environ.get(SWITCH)
        if self._reports is not None or not root:
            yield
            return
        path = Path(root).absolute()
        existing = next(path for path in (path, *path.parents) if os.path.lexists(path))
        if not existing.is_dir():
            raise ValueError(f"{SWITCH}: expected a directory, got {root}, as {existing} is not one. Choose another.")
        with self.recording() as reports:
            yield
        for report in reports:
            try:
                report.write(_next_directory(path, report))
            except Exception as error:
                logger.warning("merge report in %s is incomplete (the merge is not): %s", root, error)

    def add(
        self, method: str, pivot: str, targets: Sequence[str], tensor: str, tensors: Sequence[Tensor], merge: Merge
    ) -> None:
        """Record a merged tensor by its names, where one is recorded; `tensors`: the pivot's and the targets'."""
        with self._lock:
            if self._reports is None:
                if os.environ.get(SWITCH):
                    warn_once(logger, NO_REPORT)
                return
            report = next((r for r in self._reports if self._fixed or r.takes(method, pivot, targets)), None)
            if report is None:
                self._reports.append(report := Report(method, pivot, targets))
        report.add(tensor, tensors[0], tensors[1:], targets, merge)


reporter = Reporter()


def _next_directory(root: Path, report: Report) -> Path:
    """The next numbered subfolder, created."""
    root.mkdir(parents=True, exist_ok=True)
    numbers = [re.match(r"(\d{3})-", entry.name) for entry in root.iterdir()]
    number = 1 + max((int(found.group(1)) for found in numbers if found), default=0)
    directory = root / f"{number:03d}-{report.method}-{distinct_names([report.pivot])[0]}"
    directory.mkdir()
    return directory
