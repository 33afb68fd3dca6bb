"""Distributions that others made: their conversations rebuilt from ids, and looked up by ids."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from fusechat_fuse.capture.batches import TopK
from fusechat_fuse.capture.manifest import MAX_NON_FINITE_SHARE
from fusechat_fuse.errors import InputError
from fusechat_fuse.text.chat import ConversationEncoder, Encoded
from fusechat_fuse.text.messages import Unusable

SAMPLED_ROWS = 64  # by which it is seen whether all rows are shifted
Rebuilt = tuple[list[dict[str, Any]], Encoded]


class Place(NamedTuple):
    """Where a conversation's distributions are: a row of the data, and the first token's position in it."""

    row: int
    first: int = 0


def key_of(input_ids: np.ndarray) -> bytes:
    """What a conversation is looked up by: a digest of its ids, which are kilobytes."""
    return hashlib.blake2b(np.asarray(input_ids, np.int32).tobytes(), digest_size=16).digest()


class ImportedRows:
    """A `computation.Runner` of rows that hold ids and their distributions.

    Subclasses give `_candidates` and `_distributions`.

    Args:
        encoder: of the template that made the ids. name: of the data, for the manifest. rows: their number.
        fingerprint: changes with the data. top_k: entries of a distribution. vocab_size: ids are below it.
    Attributes: skipped: rows that make no conversation. refused: why a conversation has no distributions. counts: of
        each conversation's tokens, by its key.
    """

    source: Any = None  # columns of an aligned source

    def __init__(
        self, encoder: ConversationEncoder, name: str, rows: int, fingerprint: str, top_k: int, vocab_size: int
    ):
        self.encoder, self.name, self.rows, self.fingerprint = encoder, name, rows, fingerprint
        self.top_k, self.vocab_size, self.padded = top_k, vocab_size, 0
        self.skipped: list[dict] = []
        self.refused: list[str] = []
        self.places: dict[bytes, Place] = {}
        self.counts: dict[bytes, dict[str, int]] = {}

    def conversations(self) -> Iterator[dict[str, Any]]:
        """Rows {id, messages} of what the template renders to the given ids; the others go to `skipped`."""
        for place, name, rebuild in self._candidates():
            try:
                messages, one = rebuild()
                key = key_of(one.input_ids)
                if key in self.places:
                    raise Unusable("repeated", f"the same ids as row {self.places[key].row}")
            except Unusable as problem:
                self.skipped.append({"row": place.row, "id": name, "reason": problem.reason, "detail": str(problem)})
                continue
            self.places[key] = place
            yield {"id": name, "messages": messages}

    def check_order(self) -> None:
        """Raise InputError where the rows of a table stand at the wrong positions."""

    def _candidates(self) -> Iterator[tuple[Place, str, Callable[[], Rebuilt]]]:
        """Place and name of what may be a conversation, and what rebuilds it (raises Unusable)."""
        raise NotImplementedError

    def _distributions(self, one: Encoded) -> TopK:
        """The distributions of one conversation. Raises: Unusable where they cannot be those of its tokens."""
        raise NotImplementedError

    def __call__(self, encoded: list[Encoded], progress) -> list[TopK | Unusable]:
        results: list[TopK | Unusable] = []
        for one in encoded:
            try:
                results.append(self._distributions(one))
            except Unusable as problem:
                results.append(problem)
                self.refused.append(str(problem))
                if len(self.refused) > MAX_NON_FINITE_SHARE * len(self.places):
                    raise InputError(
                        f"distributions for {self.name}: expected finite logits that go with the cross-entropies, got "
                        f"others in more than {MAX_NON_FINITE_SHARE:.0%} of the conversations (first: "
                        f"{self.refused[0]}). Compare the rows with their source: they may be damaged, or belong to "
                        "other tokens."
                    ) from problem
            self.padded += len(one.input_ids)
            progress.update(1)
        return results


def rebuild(encoder: ConversationEncoder, ids: np.ndarray, labels: np.ndarray | None = None) -> Rebuilt:
    """The conversation of these ids, and its encoding, which is these ids; answers without labels have weight 0.

    Args:
        labels: [T], -100 for none; None: every answer is labelled.
    Raises: Unusable where the template renders no conversation to the ids.
    """
    labelled = np.ones(len(ids), bool) if labels is None else labels != -100
    if labels is not None and (labels[labelled] != ids[labelled]).any():
        raise Unusable("labels", "the labels are not the tokens at their places")
    text, detail = _text(encoder.tokenizer, ids), "the template renders no such text"
    if labels is not None and labelled.all():
        detail += "; all of it has labels, as plain text has (template text)"
    most = int((ids == encoder.end_of_turn_id).sum()) + 1
    runs = most // 2 if labels is None else int((labelled & ~np.r_[False, labelled[:-1]]).sum())
    for answers in sorted(range(1, most + 1), key=lambda count: abs(count - runs)):
        for roles in (("user", "assistant") * answers, ("system", *("user", "assistant") * answers)):
            try:
                messages: list[dict[str, Any]] | None = encoder.parse(text, roles)
                if messages is None:
                    continue
                one = encoder.encode(messages)
                check_ids(one, ids, encoder.max_length)
            except Unusable as problem:
                detail = str(problem)
                continue
            if labels is not None:
                _mark_unlabelled(messages, set(one.message[labelled[one.predicted]].tolist()))
            return messages, one
    raise Unusable("ids", detail)


def _mark_unlabelled(messages: list[dict[str, Any]], labelled: set[int]) -> None:
    """Give weight 0 to the answers that are not among the labelled ones. Raises: Unusable where none is."""
    for n, message in enumerate(messages):
        if message["role"] == "assistant" and n not in labelled:
            message["weight"] = 0
    if not labelled:
        raise Unusable("no_answer", "no answer is labelled")


def check_ids(one: Encoded, ids: np.ndarray, max_length: int) -> None:
    """Raise Unusable unless an encoding is these ids, as far as `max_length`."""
    if not np.array_equal(one.input_ids, ids[:max_length]):
        raise Unusable("ids", "the text is rendered to other ids")


def refuse_shifted(what: str, hits: np.ndarray) -> None:
    """Raise InputError where the rows of a table stand at the wrong positions: more of the labels are among the entries
    of a neighbouring row than among those of the row that should predict them.

    Args:
        hits: [3, 2]: labels among the entries of the row before, of the right one, of the one after; and how many there
            were.
    """
    before, right, after = hits[:, 0] / np.maximum(hits[:, 1], 1)
    if max(before, after) > max(2 * right, 0.3):
        raise InputError(
            f"{what}: expected the row of position t to predict token t + 1, got {right:.0%} of the labels among the "
            f"entries, and {max(before, after):.0%} one row {'earlier' if before > after else 'later'}. Shift the rows "
            "back."
        )


def _text(tokenizer, ids: np.ndarray) -> str:
    """The text of ids, special tokens apart: a decoder drops blanks around them."""
    special = set(tokenizer.all_special_ids)
    cuts = [n for n, token in enumerate(ids.tolist()) if token in special]
    text, last = [], 0
    for cut in [*cuts, len(ids)]:
        if cut > last:
            text.append(tokenizer.decode(ids[last:cut].tolist(), clean_up_tokenization_spaces=False))
        if cut < len(ids):
            text.append(tokenizer.convert_ids_to_tokens(int(ids[cut])))
        last = cut + 1
    return "".join(text)
