"""The order in which training draws conversations: the same when a run is continued, none twice in an epoch."""

from typing import Any

import torch
from transformers import trainer_pt_utils
from transformers.trainer_pt_utils import LengthGroupedSampler


def mark_repeated(sampler) -> Any:
    """Let a BatchRebalanceSampler of transformers tell, as `repeated`, which conversations an epoch has had already.
    Any other sampler stays as it is.

    Where the last step of an epoch has fewer conversations than batches (on all processes), each of the others gets one
    from the start of the epoch. `repeated`: whether each of this process's batches of a step holds such a one, if that
    step is the epoch's last; of the step drawn last.
    """
    if not isinstance(sampler, getattr(trainer_pt_utils, "BatchRebalanceSampler", ())):  # of transformers 5.20
        return sampler
    sampler.repeated, assign = [], sampler._assign

    def assign_and_mark(indices, lengths):
        groups = assign([*range(len(indices))], lengths)
        own = sampler.remainder if sampler.has_tail else len(indices)
        sampler.repeated = [all(n >= own for n in group) for group in groups[sampler.rank]]
        return [[[indices[n] for n in group] for group in of_rank] for of_rank in groups]

    sampler._assign = assign_and_mark
    return sampler


def set_epoch(dataloader, epoch: int, seed: int) -> None:
    """Tell every sampler below a DataLoader the epoch (accelerate's own search ends before the one of a resumed run);
    grouping by length gets its order from seed and epoch, so that a resumed run draws the same."""
    sampler = getattr(dataloader, "batch_sampler", None)
    while sampler is not None:
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.generator = torch.Generator().manual_seed(seed + epoch)
        sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)
