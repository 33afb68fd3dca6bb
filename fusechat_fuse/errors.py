"""InputError, the exception for what a user can correct, and operating-system errors as sentences. Commands turn both
into one line and an exit code."""

from __future__ import annotations

import contextlib
import errno
import os
import re


class InputError(ValueError):
    """Bad input. The message is one sentence: what, for which file, row or option, what was expected, what to do."""


class Unusable(InputError):
    """A conversation that cannot be used; `reason` is the name of the rule, the text says what was found."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


def check_integer(what: str, value, least: int = 1) -> None:
    """Raise InputError unless a value is an integer of at least `least` (booleans are refused).

    Args:
        what: its name in the error, such as "limit for chat data".
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{what}: expected an integer from {least}, got {value!r}.")


NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_FULL = "disk for {}: expected room to write, got none left. Free some, then run the same command again."
_PLACE = "path for {}: expected {}, got {}. Choose another path."
_SENTENCES = {
    **dict.fromkeys(NO_ROOM, _FULL),
    errno.EROFS: _PLACE.format("{}", "a place to write", "a read-only file system"),
    errno.ENOENT: "path for {}: expected it to be there, got nothing. Check the path.",
    errno.ENOTDIR: _PLACE.format("{}", "directories on the way to it", "a file in place of one"),
    errno.EISDIR: _PLACE.format("{}", "a file", "a directory"),
    errno.EACCES: _PLACE.format("{}", "read and write permission", "none"),
    errno.EPERM: _PLACE.format("{}", "read and write permission", "none"),
    errno.ENAMETOOLONG: _PLACE.format("{}", "a shorter name", "one too long for the file system"),
}


def first_line(error: BaseException) -> str:
    """The first line of an error's text (two lines where it ends in a colon), without the full stop, to quote it within
    a sentence."""
    lines = (str(error).strip() or type(error).__name__).split("\n")
    return " ".join(line.strip() for line in lines[: 1 + lines[0].endswith(":")]).rstrip(".")


def describe_error(error: BaseException) -> str:
    """The first line of an error's text, with the class's name in front unless it is a common one."""
    name = "" if isinstance(error, OSError | ValueError | ImportError) else f"{type(error).__name__}: "
    return name + first_line(error)


def describe_os_error(error: OSError) -> str:
    """An error of the file system as one sentence with the path; any other error's own text.

    Args:
        error: raised while reading or writing; its `filename` is the path (of a copy that found no room, `filename2`).
    """
    sentence, path = _SENTENCES.get(error.errno or 0), error.filename
    if error.errno in NO_ROOM and error.filename2 is not None:
        path = error.filename2
    return str(error) if sentence is None or path is None else sentence.format(os.fspath(path))


def of_output(error: OSError) -> Exception:
    """What to raise where a named output cannot be written: InputError, or of a full disk the error itself."""
    return error if error.errno in NO_ROOM else InputError(describe_os_error(error))


def system_error_number(error: BaseException) -> int | None:
    """The errno of a file-system failure that an error, or one of its causes, reports; None: there is none.

    Libraries in Rust and C++ raise other classes, with the number in the text.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            return seen.errno
        if found := re.search(r"\bos error (\d+)|\bErrno (\d+)", str(seen)):
            return int(found[1] or found[2])
        if "inline_container" in str(seen) and "unexpected pos" in str(seen):  # torch.save on a full disk
            return errno.ENOSPC
        seen = seen.__cause__ or seen.__context__
    return None


@contextlib.contextmanager
def writing(path):
    """Context of code that writes to `path`: file-system failures become an OSError with the path."""
    try:
        yield
    except Exception as error:
        number = None if isinstance(error, InputError) else system_error_number(error)
        if number is None or (isinstance(error, OSError) and error.filename is not None):
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def as_sentence(error: BaseException) -> tuple[str, int]:
    """(message, exit code) of a command that ends with an error: 2 bad input, 1 a failed run, 130 Ctrl-C."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted. Give the same command again to continue.", 130
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, InputError):
        return f"error: {text}", 2
    if isinstance(error, OSError) and error.errno in _SENTENCES and error.filename is not None:
        return f"error: {describe_os_error(error)}", 1 if error.errno in NO_ROOM else 2
    return f"failed: {type(error).__name__}: {text}", 1
