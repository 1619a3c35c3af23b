"""The figure of notebook 06 that shows where the error of every file is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lib.plots.display import figure
from lib.plots.style import use_style

if TYPE_CHECKING:
    from IPython.display import HTML

_OUTSIDE = "outside"


def kinds_of(errors: Any) -> list[str]:
    """Kinds of tensors in all files, those of the blocks first (a TensorErrors)."""
    rows = [row for found in errors.files.values() for row in found]
    inside = dict.fromkeys(row["kind"] for row in rows if row["layer"] is not None)
    return [*sorted(inside), *dict.fromkeys(row["kind"] for row in rows if row["layer"] is None)]


def error_map(errors: Any) -> HTML:
    """Relative RMSE of every tensor: one panel a file, a row a kind, a column a layer (a TensorErrors)."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    use_style()
    kinds, names = kinds_of(errors), list(errors.files)
    values = [row["relative_rmse"] for found in errors.files.values() for row in found if row["relative_rmse"] > 0]
    layers = 1 + max((row["layer"] for f in errors.files.values() for row in f if row["layer"] is not None), default=0)
    across = max(1, min(len(names), 24 // (layers + 4) + 1))
    down = -(-len(names) // across)
    fig, axes = plt.subplots(
        down, across, figsize=(7.4, down * (0.7 + 0.17 * len(kinds))), layout="constrained", squeeze=False, sharey=True
    )
    scale = LogNorm(min(values), max(values))
    for ax, name in zip(axes.flat, names, strict=False):
        image = ax.imshow(_grid(errors.files[name], kinds, layers), norm=scale, cmap="cividis", aspect="auto")
        ax.set_title(name, fontsize=9)
        ax.set_yticks(range(len(kinds)), kinds, fontsize=7)
        places = list(range(0, layers, max(1, layers // 4)))
        ax.set_xticks([*places, layers], [*map(str, places), "–"], fontsize=7)
        ax.grid(visible=False)
    for ax in axes.flat[len(names) :]:
        ax.set_axis_off()
    fig.supxlabel("layer (–: outside of the layers)", fontsize=9)
    fig.colorbar(image, ax=axes, label="relative RMSE")
    caption = (
        "Where the error is: ‖quantized − source‖ / ‖source‖ of every quantized tensor, computed from the files by "
        "turning them back into float32 (exact, no sampling). Yellow is large; white was not quantized."
    )
    return figure(fig, caption, f"Heat maps of relative error by layer and kind of tensor. {_words(errors)}")


def _grid(rows: list[dict[str, Any]], kinds: list[str], layers: int) -> np.ndarray:
    """Relative RMSE, (kinds, layers + 1); the last column is what stands outside of the layers."""
    grid = np.full((len(kinds), layers + 1), np.nan)
    for row in rows:
        grid[kinds.index(row["kind"]), layers if row["layer"] is None else row["layer"]] = row["relative_rmse"]
    return grid


def _words(errors: Any) -> str:
    said = []
    for name, rows in errors.files.items():
        if rows:
            worst, best = (pick(rows, key=lambda row: row["relative_rmse"]) for pick in (max, min))
            said.append(
                f"{name}: from {best['relative_rmse']:.2g} ({best['tensor']}) to {worst['relative_rmse']:.2g} "
                f"({worst['tensor']})."
            )
    return " ".join(said)


def kind_rows(errors: Any) -> list[dict[str, Any]]:
    """One row a kind of tensor: relative RMSE and bits per weight in every file, in words of a table."""
    tables = {name: errors.by_kind(name) for name in errors.files}
    return [
        {
            "kind": kind,
            **{
                name: f"{found[kind]['relative_rmse']:.2g} at {found[kind]['bits_per_weight']:.2f}"
                if kind in found
                else "–"
                for name, found in tables.items()
            },
        }
        for kind in kinds_of(errors)
    ]


def reading(errors: Any) -> str:
    """Which kind of tensor has the largest error in each file."""
    said = []
    for name in errors.files:
        found = errors.by_kind(name)
        if found:
            worst = max(found, key=lambda kind: found[kind]["relative_rmse"])
            bits = found[worst]["bits_per_weight"]
            said.append(f"{name}: {worst} ({found[worst]['relative_rmse']:.2g} at {bits:.2f} bits per weight)")
    return (
        f"Largest error by file: {'; '.join(said)}. An error of the weights is not yet one of the answers: how much "
        "each costs there is measured in 07."
    )
