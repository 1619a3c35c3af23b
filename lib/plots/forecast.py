"""What page 07 shows of predicted and measured KL divergence: whether the sensitivities can be believed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.plots.charts import _axes
from lib.plots.display import figure, say, table
from lib.plots.style import BLUE, GREEN, GREY

if TYPE_CHECKING:
    from IPython.display import HTML, Markdown

Entries = Sequence[Mapping[str, Any]]
_NONE = "No prediction in this run: with `size_budget_mb` 06 measures the sensitivity of every tensor."


def rows(predicted: Mapping[str, float], files: Entries) -> list[dict[str, Any]]:
    """One row a file that rounds something, smallest divergence predicted first.

    Args:
        predicted: {file: nats a token} (`lib.quantizing.predictions`).
        files: entries of comparison.json.
    """
    known = [e for e in files if predicted.get(e["file"], 0.0) > 0]
    return [
        {
            "type": e["type"],
            "MB": e["bytes"] / 1e6,
            "predicted, nats": predicted[e["file"]],
            "measured, nats": e["kld_mean"],
            "± (1.96 SE)": 1.96 * e["kld_uncertainty"],
            "measured / predicted": e["kld_mean"] / predicted[e["file"]],
        }
        for e in sorted(known, key=lambda e: predicted[e["file"]])
    ]


def shown(predicted: Mapping[str, float], files: Entries) -> HTML | Markdown:
    """The table; a sentence where nothing was predicted."""
    if not (found := rows(predicted, files)):
        return say(_NONE)
    caption = (
        f"KL divergence from the unquantized file: predicted in 06 from gradients on training rows and the rounding of "
        f"every tensor, and measured here on {files[0]['n_tokens']:,} tokens of held-out text."
    )
    formats = {"predicted, nats": ".2e", "measured, nats": ".2e", "measured / predicted": ".2f"}
    return table(found, caption, formats)


def chart(predicted: Mapping[str, float], files: Entries) -> HTML | None:
    """Measured against predicted, both on log scales, with the line on which they are equal."""
    if not (found := rows(predicted, files)):
        return None
    fig, ax = _axes(5.2, 4.0)
    x, y, half = (np.array([row[key] for row in found]) for key in ("predicted, nats", "measured, nats", "± (1.96 SE)"))
    ends = [0.7 * min(x.min(), y.min()), 1.4 * max(x.max(), y.max())]
    ax.plot(ends, ends, color=GREY, linestyle="--", linewidth=1, label="as predicted")
    for row, place, value, error in zip(found, x, y, half, strict=True):
        mixed = row["type"].startswith("MIX_")
        bars = [[min(error, 0.999 * value)], [error]]  # a log scale has no place for 0
        ax.errorbar(place, value, yerr=bars, fmt="D" if mixed else "o", color=GREEN if mixed else BLUE, capsize=3)
        ax.annotate(row["type"], (place, value), (6, -3), textcoords="offset points", fontsize=8)
    ax.set(xscale="log", yscale="log", xlabel="predicted KL divergence, nats a token")
    ax.set_ylabel("measured KL divergence, nats a token")
    ax.legend()
    caption = (
        f"Predicted and measured KL divergence from the unquantized file (log scales; bars ± 1.96 standard errors over "
        f"{files[0]['n_tokens']:,} tokens); diamonds are files under a size budget. Above the dashed line a file is "
        "farther from the source than predicted."
    )
    words = "; ".join(f"{r['type']} {r['predicted, nats']:.2g}, {r['measured, nats']:.2g}" for r in found)
    return figure(fig, caption, f"Predicted and measured KL divergence in nats. {words}.")


def reading(predicted: Mapping[str, float], files: Entries) -> Markdown | None:
    """How far the predictions are off, and whether they put the files in the right order; nothing without them."""
    if not (found := rows(predicted, files)):
        return None
    ratios = [row["measured / predicted"] for row in found]
    near = sum(0.5 <= ratio <= 2 for ratio in ratios)
    low, high = (found[int(pick(ratios))] for pick in (np.argmin, np.argmax))
    text = (
        f"Measured over predicted lies between {low['measured / predicted']:.2f} ({low['type']}) and "
        f"{high['measured / predicted']:.2f} ({high['type']}), within a factor of two for {near} of {len(found)} files."
    )
    if len(found) > 1:
        measured = [row["measured, nats"] for row in found]  # in the order of the predictions
        pairs = list(itertools.combinations(measured, 2))
        text += f" Of {len(pairs)} pairs of files {sum(a < b for a, b in pairs)} are measured in the predicted order."
    return say(
        f"{text} The prediction is one of second order on other rows, takes tensors and weights for independent, and "
        "leaves out llama.cpp's rounding of activations, which weighs most where the weights are rounded least."
    )
