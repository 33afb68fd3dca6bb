"""A step's command as a subprocess: its output goes to a log, its peak memory is measured, and it dies with the run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from fusechat_fuse.pipeline.steps import Step
from fusechat_fuse.processes import DIE_WITH_PARENT, die_with_parent


def execute(step: Step, log: Path, environment: dict[str, str], quiet: bool) -> tuple[int, int]:
    """Run a step's command; append its output to `log` and, unless quiet, copy it to standard error.

    Returns: its exit code, and the peak memory in bytes of its largest process, as of its last output (0: unknown).
    """
    peak_bytes = 0
    with log.open("ab") as file:
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
