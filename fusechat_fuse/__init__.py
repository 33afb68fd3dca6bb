"""Pairwise knowledge fusion of chat LLMs: representations, alignment, a sparse fusion loss, a Trainer.

    load_conversations -> represent -> align (-> combine) -> FusionTrainer -> a target checkpoint for mergekit

Names are resolved on first use, so `import fusechat_fuse` itself loads neither torch nor transformers.
Source: Wan et al., "FuseChat: Knowledge Fusion of Chat Models", arXiv 2408.07990.
"""

from importlib import import_module

_HOME = {
    "load_conversations": "text.conversations",
    "represent": "capture.run",
    "load_representation": "store.shards",
    "align": "alignment.run",
    "combine": "alignment.combination",
    "fusion_loss": "training.loss",
    "FusionConfig": "training.config",
    "FusionCollator": "training.collator",
    "FusionTrainer": "training.trainer",
}
__all__ = list(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(_HOME)}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__():
    return sorted([*globals(), *_HOME])
