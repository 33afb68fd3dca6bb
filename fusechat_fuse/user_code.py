"""Functions of the user's own files, named as FILE.py:function. Such a file is the user's code, and is run as it is."""

from __future__ import annotations

import importlib.util
import symtable
import sys
from collections.abc import Callable
from pathlib import Path

from fusechat_fuse.errors import InputError, describe_error

_FORM = "FILE.py:function"


def file_of(name: str) -> Path:
    """The file of FILE.py:function."""
    return Path(name.rpartition(":")[0])


def check_function(what: str, name: str) -> None:
    """Raise InputError unless a name is FILE.py:function of a file that defines it; nothing of the file is run.

    Args:
        what: of the name in the error, such as "score for compare".
    """
    file, function = file_of(name), name.rpartition(":")[2]
    if file.suffix != ".py" or not function.isidentifier():
        raise InputError(f"{what}: expected {_FORM}, got {name!r}. Name a function of a file.")
    try:
        names = symtable.symtable(file.read_text(encoding="utf-8"), str(file), "exec")
        found = names.lookup(function)
    except (OSError, UnicodeDecodeError, SyntaxError) as error:
        raise InputError(f"{what}: expected Python in {file}, got {describe_error(error)}. Correct it.") from error
    except KeyError:
        found = None
    if found is None or not (found.is_assigned() or found.is_imported()):
        raise InputError(f"{what}: expected a function {function} in {file}, got none. Define it there.")


def load_function(what: str, name: str) -> Callable:
    """Run the file of FILE.py:function, which may import its neighbours, and return the function.

    Raises: InputError for a name that `check_function` refuses, or a file that cannot be run.
    """
    check_function(what, name)
    file, function = file_of(name).absolute(), name.rpartition(":")[2]
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code may raise anything
        raise InputError(f"{what}: expected {file} to run, got {describe_error(error)}. Correct it.") from error
    return getattr(module, function)
