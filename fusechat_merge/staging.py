"""`fusechat-merge yaml`: mergekit's own command, writing to a staging directory that is renamed at the end.

mergekit streams shards into the output directory and writes the config last; a run that fails half way leaves a
directory that looks like a model. Here the output appears complete or not at all.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fusechat_merge.errors import writing

LORA_CACHE = "--lora-merge-cache"


def merge(config_path: str, out_path: str, flags: Sequence[str] = ()) -> None:
    """Check the recipe, run mergekit-yaml with `flags` and put the result at `out_path`.

    Raises:
        ValueError: see `recipe.load`; `out_path` exists and is not an empty directory, or is one that nothing can be
            renamed to; the merge report would lie in it.
    """
    from mergekit.scripts import run_yaml

    from fusechat_merge import recipe, reporting

    out = _resolved(out_path)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"output {out_path}: expected a new or empty directory, got one with files. Choose another.")
    if out.is_mount():
        raise ValueError(f"output {out_path}: expected a directory, got a mount point. Choose a directory in it.")
    reports = os.environ.get(reporting.SWITCH)
    if reports and out in (resolved := Path(reports).resolve(), *resolved.parents):
        raise ValueError(
            f"{reporting.SWITCH}: expected a directory outside the output {out_path}, got {reports}. Choose another."
        )
    config = recipe.load(config_path)
    if "--no-write-model-card" not in flags:
        recipe.check_names(config, str(config_path))
    recipe.check_adapters(
        config,
        str(config_path),
        any(flag.partition("=")[0] == LORA_CACHE for flag in flags),
        f"Pass {LORA_CACHE} DIR.",
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(out)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.{os.getpid()}-", dir=out.parent))
    try:
        with writing(f"output {out_path}"), reporting.reporter.one_output():
            staged = staging / out.name  # mergekit takes the model's name from it
            words = [str(config_path), str(staged), *flags]
            run_yaml.main.main(words, prog_name="mergekit-yaml", standalone_mode=False)
            staged.replace(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _resolved(out_path: str) -> Path:
    """The output directory, with symbolic links followed (they stay links)."""
    try:
        out = Path(out_path).resolve()
    except (OSError, RuntimeError):  # Python before 3.13 raises it
        out = None
    if out is None or out.is_symlink():
        raise ValueError(f"output {out_path}: expected a directory, got a symbolic link in a loop. Choose another.")
    return out


def _remove_abandoned(out: Path) -> None:
    """Remove the staging directories that killed runs for the same output left."""
    for entry in out.parent.iterdir():
        match = re.fullmatch(rf"\.{re.escape(out.name)}\.(\d+)-\w+", entry.name)
        if match:
            try:
                os.kill(int(match.group(1)), 0)
            except ProcessLookupError:
                shutil.rmtree(entry, ignore_errors=True)
            except PermissionError:  # another user's process runs
                pass
