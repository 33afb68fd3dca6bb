"""Rows of chat data from files, directories and Hub data sets, not yet checked.

A directory of files is read as `datasets` reads one: files that name a split (`train.jsonl`, `validation/part.json`,
`data/test-00000-of-00002.parquet`) belong to it, the folder's name before the file's; files that name none belong to
`train`, unless another file names it. A glob over several splits is read in the same way. A directory whose README.md
lists its files, as on the Hub, is opened by `datasets` itself.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import logging
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

from fusechat_fuse.errors import InputError, first_line

SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet")
_KINDS = f"{', '.join(SUFFIXES)} (texts also as .gz or .zst)"
_WHERE = "a file, glob, directory or Hub name"
_CHAT_COLUMNS = {"messages", "conversations", "prompt", "completion", "instruction", "output"}
_UNREAD = (".csv", ".tsv", ".arrow", ".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz")
_ABOUT_DATA = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}
_SPLIT_WORDS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test"}
_SPLIT_WORDS |= {"evaluation": "test", "validation": "validation", "valid": "validation", "val": "validation"}
_SPLIT_WORDS |= {"dev": "validation"}
Source = tuple[str, Iterable[Any]]  # the name that errors use, and the rows
logger = logging.getLogger(__name__)


def names_in(data) -> list[str]:
    """The paths and Hub names that are to be read; none of rows."""
    entries = data if isinstance(data, list | tuple) else [data]
    return [str(entry) for entry in entries] if all(isinstance(entry, str | Path) for entry in entries) else []


def data_sources(data, split: str) -> list[Source]:
    """The rows of a data set, unchecked, each file's with its name.

    Args:
        data: file (.json, .jsonl, .ndjson, also as .gz or .zst, or .parquet), glob, directory (saved by `datasets`, or
            of such files), Hub name, a list of these, a mapping of split to rows (`datasets.DatasetDict`), or rows.
        split: split to read.
    Raises: InputError where nothing is there or it cannot be read; for a file, while its rows are read.
    """
    if names := names_in(data):
        return [source for name in names for source in _named(name, split)]
    if isinstance(data, Mapping):
        if _CHAT_COLUMNS & set(data):
            raise InputError("data for the given rows: expected a list of rows, got a single one. Put it into a list.")
        return [("the given rows", _of_split("the given rows", data, split))]
    try:
        return [("the given rows", iter(data))]
    except TypeError as error:
        got = type(data).__name__
        raise InputError(f"data for the given rows: expected {_WHERE}, or rows, got {got}. Give one.") from error


def _named(name: str, split: str) -> list[Source]:
    if not name.strip():
        raise InputError(f"data for {name!r}: expected {_WHERE}, got an empty name. Give its path or name.")
    path = Path(name)
    if path.is_file():
        return [_file(path, path.parent, split)]
    if path.is_dir():
        return _directory(path, split)
    if glob.has_magic(name):
        found = sorted(entry for entry in map(Path, glob.glob(name, recursive=True)) if entry.is_file())
        if not found:
            raise InputError(f"data for {name}: expected files of this pattern, got none. Check the pattern.")
        root = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
        if len({_split_named(entry.relative_to(root), split) for entry in found}) > 1:
            found = _files_of_split(name, root, found, split)
        return [_file(entry, root, split) for entry in _each_once(name, found)]
    if _kind(path) or path.is_absolute() or name.startswith("."):
        raise InputError(f"data for {path}: expected a file or directory, got nothing there. Check the path.")
    return [(name, _loaded(name, split))]


def _kind(path: Path) -> str | None:
    """The suffix that says how a file is read; None for a file that is not."""
    name = path.name.lower().removesuffix(".gz").removesuffix(".zst")
    kind = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
    return None if kind == ".parquet" and path.suffix.lower() in (".gz", ".zst") else kind


def _file(path: Path, root: Path, split: str) -> Source:
    """One file, whose path below `root` may name a split."""
    kind = _kind(path)
    if kind is None:
        raise InputError(f"data for {path}: expected a file ending in {_KINDS}, got {path.suffix!r}. Convert it.")
    wanted = _SPLIT_WORDS.get(split.lower(), split)
    is_split = wanted in ("train", _split_named(path.relative_to(root), split))
    if kind == ".json":
        return str(path), _json_rows(path, split, is_split)
    if not is_split:
        raise _no_splits(path, split)
    return str(path), _parquet_rows(path) if kind == ".parquet" else _lines_of(path)


def _no_splits(path: Path, split: str) -> InputError:
    return InputError(f"split for {path}: expected none, as its data has none, got {split!r}. Leave it out.")


def _parquet_rows(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            for n in range(file.num_row_groups):
                for batch in file.read_row_group(n).to_batches(max_chunksize=64):
                    yield from batch.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"data for {path}: expected a Parquet file, got {error}. Replace it.") from error


def _opened(path: Path) -> io.BufferedIOBase:
    kind = path.suffix.lower()
    if kind == ".gz":
        return gzip.open(path)
    if kind == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _raw_lines(path: Path) -> Iterator[bytes]:
    """The lines of a text file, compressed or not, without reading it whole."""
    try:
        with _opened(path) as file:
            yield from file
    except (OSError, EOFError, zlib.error) as error:
        what = {".gz": "a gzip file", ".zst": "a zstd file"}.get(path.suffix.lower(), "a file that can be read")
        raise InputError(f"data for {path}: expected {what}, got {error}. Replace it.") from error


def _text_lines(path: Path) -> Iterator[str]:
    position = 0
    for line in _raw_lines(path):
        try:
            yield line.decode("utf-8-sig" if position == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"data for {path}: expected UTF-8 text, got another byte at {position + error.start}. Convert it."
            ) from error
        position += len(line)


def _json_rows(path: Path, split: str, is_split: bool) -> Iterator[Any]:
    """The rows of a .json file: a list, {"data": list}, {split: list}, or lines."""
    text = "".join(_text_lines(path))
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        if "Extra data" not in str(error):
            raise InputError(f"data for {path}: expected JSON, got {error}. Correct or replace the file.") from error
        yield from _lines_of(path)
        return
    if isinstance(rows, dict) and isinstance(rows.get("data"), list):
        rows = rows["data"]
    elif isinstance(rows, dict) and _CHAT_COLUMNS.isdisjoint(rows) and set(map(type, rows.values())) == {list}:
        rows, is_split = _of_split(path, rows, split), True
    if not isinstance(rows, list):
        kind = "a single object" if isinstance(rows, dict) else type(rows).__name__
        raise InputError(f"data for {path}: expected a list of conversations, got {kind}. Put it into a list.")
    if not is_split:
        raise _no_splits(path, split)
    yield from rows


def _lines_of(path: Path) -> Iterator[Any]:
    for number, line in enumerate(_text_lines(path), start=1):
        if line.strip():
            try:
                yield json.loads(line.removesuffix("\n"))
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"data for {path}, line {number}: expected JSON, got {error}. Correct the line."
                ) from error


def _of_split(name, splits: Mapping, split: str) -> Any:
    if split not in splits:
        there = ", ".join(map(str, splits))
        raise InputError(f"split for {name}: expected one of {there}, got {split!r}. Give one of them.")
    return splits[split]


def _loaded(name: str, split: str) -> Any:
    """What `datasets` loads for a Hub name (NAME:CONFIGURATION if it has several) or a directory laid out like one.

    A directory is streamed: the cache of `datasets` takes a file for unchanged if its time of change is.
    """
    import datasets

    is_there = Path(name).exists()
    place, _, configuration = (name, "", "") if is_there else name.partition(":")
    try:
        return datasets.load_dataset(place, configuration or None, split=split, streaming=is_there)
    except Exception as error:  # the Hub's client raises many kinds of errors; all mean that the name cannot be loaded
        first = str(error).strip().split("\n")[0]
        raise InputError(f"data for {name}: expected a file, directory or Hub dataset, got {first}") from error


def _from_disk(path: Path) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(str(path))
    except Exception as error:  # a damaged file may raise anything
        raise InputError(
            f"data for {path}: expected a data set written by save_to_disk, got {first_line(error)}. Save it again."
        ) from error


def _directory(path: Path, split: str) -> list[Source]:
    if (path / "dataset_dict.json").exists():
        return [(str(path), _of_split(path, _from_disk(path), split))]
    if (path / "state.json").exists():
        saved = _from_disk(path)
        if split not in ("train", str(saved.split)):
            raise _no_splits(path, split)
        return [(str(path), saved)]
    if _lists_its_files(path / "README.md"):
        return [(str(path), _loaded(str(path), split))]
    found = [file.relative_to(path) for file in path.rglob("*") if file.is_file()]
    files = sorted(path / file for file in found if not any(part.startswith(".") for part in file.parts))
    unread = [file.name for file in files if not _kind(file) and file.suffix.lower() in _UNREAD]
    files = [file for file in files if _kind(file) and file.name not in _ABOUT_DATA]
    if not files:
        raise InputError(f"data for {path}: expected files ending in {_KINDS}, or a saved data set, got none of them.")
    if unread:
        logger.warning("%s: files of other formats are not read: %s", path, ", ".join(unread))
    return [_file(file, path, split) for file in _each_once(path, _files_of_split(path, path, files, split))]


def _each_once(name, files: list[Path]) -> list[Path]:
    """The files, if none of them is there compressed as well."""
    for file in files:
        if file.suffix.lower() in (".gz", ".zst") and file.with_suffix("") in files:
            both = f"{file.with_suffix('').name} and {file.name}"
            raise InputError(f"data for {name}: expected each file once, got {both}. Give the files to be read.")
    return files


def _lists_its_files(readme: Path) -> bool:
    """Whether a README begins with the Hub's description of which files make which split."""
    import yaml

    if not readme.is_file():
        return False
    head = re.match(r"---\s*\n(.*?)\n---", readme.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        about = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        return False
    configs = about.get("configs") if isinstance(about, dict) else None
    return isinstance(configs, list) and any(isinstance(c, dict) and "data_files" in c for c in configs)


def _files_of_split(name, root: Path, files: list[Path], split: str) -> list[Path]:
    named = {file: _split_named(file.relative_to(root), split) for file in files}
    if "train" not in named.values():
        named = {file: each or "train" for file, each in named.items()}
    wanted = _SPLIT_WORDS.get(split.lower(), split)
    chosen = [file for file in files if named[file] == wanted]
    if not chosen:
        there = ", ".join(sorted(each for each in set(named.values()) if each))
        raise InputError(f"split for {name}: expected one of {there}, got {split!r}. Give one of them.")
    if others := [str(file.relative_to(root)) for file in files if file not in chosen]:
        logger.warning("%s: %d files belong to split %r; left out: %s", name, len(chosen), split, ", ".join(others))
    return chosen


def _split_named(path: Path, split: str) -> str | None:
    """The split that a path names: by a folder that bears its name, else in the file's name, else within a folder's."""
    for part in reversed(path.parts[:-1]):
        if part == split or part.lower() in _SPLIT_WORDS:
            return _SPLIT_WORDS.get(part.lower(), part)
    stem = path.name.split(".")[0]
    numbered = re.fullmatch(r"(.+)-\d{5}-of-\d{5}(-[0-9a-f]+)?", stem)
    stem = numbered[1] if numbered else stem
    if stem == split:
        return _SPLIT_WORDS.get(split.lower(), split)
    for part in (stem, *reversed(path.parts[:-1])):
        words = [word for word in re.split(r"[^a-z0-9]+", part.lower()) if word in _SPLIT_WORDS]
        if words:  # train_sft-00000-of-00003 is a split of that very name
            return part if numbered and part == stem and part.lower() not in _SPLIT_WORDS else _SPLIT_WORDS[words[0]]
    return None
