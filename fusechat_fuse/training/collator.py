"""Aligned conversations -> one training batch: padded to the longest, or packed end to end without padding.

What a batch holds (B rows of T tokens; packed: B = 1 and T = all tokens of the conversations):
    input_ids, labels [B, T] (labels unshifted, as transformers counts them), attention_mask [B, T] or, packed,
    position_ids [B, T]; shift_labels [B, T] (`shift_labels[b, t]` is what position t predicts), target_ids and
    target_probs [B, T, K] at the same positions; conversation_stats [B, C, 5] (see STATS), for the logs only.
The only Python loop runs over the conversations of a batch.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from fusechat_fuse.errors import InputError
from fusechat_fuse.training.choice import BY_SLICE, fusion_distribution
from fusechat_fuse.training.loss import IGNORED
from fusechat_fuse.training.options import FusionOptions, check_choices, take_preset
from fusechat_fuse.training.rows import as_documented

logger = logging.getLogger(__name__)
BATCH = {"input_ids", "labels", "shift_labels", "target_ids", "target_probs", "conversation_stats"}
STATS = ("source_index", "source_share", "mapped_mass", "predicted_tokens", "cut_tokens")


@dataclass
class FusionCollator:
    """Collate aligned rows (decoded, as stored: what `datasets.load_from_disk` gives, or made by hand).

    Args:
        pad_token_id: any id of the vocabulary; padding is masked everywhere.
        vocab_size: rows of the model's embedding; a conversation with an id beyond it is refused. None: no check.
        max_length: tokens kept of a conversation; predicted tokens beyond it are left out with their distributions.
        fusion_function: the choice, one of `choice.CHOICES`; None: the preset's.
        fuse_temperature: temperature T > 0 of the fusion distribution.
        ce_unit: token or byte, the unit of the cross-entropies that the choice compares; None: the preset's.
        fusion_fallback: pivot or label, the distribution where the source's is not chosen; None: the preset's.
        fusion_tail: label or drop, what replaces the entries that were not kept; None: the preset's.
        label_noise: for fusion_tail label, the share of labels that may be wrong.
        slice_choice: for a choice by slice, the source's weight in a row's slice (`slice_choice.source_by_slice`).
            FusionTrainer sets it where it is None.
        packing: put all conversations of a batch into one row with restarting position ids (no padding). The model's
            attention must honour position ids (FlashAttention, flex, and transformers' own sdpa and eager masks do).
        pad_to_multiple_of: round T up (tensor cores).
        preset: fusechat or paper, the defaults, which are FusionConfig's too.

    Returns (when called with a list of rows): dict of tensors as the module's text says; float32, int64.
    Raises: InputError naming the conversation.
    """

    pad_token_id: int = 0
    vocab_size: int | None = None
    max_length: int = FusionOptions.max_length
    fusion_function: str = None  # pyright: ignore[reportAssignmentType]: the preset's, from __post_init__ on
    fuse_temperature: float = FusionOptions.fuse_temperature
    ce_unit: str = None  # pyright: ignore[reportAssignmentType]: the preset's, from __post_init__ on
    fusion_fallback: str = None  # pyright: ignore[reportAssignmentType]: the preset's, from __post_init__ on
    fusion_tail: str = None  # pyright: ignore[reportAssignmentType]: the preset's, from __post_init__ on
    label_noise: float = FusionOptions.label_noise
    slice_choice: Callable[[dict], float] | None = None
    packing: bool = FusionOptions.packing
    pad_to_multiple_of: int | None = None
    preset: str = FusionOptions.preset

    def __post_init__(self):
        take_preset(self)
        check_choices(self)
        if not 0 <= self.label_noise < 1:
            raise InputError(f"value for label_noise: expected 0 to 1, got {self.label_noise}. Change it.")
        for name in ("fuse_temperature", "max_length"):
            if not getattr(self, name) > 0:
                raise InputError(f"value for {name}: expected more than 0, got {getattr(self, name)}. Raise it.")

    def fit_vocabulary(self, vocab_size: int) -> None:
        """Check ids against a vocabulary unless one is set; a padding id outside it becomes 0."""
        self.vocab_size = vocab_size if self.vocab_size is None else self.vocab_size
        if not 0 <= self.pad_token_id < self.vocab_size:
            self.pad_token_id = 0

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        items = [self._item(as_documented(row)) for row in rows]
        lengths = [len(item["input_ids"]) for item in items]
        step, longest = self.pad_to_multiple_of or 1, sum(lengths) if self.packing else max(lengths)
        B, T = 1 if self.packing else len(items), -(-longest // step) * step
        K = max(item["ids"].shape[1] for item in items)
        batch = {
            "input_ids": np.full((B, T), self.pad_token_id, np.int64),
            "labels": np.full((B, T), IGNORED, np.int64),
            "shift_labels": np.full((B, T), IGNORED, np.int64),
            "target_ids": np.full((B, T, K), -1, np.int64),
            "target_probs": np.zeros((B, T, K), np.float32),
        }
        for n, item in enumerate(items):
            b, offset = (0, sum(lengths[:n])) if self.packing else (n, 0)
            ids, at, width = item["input_ids"], item["predicted"] + offset, item["ids"].shape[1]
            batch["input_ids"][b, offset : offset + len(ids)] = ids
            batch["labels"][b, at] = batch["shift_labels"][b, at - 1] = ids[item["predicted"]]
            batch["target_ids"][b, at - 1, :width] = item["ids"]
            batch["target_probs"][b, at - 1, :width] = item["probs"]
        stats = np.array([item["stats"] for item in items], np.float32)
        if self.packing:
            runs = [*lengths, T - longest]  # padding is a sequence of its own
            batch |= {"position_ids": np.concatenate([np.arange(n) for n in runs])[None]}
            batch |= {"conversation_stats": stats[None]}
        else:
            batch |= {"attention_mask": (np.arange(T) < np.array(lengths)[:, None]).astype(np.int64)}
            batch |= {"conversation_stats": stats[:, None]}
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def _item(self, row: dict) -> dict:
        """One conversation cut to max_length: ids, the places it predicts from, their distributions, figures."""
        chosen = self.slice_choice if self.fusion_function in BY_SLICE else lambda row: 0.0
        if chosen is None:
            raise InputError(
                f"slice_choice for {self.fusion_function}: expected what source_by_slice makes of the training data, "
                "got none. Set it, or pass the collator, not a function around it, to FusionTrainer, which sets it."
            )
        fused = fusion_distribution(
            row,
            choice=self.fusion_function,
            ce_unit=self.ce_unit,
            fuse_temperature=self.fuse_temperature,
            fallback=self.fusion_fallback,
            tail=self.fusion_tail,
            label_noise=self.label_noise,
            slice_weight=chosen(row),
        )
        top = max(int(row["input_ids"].max(initial=0)), int(fused.ids.max(initial=0)))
        if self.vocab_size is not None and top >= self.vocab_size:
            raise InputError(
                f"token id for conversation {row['id']!r}: expected less than the model's vocabulary of "
                f"{self.vocab_size}, got {top}. Use data that was aligned to this model's tokenizer."
            )
        kept = int(np.searchsorted(row["predicted"], self.max_length))  # predicted tokens that are still there
        mass, index = row.get("mapped_mass"), row.get("source_index")
        sources = np.unique(np.asarray(0 if index is None else index))  # of a combined row; several: they were mixed
        return {
            "input_ids": row["input_ids"][: self.max_length],
            "predicted": row["predicted"][:kept],
            "ids": fused.ids[:kept],
            "probs": fused.probs[:kept],
            "stats": (
                int(sources[0]) if len(sources) == 1 else -1,
                fused.source_share,
                float(np.sum(mass[:kept], dtype=np.float64)) if mass is not None else np.nan,
                kept,
                max(len(row["input_ids"]) - self.max_length, 0),
            ),
        }


def collator_options(options) -> dict[str, Any]:
    """What a FusionCollator takes from a FusionConfig."""
    return {one.name: getattr(options, one.name) for one in fields(FusionCollator) if hasattr(options, one.name)}


def fitted(collator: FusionCollator, options, *, is_users: bool) -> FusionCollator:
    """The collator with the options of a FusionConfig; the user's own as it is, with a warning where they differ."""
    wanted = collator_options(options)
    if not is_users:
        return replace(collator, **wanted)
    if other := [name for name, value in wanted.items() if getattr(collator, name) != value]:
        logger.warning("data_collator: its own %s instead of those in the arguments.", ", ".join(other))
    return collator


def make_collator(options, tokenizer) -> FusionCollator:
    """The collator with the options of a FusionConfig; pads with the tokenizer's padding or end-of-text id."""
    ids = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return FusionCollator(pad_token_id=next((n for n in ids if n is not None), 0), **collator_options(options))


def agreed_labels(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch with a label only where both `labels` and `shift_labels` have one: a collator may mask either."""
    if missing := sorted(BATCH - set(batch)):
        raise InputError(
            f"batch for FusionTrainer: expected what FusionCollator returns, got none of {', '.join(missing)}. Change "
            "the batch of a FusionCollator in data_collator."
        )
    labels, shifted = batch["labels"], batch["shift_labels"]  # [B, T]
    ahead = pad(labels[:, 1:], (0, 1), value=IGNORED)
    shifted = shifted.masked_fill(ahead == IGNORED, IGNORED)
    return {**batch, "labels": pad(shifted[:, :-1], (1, 0), value=IGNORED), "shift_labels": shifted}


def first_conversations(batch: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """The batch with labels and figures for its first `count` conversations only; none where `count` is below 1."""
    count, stats = max(count, 0), batch["conversation_stats"]  # [B, 1, 5], or packed [1, C, 5]
    if count >= stats.shape[0] * stats.shape[1]:
        return batch
    if "position_ids" in batch:
        drop = (batch["position_ids"] == 0).cumsum(1) > count  # [1, T]
    else:
        drop = torch.arange(len(stats), device=stats.device)[:, None].expand_as(batch["labels"]) >= count  # [B, T]
    masked = {name: batch[name].masked_fill(drop, IGNORED) for name in ("labels", "shift_labels")}
    return {**batch, **masked, "conversation_stats": stats.flatten(0, 1)[:count, None]}
