"""`stages.json`: what each step of a run was made from and what it wrote, both by content.

A step is finished where its arguments, its inputs and its output are still those of its entry; file dates and launchers
do not count.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import threading
from pathlib import Path
from typing import Any

from fusechat_fuse.models.files import is_gguf
from fusechat_fuse.models.identity import add_samples
from fusechat_fuse.pipeline.steps import Step
from fusechat_fuse.store.files import file_sha256, json_bytes, read_json, short_digest, write_atomic

RECORD_FILE = "stages.json"


class Record:
    """The entries of `stages.json`, by step; the whole file is written after every change.

    An entry: fingerprint, arguments, command, and of a finished step output, seconds, peak_bytes.
    """

    def __init__(self, path: Path):
        self.path, self.entries, self.lock = path, read_json(path, "record of the run") or {}, threading.Lock()

    def source_of_plain(self) -> str | None:
        """The source whose aligned data the `plain` baseline was trained on; None if it was not trained."""
        command = self.entries.get("train plain", {}).get("arguments", [])
        return Path(command[command.index("--data_path") + 1]).name if command else None

    def is_done(self, step: Step) -> bool:
        """Whether the step has finished on the same arguments and inputs, and its output is unchanged since."""
        entry = self.entries.get(step.key, {})
        return "output" in entry and self._is_unchanged(step) and entry["output"] == content_digest(step.output)

    def begin(self, step: Step) -> bool:
        """Enter a step that starts. Returns whether its old output must be removed first.

        That is the output of an earlier start of this run: one made from other inputs, if the step is `made_anew`, or
        any merge (mergekit needs an empty directory). What this run did not write is left to the command to refuse.
        """
        known, unchanged = step.key in self.entries, self._is_unchanged(step)
        self._put(step, {})
        return known and step.made_anew and (not unchanged or step.stage == "merge")

    def end(self, step: Step, seconds: float, peak_bytes: int) -> None:
        """Enter a finished step: its duration and the peak memory of its largest process (0: unknown)."""
        self._put(step, {"output": content_digest(step.output), "seconds": round(seconds, 1), "peak_bytes": peak_bytes})

    def _is_unchanged(self, step: Step) -> bool:
        return self.entries.get(step.key, {}).get("fingerprint") == fingerprint(step)

    def _put(self, step: Step, results: dict[str, Any]) -> None:
        entry = {"fingerprint": fingerprint(step), "arguments": step.arguments, "command": step.shell, **results}
        with self.lock:
            self.entries[step.key] = entry
            write_atomic(self.path, json_bytes(self.entries))


def fingerprint(step: Step) -> str:
    """16 hexadecimal digits of what a step is made from: its arguments and the content of its inputs."""
    made_from = [step.arguments, {path: content_digest(Path(path)) for path in step.reads}]
    return short_digest(json.dumps(made_from))


def content_digest(path: Path) -> str:
    """The content of a file in 16 hexadecimal digits; of a directory, its files' names, sizes and samples (files of up
    to 64 KiB count whole).

    A glob pattern stands for the files that it matches, a Hub name for itself.
    """
    if path.is_file():
        status = path.stat()
        return _file_digest(path, status.st_size, status.st_mtime_ns)
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else ():
        if file.is_file() and not any(part.startswith((".", "checkpoint-")) for part in file.relative_to(path).parts):
            digest.update(f"{file.relative_to(path)}\n".encode())
            add_samples(digest, file)
    if path.is_dir():
        return short_digest(digest)
    return " ".join(content_digest(Path(match)) for match in sorted(glob.glob(str(path), recursive=True))) or "name"


@functools.cache
def _file_digest(path: Path, size: int, modified: int) -> str:
    """Each file is read once per run; size and time of modification tell whether it changed meanwhile. A GGUF file is
    a model: samples, as of the files in a model's directory."""
    if not is_gguf(path):
        return file_sha256(path)[:16]
    digest = hashlib.sha256()
    add_samples(digest, path)
    return short_digest(digest)
