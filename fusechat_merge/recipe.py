"""Read a mergekit configuration as mergekit does, and refuse what mergekit would silently ignore.

mergekit 0.1.5 ignores parameters that the method does not know, shared parameters set for a single model and duplicate
keys; it casts quantised weights without their scales. Models in local directories are checked here (see `checkpoint`),
models of the Hub when mergekit plans.
"""

import difflib
import logging
import os
from importlib import resources
from pathlib import Path

import torch
import yaml
from huggingface_hub.constants import HF_HUB_OFFLINE
from mergekit._data import chat_templates
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import ParameterScope
from pydantic import ValidationError

from fusechat_merge import checkpoint
from fusechat_merge._autoload import OWN

logger = logging.getLogger(__name__)
DTYPES = ("float32", "float16", "bfloat16", "float64")
DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "f16": "float16", "half": "float16", "fp32": "float32"}
DTYPE_ALIASES |= {"f32": "float32", "float": "float32", "fp64": "float64", "double": "float64"}


class StrictLoader(yaml.SafeLoader):
    """YAML without duplicate keys."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load(path: str | Path) -> MergeConfiguration:
    """The configuration in a YAML file, checked.

    Raises:
        ValueError: not YAML, not a merge configuration, an unknown merge method or dtype, an unknown, misspelt or
            misplaced parameter, or a local model directory that cannot be merged.
        OSError: the file cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(
            f"configuration {path}: expected UTF-8, got the byte 0x{byte:02x} at {error.start}. Save it as UTF-8."
        ) from None
    try:
        document = yaml.load(text, StrictLoader)
    except yaml.constructor.ConstructorError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ValueError(
            f"configuration {path}: expected each key once, got {error.problem} in the mapping at line {line}. "
            "Correct it."
        ) from None
    except yaml.YAMLError as error:
        raise ValueError(
            f"configuration {path}: expected YAML, got {str(error).splitlines()[0]}. Correct it."
        ) from None
    if not isinstance(document, dict):
        raise ValueError(
            f"configuration {path}: expected a mapping with merge_method and models, got {type(document).__name__}. "
            "Pass a mergekit configuration."
        )
    methods = {method.spec.name: method.spec for method in registry.registered_methods()}
    for key in document:
        if key not in MergeConfiguration.model_fields:
            spec = methods.get(str(document.get("merge_method")))
            if spec and key in [parameter.name for parameter in spec.parameters]:
                raise ValueError(
                    f"configuration {path}: expected {key} under parameters, got it at the top level, where it has no "
                    "effect. Move it."
                )
            raise ValueError(f"configuration {path}: " + _unexpected(key, MergeConfiguration.model_fields))
    try:
        config = MergeConfiguration.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the document"
        raise ValueError(f"configuration {path}, {place}: {first['msg']}. Correct it.") from None
    except RuntimeError as error:
        raise ValueError(f"configuration {path}: {error}. Correct it.") from None
    name = str(path)
    if config.merge_method not in methods:
        raise ValueError(f"merge_method in {name}: " + _unexpected(config.merge_method, methods))
    for key in ("dtype", "out_dtype"):
        dtype = getattr(config, key)
        if dtype is not None and dtype.removeprefix("torch.") not in DTYPES:
            raise ValueError(f"{key} in {name}: " + _unexpected(dtype, DTYPES, DTYPE_ALIASES.get(dtype.lower())))
    check_chat_template(config.chat_template, name)
    _check_parameters(config, name)
    _check_models(config, name)
    return config


def check_chat_template(template: str | None, name: str) -> None:
    """Raises ValueError for a template that is none: mergekit would write the model without its tokenizer."""
    files = [Path(file.name) for file in resources.files(chat_templates).iterdir()]
    known = ["auto", *sorted(file.stem for file in files if file.suffix == ".jinja")]
    if template and "{" not in template and template not in known:
        raise ValueError(f"chat_template in {name}: " + _unexpected(template, known))


def _check_parameters(config: MergeConfiguration, name: str) -> None:
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
            if key == "weight" and model == config.base_model and spec.name in OWN:
                raise ValueError(
                    f"parameters of {place} in {name}: expected no weight for the pivot {model}, got one. "
                    "Give weights to the targets only."
                )


def check_adapters(config: MergeConfiguration, name: str, cache: bool, remedy: str) -> None:
    """Raises ValueError for `model+adapter` where mergekit is given no directory to merge it in."""
    adapted = next((model for model in sorted(config.referenced_models(), key=str) if model.lora is not None), None)
    if adapted is not None and not cache:
        raise ValueError(f"adapter of {adapted} in {name}: expected a directory to merge it in, got none. {remedy}")


def check_names(config: MergeConfiguration, name: str) -> None:
    """Raises ValueError for a directory whose name mergekit's model card would look up on the Hub, which is offline."""
    for path in sorted({model.model.path for model in config.referenced_models()}):
        if HF_HUB_OFFLINE and os.path.isdir(path) and path[0] not in "/~." and path.count("/") < 2:
            raise ValueError(
                f"model {path} in {name}: expected a path that cannot be a name on the Hub, got a relative one: "
                "mergekit's model card asks the Hub for it, which HF_HUB_OFFLINE forbids. "
                f"Write ./{path}, or pass --no-write-model-card."
            )


def _check_models(config: MergeConfiguration, name: str) -> None:
    """Raises ValueError for a local model directory that cannot be merged; a warning where `dtype` loses digits."""
    layers, finest = {}, {}
    for model in sorted(config.referenced_models(), key=str):
        path = model.model.path
        if os.path.isabs(path) or path.startswith((".", "~")) or os.path.isdir(path):
            layers[model], finest[model] = _layers_and_rounding(model, name)
    for holder in (config, *(config.modules or {}).values()):
        models = (config.base_model, *(entry.model for entry in holder.models or ()))
        known = [model for model in models if layers.get(model)]
        for model in known[1:]:
            if layers[model] != layers[known[0]]:
                raise ValueError(
                    f"model {model} in {name}: expected {layers[known[0]]} layers as in {known[0]}, got "
                    f"{layers[model]}. Merge models of one architecture."
                )
    narrowed = [model for model in finest if config.dtype and finest[model] < _rounding(config.dtype)]
    ours = config.merge_method in OWN  # they read the inputs in the dtype of their files
    if narrowed and not (ours and config.out_dtype):
        logger.warning(
            "dtype %s in %s is narrower than the weights of %s: %s. Write `dtype: float32`%s.",
            config.dtype,
            name,
            narrowed[0],
            "the merged weights are rounded to it" if ours else "mergekit rounds the inputs to it first",
            "" if config.out_dtype else f", with `out_dtype: {config.dtype}` for a small file",
        )


def _rounding(dtype: str) -> float:
    return torch.finfo(getattr(torch, dtype.removeprefix("torch."))).eps


def _layers_and_rounding(model: ModelReference, name: str) -> tuple[int | None, float]:
    """(number of layers, None where config.json does not say; relative rounding of its finest weights)."""
    path = model.model.path
    file = Path(path, "config.json")
    if not file.is_file():
        raise ValueError(
            f"model {path} in {name}: expected a model directory with config.json, got "
            f"{'one without' if os.path.isdir(path) else 'no such directory'}. Correct the path"
            + (" (one with + or @ in it is written as `model: {model: {path: PATH}}`)." if str(model) != path else ".")
        )
    settings = checkpoint.read_json(file)
    stored = checkpoint.stored_dtypes(checkpoint.weight_files(path))
    if model.lora is None:
        checkpoint.check_precision(f"{path} in {name}", stored, settings)
    floats = [_rounding(checkpoint.FLOATS[dtype]) for dtype in stored.values() if dtype in checkpoint.FLOATS]
    return settings.get("num_hidden_layers") or settings.get("n_layer"), min(floats, default=1.0)


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


def _unexpected(word: str, known, meant: str | None = None) -> str:
    known = list(known)
    meant = meant or next(iter(difflib.get_close_matches(str(word).lower(), known, n=1)), None)
    remedy = f"Did you mean {meant}?" if meant else "Remove or rename it."
    return f"expected one of {', '.join(known)}, got {word!r}. {remedy}"
