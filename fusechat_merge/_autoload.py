"""Start-up hook: merge methods that installed packages declare are served by an unchanged mergekit.

mergekit 0.1.5 has no plug-in discovery. `fusechat_merge.pth` calls `install()` when Python starts, which only puts a
finder in front of `sys.meta_path`. When one of three modules of mergekit has been executed, a function is called:

- `mergekit.merge_methods.registry`: every method of the entry-point group `mergekit.merge_methods` is registered, in
  place of a built-in one of the same name.
- `mergekit.plan`: the planner leaves the inputs of our methods in the dtype of their files (see `planning`).
- `mergekit.merge`: `run_merge` checks its output, and writes the merge report that FUSECHAT_MERGE_REPORT asks for (see
  `running`).

A process that never imports mergekit pays for two small modules: everything that takes time (importlib.metadata,
mergekit, torch) is imported in processes that import mergekit only.

FUSECHAT_MERGE_AUTOLOAD=0 switches the hook off. It never raises: a method that cannot be registered is one warning, and
mergekit goes on with its own.
"""

import os
import sys

GROUP = "mergekit.merge_methods"
REGISTRY = "mergekit.merge_methods.registry"
PATCHES = {  # module of mergekit -> (our module whose `patch` changes it, what happens where it cannot)
    "mergekit.plan": (
        "fusechat_merge.planning",
        "inputs are rounded to the recipe's `dtype` first. Write `dtype: float32` with the `out_dtype` you want",
    ),
    "mergekit.merge": (
        "fusechat_merge.running",
        "FUSECHAT_MERGE_REPORT has no effect and outputs are not checked. Install mergekit 0.1.5, or a newer fusechat",
    ),
}
SWITCH = "FUSECHAT_MERGE_AUTOLOAD"
TESTED = ("0.1.5",)  # releases of mergekit
OWN = {"sce": "fusechat_merge.method:sce", "varm": "fusechat_merge.method:varm"}

_waiting = {}  # module -> its methods, where it was itself being imported when the registry was ready


class Finder:
    """Finds these modules of mergekit, as the other finders would, and has a function called when each is executed.

    Args:
        callbacks: name of a module -> the function, called with the module.
    """

    def __init__(self, callbacks):
        self.callbacks = callbacks

    def find_spec(self, name, path=None, target=None):
        if name not in self.callbacks:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find else None
            if spec is not None and spec.loader is not None:
                _call_after_execution(spec.loader, self.callbacks[name])
                return spec
        return None


def install() -> None:
    """Put the finder in front, once, unless the hook is switched off."""
    if os.environ.get(SWITCH) != "0" and not installed():
        sys.meta_path.insert(0, Finder({REGISTRY: serve} | dict.fromkeys(PATCHES, patch)))


def installed() -> bool:
    """Whether the finder is in place in this process."""
    return any(isinstance(finder, Finder) and REGISTRY in finder.callbacks for finder in sys.meta_path)


def register() -> None:
    """Import mergekit's registry and register the methods, whether or not the hook is switched off."""
    import importlib

    serve(importlib.import_module(REGISTRY), OWN)
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder(dict.fromkeys(PATCHES, patch)))
    for name in PATCHES.keys() & sys.modules.keys():
        patch(sys.modules[name])


def _call_after_execution(loader, callback) -> None:
    execute = loader.exec_module

    def exec_module(module):
        execute(module)
        try:
            callback(module)
        except Exception as error:
            _warn(f"the merge methods of installed packages are not served: {error!r}")

    loader.exec_module = exec_module


def patch(module) -> None:
    """Change this module of mergekit as the module docstring says."""
    import importlib

    ours, consequence = PATCHES[module.__name__]
    try:
        importlib.import_module(ours).patch(module)
    except Exception as error:
        _warn(f"its {module.__name__} is not the one this version knows ({error!r}), so {consequence}")


def serve(registry, also=()) -> None:
    """Register every method of the entry-point group, and those of `also` {name: "module:object"}, with `registry`."""
    if not isinstance(getattr(registry, "_METHODS", None), dict) or not callable(getattr(registry, "get", None)):
        _warn(
            "its merge-method registry is not the one this version knows, so mergekit's own methods stay in use. "
            "Install mergekit 0.1.5, or a newer fusechat"
        )
        return
    methods = declared() | dict(also)
    for name, place in sorted(methods.items()):
        module_name, _, attribute = place.partition(":")
        module = sys.modules.get(module_name)
        if module is not None and getattr(module.__spec__, "_initializing", False):
            _waiting.setdefault(module_name, []).append((registry, name, module_name, attribute))
        else:
            _register(registry, name, module_name, attribute)


def declared() -> dict[str, str]:
    """The merge methods that installed packages declare: {name: "module:object"}."""
    from importlib.metadata import entry_points

    return {point.name: point.value for point in entry_points(group=GROUP)}


def register_waiting(module_name: str) -> None:
    """Register the methods of a module whose own import started mergekit's. Called on the module's last line."""
    for method in _waiting.pop(module_name, ()):
        _register(*method)


def _register(registry, name: str, module_name: str, attribute: str) -> None:
    import importlib

    try:
        method = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:
        _warn(f"merge method {name!r} of {module_name} cannot be loaded and is left out: {error!r}")
        return
    registry._METHODS[name] = method


def _warn(message: str) -> None:
    import warnings

    from fusechat_merge.versions import versions

    ours, theirs = versions()
    warnings.warn(f"fusechat {ours} with mergekit {theirs}: {message}.", RuntimeWarning, stacklevel=2)
