"""Three paths from a batch to the sums of its losses: the lean head, or the model's own logits, kept or full.

lean  lm_head and loss in chunks, at labelled positions only (`lean_head.py`); for the model families that it knows
kept  the model's own logits of the labelled positions only, where its forward can leave out the others
full  the model's own logits of every position
"""

import logging

from fusechat_fuse.training.head_loss import FusionOutput
from fusechat_fuse.training.lean_head import install_lean_head, takes_kept_logits, why_not_lean
from fusechat_fuse.training.loss import IGNORED, check_loss_options, row_sums, weighted_loss

logger = logging.getLogger(__name__)
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")
FUSION_COLUMNS = ("shift_labels", "target_ids", "target_probs")
_OWN_LOGITS = {"kept": "the model's own logits of all labelled positions", "full": "full logits"}


def choose_loss_path(model, args) -> str:
    """lean, kept or full; installs the lean head in a model not yet wrapped, or logs the reason why it is not used."""
    one_device = args.n_gpu <= 1
    if not args.lean_head:
        reason = "lean_head is off"
    elif not one_device:
        reason = "one process drives several GPUs (start one process per GPU with torchrun or accelerate)"
    else:
        reason = why_not_lean(model)
    if reason is None:
        install_lean_head(model)
        return "lean"
    path = "kept" if args.lean_head and one_device and takes_kept_logits(model) else "full"
    logger.warning("The lean head is not used: %s. Training goes through %s.", reason, _OWN_LOGITS[path])
    return path


def loss_sums(model, batch: dict, path: str, *, lm_loss_weight: float, kind: str):
    """(FusionOutput of sums over the batch's labelled positions, auxiliary loss of a mixture of experts or None)."""
    check_loss_options(lm_loss_weight, kind)  # which a callback may have changed
    arguments = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    if path == "lean":
        columns = {name: batch[name] for name in FUSION_COLUMNS}
        return model(**arguments, **columns, lm_loss_weight=lm_loss_weight, fusion_loss_type=kind), None
    mask = batch["shift_labels"] != IGNORED
    kept = {"logits_to_keep": mask} if path == "kept" else {}
    outputs = model(**arguments, **kept, use_cache=False)
    rows = None if kept else mask.reshape(-1).nonzero(as_tuple=True)[0]
    logits = outputs.logits if kept else outputs.logits.flatten(0, 1)
    labels, ids, probs = (batch[name][mask] for name in FUSION_COLUMNS)
    lm_sum, fusion_sum = row_sums(logits, labels, ids, probs, kind, rows)
    loss = weighted_loss(lm_sum, fusion_sum, lm_loss_weight)
    return FusionOutput(loss, lm_sum.detach(), fusion_sum.detach()), getattr(outputs, "aux_loss", None)
