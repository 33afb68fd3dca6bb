"""Which report a merged tensor is added to, and when that report is finished.

`FUSECHAT_MERGE_REPORT=DIR` gives every output a report in a numbered subfolder of DIR; `fusechat-merge inspect` has one
report of its own. A report is finished when mergekit's `run_merge` has returned, so an output that is not whole gets no
summary. A report that cannot be written is one warning, and the merge goes on.
"""

import atexit
import contextlib
import functools
import logging
import os
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fusechat_merge.kernel import Merge
from fusechat_merge.report import Report, short_names

logger = logging.getLogger(__name__)
SWITCH = "FUSECHAT_MERGE_REPORT"
METHODS = ("sce", "varm")


class Reporter:
    """The reports of the output that this process merges; several where its slices have other pivots or targets."""

    def __init__(self):
        self._lock = threading.Lock()
        self._reports: list[Report] = []  # the last one takes the next tensor
        self._fixed = False  # inside `recording`
        self._one_output = False  # inside `one_output`
        self._failed = False  # a row could not be written

    @contextlib.contextmanager
    def recording(self, report: Report) -> Iterator[None]:
        """Add every tensor that the block merges to this report; an error in the report is raised."""
        self._reports, self._fixed = [report], True
        try:
            yield
        finally:
            self._forget()

    @contextlib.contextmanager
    def one_output(self) -> Iterator[None]:
        """Report on the output that the block merges. Its reports are finished after the block, unless it fails.

        Inside another `one_output` it does nothing.

        Raises:
            ValueError: FUSECHAT_MERGE_REPORT cannot be a directory.
        """
        root = os.environ.get(SWITCH)
        if self._one_output or not root:
            yield
            return
        existing = next(
            path for path in (Path(root).absolute(), *Path(root).absolute().parents) if os.path.lexists(path)
        )
        if not existing.is_dir():
            raise ValueError(f"{SWITCH}: expected a directory, got {root}, as {existing} is not one. Choose another.")
        self.finish()
        self._one_output = True
        try:
            yield
            self.finish()
        finally:
            for report in self._reports:
                logger.warning("merge report %s: the merge failed, so it has no summary", report.directory)
            self._forget()

    def add(
        self, method: str, pivot: str, targets: Sequence[str], tensor: str, tensors: Sequence[Tensor], merge: Merge
    ) -> None:
        """Add a merged tensor to the report that takes it, if one does.

        Args:
            method, pivot, targets, tensor: names, see `report_for`.
            tensors: the pivot's and the targets' tensors.
            merge: the result.
        """
        if self._failed:
            return
        try:
            report = self.report_for(method, pivot, targets, tensor)
            if report is not None:
                report.add(tensor, tensors[0], tensors[1:], targets, merge)
        except Exception as error:
            if self._fixed:  # an inspection is nothing but its report
                raise
            with self._lock:
                if not self._failed:
                    root = os.environ[SWITCH]
                    logger.warning("merge report in %s: the merge continues without its report: %s", root, error)
                self._failed = True

    def report_for(self, method: str, pivot: str, targets: Sequence[str], tensor: str) -> Report | None:
        """The report that a merged tensor is added to; None where there is none.

        A new one is opened in the next subfolder of FUSECHAT_MERGE_REPORT when the method, the pivot or a target is
        not the last report's, or when it has the tensor already.
        """
        with self._lock:
            last = self._reports[-1] if self._reports else None
            if self._fixed:
                return last if last is not None and set(targets) <= set(last.targets) else None
            root = os.environ.get(SWITCH)
            if not root:
                return None
            if last is None or not last.continued_by(method, pivot, targets, tensor):
                if not self._one_output:
                    self.finish()
                last = _open(Path(root), method, pivot, targets)
                self._reports.append(last)
            last.begun.add(tensor)
            return last

    def finish(self) -> None:
        """Write the summaries of the reports; a failure is a warning."""
        reports, failed = self._reports, self._failed
        self._reports, self._failed = [], False
        for report in () if failed else reports:
            try:
                report.finish()
            except Exception as error:
                logger.warning("merge report %s is incomplete (the merge is not): %s", report.directory, error)

    def _forget(self) -> None:
        self._reports, self._fixed, self._one_output, self._failed = [], False, False, False


reporter = Reporter()
atexit.register(reporter.finish)  # for a merge that did not go through `run_merge`


def patch(merge: Any) -> None:
    """Have `run_merge` of `mergekit.merge`, the module, report on its output; calling it again changes nothing."""
    run_merge = merge.run_merge
    if getattr(run_merge, "patched_by_fusechat", False):
        return

    @functools.wraps(run_merge)
    def run_merge_with_report(merge_config, *args, **kwargs):
        with reporter.one_output() if merge_config.merge_method in METHODS else contextlib.nullcontext():
            return run_merge(merge_config, *args, **kwargs)

    run_merge_with_report.patched_by_fusechat = True  # pyright: ignore[reportAttributeAccessIssue]
    merge.run_merge = run_merge_with_report


def _open(root: Path, method: str, pivot: str, targets: Sequence[str]) -> Report:
    root.mkdir(parents=True, exist_ok=True)
    numbers = [re.match(r"(\d{3})-", entry.name) for entry in root.iterdir()]
    number = 1 + max((int(found.group(1)) for found in numbers if found), default=0)
    directory = root / f"{number:03d}-{method}-{short_names([pivot])[0]}"
    report = Report(directory, method, pivot, targets)
    directory.mkdir()  # its number is taken
    logger.info("merge report goes to %s", directory)
    return report
