"""Opening configurations, tokenizers and weights as they are on disk.

A model is named by a directory (of PEFT adapters, too), a Hub name or a GGUF file; most functions also take one that is
loaded.
"""

from __future__ import annotations

import logging
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fusechat_fuse.errors import InputError
from fusechat_fuse.store.files import read_json

logger = logging.getLogger(__name__)
_WHOLE = ("model*.safetensors", "pytorch_model*.bin")  # files of weights that are not adapters
_OF_QUANTISED = re.compile(r"_(scale|scale_inv|packed|zero_point|shape)$|qweight$|qzeros$|absmax$|lora_[AB]\.")


def first_line(error: Exception) -> str:
    """The first line of an error (two, where it ends in a colon), without its full stop, to be put into a sentence."""
    lines = (str(error).strip() or type(error).__name__).split("\n")
    return " ".join(line.strip() for line in lines[: 1 + lines[0].endswith(":")]).rstrip(".")


def _said(error: Exception) -> str:
    """The first line of an error, after its kind where that is not an everyday one."""
    kind = "" if isinstance(error, OSError | ValueError | ImportError) else f"{type(error).__name__}: "
    return kind + first_line(error)


def is_named(model) -> bool:
    """Whether a model is given by a directory or a Hub name, not as a loaded object."""
    return isinstance(model, str | Path)


def _check_place(what: str, name_or_path) -> None:
    """Raise InputError where a name can only be a path and no directory and no GGUF file is there."""
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
    """A model's name, or the path of the GGUF file in its directory or Hub repository that is meant.

    Args:
        model: directory or Hub name; None: `gguf_file` is a path. gguf_file: None for other models.
    Raises: InputError where there is no such file.
    """
    if gguf_file is None:
        return model
    found = Path(gguf_file) if model is None else model_file(model, gguf_file)
    if not is_gguf(gguf_file) or found is None or not found.is_file():
        where = "" if model is None else f" in {model}"
        raise InputError(f"gguf_file for represent: expected a .gguf file{where}, got {gguf_file}. Check the name.")
    return str(found)


def adapter_base(model) -> str | None:
    """The base model that a directory of PEFT adapters names; None for other models.

    Raises: InputError where whole weights lie beside the adapters (transformers would lay these on top of them), or the
        base is none that adapters can lie on.
    """
    folder = Path(model)
    file = folder / "adapter_config.json"
    if not file.is_file():
        return None
    if whole := next((p.name for form in _WHOLE for p in sorted(folder.glob(form))), None):
        raise InputError(
            f"model for {model}: expected adapters or whole weights, got both ({file.name} beside {whole}). Move away "
            "what is not meant: the adapters, where they are merged."
        )
    found = read_json(file, "adapter's configuration")
    base = found.get("base_model_name_or_path") if isinstance(found, dict) else None
    if not base:
        raise InputError(f"adapters for {model}: expected base_model_name_or_path in {file.name}, got none. Add it.")
    there = Path(base)
    lost = not there.exists() and (there.is_absolute() or str(base).startswith("."))
    if lost or is_gguf(base) or (there / file.name).is_file():
        got = "nothing there" if lost else "a GGUF file" if is_gguf(base) else "adapters"
        raise InputError(
            f"adapters for {model}: expected a whole model at base_model_name_or_path of {file.name}, got {got} "
            f"({base}). Change it there."
        )
    return str(base)


def _for_transformers(model) -> tuple[str, dict[str, str]]:
    """What transformers takes: of a GGUF file its directory and its name."""
    if is_gguf(model):
        require_package("gguf", f"a GGUF file ({model})")
        return str(Path(model).parent), {"gguf_file": Path(model).name}
    return str(model), {}


def require_package(package: str, what: str) -> None:
    """Raise InputError where a package that `what` needs is not installed."""
    if find_spec(package) is None:
        raise InputError(f"{what}: expected the package {package}, got none. Run: pip install {package}")


def model_file(name_or_path, file: str) -> Path | None:
    """A file of a model by its name, from the directory or the Hub's cache; None where the model has none."""
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
        return model.config
    from transformers import AutoConfig

    _check_place("model", model)
    if base := adapter_base(model):
        return load_config(base, trust_remote_code=trust_remote_code)
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise InputError(
            f"model for {model}: expected a model directory, got one without config.json. Give the directory that "
            "save_pretrained wrote."
        )
    try:
        place, more = _for_transformers(model)
        return AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code, **more)
    except Exception as error:  # transformers and its readers raise many kinds
        advice = "Look whether the file is whole" if is_gguf(model) else "Check the name, and config.json"
        raise InputError(
            f"model for {model}: expected a model directory or a Hub name with a configuration that transformers "
            f"knows, got: {_said(error)}. {advice}."
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
        name_or_path: directory, Hub name, GGUF file, or a transformers fast tokenizer (returned as it is).
        trust_remote_code: run the repository's own tokenizer code where it has no tokenizer.json.
    Returns: a transformers fast tokenizer.
    Raises: InputError where there is no tokenizer or none of the fast kind.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not is_named(name_or_path):
        return _must_be_fast(name_or_path, type(name_or_path).__name__)
    _check_place("tokenizer", name_or_path)
    folder = Path(name_or_path)
    base = adapter_base(name_or_path)
    if base and not (folder / "tokenizer.json").is_file():
        return load_fast_tokenizer(base, trust_remote_code)
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
        place, more = _for_transformers(name_or_path)
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code, **more)
    except Exception as error:
        raise InputError(
            f"tokenizer for {name_or_path}: expected a model directory or a Hub name with a tokenizer, got "
            f"{first_line(error)}. Check the name."
        ) from error
    tokenizer = _must_be_fast(tokenizer, name_or_path)
    if is_gguf(name_or_path):
        return tokenizer
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


LOAD_IN = {"4bit": "load_in_4bit", "8bit": "load_in_8bit"}


def load_model(
    name_or_path,
    *,
    dtype,
    device_map: str | dict | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    load_in: str | None = None,
) -> Any:
    """The causal language model with its weights, in evaluation mode, on the CPU unless `device_map` says otherwise.

    A GGUF file is dequantised, adapters lie beside the weights of their base, a checkpoint that is quantised stays so.

    Args:
        name_or_path: directory (of PEFT adapters, too), Hub name or GGUF file.
        dtype, device_map, attn_implementation, trust_remote_code: as transformers takes them.
        load_in: 4bit (NF4) or 8bit, by bitsandbytes.
    Raises: InputError where there is no such model, or its files lack a tensor of it (transformers would leave random
        numbers there), or a package is missing.
    """
    import torch
    from transformers import AutoModelForCausalLM

    place, more = _for_transformers(name_or_path)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code, **more}
    options |= {"device_map": device_map} if device_map else {}
    options |= {"attn_implementation": attn_implementation} if attn_implementation else {}
    if load_in:
        options["quantization_config"] = _bitsandbytes(name_or_path, load_in, dtype)
    if adapter_base(name_or_path):
        require_package("peft", f"adapters ({name_or_path})")
    _check_quantization(name_or_path)
    try:
        both: Any = AutoModelForCausalLM.from_pretrained(place, output_loading_info=True, **options)
        model, told = both
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # transformers and its readers raise many kinds
        raise InputError(
            f"weights for {name_or_path}: expected a causal language model, got {_said(error)}. Check that its files "
            "are whole and belong together."
        ) from error
    if missing := sorted(told["missing_keys"]):
        raise InputError(
            f"weights for {name_or_path}: expected every tensor of {type(model).__name__}, got files without "
            f"{_some(missing)}. Give a whole checkpoint with its own config.json."
        )
    _check_all_taken(model, name_or_path, sorted(told["unexpected_keys"]))
    if is_gguf(name_or_path) and hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # it no longer is, and can be saved
        model.hf_quantizer, model.is_quantized = None, False
    return model.eval()


def _check_quantization(name) -> None:
    """Raise InputError where a checkpoint names a quantisation that transformers would pass over."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    method = quantization_of(name)
    if method not in (None, "gguf") and not any(known.startswith(method) for known in AUTO_QUANTIZATION_CONFIG_MAPPING):
        raise InputError(
            f"quantization_config for {name}: expected a quant_method that transformers knows, got {method}. Mend "
            "config.json."
        )


def _check_all_taken(model, name, left: list[str]) -> None:
    """Raise InputError where the files hold quantised weights or adapters that the model does not take.

    Of other tensors that it does not take (further layers, heads) transformers warns.
    """
    import torch

    bare = []  # FP8 that nothing scales
    if quantization_of(name) in (None, "fp8"):
        linear = [(n, m) for n, m in model.named_modules() if type(m) is torch.nn.Linear]
        bare = [n for n, module in linear if module.weight.dtype.itemsize == 1]
    if of_quantised := [*filter(_OF_QUANTISED.search, left), *(f"{n}.weight without its scale" for n in bare)]:
        raise InputError(
            f"weights for {name}: expected what the configuration describes, got also {_some(of_quantised)}. They are "
            "quantised, or of adapters, in another way than it says: mend it (quantization_config, target_modules)."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _bitsandbytes(name, load_in: str, dtype):
    import torch
    from transformers import BitsAndBytesConfig

    require_package("bitsandbytes", f"{LOAD_IN[load_in]} for {name}")
    if is_gguf(name) or getattr(load_config(name), "quantization_config", None):
        raise InputError(
            f"{LOAD_IN[load_in]} for {name}: expected weights that are not quantised, got such. Leave it out."
        )
    compute = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    compute = torch.float32 if compute == "auto" else compute
    more = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": compute} if load_in == "4bit" else {}
    return BitsAndBytesConfig(**{LOAD_IN[load_in]: True}, **more)


def quantization_of(model, load_in: str | None = None) -> str | None:
    """How a model's weights are quantised, in words; None where they are not."""
    if load_in:
        return f"bitsandbytes {load_in}"
    if is_gguf(model):
        return "gguf"
    found = getattr(load_config(model), "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return None if found is None else str(getattr(method, "value", method))


def check_trainable(model) -> None:
    """Raise InputError where a checkpoint is quantised: it can be a source, not a pivot."""
    if (quantised := quantization_of(model)) not in (None, "gguf"):
        raise InputError(
            f"pivot for train: expected weights that are not quantised, got {quantised} of {model}. Train the model it "
            "was made of, with load_in_4bit and lora_r where memory is short."
        )
