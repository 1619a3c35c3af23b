"""What pages 06 and 07 show of predicted and measured KL divergence: whether the sensitivities can be believed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.plots.charts import _axes
from lib.plots.display import figure, say, table
from lib.plots.formats import with_interval
from lib.plots.style import BLUE, GREEN, GREY

if TYPE_CHECKING:
    from IPython.display import HTML, Markdown

_NONE = (
    "No prediction in this run: under a size budget (`size_budget_mb` or `size_budget_bpw`) 06 measures the "
    "sensitivity of every tensor."
)


@dataclass(frozen=True)
class Forecast:
    """Files with both numbers.

    Attributes:
        points: "type", "bytes", "predicted", "measured", "low", "high" (nats a token; None for an open limit), smallest
            prediction first.
        tokens: counted by the measurement; text: what is counted, in words; interval: what the intervals are.
        note: what sets this measurement apart from what was predicted.
    """

    points: list[dict[str, Any]]
    tokens: int = 0
    text: str = ""
    interval: str = ""
    note: str = ""


def on_bare_texts(predicted: Mapping[str, float], files: Sequence[Mapping[str, Any]]) -> Forecast:
    """As 07 measured it: entries of comparison.json; `predicted`: `lib.quantizing.predictions`."""
    known = [e for e in files if predicted.get(e["file"], 0.0) > 0]
    points = [_point(e, predicted, e["kld_mean"], (e["kld_low"], e["kld_high"])) for e in known]
    note = " It was made for rows with system turn and question; these texts stand alone."
    interval = "± 1.96 standard errors over tokens"
    return Forecast(_sorted(points), files[0]["n_tokens"], "tokens of bare test texts", interval, note)


def on_rows(predicted: Mapping[str, float], effect: Any) -> Forecast:
    """As 06 measured it (a MixEffect); no points where there is none."""
    if effect is None:
        return Forecast([])
    content = effect.content
    known = [e for e in (content["mixed"], *content["types"]) if predicted.get(e["file"], 0.0) > 0]
    points = [_point(e, predicted, e["kld"], e["kld_interval"]) for e in known]
    text = f"tokens of {content['rows']} held-out rows, written as for training"
    return Forecast(_sorted(points), content["tokens"], text, "95 % bootstrap intervals over rows")


def on_answers(predicted: Mapping[str, float], effect: Any) -> Forecast:
    """As 06 measured it where answers are predicted (a MixEffect); `predicted`: of the loss "answer_kld"."""
    if effect is None:
        return Forecast([])
    content = effect.content
    known = [e for e in (content["mixed"], *content["types"]) if predicted.get(e["file"], 0.0) > 0]
    points = [_point(e, predicted, e["answers"]["kld"], e["answers"]["kld_interval"]) for e in known]
    text = f"tokens of the answers of {content['answer_rows']} held-out rows"
    return Forecast(_sorted(points), content["answer_positions"], text, "95 % bootstrap intervals over rows")


def on_label_words(predicted: Mapping[str, float], files: Sequence[Mapping[str, Any]]) -> Forecast:
    """As 07 measured it: KL divergence between the answer words, a mean over rows (entries of comparison.json)."""
    known = [e for e in files if predicted.get(e["file"], 0.0) > 0 and e.get("label_kld_interval")]
    points = [_point(e, predicted, e["label_kld"], e["label_kld_interval"]) for e in known]
    note = (
        " It is of a token of an answer, its end of turn included, and over the whole vocabulary; measured is the "
        "choice among the answer words of a row."
    )
    count = files[0]["n"] if files else 0
    text = "test rows, on their answer words alone"
    return Forecast(_sorted(points), count, text, "95 % intervals over rows", note)


def _point(
    entry: Mapping[str, Any], predicted: Mapping[str, float], measured: float, limits: Sequence[float | None]
) -> dict[str, Any]:
    values = {"predicted": predicted[entry["file"]], "measured": measured, "low": limits[0], "high": limits[1]}
    return {"type": entry["type"], "bytes": entry["bytes"], **values}


def _sorted(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(points, key=lambda point: point["predicted"])


def shown(forecast: Forecast) -> HTML | Markdown:
    """The table; a sentence where nothing was predicted."""
    if not forecast.points:
        return say(_NONE)
    rows = [
        {
            "type": p["type"],
            "MB": p["bytes"] / 1e6,
            "predicted, nats": f"{p['predicted']:.2g}",
            "measured, nats": with_interval(p["measured"], (p["low"], p["high"])),
            "measured / predicted": p["measured"] / p["predicted"],
        }
        for p in forecast.points
    ]
    caption = (
        "KL divergence from the unquantized file, smallest prediction first: predicted from gradients on training rows "
        f"and the rounding of every tensor; measured on {forecast.tokens:,} {forecast.text} "
        f"({forecast.interval})."
    )
    return table(rows, caption, {"measured / predicted": ".2f"})


def chart(forecast: Forecast) -> HTML | None:
    """Measured against predicted, both on log scales, with the line on which they are equal."""
    points = [p for p in forecast.points if p["measured"] > 0]
    if not points:
        return None
    fig, ax = _axes(5.6, 4.0)
    x, y = (np.array([p[key] for p in points]) for key in ("predicted", "measured"))
    ends = [0.7 * min(x.min(), y.min()), 1.4 * max(x.max(), y.max())]
    ax.plot(ends, ends, color=GREY, linestyle="--", linewidth=1, label="as predicted")
    for place, (point, at, value) in enumerate(zip(points, x, y, strict=True)):
        mixed = point["type"].startswith("MIX_")
        low, high = point["low"], point["high"]
        whole = low is not None and high is not None
        bars = [[value - max(low, 0.01 * value)], [high - value]] if whole else None  # a log scale has no place for 0
        ax.errorbar(at, value, yerr=bars, fmt="D" if mixed else "o", color=GREEN if mixed else BLUE, capsize=3)
        side = (7, -3) if place % 2 else (-7, -3)  # names at alternate sides, or neighbours would overlap
        ends_at = {"ha": "left" if place % 2 else "right", "fontsize": 8}
        ax.annotate(point["type"], (at, value), side, textcoords="offset points", **ends_at)
    ax.margins(x=0.15)
    ax.set(xscale="log", yscale="log", xlabel="predicted KL divergence, nats a token")
    ax.set_ylabel("measured KL divergence, nats a token")
    ax.legend()
    caption = (
        f"Predicted and measured KL divergence from the unquantized file (log scales; {forecast.interval}; "
        f"n = {forecast.tokens:,} {forecast.text}); a diamond is a file under a size budget. Above "
        "the dashed line a file is farther from the source than predicted."
    )
    words = "; ".join(f"{p['type']} {p['predicted']:.2g}, {p['measured']:.2g}" for p in points)
    return figure(fig, caption, f"Predicted and measured KL divergence in nats. {words}.")


def reading(forecast: Forecast) -> Markdown | None:
    """How far the predictions are off, and whether they put the files in the right order; nothing without them."""
    if not forecast.points:
        return None
    ratios = {p["type"]: p["measured"] / p["predicted"] for p in forecast.points}
    low, high = (pick(ratios, key=lambda name: ratios[name]) for pick in (min, max))
    near = sum(0.5 <= ratio <= 2 for ratio in ratios.values())
    text = (
        f"Measured over predicted lies between {ratios[low]:.2f} ({low}) and {ratios[high]:.2f} ({high}), within a "
        f"factor of two for {near} of {len(ratios)} files."
    )
    pairs = list(itertools.combinations([p["measured"] for p in forecast.points], 2))  # in the order of predictions
    if pairs:
        text += f" Of {len(pairs)} pairs of files {sum(a < b for a, b in pairs)} are measured in the predicted order."
    return say(
        f"{text} The prediction is of second order, takes tensors and weights for independent, and leaves out "
        f"llama.cpp's rounding of activations, which weighs most where the weights are rounded least.{forecast.note}"
    )
