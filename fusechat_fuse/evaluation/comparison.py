"""`compare`: which model predicts which slice of the data better, from representations alone, before any training.

    bits per byte of a conversation = sum_p ce_p / (ln 2 * bytes of its predicted tokens)

Bytes, not tokens, so that models with different tokenizers can be compared. A conversation counts if every model
predicted the same text of it; one that a model lacks or truncated elsewhere (`max_length`) is left out and counted.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fusechat_fuse.errors import InputError
from fusechat_fuse.store.card import distinct_names
from fusechat_fuse.store.files import json_bytes, write_atomic
from fusechat_fuse.store.shards import Representation, load_representation

logger = logging.getLogger(__name__)
ALL = "all"  # the name of the whole data set among the slices


def compare(representation_dirs: Sequence, output_dir=None) -> dict:
    """Bits per byte of several models on the same conversations, per slice and over all.

    Args:
        representation_dirs: two or more directories that `represent` wrote on the same data, the pivot's first, or
            opened representations.
        output_dir: for `compare.json`, `compare.md` and `compare.png` (with matplotlib); None: nothing is written.

    Returns:
        models: their names. conversations, left_out: counts. slices: name -> {conversations, bytes, models: name ->
        {median, mean, wins}, best}, the whole data set under "all". median and mean are bits per byte over
        conversations; wins is the share of conversations in which the model has the fewest (ties: the first model);
        best is the model with the lowest median.

    Raises: InputError for fewer than two directories, one that holds no representation, or no common conversation.
    """
    opened = _open(representation_dirs)
    names = _names(opened)
    slices, bits, sizes, left_out = _bits_per_byte(opened)
    table = {}
    for name in [ALL, *sorted(set(slices) - {""})]:
        chosen = np.array([name in (ALL, of) for of in slices])
        table[name] = _figures(names, bits[:, chosen], sizes[chosen])
    result = {"models": names, "conversations": len(slices), "left_out": left_out, "slices": table}
    if left_out:
        logger.warning("%d conversations are left out: not every representation has them with the same text.", left_out)
    if output_dir is not None:
        write(result, Path(output_dir))
    return result


def _open(representation_dirs: Sequence) -> list[Representation]:
    if isinstance(representation_dirs, str | Path) or len(representation_dirs) < 2:
        raise InputError(
            f"representations for compare: expected at least two directories, got {representation_dirs!r}. "
            "Give the pivot's and a source's."
        )
    places = [Path(one.path if isinstance(one, Representation) else one).resolve() for one in representation_dirs]
    if twice := next((place for place in places if places.count(place) > 1), None):
        raise InputError(
            f"representations for compare: expected each directory once, got {twice} twice. Leave one out."
        )
    opened = [one if isinstance(one, Representation) else load_representation(one) for one in representation_dirs]
    for one in opened:
        if one.manifest["kind"] != "representation":
            raise InputError(
                f"representation for {one.path}: expected what represent wrote, got {one.manifest['kind']} data. "
                "Give the representation it was made from."
            )
    return opened


def _names(opened: list[Representation]) -> list[str]:
    return distinct_names([str((one.manifest.get("model") or {}).get("name") or one.path.name) for one in opened])


def _bits_per_byte(opened: list[Representation]) -> tuple[list[str], np.ndarray, np.ndarray, int]:
    """(slice of each common conversation [N], bits per byte [M, N], bytes [N], conversations left out)."""
    found: list[dict[tuple, tuple[str, float, int]]] = []
    for one in opened:
        of_model = {}
        for row in one:
            size = int(np.sum(row["end"] - row["start"], dtype=np.int64))
            bits = float(np.sum(row["ce"], dtype=np.float64)) / np.log(2)
            of_model[row["id"], row.get("content_hash")] = (row.get("slice") or "", bits, size)
        found.append(of_model)
    everyone = set().union(*found)
    common = [
        key
        for key, (_, _, size) in found[0].items()
        if size and all(key in other and other[key][2] == size for other in found)
    ]
    if not common:
        raise InputError(
            f"conversations for {', '.join(str(one.path) for one in opened)}: expected some that all of them have, "
            "got none. Represent the models on the same data."
        )
    sizes = np.array([found[0][key][2] for key in common], np.int64)
    bits = np.array([[of_model[key][1] for key in common] for of_model in found]) / sizes
    return [found[0][key][0] for key in common], bits, sizes, len(everyone) - len(common)


def _figures(names: list[str], bits: np.ndarray, sizes: np.ndarray) -> dict:
    """The figures of one slice, from bits per byte [M, N] and bytes [N]."""
    winners = np.bincount(bits.argmin(axis=0), minlength=len(names)) / bits.shape[1]
    medians = np.median(bits, axis=1)
    models = {
        name: {"median": float(medians[m]), "mean": float(bits[m].mean()), "wins": float(winners[m])}
        for m, name in enumerate(names)
    }
    return {
        "conversations": bits.shape[1],
        "bytes": int(sizes.sum()),
        "models": models,
        "best": names[int(medians.argmin())],
    }


def table_lines(result: dict) -> list[str]:
    """The comparison as a Markdown table: median bits per byte and share of wins, the best model in bold."""
    names = result["models"]
    lines = [
        "| bits per byte (wins) | conversations | " + " | ".join(names) + " |",
        "|---|---:|" + "---:|" * len(names),
    ]
    for slice_name, figures in result["slices"].items():
        cells = []
        for name in names:
            of = figures["models"][name]
            cell = f"{of['median']:.3f} ({100 * of['wins']:.0f} %)"
            cells.append(f"**{cell}**" if name == figures["best"] else cell)
        lines.append(f"| {slice_name} | {figures['conversations']} | " + " | ".join(cells) + " |")
    return lines


def write(result: dict, folder: Path) -> None:
    """`compare.json`, `compare.md` and, where matplotlib is installed, `compare.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "compare.md", ("\n".join(table_lines(result)) + "\n").encode())
    try:
        draw_chart(result, folder / "compare.png")
    except ImportError:
        logger.info("no chart: run pip install 'fusechat[plot]' for %s", folder / "compare.png")
    write_atomic(folder / "compare.json", json_bytes(result))


def draw_chart(result: dict, path: Path) -> None:
    """A bar chart of median bits per byte: slices side by side, one bar per model."""
    from matplotlib.figure import Figure

    names, slices = result["models"], result["slices"]
    figure = Figure(figsize=(max(5.0, 1.0 + 0.35 * len(slices) * (len(names) + 1)), 3.6), layout="constrained")
    axes = figure.add_subplot()
    for m, name in enumerate(names):
        places = np.arange(len(slices)) * (len(names) + 1) + m
        axes.bar(places, [figures["models"][name]["median"] for figures in slices.values()], label=name)
    axes.set_xticks(
        np.arange(len(slices)) * (len(names) + 1) + (len(names) - 1) / 2,
        [f"{name}\n{figures['conversations']}" for name, figures in slices.items()],
    )
    axes.set_ylabel("median bits per byte")
    axes.set_title("Bits per byte of each slice (lower is better)")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=130)
