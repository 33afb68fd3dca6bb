"""`stages.json`: what each step of a run was made from and what it wrote, both by content.

A step is finished if the options that decide its output, its inputs and its output are still those of its entry. File
dates, spellings of paths, the order of options, launchers, logging and numbers of workers do not count.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

from fusechat_fuse.errors import InputError
from fusechat_fuse.models.files import adapter_base, is_gguf
from fusechat_fuse.models.identity import add_samples
from fusechat_fuse.pipeline.steps import Step
from fusechat_fuse.store.files import file_sha256, json_bytes, short_digest, write_atomic
from fusechat_fuse.user_code import file_of

_NOTES = {"", *".md .rst .org .txt .pdf .doc .docx .odt .png .jpg .jpeg .gif .svg .html .log .bak".split()}  # suffixes
_NO_NOTES = ("vocab.txt", "merges.txt")
_MODELS = ("model", "model_name_or_path", "pivot_name_or_path")
_PATHS = (*_MODELS, "data_path", "questions", "pivot_representation", "source_representation", "aligned", "baseline")
_PATHS += ("eval_data_path", "counts", "template", "gguf_file", "deepspeed", "fsdp_config", "source_answers")
_PATHS += ("answers", "score", "")
_NO_EFFECT = ("output", "output_dir", "cache_dir", "num_proc", "server_requests", "disable_tqdm", "report_to")
_NO_EFFECT += ("run_name", "tokens_per_batch", "activation_checkpointing", "gradient_checkpointing", "save_total_limit")
_ANEW = ("compare", "assign", "answer")  # commands
_NO_EFFECT_PREFIXES = ("logging_", "log_", "dataloader_num_workers", "dataloader_p")  # pin_memory, prefetch_factor, ...


class Record:
    """The entries of `stages.json`, by step; the whole file is written after every change.

    An entry: arguments, command, fingerprint, inputs (path -> digest), of a finished step output (digest), seconds,
    peak_bytes, `stale` if the step started on what `is_stale`, and `derived` if the output is of a step that is.
    """

    def __init__(self, path: Path):
        self.path, self.lock, self.entries = path, threading.Lock(), _read(path)

    def source_of_plain(self) -> str | None:
        """The source whose aligned data the `plain` baseline was trained on; None if it was not trained."""
        command = self.entries.get("train plain", {}).get("arguments", [])
        return Path(command[command.index("--data_path") + 1]).name if command else None

    def is_done(self, step: Step) -> bool:
        """Whether the step has finished on the same options and inputs, and its output is unchanged since."""
        entry = self.entries.get(step.key, {})
        return "output" in entry and not self.is_changed(step) and entry["output"] == content_digest(step.output)

    def is_changed(self, step: Step) -> bool:
        """Whether an earlier start of the step had other options or inputs."""
        entry = self.entries.get(step.key)
        return entry is not None and entry["fingerprint"] != fingerprint(step, inputs_of(step))

    def is_stale(self, step: Step) -> bool:
        """Whether the step's command may refuse what an earlier start left.

        That start had other options or inputs, or what it finished has changed since.
        """
        entry = self.entries.get(step.key, {})
        suspect = "output" in entry or "stale" in entry or self.is_changed(step)
        return suspect and step.output.exists() and not self.is_done(step)

    def starts_anew(self, step: Step, overwrite: bool = False) -> bool:
        """Whether the output that an earlier start of the step left must be removed.

        That is anything of a merge (mergekit needs an empty directory), what is stale with `overwrite`, and what the
        run's own steps make different. What this run did not write stays: the command refuses it.
        """
        entry = self.entries.get(step.key)
        if entry is None or step.stage == "merge" or (overwrite and self.is_stale(step)):
            return entry is not None
        derived = step.derived and "derived" in entry  # what was made of other data is the user's to remove
        if step.key == "train multi" or (derived and step.stage == "train"):
            return entry["inputs"] != inputs_of(step)  # with other options it may go on from its checkpoints
        anew = derived or step.stage in ("combine", "evaluate") or step.arguments[0] in _ANEW
        return anew and self.is_changed(step)

    def begin(self, step: Step, overwrite: bool = False) -> None:
        """Enter a step that starts, with its inputs as they are now; remove its old output if it starts anew."""
        anew, stale = self.starts_anew(step, overwrite), self.is_stale(step)
        if anew:
            shutil.rmtree(step.output, ignore_errors=True)
        made_here = "derived" in self.entries.get(step.key, {}) or not step.output.exists()
        notes = {"derived": True} if step.derived and made_here else {}
        self._put(step, inputs_of(step), notes | ({"stale": True} if stale and not anew else {}))

    def end(self, step: Step, seconds: float, peak_bytes: int) -> None:
        """Enter a finished step: its duration and the peak memory of its largest process (0: unknown).

        Raises: RuntimeError if an input has changed since the step began; it then counts as unfinished.
        """
        before, now = self.entries[step.key]["inputs"], inputs_of(step)
        for path, digest in now.items():
            if before.get(path) not in (digest, None):  # None: a Hub name without a cached commit until now
                raise RuntimeError(
                    f"{step.key}: expected its inputs to stay as they are, got a change of {path} while it ran. Give "
                    f"the same command with --overwrite {step.stage}."
                )
        output = content_digest(step.output)
        notes = {"derived": True} if "derived" in self.entries[step.key] else {}
        self._put(step, now, {**notes, "output": output, "seconds": round(seconds, 1), "peak_bytes": peak_bytes})

    def _put(self, step: Step, inputs: dict[str, Any], results: dict[str, Any]) -> None:
        entry = {"arguments": step.arguments, "command": step.shell, "inputs": inputs}
        with self.lock:
            self.entries[step.key] = {**entry, "fingerprint": fingerprint(step, inputs), **results}
            write_atomic(self.path, json_bytes(self.entries))


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        entries = json.loads(path.read_bytes())
        if all({"fingerprint", "inputs"} <= entry.keys() for entry in entries.values()):
            return entries
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError):
        pass
    raise InputError(
        f"record of the run for {path}: expected an entry for each step, got a damaged file. Remove it and "
        f"{path.parent / 'merged'}: all other finished steps are recognised by what they wrote."
    )


def inputs_of(step: Step) -> dict[str, str | None]:
    """Path or Hub name -> digest, of all files, directories and Hub names among a step's arguments."""
    options, reads = options_by_name(step), step.arguments[0] in ("represent", "assign")
    return {
        value: content_digest(file_of(value) if name == "score" else Path(value), data=reads and name == "data_path")
        for name in _PATHS
        for value in options.get(name, ())
        if os.path.isabs(value) or name in (*_MODELS, "data_path", "questions")
    }


def options_by_name(step: Step) -> dict[str, list[str]]:
    """The arguments that decide a step's output, by flag ("": the positional ones), existing paths absolute."""
    options: dict[str, list[str]] = {"": []}
    name = ""
    for word in step.arguments[1:]:
        if word.startswith("--"):
            name = word[2:].replace("-", "_")
            options[name] = []
        else:
            options[name].append(_absolute(word, name in ("data_path", "questions")) if name in _PATHS else word)
    return {n: v for n, v in options.items() if n not in _NO_EFFECT and not n.startswith(_NO_EFFECT_PREFIXES)}


def _absolute(name: str, may_be_pattern: bool) -> str:
    exists = os.path.exists(name) or (may_be_pattern and glob.glob(name, recursive=True))
    return os.path.abspath(name) if exists else name


def fingerprint(step: Step, inputs: dict[str, Any]) -> str:
    """16 hexadecimal digits of what a step is made from: the options that count, and the content of its inputs."""
    return short_digest(json.dumps([step.arguments[0], options_by_name(step), inputs], sort_keys=True))


def content_digest(path: Path, *, data: bool = False) -> str | None:
    """What a path or Hub name holds, in 16 hexadecimal digits.

    Args:
        path: a file; a directory, of which notes, hidden files and checkpoints do not count; a glob pattern; or a Hub
            name, which stands for its cached commit. Adapters count with their base model.
        data: whether it is chat data, of which every byte counts; large files of models and stores by samples.
    Returns: None for a Hub name that is not cached.
    """
    if path.is_file():
        status = path.stat()
        return _file_digest(path, data or not is_gguf(path), status.st_size, status.st_mtime_ns)
    if path.is_dir():
        digest = hashlib.sha256()
        for file in sorted(path.rglob("*")):
            if file.is_file() and _counts(file.relative_to(path), data):
                digest.update(f"{file.relative_to(path)}\n".encode())
                status = file.stat()
                digest.update(_file_digest(file, data, status.st_size, status.st_mtime_ns).encode())
        base = None if data else adapter_base(path)
        return short_digest(digest) + (f" on {content_digest(Path(base))}" if base else "")
    matches = [match for match in sorted(glob.glob(str(path), recursive=True)) if os.path.exists(match)]
    if matches and matches != [str(path)]:
        return short_digest(json.dumps([[match, content_digest(Path(match), data=data)] for match in matches]))
    from huggingface_hub.constants import HF_HUB_CACHE

    repository = str(path).partition(":")[0].replace("/", "--")  # a name of data may have :CONFIGURATION
    commit = Path(HF_HUB_CACHE) / f"{'datasets' if data else 'models'}--{repository}" / "refs" / "main"
    return commit.read_text().strip() if commit.exists() else None


def _counts(file: Path, data: bool) -> bool:
    """Whether a file of a directory may decide what is made from it; the README of data may name their splits."""
    if any(part.startswith((".", "checkpoint-")) for part in file.parts):
        return False
    return file.suffix.lower() not in _NOTES or file.name in _NO_NOTES or (data and file.name == "README.md")


@functools.cache
def _file_digest(path: Path, whole: bool, size: int, modified: int) -> str:
    """Each file is read once per run; size and time of modification tell whether it changed meanwhile."""
    if whole:
        return file_sha256(path)[:16]
    digest = hashlib.sha256()
    add_samples(digest, path)
    return short_digest(digest)
