"""The figures of notebooks 01 to 03: each takes plain numbers and returns a captioned <figure>."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.plots.display import figure
from lib.plots.style import BLUE, GREEN, GREY, ORANGE, font_note, readable, use_style

if TYPE_CHECKING:
    from IPython.display import HTML
    from matplotlib.axes import Axes

HATCHES = ("", "//", "..", "xx")


def _axes(width: float = 7.0, height: float = 3.6, columns: int = 1) -> tuple[Any, Any]:
    import matplotlib.pyplot as plt

    use_style()
    return plt.subplots(1, columns, figsize=(width, height), layout="constrained")


def label_balance(counts: Mapping[str, Sequence[int]], label_names: Sequence[str]) -> HTML:
    """Rows of each label in each split, as grouped bars; `counts` is {split: [rows of label 0, 1, …]}."""
    fig, ax = _axes(height=3.0)
    names, width = readable(label_names), 0.8 / len(label_names)
    places = np.arange(len(counts))
    for index, name in enumerate(names):
        values = [count[index] for count in counts.values()]
        colour = (BLUE, ORANGE, GREEN)[index % 3]
        bars = ax.bar(places + index * width, values, width, label=name, color=colour, hatch=HATCHES[index % 4])
        ax.bar_label(bars, fmt="{:,.0f}", fontsize=8)
    ax.set_xticks(places + width * (len(names) - 1) / 2, list(counts))
    ax.set_ylabel("rows")
    ax.legend(title="label")
    words = "; ".join(f"{split}: {', '.join(f'{v:,}' for v in values)}" for split, values in counts.items())
    caption = f"Rows of each label in each split (n = {sum(map(sum, counts.values())):,} rows).{font_note(label_names)}"
    return figure(fig, caption, f"Bar chart of label balance. {words}.")


def length_histogram(lengths: Mapping[str, Sequence[int]], limit: int) -> HTML:
    """Tokens a row (prompt and answer) in each split, with the run's limit."""
    fig, ax = _axes(height=3.0)
    longest = max(max(values) for values in lengths.values())
    bins = np.linspace(0, min(longest, 2 * limit), 60)
    for split, values in lengths.items():
        shown = np.minimum(values, bins[-1])
        ax.hist(shown, bins=bins, histtype="step", density=True, label=f"{split} (n = {len(values):,})", linewidth=1.5)
    ax.axvline(limit, color=GREY, linestyle=":", label=f"max_seq_length = {limit}")
    ax.set_xlabel("tokens a row, prompt and answer" + (" (longer rows in the last bin)" if longest > bins[-1] else ""))
    ax.set_ylabel("density")
    ax.legend()
    over = {split: float(np.mean(np.asarray(values) > limit)) for split, values in lengths.items()}
    words = ", ".join(f"{split} {100 * share:.1f} %" for split, share in over.items())
    n = sum(len(values) for values in lengths.values())
    caption = f"Length of the rows in tokens (n = {n:,}). Share over the limit, whose text is cut at its end: {words}."
    return figure(fig, caption, f"Histogram of row lengths in tokens; share over the limit of {limit}: {words}.")


def learning_curves(history: Sequence[Mapping[str, Any]], chosen_step: int) -> HTML:
    """Training and validation loss with the chosen checkpoint, and the learning rate, over updates."""
    fig, (left, right) = _axes(9.0, 3.3, columns=2)
    train = [(row["step"], row["loss"]) for row in history if row.get("loss") is not None]
    valid = [(row["step"], row["eval_loss"]) for row in history if row.get("eval_loss") is not None]
    rates = [(row["step"], row["learning_rate"]) for row in history if row.get("learning_rate") is not None]
    left.plot(*zip(*train, strict=True), label="training", linewidth=1.0)
    left.plot(*zip(*valid, strict=True), label="validation", marker="o", markersize=4)
    best = dict(valid)[chosen_step]
    left.plot([chosen_step], [best], "*", color=GREEN, markersize=15, label=f"chosen (step {chosen_step})")
    left.set(xlabel="update (optimizer step)", ylabel="loss, nats a loss token", ylim=(0, None))
    left.legend()
    right.plot(*zip(*rates, strict=True))
    right.set(xlabel="update (optimizer step)", ylabel="learning rate", ylim=(0, None))
    caption = (
        f"Loss on the answer tokens and learning rate over {train[-1][0]} updates; the star marks the checkpoint with "
        f"the lowest validation loss ({best:.4f} nats). One training run, one seed: no interval."
    )
    alt = (
        f"Training loss falls from {train[0][1]:.2f} to {train[-1][1]:.2f}; validation loss from {valid[0][1]:.3f} "
        f"to {valid[-1][1]:.3f}, lowest {best:.3f} at step {chosen_step}."
    )
    return figure(fig, caption, alt)


def estimates(
    points: Sequence[Mapping[str, Any]], axis: str, caption: str, reference: float | None = None, band: float = 0.0
) -> HTML:
    """Estimates with intervals, one a line.

    Args:
        points: mappings with name, estimate, low, high (same unit as the axis; None = no interval) and n.
        reference: position of a vertical line; `band` shades ± that much around it (an equivalence margin).
    """
    fig, ax = _axes(height=0.9 + 0.38 * len(points))
    places = np.arange(len(points))[::-1]
    if reference is not None:
        ax.axvline(reference, color=GREY, linestyle="--", linewidth=1)
        if band:
            ax.axvspan(reference - band, reference + band, color=GREEN, alpha=0.12, linewidth=0)
    for place, point in zip(places, points, strict=True):
        bounded = point["low"] is not None and point["high"] is not None
        error = [[point["estimate"] - point["low"]], [point["high"] - point["estimate"]]] if bounded else None
        ax.errorbar(point["estimate"], place, xerr=error, fmt="o", color=BLUE, capsize=3, linestyle="none")
    ax.set_yticks(places, [f"{point['name']}  (n = {point['n']:,})" for point in points])
    ax.set_ylim(-0.6, len(points) - 0.4)
    ax.set_xlabel(axis)
    words = "; ".join(f"{p['name']} {p['estimate']:.4g} {_limits(p)}" for p in points)
    return figure(fig, caption, f"{axis}: {words}.")


def _limits(point: Mapping[str, Any]) -> str:
    return "(no interval)" if None in (point["low"], point["high"]) else f"[{point['low']:.4g}, {point['high']:.4g}]"


def confusion(matrices: Mapping[str, Sequence[Sequence[int]]], label_names: Sequence[str]) -> HTML:
    """Confusion matrices side by side: rows = true label, columns = predicted label, cells = number of rows."""
    fig, axes = _axes(3.2 * len(matrices), 3.0, columns=len(matrices))
    names = readable(label_names)
    for ax, (title, matrix) in zip(np.atleast_1d(axes), matrices.items(), strict=True):
        values = np.asarray(matrix)
        ax.imshow(values, cmap="Blues", vmin=0, vmax=max(1, values.sum(axis=1).max()))
        for (row, column), value in np.ndenumerate(values):
            dark = value > 0.6 * values.sum(axis=1).max()
            ax.text(column, row, f"{value:,}", ha="center", va="center", color="white" if dark else "black")
        ax.set_xticks(range(len(names)), names)
        ax.set_yticks(range(len(names)), names)
        ax.set(xlabel="predicted", ylabel="true", title=title)
        ax.grid(False)
    total = int(np.sum(next(iter(matrices.values()))))
    words = "; ".join(f"{title}: {np.asarray(matrix).tolist()}" for title, matrix in matrices.items())
    caption = f"Confusion matrices, number of test rows (n = {total:,} each).{font_note(label_names)}"
    return figure(fig, caption, f"Confusion matrices, rows true and columns predicted. {words}.")


def reliability(bins: Mapping[str, Sequence[Mapping[str, float]]], caption: str) -> HTML:
    """Confidence against accuracy; `bins` is {model: [{confidence, accuracy, low, high, n}, …]}."""
    fig, ax = _axes(5.2, 3.8)
    ax.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1, label="perfectly calibrated")
    for (name, rows), marker, colour in zip(bins.items(), "osD^", (BLUE, ORANGE, GREEN, GREY), strict=False):
        kept = [row for row in rows if row["n"]]
        x, y = [row["confidence"] for row in kept], [row["accuracy"] for row in kept]
        error = [[max(0, v - r["low"]) for v, r in zip(y, kept, strict=True)]]
        error.append([max(0, r["high"] - v) for v, r in zip(y, kept, strict=True)])
        ax.errorbar(x, y, yerr=error, marker=marker, color=colour, capsize=2, label=name, linewidth=1)
    ax.set(xlabel="confidence (mean probability of the answer given)", ylabel="share of right answers", ylim=(0, 1.02))
    ax.legend()
    words = "; ".join(
        f"{name}: " + ", ".join(f"{r['confidence']:.2f}→{r['accuracy']:.2f}" for r in rows if r["n"])
        for name, rows in bins.items()
    )
    return figure(fig, caption, f"Reliability diagram, confidence to accuracy by bin. {words}.")


def overlay_histogram(values: Mapping[str, Sequence[float]], axis: str, caption: str) -> HTML:
    """Distributions of one quantity as outlines, one for each name, over a common range (1st to 99th percentile)."""
    fig, ax = _axes(height=3.0)
    every = np.concatenate([np.asarray(v, dtype=float) for v in values.values()])
    low, high = np.percentile(every, [0.5, 99.5])
    bins = np.linspace(low, high if high > low else low + 1, 50)
    for name, sample in values.items():
        _outline(ax, np.clip(sample, bins[0], bins[-1]), bins, f"{name} (n = {len(sample):,})")
    ax.axvline(0, color=GREY, linestyle=":", linewidth=1)
    ax.set(xlabel=axis, ylabel="rows")
    ax.legend()
    words = "; ".join(f"{name}: median {np.median(sample):.3g}" for name, sample in values.items())
    return figure(fig, caption, f"Histogram of {axis}. {words}.")


def _outline(ax: Axes, sample: np.ndarray, bins: np.ndarray, label: str) -> None:
    ax.hist(sample, bins=bins, histtype="step", linewidth=1.5, label=label)
