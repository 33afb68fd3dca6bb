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

    A Hub name is identified by its cached commit, a directory by its files' content, a loaded model by its weights.

    Args:
        model: directory, Hub name, GGUF file or loaded model.
    Returns: name (a directory's or file's own name, without its parents) and fingerprint.
    Raises: InputError where there is no such model.
    """
    if not is_named(model):
        return {
            "name": getattr(model, "name_or_path", "") or type(model).__name__,
            "fingerprint": weight_fingerprint(model),
        }
    folder = Path(model)
    if is_gguf(model) and folder.is_file():
        digest = hashlib.sha256()
        add_samples(digest, folder)
        return {"name": folder.name, "fingerprint": digest.hexdigest()[:16]}
    if folder.is_dir() and (base := adapter_base(model)):
        digest = hashlib.sha256(identify(base)["fingerprint"].encode())
        digest.update((folder / "adapter_config.json").read_bytes())
        for file in sorted(folder.glob("adapter_model.*")):
            add_samples(digest, file)
        return {"name": folder.resolve().name, "fingerprint": digest.hexdigest()[:16]}
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
    """The library versions that manifests record."""
    found = {}
    for package in ("fusechat", "torch", "transformers", "tokenizers", "numpy", "pyarrow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
