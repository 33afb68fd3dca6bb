"""Pictures of a merge report: coefficients by layer and tensor kind for each target, erased share by layer."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

OUTSIDE = "outside"  # column of the tensors that belong to no layer: embeddings, final norm, lm_head


def draw(rows: Sequence[dict], names: Sequence[str], directory: Path) -> list[Path]:
    """Write coefficients.png and, where anything was erased, erased.png, from `rows` and `names` of a report."""
    paths = [directory / "coefficients.png"]
    _coefficients(rows, names).savefig(paths[0], dpi=130)
    if any(row.get("erased") is not None for row in rows):
        paths.append(directory / "erased.png")
        _erased(rows, names).savefig(paths[1], dpi=130)
    return paths


def _coefficients(rows: Sequence[dict], names: Sequence[str]) -> Figure:
    """One heat map for each target, layers x tensor kinds, on one colour scale from 0 to 1."""
    kinds = list(dict.fromkeys(r["kind"] for r in sorted(rows, key=lambda r: (r["layer"] is None, r["tensor"]))))
    layers = sorted({row["layer"] for row in rows if row["layer"] is not None})
    layers = [OUTSIDE, *layers] if any(row["layer"] is None for row in rows) else layers
    columns = min(len(names), 3)
    lines = -(-len(names) // columns)
    panel = min(7.0, 2.2 + 0.17 * len(layers))
    figure = Figure(figsize=(1.8 + panel * columns, 1.3 + (0.7 + 0.27 * len(kinds)) * lines), layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False, sharey=True).flat)
    while len(grid) > len(names):
        grid.pop().remove()
    images = []  # all on one scale
    for axes, name in zip(grid, names):
        values = [[float("nan")] * len(layers) for _ in kinds]
        for row in rows:
            place = layers.index(OUTSIDE if row["layer"] is None else row["layer"])
            value = row.get(f"coefficient {name}")
            values[kinds.index(row["kind"])][place] = float("nan") if value is None else value
        images.append(axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest"))
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("layer", fontsize=8)
        shown = [i for i in range(len(layers)) if layers[i] == OUTSIDE or len(layers) <= 12 or layers[i] % 4 == 0]
        axes.set_xticks(shown, [str(layers[i]) for i in shown], fontsize=7, rotation=90)
        axes.set_yticks(range(len(kinds)), kinds, fontsize=7)
    figure.colorbar(images[0], ax=grid, label="coefficient", shrink=0.9)
    return figure


def _erased(rows: Sequence[dict], names: Sequence[str]) -> Figure:
    """Share of each target's moved elements that the majority sign erased, by layer."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    layers = sorted({row["layer"] for row in rows if row["layer"] is not None})
    for name in names:
        shares = []
        for layer in layers:
            here = [r for r in rows if r["layer"] == layer and r.get(f"erased {name}") is not None]
            total = sum(row["elements"] for row in here)
            shares.append(sum(r[f"erased {name}"] * r["elements"] for r in here) / total if total else float("nan"))
        axes.plot(layers, shares, marker="o", markersize=3, label=name)
    axes.set(xlabel="layer", ylabel="erased share", ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)  # never over a curve
    return figure
