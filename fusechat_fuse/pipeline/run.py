"""`run`: the steps of a recipe, each as a subprocess, each skipped if it is finished and unchanged.

The same command continues a killed run; each step continues where it stopped.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

from fusechat_fuse.errors import InputError, describe_error, writing
from fusechat_fuse.pipeline.best import best_of, link_best
from fusechat_fuse.pipeline.recipe import RECORD_FILE, read_recipe
from fusechat_fuse.pipeline.record import Record, inputs_of
from fusechat_fuse.pipeline.report import write_report
from fusechat_fuse.pipeline.serving import steps_now
from fusechat_fuse.pipeline.steps import STAGES, Step
from fusechat_fuse.processes import DIE_WITH_PARENT, die_with_parent
from fusechat_fuse.store.files import write_atomic

logger = logging.getLogger(__name__)


def run(
    recipe,
    *,
    only: str | None = None,
    start: str | None = None,
    overwrite: Sequence[str] = (),
    dry_run: bool = False,
    options_of: Callable[[list[str]], Any] | None = None,
) -> dict[str, Any]:
    """Carry out a recipe.

    Args:
        recipe: path of the YAML file, see `pipeline.recipe`.
        only: one stage of STAGES; start: the first stage. The results of earlier stages must exist.
        overwrite: stages whose steps start anew if their options, inputs or finished output have changed; the old
            output is removed. Of other stages, the command decides whether it can continue (compare, combine and
            evaluate start anew where options or inputs have changed, the training on all sources where inputs have).
        dry_run: log what would be done, and do nothing.
        options_of: raises InputError for bad arguments of `fusechat-fuse`; called for every step before any starts.

    Returns: `stages.json` as it is at the end: step -> fingerprint, output, seconds, peak_bytes, command.

    Raises:
        InputError: a bad recipe, an unknown stage or flag, another run at work in the same directory.
        RuntimeError: the first step that fails, with the command to repeat it by hand and its log.
    """
    checked = read_recipe(recipe)
    stages = _chosen_stages(only, start, overwrite)
    record = Record(checked.output_dir / RECORD_FILE)
    known = steps_now(checked, record)
    _warn_of(known.left_out)
    steps = known.steps
    chosen = [step for step in steps if step.stage in stages]
    unfinished = [step for step in chosen if not record.is_done(step)]
    if options_of is not None:
        _check_arguments(unfinished, recipe, options_of)
    if dry_run:
        _log_dry_run(chosen, unfinished, record, overwrite)
        return record.entries
    checked.output_dir.mkdir(parents=True, exist_ok=True)
    with _locked(checked.output_dir):
        record = Record(record.path)  # a run that has ended meanwhile may have changed it
        current = _Run(checked.output_dir, record, unfinished, overwrite)
        for stage in stages:
            for command, group in groupby([s for s in steps if s.stage == stage], key=lambda step: step.arguments[0]):
                current.perform_all([*group], checked.devices if command in ("represent", "answer") else [])
            if stage == "compare":
                before, known = known, steps_now(checked, record)
                _warn_of([sentence for sentence in known.left_out if sentence not in before.left_out])
                steps = known.steps
                current.keep(steps)
        if "report" in stages:
            best = best_of(steps, record)
            write_report(checked, steps, record.entries, known.left_out, best)
            logger.info("report: %s", checked.output_dir / "report.html")
            link_best(checked.output_dir, best)
    return record.entries


def _warn_of(sentences: list[str]) -> None:
    for sentence in sentences:
        logger.warning(sentence)


@contextlib.contextmanager
def _locked(home: Path):
    """Hold the lock of a run's directory, which ends with the process; not all file systems have locks.

    Raises: InputError that names the run that holds it.
    """
    with open(home / ".lock", "ab+", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            other = file.read().decode()
            raise InputError(
                f"output_dir for run: expected no other run in {home}, got one at work ({other}). Wait for its end, or "
                "choose another output_dir."
            ) from error
        except OSError as error:
            logger.warning("%s: %s, so that another run in it would not be refused.", home, describe_error(error))
        name = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        with writing(home / ".lock"):
            file.truncate(0)
            file.write(name.encode())
        yield


def _log_dry_run(chosen: list[Step], unfinished: list[Step], record: Record, overwrite: Sequence[str]) -> None:
    """Log for each step whether it would run, and its command."""
    outputs: list[str] = []  # of steps that would run
    for step in chosen:
        action = "skip"
        if step in unfinished:
            action = "run"
            if record.is_stale(step):
                action = f"run, or be refused if its options or inputs differ; --overwrite {step.stage} starts it anew"
                if record.starts_anew(step, step.stage in overwrite):
                    action = "run anew, since its options, inputs or output have changed"
        elif any(os.path.abspath(path) in outputs for path in inputs_of(step)):
            action = "run, unless its inputs turn out the same"
        if action != "skip":
            outputs.append(os.path.abspath(step.output))
        logger.info("%s: %s\n    %s", step.key, action, step.shell)


def _chosen_stages(only: str | None, start: str | None, overwrite: Sequence[str]) -> tuple[str, ...]:
    """The stages that --only and --from leave, in order."""
    for stage in (only, start, *overwrite):
        if stage is not None and stage not in STAGES:
            raise InputError(f"stage for run: expected one of {', '.join(STAGES)}, got {stage!r}. Use one.")
    if only is not None and start is not None:
        raise InputError(f"stages for run: expected --only or --from, got both ({only}, {start}). Leave one out.")
    return (only,) if only else STAGES[STAGES.index(start or STAGES[0]) :]


def _check_arguments(steps: list[Step], recipe, options_of: Callable[[list[str]], Any]) -> None:
    """Raise InputError for the first step whose flags `fusechat-fuse` would refuse (merges: mergekit checks them)."""
    for step in steps:
        try:
            if step.stage != "merge":
                options_of(step.arguments)
        except InputError as error:
            raise InputError(f"{step.key} of {recipe}: {error}") from error


class _Run:
    """A run in progress: performs steps, and logs for each the time passed and an estimate of the time left."""

    def __init__(self, home: Path, record: Record, unfinished: list[Step], overwrite: Sequence[str] = ()):
        self.home, self.record, self.overwrite, self.start = home, record, overwrite, time.monotonic()
        self.unfinished = {step.key: step for step in unfinished}

    def keep(self, steps: list[Step]) -> None:
        """Forget the unfinished steps that are none of these."""
        keys = {step.key for step in steps}
        self.unfinished = {key: step for key, step in self.unfinished.items() if key in keys}

    def perform(self, step: Step, device: str | None = None) -> None:
        """Run one step, unless it is finished; on a device of its own its output is only logged."""
        if self.record.is_done(step):
            return self._log(step, "finished before")
        stale = self.record.is_stale(step)
        self.record.begin(step, step.stage in self.overwrite)
        for path, text in step.files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, text.encode())
        log = self.home / "logs" / f"{step.key.replace(' ', '-')}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log(step, "starts")
        started = time.monotonic()
        environment = step.environment | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
        code, peak_bytes = execute(step, log, environment, quiet=device is not None)
        if code:
            message = f"{step.key} ended with exit code {code}: {last_message(log)}"
            if stale:
                message += f" | to start it anew: --overwrite {step.stage}"
            raise RuntimeError(f"{message} | full log: {log} | by hand: {step.shell}")
        self.record.end(step, time.monotonic() - started, peak_bytes)
        self._log(step, f"done in {_clock(time.monotonic() - started)}")

    def perform_all(self, steps: list[Step], devices: list[str]) -> None:
        """Run independent steps, one per device at a time; without devices, one after the other.

        A failure is raised once the running steps have ended.
        """
        if not devices:
            for step in steps:
                self.perform(step)
            return
        free, own = iter(devices), threading.local()

        def take_device() -> None:
            own.device = next(free)

        with ThreadPoolExecutor(len(devices), initializer=take_device) as pool:
            futures = [pool.submit(lambda step=step: self.perform(step, own.device)) for step in steps]
            try:
                for future in futures:
                    future.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _log(self, step: Step, event: str) -> None:
        if event != "starts":
            self.unfinished.pop(step.key, None)
        measured: dict[str, list[float]] = {}
        for key, entry in list(self.record.entries.items()):
            if "seconds" in entry:
                measured.setdefault(key.split()[0], []).append(entry["seconds"])
        known = [left for left in self.unfinished.values() if left.stage in measured]
        seconds = sum(sum(measured[left.stage]) / len(measured[left.stage]) for left in known)
        bound = "about" if len(known) == len(self.unfinished) else "more than"
        passed = _clock(time.monotonic() - self.start)
        logger.info("[%s, %s %s left] %s: %s", passed, bound, _clock(seconds), step.key, event)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


def execute(step: Step, log: Path, environment: dict[str, str], quiet: bool) -> tuple[int, int]:
    """Run a step's command; append its output to `log` and, unless quiet, copy it to standard error.

    Returns: its exit code, and the peak memory in bytes of its largest process, as of its last output (0: unknown).
    """
    peak_bytes = 0
    with writing(log), log.open("ab") as file:
        file.write(f"$ {step.shell}\n".encode())
        file.flush()
        child = subprocess.Popen(
            step.command,
            env={**os.environ, DIE_WITH_PARENT: "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
        )
        assert child.stdout is not None
        try:
            while output := os.read(child.stdout.fileno(), 1 << 16):
                peak_bytes = max(peak_bytes, _peak_memory(child.pid))
                file.write(output)
                file.flush()
                if not quiet:
                    sys.stderr.buffer.write(output)
                    sys.stderr.flush()
            return child.wait(), peak_bytes
        except BaseException:
            child.terminate()
            child.wait()
            raise


def _peak_memory(pid: int | str) -> int:
    """Peak memory so far, in bytes, of a process or of the largest process below it; 0 where Linux does not report it.

    Not from wait4: what it reports of an ended process is at least what the parent held when it forked.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    own = re.search(r"VmHWM:\s*(\d+) kB", status)
    return max([1024 * int(own[1]) if own else 0, *map(_peak_memory, children)])


def last_message(log: Path) -> str:
    """The last line that the last command of a log printed; an error of our own commands goes before other lines."""
    output = log.read_text(errors="replace").rpartition("\n$ ")[2]
    lines = [line.strip() for line in output.splitlines()[1:] if line.strip()]
    errors = [line for line in lines if line.startswith(("fusechat-fuse:", "fusechat-merge:"))]
    return (errors or lines or [""])[-1].rstrip(".") + "."
