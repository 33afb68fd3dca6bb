"""The rows of released data, looked up by their ids: texts rebuilt, logits made log-probabilities (see `released`).

Shape letters: T tokens, P predicted tokens, K entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from fusechat_fuse.capture.batches import TopK
from fusechat_fuse.capture.imported_rows import (
    SAMPLED_ROWS,
    ImportedRows,
    Place,
    Rebuilt,
    key_of,
    rebuild,
    refuse_shifted,
)
from fusechat_fuse.progress import progress
from fusechat_fuse.text.chat import ConversationEncoder, Encoded
from fusechat_fuse.text.messages import Unusable

TOLERANCE = 0.02  # of a log-sum-exp from float16 logits


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


class ReleasedRows(ImportedRows):
    """The released rows: logits.

    Args:
        data: `datasets.Dataset`. encoder: of the template that made the ids. name: of the data, for the manifest.
        source: the columns of the source, where the data are aligned ones.
    """

    def __init__(self, data, encoder: ConversationEncoder, name: str, source: Columns | None):
        self.data, self.source = data, source
        tables = [columns.indices for columns in (PIVOT, source) if columns]
        largest, lengths = zip(*(_scan(data, column) for column in tables))
        self.positions = np.min(lengths, 0)  # that have distributions, of each row
        top_k = max((len(row) for row in data[0][PIVOT.indices]), default=1)
        vocab_size = max(len(encoder.tokenizer), max(largest) + 1)  # embeddings may be longer
        super().__init__(encoder, name, len(data), str(data._fingerprint)[:16], top_k, vocab_size)

    def _candidates(self) -> Iterator[tuple[Place, str, Callable[[], Rebuilt]]]:
        own = next((name for name in ("id", "conv_id") if name in self.data.column_names), None)
        wanted = [name for columns in (PIVOT, self.source) if columns for name in (columns.mean, columns.by_token)]
        columns = ["input_ids", "attention_mask", "labels", *wanted, *([own] if own else [])]
        columns = [name for name in columns if name in self.data.column_names]
        data = self.data.select_columns(columns)
        for number, row in enumerate(progress(data, total=len(data), unit="row")):
            yield Place(number), str(row[own]) if own else str(number), partial(self._rebuilt, number, row)

    def _rebuilt(self, number: int, row: dict) -> Rebuilt:
        """A row's conversation. Raises: Unusable for what is wrong with it."""
        ids, labels, places = _unpadded(row)
        _mean_ce(row, PIVOT, places[_labelled(labels) - 1])
        if self.source:
            _mean_ce(row, self.source, None)
        if self.positions[number] < places[-1]:
            detail = f"distributions for {self.positions[number]} positions, the last token is at {places[-1]}"
            raise Unusable("positions", detail)
        return rebuild(self.encoder, ids, labels)

    def check_order(self) -> None:
        """Raise InputError where the rows of a table stand at the wrong positions: more of the labels are among the
        entries of a neighbouring row than among those of the row that should predict them."""
        tables = [(PIVOT.indices, 0), *([(self.source.indices, 1)] if self.source else [])]
        chosen = self.data.select([place.row for place in self.places.values()][:SAMPLED_ROWS])
        for column, least in tables:
            hits = np.zeros((3, 2), int)  # labels among the entries of the row before, the right one, the one after
            for row in chosen.select_columns(["input_ids", "attention_mask", "labels", column]):
                ids, labels, places = _unpadded(row)
                for token in _labelled(labels):
                    for n, place in enumerate(places[token - 1] + np.arange(-1, 2)):
                        entries = row[column][place] if 0 <= place < len(row[column]) else []
                        if len(entries) > least:  # one entry of a source: the fallback for what was not aligned
                            hits[n] += int(ids[token]) in entries, 1
            refuse_shifted(f"{column} for {self.name}", hits)

    def _distributions(self, one: Encoded) -> TopK:
        """The distributions of one conversation. Raises: Unusable where they cannot be those of its tokens."""
        key = key_of(one.input_ids)
        row = self.data[self.places[key].row]
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
        released = self.data[self.places[key_of(row["input_ids"])].row]
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
