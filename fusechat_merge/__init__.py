"""SCE and VaRM for mergekit, exact and fast.

Installing the distribution is enough: `mergekit-yaml` with `merge_method: sce` or `varm` runs these. From Python, `from
fusechat_merge import sce, varm` are mergekit merge methods (`merge_tensors([...], sce, base_index=0)`),
`fusechat_merge.kernel` holds the pure tensor functions, and `fusechat_merge.register()` serves the methods where the
start-up hook is switched off. Nothing heavy is imported until one of these names is used.
"""

__all__ = ["register", "sce", "varm"]

TYPE_CHECKING = False  # typing's, without importing it: this runs in every Python process
if TYPE_CHECKING:
    from fusechat_merge.method import sce, varm


def register() -> None:
    """Serve `sce` and `varm` from mergekit's registry, replacing mergekit's own `sce`; calling it again is harmless."""
    from fusechat_merge import _autoload

    _autoload.register()


def __getattr__(name: str):
    if name in ("sce", "varm"):
        from fusechat_merge import method

        return getattr(method, name)
    raise AttributeError(f"module 'fusechat_merge' has no attribute {name!r}")
