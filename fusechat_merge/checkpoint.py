"""What the files of a checkpoint say before anything is merged: the dtype of every tensor, and whether all is there.

Only headers are read. A safetensors file begins with the length of its header (8 bytes, little endian) and the header,
JSON: name -> {dtype, shape, data_offsets}; the tensors' bytes follow.
"""

import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
NARROW = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "F4")
BYTES = ("I8", "U8")
OUTPUT_LAYERS = ("lm_head.weight", "embed_out.weight")


def read_json(file: Path) -> dict:
    """The mapping in a JSON file of a checkpoint; ValueError, with its path, where there is none."""
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
        ValueError: a file that is no safetensors file, or is cut off.
        OSError: a file cannot be read.
    """
    found = {}
    for file in files:
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


def quantised(stored: dict[str, str], config: dict) -> str | None:
    """What shows that the weights need scales to be numbers ("float8 ... in lm_head.weight"); None: nothing does.

    Args:
        stored: see `stored_dtypes`; empty where it is not known.
        config: what config.json says.
    """
    for name, dtype in stored.items():
        narrow = dtype in NARROW or (dtype in BYTES and name.endswith("weight"))
        if narrow:
            return f"{dtype} in {name}"
    settings = config.get("quantization_config")
    if settings and not (stored and set(stored.values()) <= set(FLOATS)):
        return f"quantization_config ({settings.get('quant_method', 'of an unnamed method')}) in its config.json"
    return None


def quantised_sentence(shown: str) -> str:
    """What to say about it."""
    return (
        f"expected float32, float16 or bfloat16 weights, got {shown}, whose scales a merge cannot see. "
        "Convert that model first."
    )
