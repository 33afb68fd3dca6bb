"""The report on a merge, tensor by tensor: coefficients, update norms, selected and erased shares, sign agreement, and
the distance to the mean of the targets (linear merging).

The numbers come from the merge itself. Coefficients, norms and the selected share cost nothing. Signs, cosines and
distances are taken from one stretch of a tensor in 256 (from all by `fusechat-merge inspect`), so that only the
pictures take time.
`reporting` says which merges get a report.

Shape letters: M targets.
"""

import csv
import json
import logging
import math
import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from fusechat_merge.chunks import map_chunks
from fusechat_merge.kernel import Merge
from fusechat_merge.versions import versions

logger = logging.getLogger(__name__)
STRETCH, LONG_STRETCH = 1 << 14, 1 << 17  # elements; long ones where all are counted: fewer calls
SAMPLED = 256  # of so many stretches one has its signs counted
EVEN = 0.05  # coefficients that differ by less from equal ones make a merge a mean
LAYER = re.compile(r"\.(\d+)\.")


def count_signs(
    pivot: Tensor, targets: Sequence[Tensor], keep: Tensor | None, every: int, merged: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Signs and products of the task vectors in the first of each `every` stretches of a tensor.

    Args: as for `kernel.sce`; `keep` and `merged` as in `kernel.Merge`.

    Returns, over the elements that `keep` has (products and apart: over all):
        moved: float64 [M, M], elements that both targets move (on the diagonal: that the target moves).
        agreement: float64 [M, M], of those, moved the same way minus moved opposite ways.
        erased: float64 [M], elements that the target moves against the majority.
        products: float64 [M, M], d_i . d_j.
        apart: float64, the squared distance of the merged elements from pivot + mean_j d_j, both in the result's dtype.
    """
    pivot, targets = pivot.detach().reshape(-1), [target.detach().reshape(-1) for target in targets]
    merged = merged.reshape(-1)
    dtype = torch.float64 if torch.float64 in {tensor.dtype for tensor in (pivot, *targets)} else torch.float32
    length = STRETCH if every > 1 else LONG_STRETCH

    def count(chunk: slice) -> tuple[Tensor, ...]:
        stretch = slice(chunk.start, chunk.start + length)
        base = pivot[stretch].to(dtype)
        rows = torch.stack([target[stretch].to(dtype) for target in targets]).sub_(base)
        products = rows.double() @ rows.double().T
        linear = (base + rows.mean(0)).to(merged.dtype)
        apart = (merged[stretch].double() - linear.double()).square_().sum()
        if keep is not None:
            rows *= keep[stretch]
        majority = torch.where(rows.sum(0) >= 0, 1.0, -1.0)
        signs = rows.sign_().float()  # products of these are whole numbers, exact in float32
        present = signs.abs()
        return present @ present.T, signs @ signs.T, (present.sum(1) - signs @ majority) / 2, products, apart

    counts = map_chunks(count, pivot.numel(), length * every, pivot.device)
    moved, agreement, erased, products, apart = (torch.stack(parts).double().sum(0).cpu() for parts in zip(*counts))
    return moved, agreement, erased, products, apart


class Report:
    """The report on one output.

    Args:
        method: name of the merge method.
        pivot: the pivot as the recipe names it.
        targets: the targets as the recipe names them.
        every: see `count_signs`.
    """

    def __init__(self, method: str, pivot: str, targets: Sequence[str], every: int = SAMPLED):
        self.method, self.pivot, self.targets, self.every = method, pivot, list(targets), every
        self.names = distinct_names(self.targets)
        self.pairs = [f"{a} | {b}" for a, b in combinations(self.names, 2)]
        self.rows: list[dict] = []
        self._products = torch.zeros(len(self.names), len(self.names), dtype=torch.float64)  # over all tensors
        self._apart = self._linear = torch.zeros((), dtype=torch.float64)  # squares, likewise

    def takes(self, method: str, pivot: str, targets: Sequence[str]) -> bool:
        """Whether it is about this method, this pivot and, among others, these targets."""
        return (method, pivot) == (self.method, self.pivot) and set(targets) <= set(self.targets)

    def add(self, tensor: str, pivot: Tensor, tensors: Sequence[Tensor], targets: Sequence[str], merge: Merge) -> None:
        """Add the row of a merged tensor. `targets`: the names of those that have it, in the order of `tensors`."""
        both_moved, agreement, erased, products, apart = count_signs(
            pivot, tensors, merge.keep, self.every, merge.merged
        )
        linear = products.sum() / len(tensors) ** 2  # |mean_j d_j|^2
        layer = LAYER.search(tensor)
        name = tensor[layer.end() :] if layer else tensor
        row = {
            "tensor": tensor,
            "layer": int(layer.group(1)) if layer else None,
            "kind": name.removeprefix("model.").removesuffix(".weight"),  # such as mlp.up_proj
            "elements": pivot.numel(),
            "selected": merge.selected,
            "erased": None,
            "distance to linear": _share(apart.sqrt(), linear.sqrt()),
        }
        self._apart, self._linear = self._apart + apart, self._linear + linear
        places = torch.tensor([self.targets.index(target) for target in targets])
        self._products[places[:, None], places] += products
        names = [self.names[place] for place in places]
        for index, name in enumerate(names):
            row[f"coefficient {name}"] = float(merge.coefficients[index])
            row[f"norm {name}"] = math.sqrt(float(merge.square_sums[index]))
        if self.method == "sce":
            moved = torch.diagonal(both_moved)
            row["erased"] = _share(erased.sum(), moved.sum())
            for index, name in enumerate(names):
                row[f"erased {name}"] = _share(erased[index], moved[index])
        for a, b in combinations(range(len(names)), 2):
            both = both_moved[a, b]
            row[f"agreement {names[a]} | {names[b]}"] = _share((both + agreement[a, b]) / 2, both)
        self.rows.append(row)

    def columns(self) -> list[str]:
        """Columns of coefficients.csv."""
        columns = ["tensor", "layer", "kind", "elements", "selected", "erased", "distance to linear"]
        for quantity in ("coefficient", "norm", "erased"):
            columns += [f"{quantity} {name}" for name in self.names]
        return columns + [f"agreement {pair}" for pair in self.pairs]

    def summary(self) -> dict:
        """Means over the tensors, weighted by their elements, and the norms of whole models."""
        fusechat, mergekit = versions()
        kinds = sorted({row["kind"] for row in self.rows})
        return {
            "method": self.method,
            "versions": {"fusechat": fusechat, "mergekit": mergekit, "torch": torch.__version__},
            "pivot": self.pivot,
            "targets": dict(zip(self.names, self.targets)),
            "tensors": len(self.rows),
            "elements": sum(row["elements"] for row in self.rows),
            "signs_counted": "everywhere" if self.every == 1 else f"in one of {self.every} stretches",
            "coefficients": {name: self._mean(f"coefficient {name}") for name in self.names},
            "update_norms": {
                name: math.sqrt(math.fsum((row.get(f"norm {name}") or 0.0) ** 2 for row in self.rows))
                for name in self.names
            },
            "selected_share": self._mean("selected"),
            "erased_share": self._mean("erased"),
            "erased_shares": {name: self._mean(f"erased {name}") for name in self.names},
            "sign_agreement": {pair: self._mean(f"agreement {pair}") for pair in self.pairs},
            "cosines": self._cosines(),
            "distance_to_linear": _share(self._apart.sqrt(), self._linear.sqrt()),
            "coefficients_by_kind": {
                kind: {name: self._mean(f"coefficient {name}", kind) for name in self.names} for kind in kinds
            },
        }

    def _cosines(self) -> dict[str, float | None]:
        """Of each pair of targets: d_i . d_j / (|d_i| |d_j|), over all tensors that both have."""
        norms = torch.diagonal(self._products).sqrt()
        places = combinations(range(len(self.names)), 2)
        return {p: _share(self._products[a, b], norms[a] * norms[b]) for p, (a, b) in zip(self.pairs, places)}

    def is_mean(self) -> bool:
        """Whether all targets have nearly the same coefficient, on the mean over elements."""
        found = [self._mean(f"coefficient {name}") or 0.0 for name in self.names]
        return max(abs(coefficient * len(found) - 1) for coefficient in found) < EVEN

    def _mean(self, column: str, only: str | None = None) -> float | None:
        rows = [r for r in self.rows if r.get(column) is not None and (only is None or r["kind"] == only)]
        elements = sum(row["elements"] for row in rows)
        return math.fsum(row[column] * row["elements"] for row in rows) / elements if elements else None

    def write(self, directory: Path) -> None:
        """Write coefficients.csv, summary.json and, where matplotlib is installed, the pictures to a directory."""
        directory.mkdir(parents=True, exist_ok=True)
        with open(directory / "coefficients.csv", "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, self.columns())
            writer.writeheader()
            writer.writerows(self.rows)
        path, partial = directory / "summary.json", directory / "summary.json.part"
        try:
            partial.write_text(json.dumps(self.summary(), indent=2) + "\n", encoding="utf-8")
            partial.replace(path)  # complete or not at all
        finally:
            partial.unlink(missing_ok=True)
        if len(self.names) > 1 and self.is_mean():
            cosines = ", ".join(f"{pair} {value:.2f}" for pair, value in self._cosines().items() if value is not None)
            logger.warning(
                "%s: all coefficients are within %.0f %% of equal, so this merge is nearly the mean of its targets "
                "(cosines of task vectors: %s).",
                *(self.method, 100 * EVEN, cosines),
            )
        try:
            from fusechat_merge import plots
        except ImportError:
            logger.warning(
                "pictures for the merge report: expected matplotlib, got none. Install fusechat[plot] "
                "(the numbers are written)."
            )
        else:
            plots.draw(self.rows, self.names, directory)


def distinct_names(models: Sequence[str]) -> list[str]:
    """The last part of each model's name; equal ones are numbered from 1: chat#1, chat#2."""
    names = [model.rstrip("/").rpartition("/")[2] for model in models]
    return [f"{name}#{names[: n + 1].count(name)}" if names.count(name) > 1 else name for n, name in enumerate(names)]


def _share(part: Tensor, whole: Tensor) -> float | None:
    return float(part / whole) if whole > 0 else None
