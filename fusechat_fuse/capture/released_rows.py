"""The rows of released data, looked up by their ids: texts rebuilt, logits made log-probabilities (see `released`).

Shape letters: T tokens, P predicted tokens, K entries.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from fusechat_fuse.capture.batches import TopK
from fusechat_fuse.text.chat import ConversationEncoder, Encoded
from fusechat_fuse.text.messages import Unusable

FUSED = ("fused_per_step_logits", "fused_per_step_indices", "fused_metric_ce")
TOLERANCE = 0.02  # of a log-sum-exp from float16 logits


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
    """The released rows; a `computation.Runner` that looks distributions up by their ids."""

    def __init__(self, data, encoder: ConversationEncoder, name: str):
        self.data, self.encoder, self.name = data, encoder, name
        self.is_aligned = FUSED[0] in data.column_names
        tables = ["per_step_indices", *(["fused_per_step_indices"] if self.is_aligned else [])]
        largest, lengths = zip(*(_scan(data, name) for name in tables))
        self.vocab_size = max(len(encoder.tokenizer), max(largest) + 1)  # embeddings may be longer
        self.positions = np.min(lengths, 0)  # that have distributions, of each row
        self.top_k = max((len(row) for row in data[0]["per_step_indices"]), default=1)
        self.fingerprint = str(data._fingerprint)[:16]
        self.padded = 0
        self.skipped: list[dict] = []
        self.places: dict[bytes, int] = {}
        self.counts: dict[bytes, dict[str, int]] = {}

    def conversations(self):
        """Rows {id, messages} of what the template renders to the released ids; the others go to `skipped`."""
        from tqdm.auto import tqdm

        own = next((name for name in ("id", "conv_id") if name in self.data.column_names), None)
        means = ["metric_ce", *(["fused_metric_ce"] if self.is_aligned else [])]
        columns = ["input_ids", "attention_mask", "labels", *means, *([own] if own else [])]
        for number, row in enumerate(tqdm(self.data.select_columns(columns), unit="row", disable=None)):
            name = str(row[own]) if own else str(number)
            try:
                for mean in means:
                    if not np.isfinite(np.float64(row[mean])):  # float16 overflowed; filter_nan dropped these
                        raise Unusable("no_metric", f"{mean} is {row[mean]}")
                ids, labels = _unpadded(row)
                if self.positions[number] < (last := int(np.flatnonzero(row["attention_mask"])[-1])):
                    detail = f"distributions for {self.positions[number]} positions, the last token is at {last}"
                    raise Unusable("positions", detail)
                messages, one = self._messages(ids, labels)
            except Unusable as problem:
                entry = {"row": number, "id": name, "reason": problem.reason, "detail": str(problem)}
                self.skipped.append(entry)
                continue
            self.places[key_of(one.input_ids)] = number
            yield {"id": name, "messages": messages}

    def _messages(self, ids: np.ndarray, labels: np.ndarray) -> tuple[list[dict[str, Any]], Encoded]:
        """The conversation of these ids, and its encoding, which is these ids; answers without labels have weight 0."""
        labelled = labels != -100
        if (labels[labelled] != ids[labelled]).any():
            raise Unusable("labels", "the labels are not the tokens at their places")
        text, detail = self._text(ids), "the template renders no such text"
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

    def __call__(self, encoded: list[Encoded], progress) -> list[TopK]:
        results = []
        for one in encoded:
            results.append(self._distributions(one))
            self.padded += len(one.input_ids)
            progress.update(1)
        return results

    def _distributions(self, one: Encoded) -> TopK:
        key = key_of(one.input_ids)
        row = self.data[self.places[key]]
        keep, at = np.flatnonzero(np.asarray(row["attention_mask"])), one.predicted - 1
        ids, z = _table(row["per_step_indices"], row["per_step_logits"], keep[at], self.top_k)
        actual = one.input_ids[one.predicted]
        hit = ids == actual[:, None]
        listed, listed_z = hit.any(1), np.where(hit, z, 0.0).sum(1)
        normalizer = _logsumexp(z)
        known = _token_ce(row.get("per_step_metric_ce"), keep, at)
        exact = listed & np.isfinite(known) & (listed_z + known >= normalizer - TOLERANCE)
        normalizer = np.where(exact, np.maximum(listed_z + known, normalizer), normalizer)
        logprobs = np.where(ids >= 0, z - normalizer[:, None], -np.inf)
        lowest = np.where(ids >= 0, logprobs, np.inf).min(1)
        ce = np.where(np.isfinite(known), known, np.where(listed, normalizer - listed_z, -lowest))
        unknown = ~np.isfinite(known)
        if unknown.any():
            rest = max(float(row["metric_ce"]) * len(ce) - ce[~unknown].sum(), 0.0)
            ce = np.where(unknown, (ce + 1e-9) * rest / (ce[unknown] + 1e-9).sum(), ce)
        self.counts[key] = {
            "exact_tokens": int(exact.sum()),
            "renormalised_tokens": int((~exact).sum()),
            "estimated_ce": int(unknown.sum()),
        }
        finite = np.isfinite(ce) & np.isfinite(normalizer) & (ids[:, 0] >= 0)
        logprobs = np.maximum(logprobs, np.finfo(np.float16).min)
        return TopK(np.maximum(ids, 0).astype(np.int32), logprobs.astype(np.float32), ce.astype(np.float32), finite)

    def source_of(self, row: dict) -> dict:
        """The fields of a source beside the pivot's, from the `fused_*` columns."""
        released = self.data[self.places[key_of(row["input_ids"])]]
        keep, at = np.flatnonzero(np.asarray(released["attention_mask"])), row["predicted"] - 1
        indices, logits = released["fused_per_step_indices"], released["fused_per_step_logits"]
        width = max((len(indices[t]) for t in keep[at] if t < len(indices)), default=1) or 1
        ids, z = _table(indices, logits, keep[at], width)
        probs = np.where(ids >= 0, np.exp(z - _logsumexp(z)[:, None]), 0.0)
        answered = (ids >= 0).sum(1) > 1  # none: nothing survived; one: the fallback for a token that was not aligned
        own = np.where(ids == row["input_ids"][row["predicted"]][:, None], probs, 0.0).sum(1)
        with np.errstate(divide="ignore"):
            own_ce = -np.log(own)
        return {
            "source_ids": ids.astype(np.int32),
            "source_probs": probs.astype(np.float32),
            "source_token_ce": np.where(answered, own_ce, np.inf).astype(np.float32),
            "mapped_mass": answered.astype(np.float16),
            "label_tail": np.zeros(len(ids), np.float16),
            "source_ce": float(released["fused_metric_ce"]),
            "source_tokens": len(ids),
            "source_bytes": int((row["end"] - row["start"]).sum()),
        }


def _unpadded(row: dict) -> tuple[np.ndarray, np.ndarray]:
    keep = np.flatnonzero(np.asarray(row["attention_mask"]))
    ids, labels = np.asarray(row["input_ids"], np.int32), np.asarray(row["labels"], np.int64)
    if not len(keep) or len(ids) != len(labels) or keep[-1] >= len(ids):
        raise Unusable("lengths", f"{len(ids)} ids, {len(labels)} labels, {len(keep)} places that are no padding")
    return ids[keep], labels[keep]


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
    top = z.max(1)
    safe = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.where(np.isneginf(top), 0.0, safe + np.log(np.exp(z - safe[:, None]).sum(1)))


def _token_ce(values, keep: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Cross-entropies of the predicted tokens, NaN where they are not released (a row t is that of token t + 1)."""
    found = np.full(len(at), np.nan)
    if values is not None:
        values = np.asarray(values, np.float64)
        there = keep[at] < len(values)
        found[there] = values[keep[at][there]]
        found[found <= 0] = np.nan  # masked places hold 0
    return found
