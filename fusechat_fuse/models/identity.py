"""Fingerprints of models, and the versions of libraries for manifests."""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np

from fusechat_fuse.errors import InputError
from fusechat_fuse.models.files import adapter_base, is_gguf, is_named, model_file


class Identity(TypedDict):
    """A model's name, 16 hexadecimal digits that change with it, and how its weights are quantised, if they are."""

    name: str
    fingerprint: str
    quantization: NotRequired[str]


def identify(model) -> Identity:
    """A model's identity, as representations and training runs record it.

    A Hub name is identified by its cached commit, a loaded model by its weights, files by their content: config.json
    (of adapters: their own, and the base's fingerprint) and samples of each weight file.

    Args:
        model: directory, Hub name, GGUF file or loaded model.
    Returns: name (a directory's or file's own name, without its parents) and fingerprint.
    Raises: InputError where there is no such model.
    """
    if not is_named(model):
        name = getattr(model, "name_or_path", "") or type(model).__name__
        return {"name": name, "fingerprint": _weight_fingerprint(model)}
    folder = Path(model)
    name = folder.resolve().name
    if is_gguf(model) and folder.is_file():
        name, content, files = folder.name, b"", [folder]
    elif folder.is_dir() and (base := adapter_base(model)):
        content = identify(base)["fingerprint"].encode() + (folder / "adapter_config.json").read_bytes()
        files = folder.glob("adapter_model.*")
    elif folder.is_dir():
        content, files = (folder / "config.json").read_bytes(), [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    elif file := model_file(model, "config.json"):
        return {"name": str(model), "fingerprint": file.parent.name[:16]}  # .../snapshots/COMMIT/config.json
    else:
        raise InputError(f"model for {model}: expected a model directory or a Hub name, got neither. Check the name.")
    digest = hashlib.sha256(content)
    for file in sorted(files):
        add_samples(digest, file)
    return {"name": name, "fingerprint": digest.hexdigest()[:16]}


def add_samples(digest, path: Path) -> None:
    """Put a file's name, its size, its first 64 KiB and 64 samples of 4 KiB into a digest of hashlib."""
    size = path.stat().st_size
    digest.update(f"{path.name} {size} ".encode())
    with open(path, "rb") as file:
        digest.update(file.read(1 << 16))
        for offset in np.linspace(0, max(size - 4096, 0), 64, dtype=np.int64):
            file.seek(int(offset))
            digest.update(file.read(4096))


def _weight_fingerprint(model) -> str:
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
    """The library versions that manifests record."""
    found = {}
    for package in ("fusechat", "torch", "transformers", "tokenizers", "numpy", "pyarrow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
