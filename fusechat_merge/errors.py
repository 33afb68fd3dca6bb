"""A full disk as one sentence, whichever library reports it."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class FullDisk(OSError):
    """No room is left for what is written; the message is a sentence."""


def number_of(error: BaseException) -> int | None:
    """The errno of a failure of the file system; None: it is none. Libraries in Rust have the number in the text."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if found := re.search(r"\bos error (\d+)|\bErrno (\d+)", str(error)):
        return int(found[1] or found[2])
    if "inline_container" in str(error) and "unexpected pos" in str(error):  # torch.save
        return errno.ENOSPC
    return None


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Context of code that writes `what`, a name for the message: failures of the file system that name no path, and
    those of a full disk, become an OSError (FullDisk) that does."""
    try:
        yield
    except Exception as error:
        number = number_of(error)
        if number is None or (number not in NO_ROOM and getattr(error, "filename", None)):
            raise
        kind, remedy = (FullDisk, "Free some room") if number in NO_ROOM else (OSError, "Mend that")
        raise kind(
            f"{what}: expected to write all of it, got {os.strerror(number)}. {remedy}, then run the same "
            "command again."
        ) from error
