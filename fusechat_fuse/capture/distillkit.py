"""DistillKit's parquet captures: rows of ids, one conversation or several packed one after another, with compressed
log-probabilities (`compressed.py`) for each token but the first, perhaps with one more row at the end.

A packed row is cut into conversations where `attention_mask` counts them, at padding and the tokenizer's EOS (where
that ends no turn), before a BOS and before the text with which a system message begins a conversation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fusechat_fuse.capture.batches import TopK
from fusechat_fuse.capture.captured_rows import Entry, Forward
from fusechat_fuse.capture.compressed import CONFIGURATION, read_compression
from fusechat_fuse.capture.imported_rows import SAMPLED_ROWS, Place, refuse_shifted
from fusechat_fuse.errors import InputError
from fusechat_fuse.models.identity import add_samples
from fusechat_fuse.text.chat import ConversationEncoder, Encoded
from fusechat_fuse.text.messages import Unusable

_ROWS_AT_ONCE = 4  # a packed row has some megabytes
MAX_MASS = 1.05  # of a token's entries, by which the tail's approximation may exceed 1


class DistillKit:
    """The captures in parquet files; `captured_rows.Captures` says what the methods do.

    Args:
        files: of one capture, with its configuration in their directory or one above it, up to `root`.
        encoder: of the template that made the ids.
    Raises: InputError for other columns, a configuration that does not go with them or with the tokenizer.
    """

    def __init__(self, files: list[Path], root: Path, encoder: ConversationEncoder):
        self.files, self.encoder, self.name = files, encoder, root.name
        configuration = next((p for p in (files[0].parent / CONFIGURATION, root / CONFIGURATION) if p.exists()), None)
        self.compression = read_compression(configuration or root / CONFIGURATION)
        self.top_k, self.vocab_size = self.compression.k, self.compression.d
        digest = hashlib.sha256(repr(self.compression).encode())
        for file in files:
            self._check_columns(file)
            add_samples(digest, file)
        self.fingerprint = digest.hexdigest()[:16]
        if len(encoder.tokenizer) > self.vocab_size:
            raise InputError(
                f"tokenizer for {self.name}: expected at most the capture's {self.vocab_size} ids (d), got "
                f"{len(encoder.tokenizer)}. Give the tokenizer of the captured model."
            )
        self._check_widths()
        self._distributions = Forward(lambda: self._rows(self.compression.columns))
        self._sampled, self._hits = 0, np.zeros((3, 2), int)

    def _check_columns(self, file: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as parquet

        try:
            found = parquet.read_schema(file).names
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"capture for {file}: expected a Parquet file, got {error}. Download it again.") from error
        if missing := {"input_ids", *self.compression.columns} - set(found):
            raise InputError(
                f"columns for {file}: expected input_ids, {', '.join(self.compression.columns)}, got "
                f"{', '.join(found)}, without {', '.join(sorted(missing))}. Give a capture that DistillKit wrote, with "
                f"its {CONFIGURATION}."
            )

    def _check_widths(self) -> None:
        """Raise InputError where a token has other numbers of bytes than the configuration says."""
        for name, expected in zip(self.compression.columns, self.compression.widths):
            row = next(self._rows((name,)), {name: np.zeros((0, 0))})
            if (got := row[name].shape[1]) != expected:
                raise InputError(
                    f"compression for {self.name}: expected {expected} numbers in {name} per token (k "
                    f"{self.compression.k}, d {self.compression.d}), got {got}. Give this capture's {CONFIGURATION}."
                )

    def _rows(self, columns: tuple[str, ...]) -> Iterator[dict[str, np.ndarray]]:
        """The rows of all files, their columns as arrays [T] or [T, width]."""
        import pyarrow.parquet as parquet

        for file in self.files:
            with parquet.ParquetFile(file) as opened:
                wanted = [name for name in columns if name in opened.schema_arrow.names]
                for batch in opened.iter_batches(batch_size=_ROWS_AT_ONCE, columns=wanted):
                    for n in range(batch.num_rows):
                        yield {name: _array(batch.column(name)[n].values) for name in wanted}

    def entries(self) -> Iterator[Entry]:
        for number, row in enumerate(self._rows(("input_ids", "attention_mask"))):
            ids = row["input_ids"].astype(np.int64)
            parts = self._parts(ids, row.get("attention_mask"))
            for n, (begin, end) in enumerate(parts):
                name = str(number) if len(parts) == 1 else f"{number}.{n}"
                yield Entry(Place(number, begin), name, ids[begin:end].astype(np.int32))

    def _parts(self, ids: np.ndarray, mask: np.ndarray | None) -> list[tuple[int, int]]:
        """Begin and end of the conversations of a row."""
        tokenizer, encoder = self.encoder.tokenizer, self.encoder
        outside = np.isin(ids, list({tokenizer.pad_token_id, tokenizer.eos_token_id} - {None}))
        outside &= ids != encoder.end_of_turn_id
        outside |= (mask == 0) if mask is not None and len(mask) == len(ids) else False
        cuts = {0, len(ids), *(np.flatnonzero(np.diff(outside)) + 1).tolist()}
        if mask is not None and len(mask) == len(ids):
            cuts |= set((np.flatnonzero(np.diff(mask)) + 1).tolist())
        for opening in encoder.openings():
            size = len(opening)
            found = np.flatnonzero(ids[: len(ids) - size + 1] == opening[0])
            cuts |= {n for n in found.tolist() if (ids[n : n + size] == opening).all()}
        edges = sorted(cuts)
        return [(a, b) for a, b in pairwise(edges) if not outside[a]]

    def _check_order(self, row: dict[str, Any], place: Place, one: Encoded, listed: np.ndarray) -> None:
        """Raise InputError where the first conversations' entries hold fewer of the tokens that they should predict
        than of those beside them."""
        if self._sampled == SAMPLED_ROWS:
            return
        self._sampled += 1
        self._hits[1] += listed.sum(), len(listed)
        for n, shift in ((0, -1), (2, 1)):
            at = place.first + one.predicted - 1 + shift
            inside = (at >= 0) & (at < len(row[self.compression.columns[0]]))
            ids, _ = self._decoded(row, at[inside])
            self._hits[n] += (ids == one.input_ids[one.predicted[inside]][:, None]).any(1).sum(), inside.sum()
        refuse_shifted(f"{', '.join(self.compression.columns)} for {self.name}", self._hits)

    def _decoded(self, row: dict[str, Any], at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        columns = [row[name][at] for name in self.compression.columns]
        if any(column.shape[1] != width for column, width in zip(columns, self.compression.widths)):
            raise Unusable("lengths", "the entries have other sizes than the first row's")
        return self.compression.decode(*columns)

    def read(self, place: Place, one: Encoded, top_k: int) -> tuple[TopK, dict[str, int]]:
        row, at = self._distributions.at(place.row), place.first + one.predicted - 1
        if at[-1] >= (count := len(row[self.compression.columns[0]])):
            raise Unusable("positions", f"distributions for {count} positions, the last token is at {at[-1] + 1}")
        ids, logprobs = self._decoded(row, at)
        total = np.logaddexp.reduce(logprobs, 1)
        exact = total <= np.log(MAX_MASS)  # else logits, which the older format may hold
        if not (exact | np.isnan(total)).all() and not self.compression.legacy:
            raise Unusable("mass", f"probabilities of {np.exp(np.nanmax(total)):.3g} in all for one token")
        if ids.max(initial=0) >= self.vocab_size:
            raise Unusable("vocabulary", f"token id {ids.max()} of {self.vocab_size}")
        logprobs = logprobs - np.maximum(total, 0)[:, None]
        hit = ids == one.input_ids[one.predicted][:, None]
        listed = hit.any(1)
        self._check_order(row, place, one, listed)
        ce = -np.where(listed, np.where(hit, logprobs, 0).sum(1), logprobs.min(1))
        order = np.argsort(-logprobs, 1, kind="stable")[:, :top_k]
        ids, logprobs = np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs, order, 1)
        found = TopK(ids.astype(np.int32), logprobs.astype(np.float32), np.maximum(ce, 0).astype(np.float32))
        counts = {"exact_tokens": int(exact.sum()), "renormalised_tokens": int((~exact).sum())}
        return found, counts | {"estimated_ce": int((~listed).sum())}


def _array(values: Any) -> np.ndarray:
    """A list of numbers as an array [T], one of lists of one length as [T, width]; [T, 0] where lengths differ."""
    import pyarrow as pa

    if not pa.types.is_list(values.type) and not pa.types.is_large_list(values.type):
        return values.to_numpy(zero_copy_only=False)
    flat = values.flatten().to_numpy(zero_copy_only=False)
    width = len(flat) // max(len(values), 1)
    lengths = values.value_lengths().to_numpy(zero_copy_only=False)
    return flat.reshape(-1, width) if len(flat) and (lengths == width).all() else np.zeros((len(values), 0), np.uint8)
