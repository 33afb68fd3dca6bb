"""Checks of checkpoints before anything is merged: whole and unambiguous files, dtypes that can be merged, an output
layer, settings that agree with the pivot's.

Of the weights only the headers are read. A safetensors file begins with the length of its header (8 bytes, little
endian) and the header, JSON: name -> {dtype, shape, data_offsets}; the tensors' bytes follow.
"""

import json
import logging
import os
import re
import struct
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mergekit.architecture import arch_info_for_config
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache

from fusechat_merge.once import warn_once

logger = logging.getLogger(__name__)
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
NARROW = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "F4")
BYTES = ("I8", "U8")
OUTPUT_LAYERS = ("lm_head.weight", "embed_out.weight")
NO_COMPUTATION = re.compile(  # settings in config.json that change no forward pass, or are checked elsewhere
    r"(.*\.)?(_\w+|architectures|auto_map|dtype|torch_dtype|transformers_version|use_cache|initializer_range|\w*dropout|"
    r"\w+_token_id|\w+_token_index|vocab_size|num_hidden_layers|tie_word_embeddings|quantization_config)(\..*)?"
)


def read_json(file: Path) -> dict:
    """The mapping in a JSON file of a checkpoint; a ValueError names the file where it holds none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"file {file}: expected a JSON mapping, got something else. Copy or download it again.")
    return found


def stored_dtypes(files: Iterable[str | Path]) -> dict[str, str]:
    """Name -> safetensors' name of the dtype, of every tensor in these safetensors files.

    Raises:
        ValueError: a file is missing, is not a safetensors file, is cut off, or holds a tensor of another one.
        OSError: a file cannot be read.
    """
    found, place = {}, {}
    for file in files:
        if not os.path.exists(file):
            raise ValueError(f"weights file {file}: expected it, as the index names it, got none. Copy or download it.")
        size = os.path.getsize(file)
        with open(file, "rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            header = stream.read(length) if length <= size - 8 else b""
        try:
            entries = json.loads(header)
            entries.pop("__metadata__", None)
            ends = [entry["data_offsets"][1] for entry in entries.values()]
            found |= {name: entry["dtype"] for name, entry in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise ValueError(
                f"weights file {file}: expected a safetensors file, got {size} bytes without its header. "
                "Copy or download it again."
            ) from None
        if twice := place.keys() & entries.keys():
            raise ValueError(
                f"tensor {min(twice)} in {file}: expected it in one weights file, got it in {place[min(twice)]} too. "
                "Save that model again."
            )
        place |= dict.fromkeys(entries, file)
        whole = 8 + length + max(ends, default=0)
        if size < whole:
            raise ValueError(
                f"weights file {file}: expected {whole} bytes, got {size}. It is cut off: copy or download it again."
            )
    return found


def weight_files(directory: str | Path) -> list[Path]:
    """The safetensors files that a checkpoint directory's tensors are read from; none where it holds pickles."""
    directory = Path(directory)
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return [directory / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    single = directory / "model.safetensors"
    return [single] if single.is_file() else []


def check_one_save(directory: str | Path) -> None:
    """Raises ValueError where a directory holds two saves, of which transformers reads one and mergekit the other."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = Path(directory, f"{single}.index.json")
        if index.is_file() and index.with_name(single).is_file():
            raise ValueError(
                f"weights in {directory}: expected one save, got {single}, which transformers reads, and {index.name}, "
                "which mergekit reads. Remove the older one."
            )


def check_precision(model: str, stored: dict[str, str], config: dict) -> None:
    """Raises ValueError for quantised weights, by the `stored_dtypes` ({} if unknown) and what config.json holds."""
    settings = config.get("quantization_config")
    narrow = (f"{d} in {n}" for n, d in stored.items() if d in NARROW or (d in BYTES and n.endswith("weight")))
    shown = next(narrow, None)
    if shown is None and settings and not (stored and set(stored.values()) <= set(FLOATS)):
        shown = f"quantization_config ({settings.get('quant_method', 'of an unnamed method')}) in its config.json"
    if shown is not None:
        raise ValueError(
            f"model {model}: expected float32, float16 or bfloat16 weights, got {shown}, whose scales a merge does not "
            "apply. Convert that model first."
        )


def check_distinct(where: str, models: Sequence[ModelReference]) -> None:
    """Raises ValueError where two names mean the same model: `T`, `T/`, a symbolic link to it."""
    found: dict[ModelReference, ModelReference] = {}
    for model in models:
        parts = {
            part: path.model_copy(update={"path": os.path.realpath(path.path)})
            for part, path in (("model", model.model), ("lora", model.lora))
            if path is not None and os.path.isdir(path.path)
        }
        first = found.setdefault(model.model_copy(update=parts), model)
        if first is not model:
            raise ValueError(
                f"inputs for {where}: expected each model once, got {first} and {model}, which are the same model. "
                "Remove one, or give it a weight."
            )


def check_all(method: str, models: Sequence[ModelReference], pivot: Hashable) -> None:
    """Refuse checkpoints that cannot be merged, or that mergekit would read wrongly. Called while mergekit plans.

    Raises:
        ValueError: a weights file is cut off or in two versions, weights are quantised, or the output layer of a model
            that does not share it with the embeddings is missing (mergekit would take the embeddings for it).
    """
    cache = LoaderCache()
    outputs: dict[Hashable, set[str]] = {}
    configs: dict[Hashable, Any] = {}
    for model in models:
        index = cache.get(model).index
        check_one_save(index.base_path)
        files = sorted({os.path.join(index.base_path, name) for name in index.tensor_paths.values()})
        stored = stored_dtypes(files) if index.is_safetensors else {}
        configs[model] = model.config(trust_remote_code=cache.trust_remote_code)
        if model.lora is None:
            check_precision(f"{model} for {method}", stored, configs[model].to_dict())
        outputs[model] = {name for name in index.tensor_paths if name.endswith(OUTPUT_LAYERS)}
    for model in models:
        if differing := _differences(configs[model].to_dict(), configs[pivot].to_dict()):
            warn_once(
                logger,
                f"config.json of {model} differs from the pivot's, by which the merged model computes, in "
                f"{', '.join(differing)}.",
            )
    expected = set().union(*outputs.values()) or _output_layers(configs[models[0]])
    for model in models:
        missing = expected - outputs[model]
        if missing and not _tied(configs[model]):
            raise ValueError(
                f"weights for {method}, model {model}: expected {min(missing)}, as its config.json says "
                "tie_word_embeddings: false, got none. Save that model again, or set tie_word_embeddings."
            )
        if expected and outputs[model] and not _tied(configs[model]) and _tied(configs[pivot]) and not outputs[pivot]:
            warn_once(
                logger,
                f"the merged model has {min(expected)}, as {model}, but the pivot's config.json, which it takes over, "
                "says tie_word_embeddings: true, so a program may use the embeddings instead. Set tie_word_embeddings: "
                f"false in {pivot} first.",
            )


def _differences(settings: dict, pivots: dict) -> list[str]:
    """The settings in which two configurations compute differently, with both values."""
    ours, theirs = _flat(settings), _flat(pivots)
    return [
        f"{name} ({ours.get(name)!r:.60}, the pivot's {theirs.get(name)!r:.60})"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name) and not NO_COMPUTATION.fullmatch(name)
    ]


def _flat(settings: dict, prefix: str = "") -> dict[str, Any]:
    found = {}
    for name, value in settings.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + str(name): value}
    return found


def _tied(config: Any) -> bool:
    return getattr(config, "tie_word_embeddings", True)


def _output_layers(config: Any) -> set[str]:
    """The output layers of this architecture for which mergekit would take the embeddings."""
    info = arch_info_for_config(config)
    modules = [module.architecture for module in info.modules.values()] if info else []
    weights = [weight for module in modules for weight in (*module.pre_weights(config), *module.post_weights(config))]
    return {w.name for w in weights if w.tied_names and w.name.endswith(OUTPUT_LAYERS)}
