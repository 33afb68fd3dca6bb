"""The rows of released data, looked up by their ids: texts rebuilt, logits made log-probabilities (see `released`).

Shape letters: T tokens, P predicted tokens, K entries.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusechat_fuse.capture.batches import TopK
from fusechat_fuse.capture.manifest import MAX_NON_FINITE_SHARE
from fusechat_fuse.errors import InputError
from fusechat_fuse.progress import progress
from fusechat_fuse.text.chat import ConversationEncoder, Encoded
from fusechat_fuse.text.messages import Unusable

TOLERANCE = 0.02  # of a log-sum-exp from float16 logits
SAMPLED_ROWS = 64  # by which it is seen whether all rows are shifted


@dataclass(frozen=True)
class Columns:
    """The columns of one model's distributions, and of its cross-entropy: of each conversation or of each token."""

    logits: str
    indices: str
    mean: str
    by_token: str


PIVOT = Columns("per_step_logits", "per_step_indices", "metric_ce", "per_step_metric_ce")
FUSED = Columns("fused_per_step_logits", "fused_per_step_indices", "fused_metric_ce", "per_step_fused_metric_ce")


def _scan(data, column: str) -> tuple[int, np.ndarray]:
    """(largest id, positions of each row) of a column of lists of ids, without making Python's lists of it."""
    tables = data.with_format("arrow").select_columns([column]).iter(256)
    largest, lengths = 0, [np.zeros(0, np.int64)]
    for chunk in (chunk for table in tables for chunk in table[0].chunks):
        largest = max(largest, int(np.max(chunk.flatten().flatten().to_numpy(zero_copy_only=False), initial=0)))
        lengths.append(chunk.value_lengths().fill_null(0).to_numpy(zero_copy_only=False))
    return largest, np.concatenate(lengths)


def key_of(input_ids: np.ndarray) -> bytes:
    """What a conversation is looked up by: a digest of its ids, which are kilobytes."""
    return hashlib.blake2b(np.asarray(input_ids, np.int32).tobytes(), digest_size=16).digest()


class ReleasedRows:
    """The released rows; a `computation.Runner` that looks distributions up by their ids.

    Args:
        data: `datasets.Dataset`. encoder: of the template that made the ids. name: of the data, for the manifest.
        source: the columns of the source, where the data are aligned ones.
    """

    def __init__(self, data, encoder: ConversationEncoder, name: str, source: Columns | None):
        self.data, self.encoder, self.name, self.source = data, encoder, name, source
        tables = [columns.indices for columns in (PIVOT, source) if columns]
        largest, lengths = zip(*(_scan(data, column) for column in tables))
        self.vocab_size = max(len(encoder.tokenizer), max(largest) + 1)  # embeddings may be longer
        self.positions = np.min(lengths, 0)  # that have distributions, of each row
        self.top_k = max((len(row) for row in data[0][PIVOT.indices]), default=1)
        self.fingerprint = str(data._fingerprint)[:16]
        self.padded = 0
        self.skipped: list[dict] = []
        self.refused: list[str] = []  # why a conversation's distributions are none
        self.places: dict[bytes, int] = {}
        self.counts: dict[bytes, dict[str, int]] = {}

    def conversations(self):
        """Rows {id, messages} of what the template renders to the released ids; the others go to `skipped`."""
        own = next((name for name in ("id", "conv_id") if name in self.data.column_names), None)
        wanted = [name for columns in (PIVOT, self.source) if columns for name in (columns.mean, columns.by_token)]
        columns = ["input_ids", "attention_mask", "labels", *wanted, *([own] if own else [])]
        columns = [name for name in columns if name in self.data.column_names]
        data = self.data.select_columns(columns)
        for number, row in enumerate(progress(data, total=len(data), unit="row")):
            name = str(row[own]) if own else str(number)
            try:
                key, messages = self._conversation(number, row)
            except Unusable as problem:
                self.skipped.append({"row": number, "id": name, "reason": problem.reason, "detail": str(problem)})
                continue
            self.places[key] = number
            yield {"id": name, "messages": messages}

    def _conversation(self, number: int, row: dict) -> tuple[bytes, list[dict[str, Any]]]:
        """A row's key and messages. Raises: Unusable for what is wrong with it."""
        ids, labels, places = _unpadded(row)
        _mean_ce(row, PIVOT, places[_labelled(labels) - 1])
        if self.source:
            _mean_ce(row, self.source, None)
        if self.positions[number] < places[-1]:
            detail = f"distributions for {self.positions[number]} positions, the last token is at {places[-1]}"
            raise Unusable("positions", detail)
        messages, one = self._messages(ids, labels)
        key = key_of(one.input_ids)
        if key in self.places:
            raise Unusable("repeated", f"the same ids as row {self.places[key]}")
        return key, messages

    def check_order(self) -> None:
        """Raise InputError where the rows of a table stand at the wrong positions: more of the labels are among the
        entries of a neighbouring row than among those of the row that should predict them."""
        tables = [(PIVOT.indices, 0), *([(self.source.indices, 1)] if self.source else [])]
        chosen = self.data.select(list(self.places.values())[:SAMPLED_ROWS])
        for column, least in tables:
            hits = np.zeros((3, 2), int)  # labels among the entries of the row before, the right one, the one after
            for row in chosen.select_columns(["input_ids", "attention_mask", "labels", column]):
                ids, labels, places = _unpadded(row)
                for token in _labelled(labels):
                    for n, place in enumerate(places[token - 1] + np.arange(-1, 2)):
                        entries = row[column][place] if 0 <= place < len(row[column]) else []
                        if len(entries) > least:  # one entry of a source: the fallback for what was not aligned
                            hits[n] += int(ids[token]) in entries, 1
            before, right, after = hits[:, 0] / np.maximum(hits[:, 1], 1)
            if max(before, after) > max(2 * right, 0.3):
                raise InputError(
                    f"{column} for {self.name}: expected the row of position t to predict token t + 1, got "
                    f"{right:.0%} of the labels among the entries, and {max(before, after):.0%} one row "
                    f"{'earlier' if before > after else 'later'}. Shift the rows back."
                )

    def _messages(self, ids: np.ndarray, labels: np.ndarray) -> tuple[list[dict[str, Any]], Encoded]:
        """The conversation of these ids, and its encoding, which is these ids; answers without labels have weight 0."""
        labelled = labels != -100
        if (labels[labelled] != ids[labelled]).any():
            raise Unusable("labels", "the labels are not the tokens at their places")
        text, detail = self._text(ids), "the template renders no such text"
        if labelled.all():
            detail += "; all of it has labels, as plain text has (template text)"
        runs = int((labelled & ~np.r_[False, labelled[:-1]]).sum())
        most = int((ids == self.encoder.end_of_turn_id).sum()) + 1
        for answers in sorted(range(1, most + 1), key=lambda count: abs(count - runs)):
            for roles in (("user", "assistant") * answers, ("system", *("user", "assistant") * answers)):
                try:
                    messages: list[dict[str, Any]] | None = self.encoder.parse(text, roles)
                    if messages is None:
                        continue
                    one = self.encoder.encode(messages)
                except Unusable as problem:
                    detail = str(problem)
                    continue
                if not np.array_equal(one.input_ids, ids):
                    detail = "the text is rendered to other ids"
                    continue
                taught = set(one.message[labelled[one.predicted]].tolist())
                for n, message in enumerate(messages):
                    if message["role"] == "assistant" and n not in taught:
                        message["weight"] = 0
                if not taught:
                    raise Unusable("no_answer", "no answer is labelled")
                return messages, one
        raise Unusable("ids", detail)

    def _text(self, ids: np.ndarray) -> str:
        """The text of ids, special tokens apart: a decoder drops blanks around them."""
        tokenizer, special = self.encoder.tokenizer, set(self.encoder.tokenizer.all_special_ids)
        cuts = [n for n, token in enumerate(ids.tolist()) if token in special]
        text, last = [], 0
        for cut in [*cuts, len(ids)]:
            if cut > last:
                text.append(tokenizer.decode(ids[last:cut].tolist(), clean_up_tokenization_spaces=False))
            if cut < len(ids):
                text.append(tokenizer.convert_ids_to_tokens(int(ids[cut])))
            last = cut + 1
        return "".join(text)

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

    def _distributions(self, one: Encoded) -> TopK:
        """The distributions of one conversation. Raises: Unusable where they cannot be those of its tokens."""
        key = key_of(one.input_ids)
        row = self.data[self.places[key]]
        _, labels, places = _unpadded(row)
        labelled = _labelled(labels)  # the tokens of which the mean is taken
        tokens = np.union1d(labelled, one.predicted)
        at, in_mean = places[tokens - 1], np.isin(tokens, labelled)
        ids, z = _table(row[PIVOT.indices], row[PIVOT.logits], at, self.top_k)
        hit = ids == one.input_ids[tokens][:, None]
        listed, listed_z = hit.any(1), np.where(hit, z, 0.0).sum(1)
        normalizer = _logsumexp(z)
        lowest = np.where(ids >= 0, z, np.inf).min(1)
        least = normalizer - np.where(listed, listed_z, lowest)  # what the listed entries alone allow
        if not np.isfinite(least).all():
            where = int(tokens[int(np.argmin(np.isfinite(least)))])
            raise Unusable("non_finite", f"logits for token {where} of {len(one.input_ids)} are not finite")
        mean = _mean_ce(row, PIVOT, places[labelled - 1])
        values = np.asarray(row.get(PIVOT.by_token) or [], np.float64)  # masked places hold 0
        known = np.array([values[t] if t < len(values) and values[t] > 0 else np.nan for t in at])
        _check_mean(PIVOT.mean, mean, least[in_mean])
        given = in_mean & np.isfinite(known)
        if given.any():
            _check_mean(PIVOT.by_token, known[given].mean(), least[given])
        exact = listed & np.isfinite(known) & (listed_z + known >= normalizer - TOLERANCE)
        normalizer = np.where(exact, np.maximum(listed_z + known, normalizer), normalizer)
        logprobs = np.where(ids >= 0, z - normalizer[:, None], -np.inf)
        unknown = ~np.isfinite(known)
        ce = np.where(unknown, least, known)
        if (estimated := unknown & in_mean).any():
            rest = max(mean * len(labelled) - ce[given].sum(), 0.0)
            ce = np.where(unknown, (ce + 1e-9) * rest / (ce[estimated] + 1e-9).sum(), ce)
        kept = np.searchsorted(tokens, one.predicted)
        self.counts[key] = {
            "exact_tokens": int(exact[kept].sum()),
            "renormalised_tokens": int((~exact[kept]).sum()),
            "estimated_ce": int(unknown[kept].sum()),
        }
        logprobs = np.maximum(logprobs[kept], np.finfo(np.float16).min).astype(np.float32)
        found = np.maximum(ids[kept], 0).astype(np.int32)
        return TopK(found, logprobs, ce[kept].astype(np.float32))

    def source_of(self, row: dict) -> dict:
        """The fields of a source beside the pivot's."""
        assert self.source
        released = self.data[self.places[key_of(row["input_ids"])]]
        at = np.flatnonzero(np.asarray(released["attention_mask"]))[row["predicted"] - 1]
        indices, logits = released[self.source.indices], released[self.source.logits]
        width = max((len(indices[t]) for t in at if t < len(indices)), default=1) or 1
        ids, z = _table(indices, logits, at, width)
        probs = np.where(ids >= 0, np.exp(z - _logsumexp(z)[:, None]), 0.0)
        answered = (ids >= 0).sum(1) > 1  # none: nothing survived; one: the fallback for a token that was not aligned
        with np.errstate(divide="ignore"):
            own_ce = -np.log(np.where(ids == row["input_ids"][row["predicted"]][:, None], probs, 0.0).sum(1))
        return {
            "source_ids": ids.astype(np.int32),
            "source_probs": probs.astype(np.float32),
            "source_token_ce": np.where(answered, own_ce, np.inf).astype(np.float32),
            "mapped_mass": answered.astype(np.float16),
            "label_tail": np.zeros(len(ids), np.float16),
            "source_ce": _mean_ce(released, self.source, None),
            "source_tokens": None,  # only the mean over them is released
            "source_bytes": int((row["end"] - row["start"]).sum()),
        }


def _unpadded(row: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids [T], labels [T], places [T] of the tokens in the padded row)."""
    places = np.flatnonzero(np.asarray(row["attention_mask"]))
    ids, labels = np.asarray(row["input_ids"], np.int32), np.asarray(row["labels"], np.int64)
    if not len(places) or len(ids) != len(labels) or places[-1] >= len(ids):
        raise Unusable("lengths", f"{len(ids)} ids, {len(labels)} labels, {len(places)} places that are no padding")
    return ids[places], labels[places], places


def _labelled(labels: np.ndarray) -> np.ndarray:
    """The tokens with a label, but for the first, which no row predicts."""
    return np.flatnonzero(labels[1:] != -100) + 1


def _mean_ce(row: dict, columns: Columns, at: np.ndarray | None) -> float:
    """A model's mean cross-entropy on a conversation.

    Args:
        at: the positions whose predictions have a label; None: not known (a source's are of tokens of its own), then
            all that are not 0, which masked ones are.
    Raises: Unusable where it is not known or below 0.
    """
    values = np.asarray(row.get(columns.by_token) or [], np.float64)
    least = np.nanmin(values, initial=0.0)
    if columns.mean in row:
        mean, name = float(np.float64(row[columns.mean])), columns.mean
    else:
        values, name = values[values != 0] if at is None else values[at[at < len(values)]], columns.by_token
        mean = float(np.mean(values)) if len(values) else float("nan")
    if not np.isfinite(mean):  # float16 overflowed; filter_nan dropped these
        raise Unusable("no_metric", f"{name} is {mean}")
    if min(mean, least) < 0:
        raise Unusable("metric", f"a cross-entropy of {min(mean, least):.4g}, below 0")
    return mean


def _check_mean(name: str, mean: float, least: np.ndarray) -> None:
    """Raise Unusable where a mean cross-entropy is below what the listed logits allow: they are of other tokens.

    Args:
        least: [N] cross-entropies of the same tokens if no entry but the listed had a probability.
    """
    if mean < 0.95 * (lower := least.mean()) - TOLERANCE:
        detail = f"{name} is {mean:.4g}, and the listed logits allow no less than {lower:.4g} for these labels"
        raise Unusable("metric", detail)


def _table(indices: list, logits: list, places: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids [P, K], -1 past a row's end; logits float64 [P, K], -inf there) of some positions, largest first."""
    ids = np.full((len(places), width), -1, np.int64)
    z = np.full((len(places), width), -np.inf)
    for n, place in enumerate(places):
        if place < min(len(indices), len(logits)) and (count := min(len(indices[place]), width)):
            ids[n, :count], z[n, :count] = indices[place][:count], logits[place][:count]
    order = np.argsort(-z, 1, kind="stable")
    return np.take_along_axis(ids, order, 1), np.take_along_axis(z, order, 1)


def _logsumexp(z: np.ndarray) -> np.ndarray:
    """[P, K] -> [P]; -inf for a row of no entries would divide by nothing, so it is 0."""
    with np.errstate(invalid="ignore"):  # NaN: refused later, with a sentence
        total = np.logaddexp.reduce(z, 1)
    return np.where(np.isneginf(total), 0.0, total)
