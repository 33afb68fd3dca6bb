"""Read a mergekit configuration as mergekit does, and name what mergekit would pass over in silence.

mergekit 0.1.5 ignores parameters that the method does not know, and shared parameters set for a single model.
"""

import difflib
import os
from pathlib import Path

import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import ParameterScope
from pydantic import ValidationError


def load(path: str | Path) -> tuple[MergeConfiguration, str]:
    """(configuration, its YAML text), checked.

    Raises:
        ValueError: no YAML, no merge configuration, an unknown merge method, an unknown, misspelt or misplaced
            parameter, or a local model directory without a config.json.
        OSError: the file cannot be read.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"configuration {path}: expected YAML, got {str(error).splitlines()[0]}. Mend it.") from None
    if not isinstance(document, dict):
        raise ValueError(
            f"configuration {path}: expected a mapping with merge_method and models, got {type(document).__name__}. "
            "Pass a mergekit configuration."
        )
    for key in document:
        if key not in MergeConfiguration.model_fields:
            raise ValueError(f"configuration {path}: " + _unexpected_key(key, document.get("merge_method")))
    try:
        config = MergeConfiguration.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the document"
        raise ValueError(f"configuration {path}, {place}: {first['msg']}. Mend it.") from None
    except RuntimeError as error:
        raise ValueError(f"configuration {path}: {error}. Mend it.") from None
    check(config, str(path))
    return config, text


def check(config: MergeConfiguration, name: str) -> None:
    """Raises ValueError for what `load` lists, beyond the syntax."""
    methods = [method.spec.name for method in registry.registered_methods()]
    if config.merge_method not in methods:
        raise ValueError(f"merge_method in {name}: " + _unexpected(config.merge_method, methods))
    spec = registry.get(config.merge_method).spec
    shared = [p.name for p in spec.parameters if p.scope == ParameterScope.SHARED]
    known = [p.name for p in spec.parameters]
    for place, parameters, model in _parameters(config):
        for key in parameters or ():
            if key not in known:
                raise ValueError(
                    f"parameters of {place} in {name}, merge_method {spec.name}: " + _unexpected(key, known)
                )
            if model is not None and key in shared:
                raise ValueError(
                    f"parameters of {place} in {name}: expected {key} under the top-level parameters, got it for one "
                    "model, where it has no effect. Move it."
                )
            if key == "weight" and model == config.base_model and spec.name in ("sce", "varm"):
                raise ValueError(
                    f"parameters of {place} in {name}: expected no weight for the pivot {model}, got one. "
                    "Give weights to the targets only."
                )
    for model in config.referenced_models():
        path = model.model.path
        local = os.path.isabs(path) or path.startswith((".", "~")) or os.path.isdir(path)
        if local and not os.path.isfile(os.path.join(path, "config.json")):
            raise ValueError(
                f"model {path} in {name}: expected a model directory with config.json, got "
                f"{'one without' if os.path.isdir(path) else 'no such directory'}. Mend the path."
            )


def _parameters(config: MergeConfiguration):
    """Every `parameters` mapping: (where it is, it, the model it belongs to or None)."""
    yield "the configuration", config.parameters, None
    modules = {"": config, **{f"modules.{name} ": module for name, module in (config.modules or {}).items()}}
    for prefix, holder in modules.items():
        if prefix:
            yield prefix.strip(), holder.parameters, None
        for model in holder.models or ():
            yield f"{prefix}model {model.model}", model.parameters, model.model
        for index, output in enumerate(holder.slices or []):
            yield f"{prefix}slice {index}", output.parameters, None
            for source in output.sources:
                yield f"{prefix}slice {index}, {source.model}", source.parameters, source.model


def _unexpected_key(key: str, method: str | None) -> str:
    """What to say about a top-level key that mergekit would ignore: often a parameter in the wrong place."""
    methods = {m.spec.name: m for m in registry.registered_methods()}
    if method in methods and key in [p.name for p in methods[method].spec.parameters]:
        return f"expected {key} under parameters, got it at the top level, where it has no effect. Move it."
    return _unexpected(key, MergeConfiguration.model_fields)


def _unexpected(word: str, known) -> str:
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    remedy = f"Did you mean {close[0]}?" if close else "Remove or rename it."
    return f"expected one of {', '.join(known)}, got {word!r}. {remedy}"
