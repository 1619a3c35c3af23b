"""The figure of notebook 06 that shows where the error of every file is.
What page 06 shows before anything is scored: the grid of the base's weights, and what is left of the fine-tuning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.report.display import figure, mark_names, say, table, use_style
from lib.statistics.losses import KEEPS_LITTLE

if TYPE_CHECKING:
    from IPython.display import HTML, Markdown


# The figure of notebook 06 that shows where the error of every file is.

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


def error_reading(errors: Any) -> str:
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


# What page 06 shows before anything is scored: the grid of the base's weights, and what is left of the fine-tuning.

MARK = "on the grid of the base's weights: can round the fine-tuning away, so do not compare it with other types."
_ALL = "all matrices"


def mark(grid: Any, plan: Sequence[Mapping[str, Any]] = ()) -> None:
    """From now on tables mark such types and files (a SourceGrid; "type" and "histogram" of planned files)."""
    mark_names(grid.marked([(p["type"], p["histogram"]) for p in plan]), MARK)


def grid_table(grid: Any) -> HTML | Markdown:
    """Share of blocks that each type gives back (a SourceGrid); why there is none."""
    if grid.product is None:
        return say(f"Not measured. {grid.reason}")
    shares = sorted(grid.shares.items(), key=lambda pair: -pair[1])
    caption = (
        f"Share of {grid.blocks:,} blocks of 32 of the base's own weights that a type gives back but for the last "
        f"places of 16 bits: rows at even distances of the {grid.matrices:,} matrices that fine-tuning moved, constant "
        "blocks left out."
    )
    rows = [{"tensor type": kind, "given back": share} for kind, share in shares]
    return table(rows, caption, {"given back": ".1%"})


def grid_reading(grid: Any) -> Markdown | None:
    """What that means (a SourceGrid)."""
    if grid.product is None:
        return None
    if notes := grid.product.entry.notes:
        return say(f"**{notes[0][0].upper()}{notes[0][1:]}.**")
    if grid.distinct is None:
        return say("No row of the base fills blocks of 32 weights, so nothing can be told of its grid.")
    most = max(grid.shares.values(), default=0.0)
    return say(
        f"The base's weights lie on the grid of none of the {len(grid.shares)} types tried (at most {100 * most:.1f} % "
        f"given back; {grid.distinct:.1f} different values in a block of 32)."
    )


def kept_table(kept: Any) -> HTML | Markdown:
    """One row a kind of tensor, a column a file: the share of the change that is left (a Retention)."""
    if kept.product is None:
        return say(f"Not measured. {kept.reason}")
    caption = (
        "⟨file − base, δ⟩ / ‖δ‖² with δ = tuned − base: 1 where a file keeps what fine-tuning changed in the weights, "
        "0 where it gives the base back, above 1 where it exaggerates the change; in brackets the share of changed "
        "blocks of 32 that are the base's again. Exact, over all quantized matrices that fine-tuning moved; "
        f"‖δ‖ / ‖base‖ is {kept.moved:.2g}."
    )
    if kept.left_out:
        caption += f" Not in the base and left out: {', '.join(kept.left_out)}."
    rows = [_row(_ALL, kept, None), *(_row(kind, kept, kind) for kind in kinds_of(kept))]
    return table(rows, caption)


def _row(name: str, kept: Any, kind: str | None) -> dict[str, Any]:
    return {"kind": name, **{file: _retention_words(kept, file, kind) for file in kept.files}}


def _retention_words(kept: Any, file: str, kind: str | None = None) -> str | None:
    share, back = kept.kept(file, kind), kept.returned(file, kind)
    if share is None:
        return None
    return f"{share:.2f}" if back is None else f"{share:.2f} ({100 * back:.0f} %)"


def kept_reading(kept: Any) -> Markdown | None:
    """The files that lose more than a tenth of the change, in words (a Retention)."""
    if kept.product is None:
        return None
    found = {name: share for name in kept.files if (share := kept.kept(name)) is not None}
    if not found:
        return say("Fine-tuning moved no matrix that a file quantizes, so there is nothing to keep.")
    poor = sorted((name for name in found if found[name] < KEEPS_LITTLE), key=found.get)
    if poor:
        listed = "; ".join(f"{name} {_retention_words(kept, name)}" for name in poor)
        text = (
            f"**These files keep less than {KEEPS_LITTLE:g} of what fine-tuning changed in the weights: {listed}.** In "
            "brackets: changed blocks that are the base's again. What it costs the answers is measured in 07."
        )
    else:
        least = min(found, key=found.get)
        text = (
            f"Every file keeps at least {KEEPS_LITTLE:g} of the change; least {least}, {_retention_words(kept, least)}."
        )
    return say(f"{text} Export folders are not turned back here; 07 measures what their answers keep.")
