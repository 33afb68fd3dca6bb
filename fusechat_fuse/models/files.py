"""Opening configurations and tokenizers as they are on disk (weights: `loading.py`).

A model is named by a directory (of PEFT adapters, too), a Hub name or a GGUF file; most functions also take one that is
loaded.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fusechat_fuse.errors import InputError, describe_error, first_line
from fusechat_fuse.store.files import read_json

logger = logging.getLogger(__name__)
_WHOLE = ("model*.safetensors", "pytorch_model*.bin")  # files of weights that are not adapters


def is_named(model) -> bool:
    """Whether a model is given by a directory or a Hub name, not as a loaded object."""
    return isinstance(model, str | Path)


def _check_exists(what: str, name_or_path) -> None:
    """Raise InputError where a name can only be a path, and no directory or GGUF file is there."""
    path = Path(name_or_path)
    if is_gguf(name_or_path) and path.is_file():
        return
    if path.is_file() or (not path.is_dir() and (path.is_absolute() or str(name_or_path).startswith("."))):
        raise InputError(
            f"{what} for {name_or_path}: expected a model directory or a Hub name, got neither. Check the path."
        )


def is_gguf(model) -> bool:
    """Whether a model is given by a GGUF file."""
    return is_named(model) and str(model).endswith(".gguf")


def with_gguf(model, gguf_file: str | None):
    """The model's name, or the path of the given GGUF file in its directory or Hub repository.

    Args:
        model: directory or Hub name; None: `gguf_file` is a path. gguf_file: None for other models.
    Raises: InputError where there is no such file.
    """
    if gguf_file is None:
        return model
    found = Path(gguf_file) if model is None else model_file(model, gguf_file)
    if not is_gguf(gguf_file) or found is None or not found.is_file():
        where = "" if model is None else f" in {model}"
        raise InputError(f"gguf_file {gguf_file}: expected a .gguf file{where}, got none. Check the name.")
    return str(found)


def adapter_base(model) -> str | None:
    """The base model that a directory of PEFT adapters names; None for other models.

    Raises: InputError where whole weights are beside the adapters (transformers would apply the adapters to them), or
        the base is not a whole model.
    """
    folder = Path(model)
    file = folder / "adapter_config.json"
    if not file.is_file():
        return None
    if whole := next((p.name for form in _WHOLE for p in sorted(folder.glob(form))), None):
        raise InputError(
            f"model for {model}: expected adapters or whole weights, got both ({file.name} beside {whole}). Move one "
            "of them away: the adapters, if they are merged into the weights."
        )
    found = read_json(file, "adapter's configuration")
    base = found.get("base_model_name_or_path") if isinstance(found, dict) else None
    if not base:
        raise InputError(f"adapters for {model}: expected base_model_name_or_path in {file.name}, got none. Add it.")
    base_path = Path(base)
    missing = not base_path.exists() and (base_path.is_absolute() or str(base).startswith("."))
    if missing or is_gguf(base) or (base_path / file.name).is_file():
        got = "nothing there" if missing else "a GGUF file" if is_gguf(base) else "adapters"
        raise InputError(
            f"adapters for {model}: expected a whole model at base_model_name_or_path of {file.name}, got {got} "
            f"({base}). Change it there."
        )
    return str(base)


def for_transformers(model) -> tuple[str, dict[str, str]]:
    """(name or directory, further options) as `from_pretrained` takes them; a GGUF file is an option."""
    if is_gguf(model):
        require_package("gguf", f"a GGUF file ({model})")
        return str(Path(model).parent), {"gguf_file": Path(model).name}
    return str(model), {}


def require_package(package: str, what: str) -> None:
    """Raise InputError where a package that `what` needs is not installed."""
    if find_spec(package) is None:
        raise InputError(f"{what}: expected the package {package}, got none. Run: pip install {package}")


def model_file(name_or_path, file: str) -> Path | None:
    """The path of a model's file, in its directory or the Hub's cache; None where the model has none."""
    if is_gguf(name_or_path):
        return None
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
        model: directory, Hub name, GGUF file or loaded model; of adapters, their base is read.
        trust_remote_code: run the repository's own code.
    Raises: InputError where there is no model, or none that transformers knows.
    """
    if not is_named(model):
        return _decoder_only(model.config, type(model).__name__)
    from transformers import AutoConfig

    _check_exists("model", model)
    if base := adapter_base(model):
        return load_config(base, trust_remote_code=trust_remote_code)
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise InputError(
            f"model for {model}: expected a model directory, got one without config.json. Give the directory that "
            "save_pretrained wrote."
        )
    try:
        place, more = for_transformers(model)
        config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code, **more)
    except Exception as error:  # transformers and its readers raise many kinds
        advice = "Check that the file is complete" if is_gguf(model) else "Check the name, and config.json"
        if "custom code" in str(error):
            advice = "Read that code, and give trust_remote_code where you trust it"
        raise InputError(
            f"model for {model}: expected a model directory or a Hub name with a configuration that transformers "
            f"knows, got: {describe_error(error)}. {advice}."
        ) from error
    return _decoder_only(config, model)


def _decoder_only(config, name):
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"model for {name}: expected a decoder-only language model, got an encoder-decoder ({config.model_type}). "
            "Give a causal language model."
        )
    return config


def positions_of(config) -> int | None:
    """Number of positions of a model with this configuration; None where it does not say."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def rope_boundary(config) -> int | None:
    """Length above which a batch takes the long factors of LongRoPE for all of its rows; None for other models."""
    config = config.get_text_config()
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for one in (found, *found.values()):  # of all layers, or by kind of layer
        if isinstance(one, dict) and "longrope" in (one.get("rope_type"), one.get("type")):
            own = one.get("original_max_position_embeddings")
            return own or getattr(config, "original_max_position_embeddings", None)
    return None


def load_fast_tokenizer(name_or_path, trust_remote_code: bool = False) -> Any:
    """A tokenizer whose ids are those of its own tokenizer.json.

    transformers 5 rebuilds some classes' pipelines (a LlamaTokenizer gets a Metaspace pre-tokenizer, which changes the
    ids of white space), so tokenizer.json is loaded as it is wherever there is one.

    Args:
        name_or_path: directory, Hub name, GGUF file, or a transformers fast tokenizer (returned as it is).
        trust_remote_code: run the repository's own tokenizer code where it has no tokenizer.json.
    Returns: a transformers fast tokenizer.
    Raises: InputError where there is no tokenizer or none of the fast kind.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not is_named(name_or_path):
        return _must_be_fast(name_or_path, type(name_or_path).__name__)
    _check_exists("tokenizer", name_or_path)
    folder = Path(name_or_path)
    base = adapter_base(name_or_path)
    if base and not (folder / "tokenizer.json").is_file():
        return load_fast_tokenizer(base, trust_remote_code)
    if folder.is_dir() and not [*folder.glob("*tokenizer*"), *folder.glob("*.tiktoken"), *folder.glob("tekken.json")]:
        raise InputError(f"tokenizer for {folder}: expected tokenizer.json in it, got no tokenizer. Copy one there.")
    own = model_file(name_or_path, "tokenizer.json") is not None
    try:
        if own:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(name_or_path))
        else:
            place, more = for_transformers(name_or_path)
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code, **more)
    except Exception as error:  # the tokenizers library raises Exception itself
        expected = "a readable tokenizer.json" if own else "a model directory or a Hub name with a tokenizer"
        advice = "" if own else " Check the name."
        raise InputError(
            f"tokenizer for {name_or_path}: expected {expected}, got {first_line(error)}.{advice}"
        ) from error
    tokenizer = _must_be_fast(tokenizer, name_or_path)
    if not own and not is_gguf(name_or_path):
        logger.warning(
            "%s has no tokenizer.json: transformers rebuilt the tokenizer from its vocabulary file, and ids of white "
            "space may differ from the original's. Put the original tokenizer.json beside it.",
            name_or_path,
        )
    return tokenizer


def _must_be_fast(tokenizer, name):
    if not hasattr(getattr(tokenizer, "backend_tokenizer", None), "encode"):
        raise InputError(
            f"tokenizer for {name}: expected a fast tokenizer (tokenizer.json), got {type(tokenizer).__name__} without "
            "a tokenizers backend. Save one with tokenizer.json and give that directory."
        )
    if getattr(tokenizer.backend_tokenizer.model, "dropout", None):
        logger.warning("%s draws ids at random (BPE dropout): switched off, as ids must be the same each time.", name)
        tokenizer.backend_tokenizer.model.dropout = None
    return tokenizer
