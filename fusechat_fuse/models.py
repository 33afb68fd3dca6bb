"""Opening models and tokenizers as they are on disk, and telling one from another."""

from __future__ import annotations

import hashlib
import logging
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from fusechat_fuse.errors import InputError

logger = logging.getLogger(__name__)


def first_line(error: Exception) -> str:
    """The first line of an error, without its full stop, to be put into a sentence."""
    return (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")


def load_fast_tokenizer(name_or_path, trust_remote_code: bool = False):
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

    if not isinstance(name_or_path, (str, Path)):
        return _must_be_fast(name_or_path, type(name_or_path).__name__)
    folder = Path(name_or_path)
    if folder.is_file() or (folder.is_absolute() and not folder.is_dir()):
        raise InputError(f"tokenizer for {folder}: expected a model directory, got none there. Check the path.")
    if folder.is_dir() and not [*folder.glob("*tokenizer*"), *folder.glob("*.tiktoken"), *folder.glob("tekken.json")]:
        raise InputError(f"tokenizer for {folder}: expected tokenizer.json in it, got no tokenizer. Copy one there.")
    if _has_file(folder, "tokenizer.json"):
        try:
            return _must_be_fast(PreTrainedTokenizerFast.from_pretrained(str(name_or_path)), name_or_path)
        except Exception as error:
            raise InputError(
                f"tokenizer for {name_or_path}: expected a readable tokenizer.json, got {first_line(error)}."
            ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name_or_path), trust_remote_code=trust_remote_code)
    except Exception as error:
        raise InputError(
            f"tokenizer for {name_or_path}: expected a model directory or Hub name with a tokenizer, got "
            f"{first_line(error)}. Check the name."
        ) from error
    tokenizer = _must_be_fast(tokenizer, name_or_path)
    logger.warning(
        "%s has no tokenizer.json: transformers rebuilt the tokenizer from its vocabulary file, and ids of white space "
        "may differ from the original's. Put the original tokenizer.json beside it.",
        name_or_path,
    )
    return tokenizer


def _has_file(folder: Path, file: str) -> bool:
    """Whether a directory or Hub repository holds a file."""
    if folder.is_dir():
        return (folder / file).exists()
    from transformers.utils import cached_file

    try:
        return cached_file(str(folder), file) is not None
    except OSError:
        return False


def _must_be_fast(tokenizer, name):
    if not hasattr(getattr(tokenizer, "backend_tokenizer", None), "encode"):
        raise InputError(
            f"tokenizer for {name}: expected a fast tokenizer (tokenizer.json), got {type(tokenizer).__name__} without "
            "a tokenizers backend. Save one with tokenizer.json and give that directory."
        )
    return tokenizer


def file_fingerprint(folder: Path) -> str:
    """A model directory's content in 16 hexadecimal digits: config.json, and of each weight file its size, its first
    64 KiB and 64 samples of 4 KiB. Reads a few MiB whatever the model's size; the directory's name does not count."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    for path in weights:
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as file:
            digest.update(file.read(1 << 16))
            for offset in np.linspace(0, max(size - 4096, 0), 64, dtype=np.int64):
                file.seek(int(offset))
                digest.update(file.read(4096))
    return digest.hexdigest()[:16]


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


def check_model(model, tokenizer) -> None:
    """Raise InputError unless `model` is a model directory, a possible Hub name, or loaded and with a tokenizer."""
    if not isinstance(model, (str, Path)):
        if tokenizer is None:
            raise InputError("tokenizer for represent: expected one beside a loaded model, got none. Give tokenizer=.")
        return
    folder = Path(model)
    if folder.is_file() or (not folder.is_dir() and (folder.is_absolute() or str(model).startswith("."))):
        raise InputError(f"model for {model}: expected a model directory, got none there. Check the path.")
    if folder.is_dir() and not (folder / "config.json").exists():
        raise InputError(f"model for {model}: expected a directory with config.json, got one without. Check the path.")


def positions_of(model, trust_remote_code: bool = False) -> int | None:
    """How many positions a model was made for (None where its configuration does not say).

    Args:
        model: directory, Hub name or loaded model. trust_remote_code: as transformers takes it.
    Raises: InputError where its configuration cannot be read.
    """
    if isinstance(model, (str, Path)):
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(str(model), trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"model for {model}: expected a configuration transformers knows, got: {first_line(error)}."
            ) from error
    else:
        config = model.config
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def load_model(name_or_path, *, device, dtype, device_map, attn_implementation, trust_remote_code):
    """The causal language model in evaluation mode.

    Args:
        name_or_path: directory or Hub name; a loaded model is returned as it is.
        device: where to put it; None: the GPU if there is one. Left to `device_map` where that is given.
        dtype, device_map, attn_implementation, trust_remote_code: as transformers takes them.
    Raises: InputError where there is no such model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if not isinstance(name_or_path, (str, Path)):
        return name_or_path.eval()
    options = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    options |= {"device_map": device_map} if device_map else {}
    options |= {"attn_implementation": attn_implementation} if attn_implementation else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(str(name_or_path), **options)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"model for {name_or_path}: expected a causal language model, got {first_line(error)}. Check the directory."
        ) from error
    if not device_map:
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return model.eval()


def model_identity(model) -> dict:
    """Name and fingerprint of a model directory, Hub name or loaded model."""
    if not isinstance(model, (str, Path)):
        return {
            "name": getattr(model, "name_or_path", "") or type(model).__name__,
            "fingerprint": weight_fingerprint(model),
        }
    folder = Path(model)
    if folder.is_dir():
        return {"name": folder.resolve().name, "fingerprint": file_fingerprint(folder)}
    from transformers.utils import cached_file

    try:
        file = Path(cached_file(str(model), "config.json"))
    except OSError as error:
        raise InputError(
            f"model for {model}: expected a directory or a Hub name, got neither ({str(error).splitlines()[0]})."
        ) from error
    return {"name": str(model), "fingerprint": file.parent.name[:16]}


def library_versions() -> dict[str, str]:
    """The versions that belong into a manifest."""
    found = {}
    for package in ("fusechat", "torch", "transformers", "tokenizers", "numpy", "pyarrow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
