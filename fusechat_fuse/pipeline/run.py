"""`run`: the steps of a recipe, each as a subprocess, each skipped where it is finished and unchanged.

What a step was made from (its arguments and what it reads) and what it made are kept by content in `stages.json`;
dates and launchers do not count. A killed run goes on with the same command, the stages from where they stopped.
"""

from __future__ import annotations

import ctypes
import functools
import glob
import hashlib
import json
import logging
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fusechat_fuse.errors import InputError
from fusechat_fuse.models.files import is_gguf
from fusechat_fuse.models.identity import add_samples
from fusechat_fuse.pipeline.recipe import read_recipe
from fusechat_fuse.pipeline.report import write_report
from fusechat_fuse.pipeline.steps import STAGES, Step, steps_of
from fusechat_fuse.store.files import file_sha256, json_bytes, read_json, write_atomic

logger = logging.getLogger(__name__)
RECORD = "stages.json"
PR_SET_PDEATHSIG, SIGKILL = 1, 9
_LIBRARY = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: a forked child must not load anything


def run(
    recipe,
    *,
    only: str | None = None,
    start: str | None = None,
    dry_run: bool = False,
    check: Callable[[list[str]], Any] | None = None,
) -> dict[str, Any]:
    """Carry out a recipe.

    Args:
        recipe: path of the YAML file, see `pipeline.recipe`.
        only: one stage of STAGES; start: the first stage; what comes before must be there.
        dry_run: say what would be done, and do nothing.
        check: raises InputError for arguments of `fusechat-fuse` that it would refuse; asked before anything begins.

    Returns: `stages.json` as it is at the end: step -> fingerprint, output, seconds, peak_bytes, command.

    Raises:
        InputError: a bad recipe, an unknown stage or flag.
        RuntimeError: the first step that fails, with the command to repeat by hand and its log.
    """
    plan = read_recipe(recipe)
    for stage in (only, start):
        if stage is not None and stage not in STAGES:
            raise InputError(f"stage for run: expected one of {', '.join(STAGES)}, got {stage!r}. Use one.")
    if only is not None and start is not None:
        raise InputError(f"stages for run: expected --only or --from, got both ({only}, {start}). Leave one out.")
    record = _Record(plan.output_dir / RECORD)
    steps = steps_of(plan, record.plain_of())
    wanted = [s for s in STAGES if s == (only or s) and STAGES.index(s) >= STAGES.index(start or STAGES[0])]
    chosen = [step for step in steps if step.stage in wanted]
    left = [step for step in chosen if not record.is_done(step)]
    if check is not None:
        for step in left:
            try:
                if step.stage != "merge":
                    check(step.arguments)
            except InputError as error:
                raise InputError(f"{step.key} of {recipe}: {error}") from error
    if dry_run:
        for step in chosen:
            logger.info("%s: %s\n    %s", step.key, "run" if step in left else "skip", step.shell)
        return record.entries
    plan.output_dir.mkdir(parents=True, exist_ok=True)
    progress = _Progress(left, record)
    for stage in wanted:
        of_stage = [step for step in chosen if step.stage == stage]
        together = [step for step in of_stage if step.parallel and plan.devices]
        _side_by_side(together, plan.devices, record, progress, plan.output_dir)
        for step in of_stage:
            if step not in together:
                _perform(step, record, progress, plan.output_dir)
    if "report" in wanted:
        write_report(plan, steps, record.entries)
        logger.info("report: %s", plan.output_dir / "report.html")
    return record.entries


class _Record:
    """`stages.json`, written whole after every step."""

    def __init__(self, path: Path):
        self.path, self.entries, self.lock = path, read_json(path, "record of the run") or {}, threading.Lock()

    def plain_of(self) -> str | None:
        """The source that `plain` was trained with, where it was."""
        command = self.entries.get("train plain", {}).get("arguments", [])
        return Path(command[command.index("--data_path") + 1]).name if command else None

    def is_done(self, step: Step) -> bool:
        """Finished, from what is there now, and its output as it was left."""
        entry = self.entries.get(step.key, {})
        return "output" in entry and self._is_of(step) and entry["output"] == _digest(step.output)

    def begin(self, step: Step) -> bool:
        """Write down that a step begins; whether its output is one that this run made and that cannot be gone on with.

        That is an output made from something else, where the step is `made_anew`, and any merge, which takes no
        directory with files. What the run did not make is left to the command, which refuses it.
        """
        known, same = step.key in self.entries, self._is_of(step)
        self._put(step, {})
        return known and step.made_anew and (not same or step.stage == "merge")

    def end(self, step: Step, seconds: float, peak_bytes: int) -> None:
        """Write down a finished step: how long it took, the memory of its largest process (0: not known)."""
        self._put(step, {"output": _digest(step.output), "seconds": round(seconds, 1), "peak_bytes": peak_bytes})

    def _is_of(self, step: Step) -> bool:
        return self.entries.get(step.key, {}).get("fingerprint") == _fingerprint(step)

    def _put(self, step: Step, more: dict[str, Any]) -> None:
        about = {"fingerprint": _fingerprint(step), "arguments": step.arguments, "command": step.shell}
        with self.lock:
            self.entries[step.key] = {**about, **more}
            write_atomic(self.path, json_bytes(self.entries))


def _fingerprint(step: Step) -> str:
    """What a step is made from: its arguments and the content of what it reads."""
    made_from = [step.arguments, {path: _digest(Path(path)) for path in step.reads}]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]


def _digest(path: Path) -> str:
    """The content of a file; of a directory names, sizes and samples of its files (all of those up to 64 KiB).

    A Hub name stands for itself, a pattern for the files that it fits.
    """
    if path.is_file():
        about = path.stat()
        return _file_digest(path, about.st_size, about.st_mtime_ns)
    found = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else ():
        if file.is_file() and not any(part.startswith((".", "checkpoint-")) for part in file.relative_to(path).parts):
            found.update(f"{file.relative_to(path)}\n".encode())
            add_samples(found, file)
    if path.is_dir():
        return found.hexdigest()[:16]
    return " ".join(_digest(Path(match)) for match in sorted(glob.glob(str(path), recursive=True))) or "name"


@functools.cache
def _file_digest(path: Path, size: int, changed: int) -> str:
    """Read once by a run; the arguments after the path tell whether a file is still the same within it. Of a GGUF file,
    which is a model, samples as of the files in a model's directory."""
    if not is_gguf(path):
        return file_sha256(path)[:16]
    found = hashlib.sha256()
    add_samples(found, path)
    return found.hexdigest()[:16]


class _Progress:
    """One line a step, with the time that passed and what is left by the steps that were measured."""

    def __init__(self, left: list[Step], record: _Record):
        self.left, self.record, self.start = {step.key: step for step in left}, record, time.monotonic()

    def say(self, step: Step, what: str) -> None:
        """Log one line."""
        if what != "starts":
            self.left.pop(step.key, None)
        measured: dict[str, list[float]] = {}
        for key, entry in list(self.record.entries.items()):
            if "seconds" in entry:
                measured.setdefault(key.split()[0], []).append(entry["seconds"])
        known = [s for s in self.left.values() if s.stage in measured]
        remaining = sum(sum(measured[s.stage]) / len(measured[s.stage]) for s in known)
        left = f"about {_clock(remaining)}" if len(known) == len(self.left) else f"more than {_clock(remaining)}"
        logger.info("[%s, %s left] %s: %s", _clock(time.monotonic() - self.start), left, step.key, what)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


def _side_by_side(steps: list[Step], devices: list[str], record: _Record, progress: _Progress, home: Path) -> None:
    """Independent steps, one on each device at a time; the first failure is raised when those that run have ended."""
    if not steps:
        return
    free: queue.Queue[str] = queue.Queue()
    for device in devices:
        free.put(device)

    def perform(step: Step) -> None:
        device = free.get()
        try:
            _perform(step, record, progress, home, {"CUDA_VISIBLE_DEVICES": device}, quiet=True)
        finally:
            free.put(device)

    with ThreadPoolExecutor(len(devices)) as pool:
        futures = [pool.submit(perform, step) for step in steps]
        for future in futures:
            try:
                future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def _perform(
    step: Step, record: _Record, progress: _Progress, home: Path, more: dict | None = None, quiet: bool = False
) -> None:
    """Skip one step or run it."""
    if record.is_done(step):
        return progress.say(step, "finished before")
    if record.begin(step):
        shutil.rmtree(step.output, ignore_errors=True)
    for path, text in step.files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text.encode())
    log = home / "logs" / f"{step.key.replace(' ', '-')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    progress.say(step, "starts")
    begun = time.monotonic()
    code, peak_bytes = _follow(step, log, {**step.environment, **(more or {})}, quiet)
    if code:
        raise RuntimeError(
            f"{step.key} ended with exit code {code}: {_last_line(log)} | all it said: {log} | by hand: {step.shell}"
        )
    record.end(step, time.monotonic() - begun, peak_bytes)
    progress.say(step, f"done in {_clock(time.monotonic() - begun)}")


def _follow(step: Step, log: Path, environment: dict[str, str], quiet: bool) -> tuple[int, int]:
    """Run a command; what it says goes to its log and, unless quiet, on to standard error.

    Returns its exit code and the most bytes that one process of it held when it last said something (0: not known).
    """
    peak_bytes = 0
    with log.open("ab") as kept:
        kept.write(f"$ {step.shell}\n".encode())
        kept.flush()
        child = subprocess.Popen(
            step.command,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=_end_with_parent if _LIBRARY else None,
        )
        assert child.stdout is not None
        try:
            while said := os.read(child.stdout.fileno(), 1 << 16):
                peak_bytes = max(peak_bytes, _high_water(child.pid))
                kept.write(said)
                kept.flush()
                if not quiet:
                    sys.stderr.buffer.write(said)
                    sys.stderr.flush()
            return child.wait(), peak_bytes
        except BaseException:
            child.terminate()
            child.wait()
            raise


def _high_water(pid: int | str) -> int:
    """The most bytes that a process, or the largest of those it started, has held so far; 0 where Linux does not say.

    What wait4 tells of an ended process is at least what its parent held when it forked.
    """
    try:
        said = Path(f"/proc/{pid}/status").read_text()
        started = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    own = re.search(r"VmHWM:\s*(\d+) kB", said)
    return max([1024 * int(own[1]) if own else 0, *map(_high_water, started)])


def _end_with_parent() -> None:
    """In the child: when the run is killed, so is the stage, which the next run then continues."""
    assert _LIBRARY is not None
    _LIBRARY.prctl(PR_SET_PDEATHSIG, SIGKILL)


def _last_line(log: Path) -> str:
    """What the last command in a log said of its end."""
    said = log.read_text(errors="replace").rpartition("\n$ ")[2]
    lines = [line.strip() for line in said.splitlines()[1:] if line.strip()]
    told = [line for line in lines if line.startswith(("fusechat-fuse:", "fusechat-merge:"))]
    return (told or lines or [""])[-1].rstrip(".") + "."
