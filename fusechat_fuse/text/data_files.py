"""Rows of chat data out of files, directories and Hub data sets, whatever their shape."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fusechat_fuse.errors import InputError

SUFFIXES = (".json", ".jsonl", ".parquet")


def _json_rows(path: Path) -> Iterator[Any]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"data for {path}: expected UTF-8 text, got byte {error.start} that is none. Convert it."
        ) from error
    if path.suffix == ".json":
        try:
            rows = json.loads(text)
        except ValueError as error:
            if "Extra data" not in str(error):
                raise InputError(f"data for {path}: expected JSON, got {error}. Mend or replace the file.") from error
        else:
            rows = rows.get("data", rows) if isinstance(rows, dict) else rows
            if not isinstance(rows, list):
                kind = "a single object" if isinstance(rows, dict) else type(rows).__name__
                raise InputError(f"data for {path}: expected a list of conversations, got {kind}. Put it into a list.")
            yield from rows
            return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise InputError(
                    f"data for {path}, line {number}: expected JSON, got {error}. Mend the line."
                ) from error


def _file_rows(path: Path) -> Iterable[Any]:
    if path.suffix in (".json", ".jsonl"):
        return _json_rows(path)
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        return parquet.read_table(path).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"data for {path}: expected a Parquet file, got {error}. Replace it.") from error


def data_rows(path_or_name: str, split: str) -> Iterable[Any]:
    """The rows of a data set, unchecked.

    Args:
        path_or_name: .json, .jsonl or .parquet file, directory (saved by `datasets`, or of such files), or Hub name.
        split: of a data set with several.
    Raises: InputError where nothing is there or it cannot be read; of a file, while its rows are taken.
    """
    path = Path(path_or_name)
    if path.is_file():
        if path.suffix not in SUFFIXES:
            kinds = ", ".join(SUFFIXES)
            raise InputError(f"data for {path}: expected a file ending in {kinds}, got {path.suffix!r}. Convert it.")
        return _file_rows(path)
    if path.is_dir():
        return _directory_rows(path, split)
    if path.suffix in SUFFIXES or path.is_absolute() or path_or_name.startswith("."):
        raise InputError(f"data for {path}: expected a file or directory, got nothing there. Check the path.")
    import datasets

    try:
        return datasets.load_dataset(path_or_name, split=split)
    except Exception as error:  # the hub's client raises many kinds; all mean the name cannot be loaded
        first = str(error).strip().split("\n")[0]
        raise InputError(f"data for {path_or_name}: expected a file, directory or Hub dataset, got {first}") from error


def _directory_rows(path: Path, split: str) -> Iterable[Any]:
    import datasets

    if (path / "state.json").exists():
        return datasets.load_from_disk(str(path))
    if (path / "dataset_dict.json").exists():
        splits = datasets.load_from_disk(str(path))
        assert isinstance(splits, datasets.DatasetDict), path  # what the file says
        if split not in splits:
            there = ", ".join(map(str, splits))
            raise InputError(f"split for {path}: expected one of {there}, got {split!r}. Give one of them.")
        return splits[split]
    inside = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if not inside:
        raise InputError(
            f"data for {path}: expected .json, .jsonl, .parquet files or a saved dataset, got none of them."
        )
    return (row for file in inside for row in _file_rows(file))
