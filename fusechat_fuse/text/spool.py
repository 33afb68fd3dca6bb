"""Messages of many conversations in a temporary file, so that a corpus may be larger than memory."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fusechat_fuse.errors import InputError


class Spool:
    """Texts in an unnamed temporary file (below TMPDIR), which ends with the process; any thread may read.

    Raises: InputError where the disk is full.
    """

    def __init__(self):
        with _naming_tmpdir():
            self._file = tempfile.TemporaryFile()  # noqa: SIM115  stays open as long as the conversations
        self._size, self._flushed = 0, 0

    def append(self, text: str) -> tuple[int, int]:
        """Append a text (ASCII). Returns its start and size in bytes."""
        raw = text.encode("ascii")
        with _naming_tmpdir():
            self._file.write(raw)
        self._size += len(raw)
        return self._size - len(raw), len(raw)

    def read(self, start: int, size: int) -> Any:
        """The value of the JSON text at a place."""
        if start + size > self._flushed:
            with _naming_tmpdir():
                self._file.flush()
            self._flushed = self._size
        return json.loads(os.pread(self._file.fileno(), size, start))


@contextmanager
def _naming_tmpdir() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"temporary file for the conversations: expected room below TMPDIR, got {error}. "
            "Set TMPDIR to a directory on a disk with room for the texts."
        ) from error
