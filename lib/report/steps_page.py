"""Parts of page 07: the error ladder, real phones, and (of 06 too) whether predicted KL divergence came true."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.language import retold
from lib.report.display import Entry, Row, Shown, absent, figure, rows_of, table, tabled, tell
from lib.report.looks import BLUE, GREEN, GREY, ORANGE, panels, word
from lib.report.sentences import sentence
from lib.scoring.metric import metric_in

if TYPE_CHECKING:
    from IPython.display import HTML, Markdown
    from matplotlib.axes import Axes

# The error ladder: which step from the adapter to the quantized file changed what.

Steps = Sequence[Entry]


_CHANGE = {"accuracy": "kld", "answer_loss": "moved"}
"""By metric: the key of how far a step is from another, never negative."""


def shown(steps: Steps, note: str) -> Shown:
    """Figure, table and sentence of the ladder; why there is none.

    Args:
        note: why the adapter, its first step, is left out.
    """
    if not steps:
        return (absent("compare.no_ladder"),)
    metric, first = metric_in(steps).name, steps[0]
    caption = sentence("compare.steps", metric=metric, tokens=first.get("tokens"), margin=first.get("margin_percent"))
    return ladder(steps), table(rows_of(f"compare.steps_{metric}", steps), caption), steps_reading(steps, note)


def ladder(steps: Steps) -> HTML:
    """How far every step is from the one before and from the first, and what that means for the quality."""
    metric = metric_in(steps).name
    change, paired = _CHANGE[metric], metric == "answer_loss"
    fig, (upper, lower) = panels(height=1.8 + 0.6 * len(steps), rows=2)
    places = np.arange(len(steps))[::-1]
    for key, shift, colour, shape, words in (
        ("before", 0.12, BLUE, "o", "from the step before"),
        ("first", -0.12, ORANGE, "s", "from the first step"),
    ):
        against = [(place + shift, step[key]) for place, step in zip(places, steps, strict=True) if step[key]]
        style = {"fmt": shape, "color": colour, "label": words}
        _bars(upper, against, change, **style)
        if paired:
            _bars(lower, against, "loss_difference", **style)
    if paired:
        lower.axvline(0, color=GREY, linewidth=0.8)
    else:
        _bars(lower, list(zip(places, steps, strict=True)), "accuracy", fmt="o", color=GREY)
    axis = sentence("compare.change_axis", metric=metric)
    upper.set_xscale("symlog", linthresh=1e-6)
    upper.set_xlim(left=0)
    upper.set_yticks(places, [word(step["name"]) for step in steps])
    upper.set(xlabel=axis, ylim=(-0.5, len(steps) - 0.5))
    upper.legend(loc="upper center", bbox_to_anchor=(0.5, 1.22), ncols=2, fontsize=8)
    lower.set_yticks(places, [word(step["name"]) for step in steps])
    lower.set(xlabel=sentence("compare.effect_axis", metric=metric), ylim=upper.get_ylim())
    alt = sentence("compare.ladder_alt", steps=steps[1:], axis=axis, key=change)
    adapter = steps[0]["name"].startswith("adapter")
    return figure(fig, sentence("compare.ladder", n=steps[0]["n"], metric=metric, adapter=adapter), alt)


def _bars(ax: Axes, shown: Sequence[tuple[float, Mapping[str, Any]]], key: str, **style: Any) -> None:
    """Estimates with their intervals at some heights."""
    middle = np.array([entry[key] for _, entry in shown])
    limits = np.array([entry[f"{key}_interval"] for _, entry in shown], dtype=np.float64)
    limits = np.where(np.isfinite(limits), limits, middle[:, None])  # a limit that there is not draws no bar
    error = [middle - limits[:, 0], limits[:, 1] - middle]
    ax.errorbar(middle, [height for height, _ in shown], xerr=error, capsize=3, linestyle="none", **style)


def steps_reading(steps: Steps, note: str = "") -> Markdown:
    """Which step cost most."""
    name = metric_in(steps).name
    place = max(range(1, len(steps)), key=lambda i: steps[i]["before"][_CHANGE[name]])
    return tell(
        f"compare.steps_reading_{name}",
        which=f"{retold(steps[place - 1]['name'])} → {retold(steps[place]['name'])}",
        costly=steps[place]["before"],
        total=steps[-1]["first"],
        first=steps[0],
        exp=math.exp,
        note=retold(note),
    )


# Real phones.


def shown_phones(results: Sequence[Entry], left_out: Sequence[str], comparison: Any, run: str) -> Shown:
    """Speed and agreement of each phone, and what the table shows, or how to get one (of a ComparisonResult)."""
    say = tell if results or left_out else absent
    words = say("compare.phones_reading", run=run, results=results, left_out=left_out)
    if not results:
        return (words,)
    lines = phones(results, comparison.files, comparison.conditions["processor"])
    return table(lines, sentence("compare.phones")), words


def phones(results: Sequence[Mapping[str, Any]], files: Iterable[Mapping[str, Any]], processor: str) -> list[Row]:
    """Speed and agreement of each phone, and below them this machine with the same files.

    Args:
        results: of `lib.stages.compare.speed.measured`.
        files: entries of the comparison.
        processor: of this machine, in words.
    """
    types = {result["type"] for result in results}
    compared = [entry for entry in files if entry["type"] in types]
    return rows_of("compare.phones", results) + rows_of("compare.this_machine", compared, processor=processor)


# What pages 06 and 07 show of predicted and measured KL divergence: whether the sensitivities can be believed.


@dataclass(frozen=True)
class Forecast:
    """Files with both numbers.

    Attributes:
        points: "type", "bytes", "predicted", "measured", "low", "high" (nats a token; None for an open limit), smallest
            prediction first.
        counted: what was measured, for captions: "kind", "n" (tokens, or rows) and held-out "rows".
    """

    points: list[dict[str, Any]]
    counted: dict[str, Any] = field(default_factory=dict)


def _forecast(kind: str, predicted: Mapping[str, float], files: Iterable[Entry], **counted: Any) -> Forecast:
    """The points of files with a prediction, by the table forecast.KIND."""
    found = rows_of(f"forecast.{kind}", files, predicted=predicted)
    points = [point for point in found if point["predicted"] > 0 and point["measured"] is not None]
    return Forecast(sorted(points, key=lambda point: point["predicted"]), {"kind": kind, "rows": 0, **counted})


def on_bare_texts(predicted: Mapping[str, float], files: Sequence[Entry]) -> Forecast:
    """As 07 measured it: entries of comparison.json; `predicted`: `lib.stages.quantize.stage.predictions`."""
    return _forecast("bare_texts", predicted, files, n=files[0]["n_tokens"])


def on_label_words(predicted: Mapping[str, float], files: Sequence[Entry]) -> Forecast:
    """As 07 measured it: KL divergence between the answer words, a mean over rows (entries of comparison.json)."""
    return _forecast("label_words", predicted, files, n=files[0]["n"])


def on_rows(predicted: Mapping[str, float], effect: Any) -> Forecast:
    """As 06 measured it (a MixEffect); no points where there is none."""
    return _on_held_out("rows", predicted, effect, "tokens", "rows")


def on_answers(predicted: Mapping[str, float], effect: Any) -> Forecast:
    """As 06 measured it where answers are predicted (a MixEffect); `predicted`: of the loss "answer_kld"."""
    return _on_held_out("answers", predicted, effect, "answer_positions", "answer_rows")


def _on_held_out(kind: str, predicted: Mapping[str, float], effect: Any, n: str, rows: str) -> Forecast:
    if effect is None:
        return Forecast([])
    found = effect.content
    return _forecast(kind, predicted, (found["mixed"], *found["types"]), n=found[n], rows=found[rows])


def forecast_table(forecast: Forecast) -> HTML | Markdown:
    """The table; a sentence where nothing was predicted."""
    if not forecast.points:
        return absent("compare.no_forecast")
    return tabled("compare.forecast", forecast.points, **forecast.counted)


def forecast_chart(forecast: Forecast) -> HTML | None:
    """Measured against predicted, both on log scales, with the line on which they are equal."""
    points = [p for p in forecast.points if p["measured"] > 0]
    if not points:
        return None
    fig, ax = panels(5.6, 4.0)
    x, y = (np.array([p[key] for p in points]) for key in ("predicted", "measured"))
    ends = [0.7 * min(x.min(), y.min()), 1.4 * max(x.max(), y.max())]
    ax.plot(ends, ends, color=GREY, linestyle="--", linewidth=1, label="as predicted")
    for place, (point, at, value) in enumerate(zip(points, x, y, strict=True)):
        mixed = point["type"].startswith("MIX_")
        low, high = point["low"], point["high"]
        # a log scale has no place for 0
        bars = None if None in (low, high) else [[value - max(low, 0.01 * value)], [high - value]]
        ax.errorbar(at, value, yerr=bars, fmt="D" if mixed else "o", color=GREEN if mixed else BLUE, capsize=3)
        side = (7, -3) if place % 2 else (-7, -3)  # names at alternate sides, or neighbours would overlap
        ends_at = {"ha": "left" if place % 2 else "right", "fontsize": 8}
        ax.annotate(point["type"], (at, value), side, textcoords="offset points", **ends_at)
    ax.margins(x=0.15)
    ax.set(xscale="log", yscale="log", xlabel="predicted KL divergence, nats a token")
    ax.set_ylabel("measured KL divergence, nats a token")
    ax.legend()
    alt = sentence("compare.forecast_alt", points=forecast.points)
    return figure(fig, sentence("compare.forecast_chart", **forecast.counted), alt)


def forecast_reading(forecast: Forecast) -> Markdown | None:
    """How far the predictions are off, and whether they put the files in the right order; nothing without them."""
    if not forecast.points:
        return None
    ratios = {p["type"]: p["measured"] / p["predicted"] for p in forecast.points}
    low, high = (choose(ratios.items(), key=lambda item: item[1]) for choose in (min, max))
    pairs = list(itertools.combinations([p["measured"] for p in forecast.points], 2))  # in the order of predictions
    return tell(
        "compare.forecast_reading",
        low=low,
        high=high,
        near=sum(0.5 <= ratio <= 2 for ratio in ratios.values()),
        files=len(ratios),
        pairs=len(pairs),
        ordered=sum(a < b for a, b in pairs),
        kind=forecast.counted["kind"],
    )


def forecasts(bare: Forecast, at_answers: Forecast) -> Shown:
    """Table, chart and sentence of the prediction on text, and of the one at answers where there is one."""
    found = (forecast_table(bare), forecast_chart(bare), forecast_reading(bare))
    if not at_answers.points:  # without a budget the sentence above has said why there are none
        return found
    return (*found, forecast_table(at_answers), forecast_reading(at_answers))
