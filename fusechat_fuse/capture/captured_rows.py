"""Captures of log-probabilities by other projects: DistillKit's compressed ones, and stored answers of servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from fusechat_fuse.capture.batches import TopK
from fusechat_fuse.capture.imported_rows import ImportedRows, Place, Rebuilt, check_ids, key_of, rebuild
from fusechat_fuse.text.chat import ConversationEncoder, Encoded
from fusechat_fuse.text.messages import Unusable


class Entry(NamedTuple):
    """What may be a conversation: its ids, or its messages, or both; or why it is none."""

    place: Place
    name: str
    ids: np.ndarray | None
    messages: list[dict[str, Any]] | None = None
    problem: Unusable | None = None


class Captures(Protocol):
    """Files of captures. name: for errors. fingerprint: changes with them. top_k: entries that each token has."""

    name: str
    fingerprint: str
    top_k: int
    vocab_size: int

    def entries(self) -> Iterator[Entry]:
        """What may be conversations, in the order of the rows."""
        ...

    def read(self, place: Place, one: Encoded, top_k: int) -> tuple[TopK, dict[str, int]]:
        """A conversation's distributions, and counts of its tokens; asked for in the order of the rows.

        Raises: Unusable where they cannot be those of its tokens.
        """
        ...


class CapturedRows(ImportedRows):
    """The rows of captures. `ImportedRows` has the arguments."""

    def __init__(self, captures: Captures, encoder: ConversationEncoder, top_k: int):
        self.captures = captures
        top_k = min(top_k, captures.top_k)
        super().__init__(encoder, captures.name, 0, captures.fingerprint, top_k, captures.vocab_size)

    def _candidates(self) -> Iterator[tuple[Place, str, Callable[[], Rebuilt]]]:
        for entry in self.captures.entries():
            self.rows = entry.place.row + 1
            yield entry.place, entry.name, partial(self._rebuilt, entry)

    def _rebuilt(self, entry: Entry) -> Rebuilt:
        if entry.problem:
            raise entry.problem
        if entry.messages is None:
            assert entry.ids is not None
            return rebuild(self.encoder, entry.ids)
        one = self.encoder.encode(entry.messages)
        if entry.ids is not None:
            check_ids(one, entry.ids, self.encoder.max_length)
        return entry.messages, one

    def _distributions(self, one: Encoded) -> TopK:
        key = key_of(one.input_ids)
        found, self.counts[key] = self.captures.read(self.places[key], one, self.top_k)
        finite = np.isfinite(found.ce) & np.isfinite(found.logprobs).all(1)
        if not finite.all():
            where = int(one.predicted[int(np.argmin(finite))])
            raise Unusable("non_finite", f"log-probabilities for token {where} of {len(one.input_ids)} are not finite")
        return found


class Forward:
    """The rows of a stream by number, read on from the last one that was asked for; a number before it begins anew."""

    def __init__(self, begin: Callable[[], Iterator[Any]]):
        self._begin, self._rows, self._next, self._row = begin, begin(), 0, None

    def at(self, number: int) -> Any:
        if number < self._next - 1:
            self._rows, self._next = self._begin(), 0
        while self._next <= number:
            self._row = next(self._rows)
            self._next += 1
        return self._row
