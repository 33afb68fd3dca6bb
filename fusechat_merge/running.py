"""What `run_merge` of mergekit does besides, for our methods: it never writes over an input, takes no merged adapter
that is unfinished or outdated, ends with an error where the tokenizer finds no room, and writes the merge report.
"""

import contextlib
import functools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference

from fusechat_merge._autoload import OWN
from fusechat_merge.checkpoint import check_one_save, stored_dtypes, weight_files
from fusechat_merge.errors import number_of
from fusechat_merge.reporting import reporter


def patch(merge: Any) -> None:
    """Wrap `run_merge` of `mergekit.merge`, the module; calling it again changes nothing."""
    run_merge, copy_tokenizer = merge.run_merge, merge._copy_tokenizer
    if getattr(run_merge, "patched_by_fusechat", False):
        return
    failures: list[Exception] = []

    @functools.wraps(copy_tokenizer)
    def copy_tokenizer_or_fail(*args, **kwargs):
        try:
            copy_tokenizer(*args, **kwargs)
        except Exception as error:  # which mergekit logs, and calls the merge successful
            failures.append(error)
            raise

    @functools.wraps(run_merge)
    def run_merge_with_checks(merge_config, out_path, options, *args, **kwargs):
        if merge_config.merge_method not in OWN:
            return run_merge(merge_config, out_path, options, *args, **kwargs)
        check_output(merge_config, out_path)
        failures.clear()
        with reporter.one_output(), whole_adapters(merge_config, options.lora_merge_cache):
            result = run_merge(merge_config, out_path, options, *args, **kwargs)
            for error in failures:
                if number_of(error) is not None:
                    raise error
        check_one_save(out_path)
        return result

    run_merge_with_checks.patched_by_fusechat = True  # pyright: ignore[reportAttributeAccessIssue]
    merge.run_merge, merge._copy_tokenizer = run_merge_with_checks, copy_tokenizer_or_fail


def check_output(config: Any, out_path: str | Path) -> None:
    """Raises ValueError where a merge would be written over one of its inputs."""
    for model in config.referenced_models():
        if os.path.isdir(model.model.path) and os.path.realpath(model.model.path) == os.path.realpath(out_path):
            raise ValueError(f"output {out_path}: expected a directory of its own, got the input {model}. Choose one.")


@contextlib.contextmanager
def whole_adapters(config: Any, cache: str | None) -> Iterator[None]:
    """The block finds no merged adapter in mergekit's cache that is not to be used, and leaves none unfinished.

    Raises:
        ValueError: a merged adapter is unfinished, or older than the adapter or its base model.
    """
    adapted = [model for model in config.referenced_models() if model.lora is not None] if cache else []
    folders = {_merged_adapter(model, str(cache)): model for model in adapted}
    new = [folder for folder in folders if not folder.exists()]
    for folder in folders.keys() - new:
        _check_merged_adapter(folders[folder], folder)
    try:
        yield
    except BaseException:
        for folder in new:
            if folder.exists() and not _is_whole(folder):
                shutil.rmtree(folder, ignore_errors=True)
        raise


def _merged_adapter(model: ModelReference, cache: str) -> Path:
    """Where mergekit keeps the merge of `model+adapter`."""
    assert model.lora is not None
    return Path(cache, f"{model.model._unique_id()}_{model.lora._unique_id()}")


def _is_whole(folder: Path) -> bool:
    try:
        return bool(stored_dtypes(weight_files(folder)))
    except ValueError:
        return False


def _check_merged_adapter(model: ModelReference, folder: Path) -> None:
    assert model.lora is not None
    got = None if _is_whole(folder) else "an unfinished one"
    sources = [*Path(model.lora.path).glob("adapter_*"), *Path(model.model.path).glob("*.safetensors")]
    made = min((file.stat().st_mtime for file in folder.iterdir()), default=0.0)
    if any(file.stat().st_mtime > made for file in sources):
        got = got or "an older one"
    if got is not None:
        raise ValueError(f"merged adapter in {folder}: expected one made of {model} as it is, got {got}. Remove it.")
