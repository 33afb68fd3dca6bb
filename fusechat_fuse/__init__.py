"""Pairwise knowledge fusion of chat LLMs: representations, alignment, a sparse fusion loss, a Trainer.

    load_conversations -> represent (-> compare) -> align (-> combine) -> FusionTrainer -> a target for mergekit

Names are resolved on first use, so `import fusechat_fuse` itself loads neither torch nor transformers.
Source: Wan et al., "FuseChat: Knowledge Fusion of Chat Models", arXiv 2408.07990.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusechat_fuse.alignment.combination import combine
    from fusechat_fuse.alignment.run import align
    from fusechat_fuse.capture.released import import_released
    from fusechat_fuse.capture.run import represent
    from fusechat_fuse.evaluation.answers import answer
    from fusechat_fuse.evaluation.comparison import compare
    from fusechat_fuse.store.shards import load_representation
    from fusechat_fuse.text.conversations import load_conversations
    from fusechat_fuse.training.collator import FusionCollator
    from fusechat_fuse.training.config import FusionConfig
    from fusechat_fuse.training.loss import fusion_loss
    from fusechat_fuse.training.trainer import FusionTrainer

__all__ = [
    "FusionCollator",
    "FusionConfig",
    "FusionTrainer",
    "align",
    "answer",
    "combine",
    "compare",
    "fusion_loss",
    "import_released",
    "load_conversations",
    "load_representation",
    "represent",
]
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
    "FusionConfig": "training.config",
    "FusionCollator": "training.collator",
    "FusionTrainer": "training.trainer",
}


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(_HOME)}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__():
    return sorted([*globals(), *_HOME])
