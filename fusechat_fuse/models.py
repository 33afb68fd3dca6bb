"""Opening configurations, tokenizers and weights as they are on disk, and telling one model from another.

A model is named by a directory or a Hub name; most functions also take one that is loaded.
"""

from __future__ import annotations

import hashlib
import logging
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from fusechat_fuse.errors import InputError

logger = logging.getLogger(__name__)
_UNREADABLE = (OSError, ValueError, KeyError, ImportError)  # what transformers raises for a model that cannot be read


class Identity(TypedDict):
    """A model's name, and 16 hexadecimal digits that change with it."""

    name: str
    fingerprint: str


def first_line(error: Exception) -> str:
    """The first line of an error, without its full stop, to be put into a sentence."""
    return (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")


def is_named(model) -> bool:
    """Whether a model is given by a directory or a Hub name, not as a loaded object."""
    return isinstance(model, str | Path)


def _check_place(what: str, name_or_path) -> None:
    """Raise InputError where a name can only be a path and no directory is there."""
    path = Path(name_or_path)
    if path.is_file() or (not path.is_dir() and (path.is_absolute() or str(name_or_path).startswith("."))):
        raise InputError(
            f"{what} for {name_or_path}: expected a model directory or a Hub name, got neither. Check the path."
        )


def model_file(name_or_path, file: str) -> Path | None:
    """A file of a model by its name, from the directory or the Hub's cache; None where the model has none."""
    if Path(name_or_path).is_dir():
        path = Path(name_or_path) / file
        return path if path.is_file() else None
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(str(name_or_path), file)
    except OSError:
        return None
    return Path(found) if found else None


def load_config(model, *, trust_remote_code: bool = False) -> Any:
    """A model's configuration (transformers' PretrainedConfig).

    Args:
        model: directory, Hub name or loaded model.
        trust_remote_code: run the repository's own code.
    Raises: InputError where there is no model, or none that transformers knows.
    """
    if not is_named(model):
        return model.config
    from transformers import AutoConfig

    _check_place("model", model)
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise InputError(
            f"model for {model}: expected a model directory, got one without config.json. Give the directory that "
            "save_pretrained wrote."
        )
    try:
        return AutoConfig.from_pretrained(str(model), trust_remote_code=trust_remote_code)
    except _UNREADABLE as error:
        raise InputError(
            f"model for {model}: expected a model directory or a Hub name with a configuration that transformers "
            f"knows, got: {first_line(error)}. Check the name."
        ) from error


def positions_of(config) -> int | None:
    """How many positions a model of this configuration was made for; None where it does not say."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def load_fast_tokenizer(name_or_path, trust_remote_code: bool = False) -> Any:
    """A tokenizer whose ids are those of its own tokenizer.json.

    transformers 5 rebuilds some classes' pipelines (a LlamaTokenizer gets a Metaspace pre-tokenizer, which changes the
    ids of white space), so tokenizer.json is loaded as it is wherever there is one.

    Args:
        name_or_path: directory, Hub name, or a transformers fast tokenizer (returned as it is).
        trust_remote_code: run the repository's own tokenizer code where it has no tokenizer.json.
    Returns: a transformers fast tokenizer.
    Raises: InputError where there is no tokenizer or none of the fast kind.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not is_named(name_or_path):
        return _must_be_fast(name_or_path, type(name_or_path).__name__)
    _check_place("tokenizer", name_or_path)
    folder = Path(name_or_path)
    if folder.is_dir() and not [*folder.glob("*tokenizer*"), *folder.glob("*.tiktoken"), *folder.glob("tekken.json")]:
        raise InputError(f"tokenizer for {folder}: expected tokenizer.json in it, got no tokenizer. Copy one there.")
    if model_file(name_or_path, "tokenizer.json"):
        try:
            return _must_be_fast(PreTrainedTokenizerFast.from_pretrained(str(name_or_path)), name_or_path)
        except Exception as error:  # the tokenizers library raises Exception itself
            raise InputError(
                f"tokenizer for {name_or_path}: expected a readable tokenizer.json, got {first_line(error)}."
            ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name_or_path), trust_remote_code=trust_remote_code)
    except Exception as error:
        raise InputError(
            f"tokenizer for {name_or_path}: expected a model directory or a Hub name with a tokenizer, got "
            f"{first_line(error)}. Check the name."
        ) from error
    tokenizer = _must_be_fast(tokenizer, name_or_path)
    logger.warning(
        "%s has no tokenizer.json: transformers rebuilt the tokenizer from its vocabulary file, and ids of white space "
        "may differ from the original's. Put the original tokenizer.json beside it.",
        name_or_path,
    )
    return tokenizer


def _must_be_fast(tokenizer, name):
    if not hasattr(getattr(tokenizer, "backend_tokenizer", None), "encode"):
        raise InputError(
            f"tokenizer for {name}: expected a fast tokenizer (tokenizer.json), got {type(tokenizer).__name__} without "
            "a tokenizers backend. Save one with tokenizer.json and give that directory."
        )
    return tokenizer


def load_model(
    name_or_path,
    *,
    dtype,
    device_map: str | dict | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The causal language model with its weights, in evaluation mode, on the CPU unless `device_map` says otherwise.

    Args:
        name_or_path: directory or Hub name.
        dtype, device_map, attn_implementation, trust_remote_code: as transformers takes them.
    Raises: InputError where there is no such model, or its files lack a tensor of it (transformers would leave random
        numbers there).
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    options |= {"device_map": device_map} if device_map else {}
    options |= {"attn_implementation": attn_implementation} if attn_implementation else {}
    try:
        both: Any = AutoModelForCausalLM.from_pretrained(str(name_or_path), output_loading_info=True, **options)
        model, told = both
    except _UNREADABLE as error:
        raise InputError(
            f"weights for {name_or_path}: expected a causal language model, got {first_line(error)}. Check the model."
        ) from error
    if missing := sorted(told["missing_keys"]):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(
            f"weights for {name_or_path}: expected every tensor of {type(model).__name__}, got files without "
            f"{', '.join(missing[:3])}{more}. Give a whole checkpoint with its own config.json."
        )
    return model.eval()


def identify(model) -> Identity:
    """Which model this is, whoever asks and whenever: representations and training runs record it.

    A Hub name is known by the commit that is cached for it, a directory by what is in its files, a loaded model by its
    weights.

    Args:
        model: directory, Hub name or loaded model.
    Returns: name (a directory's own name, without its parents) and fingerprint.
    Raises: InputError where there is no such model.
    """
    if not is_named(model):
        return {
            "name": getattr(model, "name_or_path", "") or type(model).__name__,
            "fingerprint": weight_fingerprint(model),
        }
    folder = Path(model)
    if folder.is_dir():
        return {"name": folder.resolve().name, "fingerprint": file_fingerprint(folder)}
    file = model_file(model, "config.json")
    if file is None:
        raise InputError(f"model for {model}: expected a model directory or a Hub name, got neither. Check the name.")
    return {"name": str(model), "fingerprint": file.parent.name[:16]}  # .../snapshots/COMMIT/config.json


def file_fingerprint(folder: Path) -> str:
    """A model directory's content in 16 hexadecimal digits: config.json, and of each weight file its size, its first
    64 KiB and 64 samples of 4 KiB. Reads a few MiB whatever the model's size; the directory's name does not count."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    for path in weights:
        add_samples(digest, path)
    return digest.hexdigest()[:16]


def add_samples(digest, path: Path) -> None:
    """Put a file's name, its size, its first 64 KiB and 64 samples of 4 KiB into a digest of hashlib."""
    size = path.stat().st_size
    digest.update(f"{path.name} {size} ".encode())
    with open(path, "rb") as file:
        digest.update(file.read(1 << 16))
        for offset in np.linspace(0, max(size - 4096, 0), 64, dtype=np.int64):
            file.seek(int(offset))
            digest.update(file.read(4096))


def weight_fingerprint(model) -> str:
    """A loaded model's content in 16 hexadecimal digits: names, shapes, and 64 values of each parameter."""
    import torch

    digest = hashlib.sha256(type(model).__name__.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        flat = tensor.detach().reshape(-1)
        if flat.numel() and flat.device.type != "meta":
            at = torch.linspace(0, flat.numel() - 1, 64, dtype=torch.float64).long().to(flat.device)
            digest.update(flat[at].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def library_versions() -> dict[str, str]:
    """The versions that belong into a manifest."""
    found = {}
    for package in ("fusechat", "torch", "transformers", "tokenizers", "numpy", "pyarrow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
