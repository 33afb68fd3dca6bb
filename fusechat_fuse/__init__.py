"""Pairwise knowledge fusion of chat LLMs: representations, alignment, a sparse fusion loss, a Trainer.

    load_conversations -> represent (-> compare) -> align (-> combine) -> FusionTrainer -> a target for mergekit

Names are resolved on first use, so `import fusechat_fuse` itself loads neither torch nor transformers.
Source: Wan et al., "FuseChat: Knowledge Fusion of Chat Models", arXiv 2408.07990.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from fusechat_fuse.requirements import check_versions

if TYPE_CHECKING:
    from fusechat_fuse.alignment.combination import combine as combine
    from fusechat_fuse.alignment.run import align as align
    from fusechat_fuse.capture.released import import_released as import_released
    from fusechat_fuse.capture.run import represent as represent
    from fusechat_fuse.evaluation.answers import answer as answer
    from fusechat_fuse.evaluation.comparison import compare as compare
    from fusechat_fuse.store.shards import load_representation as load_representation
    from fusechat_fuse.text.conversations import load_conversations as load_conversations
    from fusechat_fuse.training.collator import FusionCollator as FusionCollator
    from fusechat_fuse.training.config import FusionConfig as FusionConfig
    from fusechat_fuse.training.loss import fusion_loss as fusion_loss
    from fusechat_fuse.training.slice_choice import source_by_slice as source_by_slice
    from fusechat_fuse.training.trainer import FusionTrainer as FusionTrainer

_HOME = {
    "load_conversations": "text.conversations",
    "represent": "capture.run",
    "import_released": "capture.released",
    "load_representation": "store.shards",
    "answer": "evaluation.answers",
    "compare": "evaluation.comparison",
    "align": "alignment.run",
    "combine": "alignment.combination",
    "fusion_loss": "training.loss",
    "source_by_slice": "training.slice_choice",
    "FusionConfig": "training.config",
    "FusionCollator": "training.collator",
    "FusionTrainer": "training.trainer",
}
__all__ = list(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(_HOME)}")
    check_versions(__name__)
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__():
    return sorted([*globals(), *_HOME])
