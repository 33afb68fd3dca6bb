"""A reader of stores written from `docs/format.md` alone, in plain loops; shares no code with the library."""

import json
import struct
from pathlib import Path

import pyarrow as pa


def read_store(path) -> list[dict]:
    """Every row of a store under the names that a reader gets; arrays as nested lists."""
    manifest = json.loads((Path(path) / "manifest.json").read_text())
    assert manifest["schema_version"] == 2
    rows = []
    for shard in manifest["shards"]:
        stream = pa.ipc.open_stream(pa.memory_map(str(Path(path) / shard["file"])))
        batches = [batch for batch in stream]
        assert len(batches) == 1
        rows += [read_row(row) for row in batches[0].to_pylist()]
    return rows


def integers(data: bytes, width: int, signed: bool = False) -> list[int]:
    parts = (data[n : n + width] for n in range(0, len(data), width))
    return [int.from_bytes(part, "little", signed=signed) for part in parts]


def ids(data: bytes) -> list[int]:
    return [-1 if i == 0xFFFFFF else i for i in integers(data, 3)]


def small(data: bytes, n: int) -> list[int]:
    width = len(data) // n
    return integers(data, width, signed=width == 4) if width else [0] * n


def floats(data: bytes, kind: str) -> list[float]:
    return list(struct.unpack(f"<{len(data) // struct.calcsize(kind)}{kind}", data))


def planes(data: bytes, width: int) -> list[int]:
    n = int.from_bytes(data[:4], "little")
    content = pa.decompress(data[4:], decompressed_size=n, codec="zstd", asbytes=True) if n else b""
    m = n // width
    return [sum(content[plane * m + i] << (8 * plane) for plane in range(width)) for i in range(m)]


def log_probability(level: int) -> float:
    octave = max(level // 512 - 1, 0)
    return -(level / 512 - octave) * 2**octave


def read_row(stored: dict) -> dict:
    row = {name: value for name, value in stored.items() if isinstance(value, str | float)}
    row |= {name: stored[name] for name in ("source_tokens", "source_bytes") if name in stored}
    P = stored["num_predicted"]
    row |= read_positions(stored, P) | (read_plain(stored, P) if "ce" in stored else read_compact(stored, P))
    assert len(row["input_ids"]) == stored["num_tokens"]
    return row | (read_source(stored, P) if "source_ids" in stored else {})


def read_positions(stored: dict, P: int) -> dict:
    row = {"predicted": [], "message": [], "start": [], "end": []}
    runs = integers(stored["runs"], 4, signed=True)
    gaps, widths = small(stored["gaps"], P), small(stored["widths"], P)
    for first, length, message in zip(runs[::3], runs[1::3], runs[2::3]):
        before = 0
        for index in range(first, first + length):
            p = len(row["predicted"])
            row["predicted"].append(index)
            row["message"].append(message)
            row["start"].append(before + gaps[p])
            before += gaps[p] + widths[p]
            row["end"].append(before)
    assert len(row["predicted"]) == P
    return row


def read_plain(stored: dict, P: int) -> dict:
    topk, logprobs = ids(stored["topk_ids"]), floats(stored["topk_logprobs"], "e")
    K = len(topk) // P
    return {
        "input_ids": ids(stored["input_ids"]),
        "topk_ids": [topk[p * K : (p + 1) * K] for p in range(P)],
        "topk_logprobs": [logprobs[p * K : (p + 1) * K] for p in range(P)],
        "ce": floats(stored["ce"], "f"),
    }


def read_compact(stored: dict, P: int) -> dict:
    topk, steps = planes(stored["c_topk_ids"], 3), planes(stored["c_topk_levels"], 2)
    K = len(topk) // P
    levels = [[sum(steps[j * P + p] for j in range(k + 1)) for k in range(K)] for p in range(P)]
    return {
        "input_ids": planes(stored["c_input_ids"], 3),
        "topk_ids": [[topk[k * P + p] for k in range(K)] for p in range(P)],
        "topk_logprobs": [[log_probability(level) for level in row] for row in levels],
        "ce": [value / 2**13 for value in planes(stored["c_ce"], 4)],
    }


def read_source(stored: dict, P: int) -> dict:
    width, position = stored["source_width"], 0
    kept, logs = ids(stored["source_ids"]), floats(stored["source_logprobs"], "e")
    row = {"source_ids": [], "source_logprobs": []}
    for count in small(stored["source_counts"], P):
        row["source_ids"].append(kept[position : position + count] + [-1] * (width - count))
        row["source_logprobs"].append(logs[position : position + count] + [float("-inf")] * (width - count))
        position += count
    row["source_token_ce"] = floats(stored["source_token_ce"], "f")
    row["mapped_mass"] = floats(stored["mapped_mass"], "e")
    if "label_tail" in stored:
        row["label_tail"] = floats(stored["label_tail"], "e")
    if stored.get("source_index") is not None:
        row["source_index"] = ids(stored["source_index"])
    return row
