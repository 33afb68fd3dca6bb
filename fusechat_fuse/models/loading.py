"""Opening a model's weights: whole, as a GGUF file, below PEFT adapters, quantised on disk or on loading."""

from __future__ import annotations

import re
from typing import Any

from fusechat_fuse.errors import InputError, describe_error
from fusechat_fuse.models.files import adapter_base, for_transformers, is_gguf, is_named, model_file, require_package
from fusechat_fuse.store.files import read_json

_OF_QUANTISED = re.compile(r"weight_(scale|scale_inv|packed|zero_point|shape)$|qweight$|qzeros$|absmax$")
_OF_ADAPTERS = re.compile(r"lora_[AB]\.")
DTYPES = ("auto", "float32", "bfloat16", "float16")
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

    A GGUF file is dequantised, adapters stay separate from their base's weights, a quantised checkpoint stays
    quantised.

    Args:
        name_or_path: directory (of PEFT adapters, too), Hub name or GGUF file.
        dtype, device_map, attn_implementation, trust_remote_code: as transformers takes them.
        load_in: 4bit (NF4) or 8bit, by bitsandbytes.
    Raises: InputError where there is no such model, its files lack a tensor (transformers would initialise it at
        random), or a package is missing.
    """
    import torch
    from transformers import AutoModelForCausalLM

    place, more = for_transformers(name_or_path)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code, **more}
    options |= {"device_map": device_map} if device_map else {}
    options |= {"attn_implementation": attn_implementation} if attn_implementation else {}
    if load_in:
        options["quantization_config"] = _bitsandbytes(name_or_path, load_in, dtype)
    if adapter_base(name_or_path):
        require_package("peft", f"adapters ({name_or_path})")
    _check_quantization(name_or_path)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(place, output_loading_info=True, **options)
        model, loading_info = loaded
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # transformers and its readers raise many kinds
        raise InputError(
            f"weights for {name_or_path}: expected a causal language model, got {describe_error(error)}. Check that "
            "its files are complete and belong together."
        ) from error
    if missing := sorted(loading_info["missing_keys"]):
        advice = "Give a whole checkpoint with its own config.json."
        if adapter_base(name_or_path):  # transformers does not read DoRA's magnitudes
            advice = "Merge the adapters into their base with peft's merge_and_unload, and give that."
        raise InputError(
            f"weights for {name_or_path}: expected every tensor of {type(model).__name__}, got files without "
            f"{_some(missing)}. {advice}"
        )
    _check_form(model, name_or_path, sorted(loading_info["unexpected_keys"]))
    if is_gguf(name_or_path) and hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # it no longer is, and can be saved
        model.hf_quantizer, model.is_quantized = None, False
    return model.eval()


def check_causal(model, name) -> None:
    """Raise InputError where a model's logits depend on later tokens.

    Two probes of 16 tokens that differ in the second half must have equal logits in the first, within 1e-3 of the
    largest logit, 5e-2 where the arithmetic is below float32.

    Args:
        model: loaded, in evaluation mode; borrowed. name: for the error.
    """
    import torch

    embedding = model.get_input_embeddings().weight
    rows, device = int(embedding.shape[0]), "cpu" if embedding.device.type == "meta" else embedding.device
    if not embedding.numel():
        return  # ZeRO-3 holds it in parts: nothing can be computed before training begins
    probes = (torch.arange(16).repeat(2, 1) + torch.tensor([[0] * 16, [0] * 8 + [rows // 2] * 8])) % rows
    with torch.inference_mode():
        logits = model(input_ids=probes.to(device), use_cache=False).logits[:, :8]
    exact = logits.dtype == torch.float32 and getattr(model, "hf_quantizer", None) is None
    first, second = logits.float()
    # false where they are not finite, which says nothing of causality
    if (first - second).abs().max() > (1e-3 if exact else 5e-2) * first.abs().max():
        raise InputError(
            f"model for {name}: expected a causal language model, got one whose logits depend on later tokens "
            "(a masked language model, or is_causal false in config.json?). Give a causal one."
        )


def _check_quantization(name) -> None:
    """Raise InputError where a checkpoint names a quantisation that transformers would ignore."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    method = quantization_of(name)
    if method not in (None, "gguf") and not any(known.startswith(method) for known in AUTO_QUANTIZATION_CONFIG_MAPPING):
        raise InputError(
            f"quantization_config for {name}: expected a quant_method that transformers knows, got {method}. Mend "
            "config.json."
        )


def _check_form(model, name, left: list[str]) -> None:
    """Raise InputError where the files hold quantised weights or adapters that the model does not use.

    transformers warns of other unused tensors (further layers, heads).
    """
    import torch

    quantised, wrong = quantization_of(name), [*filter(_OF_ADAPTERS.search, left)]
    if quantised is None:
        wrong += filter(_OF_QUANTISED.search, left)
    if quantised in (None, "fp8"):  # other methods keep such weights in Linear
        linear = [(n, module) for n, module in model.named_modules() if type(module) is torch.nn.Linear]
        wrong += [f"{n}.weight without its scale" for n, module in linear if module.weight.dtype.itemsize == 1]
    if wrong:
        raise InputError(
            f"weights for {name}: expected the tensors that its configuration describes, got also {_some(wrong)}, "
            "of another quantisation or other adapters. Correct quantization_config or target_modules."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _bitsandbytes(name, load_in: str, dtype):
    import torch
    from transformers import BitsAndBytesConfig

    require_package("bitsandbytes", f"{LOAD_IN[load_in]} for {name}")
    if quantization_of(name) is not None:
        raise InputError(
            f"{LOAD_IN[load_in]} for {name}: expected weights that are not quantised, got quantised ones. Leave it out."
        )
    compute = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    compute = torch.float32 if compute == "auto" else compute
    more = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": compute} if load_in == "4bit" else {}
    return BitsAndBytesConfig(**{LOAD_IN[load_in]: True}, **more)


def check_loading(command: str, options: dict[str, Any]) -> str | None:
    """Raise InputError for options of a command, of loading or of servers, that are wrong or do not go together.

    Returns: `load_in` of the switches load_in_4bit and load_in_8bit.
    """
    four, eight, server = options["load_in_4bit"], options["load_in_8bit"], options["server"]
    if options["dtype"] not in DTYPES:
        expected = f"{', '.join(DTYPES[:-1])} or {DTYPES[-1]}"
        raise InputError(f"dtype for {command}: expected {expected}, got {options['dtype']!r}. Use one.")
    if (four or eight) and ((four and eight) or not is_named(options["model"])):
        got = "both" if four and eight else "a loaded model"
        raise InputError(f"load_in_4bit or load_in_8bit for {command}: expected one, of a named model, got {got}.")
    if server is None and (name := options["server_model"]):
        raise InputError(f"server_model {name} for {command}: expected server with it, got none. Give its URL.")
    if server is not None:
        from fusechat_fuse.models.servers import urls_of

        urls_of(command, server, options["server_kind"], options["server_requests"])
        if four or eight or options["device_map"] or options["gguf_file"]:
            raise InputError(
                "load_in, device_map or gguf_file with a server: expected none, as the server loads the weights. "
                "Leave them out."
            )
    return "4bit" if four else "8bit" if eight else None


def load_to_device(model, device: str | None = None, **loading) -> Any:
    """The model in evaluation mode on a device; a model that was given loaded stays where it is.

    Args:
        device: None: the GPU if there is one. loading: as `load_model` takes it; with a device_map, that decides.
    """
    import torch

    if not is_named(model):
        return model.eval()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if quantization_of(model, loading["load_in"]) not in (None, "gguf") and not loading["device_map"]:
        loading = {**loading, "device_map": {"": device}}  # quantised weights cannot be moved later
    loaded = load_model(model, **loading)
    return loaded if loading["device_map"] else loaded.to(device)


def quantization_of(model, load_in: str | None = None) -> str | None:
    """How a model's weights are quantised, in words; None where they are not."""
    if load_in:
        return f"bitsandbytes {load_in}"
    if is_gguf(model):
        return "gguf"
    file = model_file(adapter_base(model) or model, "config.json")
    about = None if file is None else read_json(file, "configuration")
    found = about.get("quantization_config") if isinstance(about, dict) else None
    return None if found is None else str(found.get("quant_method") if isinstance(found, dict) else found)


def check_trainable(model) -> None:
    """Raise InputError where a checkpoint is quantised: it can be a source, not a pivot."""
    if (quantised := quantization_of(model)) not in (None, "gguf"):
        raise InputError(
            f"pivot for train: expected weights that are not quantised, got {quantised} of {model}. Train the model "
            "that was quantised, with load_in_4bit and lora_r where memory is short."
        )
