"""Messages of many conversations on disk, so that a corpus may be larger than memory."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fusechat_fuse.errors import InputError


class Spool:
    """Texts in an unnamed temporary file (below TMPDIR), gone with the process; any thread may read.

    Raises: InputError where there is no room for it.
    """

    def __init__(self):
        with _room():
            self._file = tempfile.TemporaryFile()  # noqa: SIM115  as long as the conversations
        self._size, self._flushed = 0, 0

    def append(self, text: str) -> tuple[int, int]:
        """Keep a text (ASCII); returns where it begins and its size, in bytes."""
        raw = text.encode("ascii")
        with _room():
            self._file.write(raw)
        self._size += len(raw)
        return self._size - len(raw), len(raw)

    def read(self, start: int, size: int) -> Any:
        """What the JSON text at a place says."""
        if start + size > self._flushed:
            with _room():
                self._file.flush()
            self._flushed = self._size
        return json.loads(os.pread(self._file.fileno(), size, start))


@contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"temporary file for the conversations: expected room below TMPDIR, got {error}. "
            "Set TMPDIR to a directory on a disk with room for the texts."
        ) from error
