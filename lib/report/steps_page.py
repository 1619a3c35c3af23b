"""The error ladder of 07: which step from the adapter to the quantized file changed what, with labels and without.
The rows and sentences about real phones in notebook 07.
What pages 06 and 07 show of predicted and measured KL divergence: whether the sensitivities can be believed.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.report.charts import _axes
from lib.report.compare_page import _interval
from lib.report.display import BLUE, GREEN, GREY, ORANGE, Row, figure, say, table, with_interval

if TYPE_CHECKING:
    from IPython.display import HTML, Markdown
    from matplotlib.axes import Axes


# The error ladder of 07: which step from the adapter to the quantized file changed what, with labels and without.

Steps = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class _Chart:
    """How one kind of ladder is drawn.

    Attributes:
        change: key of how far a step is from another, never negative: left, logarithmic.
        effect: key of what that means: right; of the step itself, or of the step against another (`paired`).
        change_axis, effect_axis: the same in words, with units.
        caption: behind "n = … test rows. ".
    """

    change: str
    effect: str
    paired: bool
    change_axis: str
    effect_axis: str
    caption: str


_LABELS = _Chart(
    "kld",
    "accuracy",
    False,
    "KL divergence, nats a row (log above 10⁻⁶)",
    "accuracy",
    "Left: mean KL divergence over the answer words, with 95 % intervals (near copies together). Right: accuracy with "
    "95 % Wilson intervals (rows as they are).",
)
_ANSWERS = _Chart(
    "moved",
    "loss_difference",
    True,
    "|change| of a row's loss, nats a token (log above 10⁻⁶)",
    "change of the mean loss, nats a token",
    "Left: by how much the loss of a row's reference answers moves, whatever the sign. Right: change of the mean loss; "
    "to the right of 0 is worse. Paired, with 95 % bootstrap intervals over groups of alike rows.",
)


def _kind(steps: Steps) -> _Chart:
    return _LABELS if "accuracy" in steps[0] else _ANSWERS


def ladder(steps: Steps) -> HTML:
    """How far every step is from the one before and from the first, and what that means for the quality."""
    kind = _kind(steps)
    fig, (left, right) = _axes(9.5, 1.2 + 0.5 * len(steps), columns=2)
    places = np.arange(len(steps))[::-1]
    for key, shift, colour, shape, words in (
        ("before", 0.12, BLUE, "o", "from the step before"),
        ("first", -0.12, ORANGE, "s", "from the first step"),
    ):
        shown = [(place + shift, step[key]) for place, step in zip(places, steps, strict=True) if step[key]]
        style = {"fmt": shape, "color": colour, "label": words}
        _bars(left, shown, kind.change, **style)
        if kind.paired:
            _bars(right, shown, kind.effect, **style)
    if kind.paired:
        right.axvline(0, color=GREY, linewidth=0.8)
    else:
        _bars(right, list(zip(places, steps, strict=True)), kind.effect, fmt="o", color=GREY)
    left.set_xscale("symlog", linthresh=1e-6)
    left.set_xlim(left=0)
    left.set_yticks(places, [step["name"] for step in steps])
    left.set_ylim(-0.5, len(steps) - 0.5)
    right.set_ylim(left.get_ylim())
    left.set_xlabel(kind.change_axis)
    left.legend(loc="upper center", bbox_to_anchor=(0.5, 1.22), ncols=2, fontsize=8)
    right.set_yticks(places, [])
    right.set_xlabel(kind.effect_axis)
    caption = f"From the trained adapter to the quantized file, n = {steps[0]['n']:,} test rows. {kind.caption}"
    words = "; ".join(f"{step['name']}: {step['before'][kind.change]:.2g}" for step in steps[1:])
    return figure(fig, caption, f"Error ladder, {kind.change_axis}, from the step before. {words}.")


def _bars(axes: Axes, shown: Sequence[tuple[float, Mapping[str, Any]]], key: str, **style: Any) -> None:
    """Estimates with their intervals at some heights."""
    middle = np.array([entry[key] for _, entry in shown])
    limits = np.array([entry[f"{key}_interval"] for _, entry in shown], dtype=np.float64)
    limits = np.where(np.isfinite(limits), limits, middle[:, None])  # a limit that there is not draws no bar
    error = [middle - limits[:, 0], limits[:, 1] - middle]
    axes.errorbar(middle, [height for height, _ in shown], xerr=error, capsize=3, linestyle="none", **style)


def rows(steps: Steps) -> list[Row]:
    """One row a step."""
    row = _label_row if _kind(steps) is _LABELS else _answer_row
    return [row(step, step["before"] or {}, step["first"] or {}) for step in steps]


def caption(steps: Steps) -> str:
    """Caption of the table."""
    if _kind(steps) is _LABELS:
        return "Every step against the one before, and to the first: KL divergence, equal labels and accuracy points."
    return (
        f"Every step against the one before, and to the first, on {steps[0]['tokens']:,} answer tokens: change of the "
        "mean loss (paired, 95 % bootstrap interval over groups of alike rows), by how much a row's loss moves on "
        "average whatever the sign (nats a token), and the share of rows whose perplexity changes by less than "
        f"{steps[0]['margin_percent']:g} %."
    )


def _label_row(step: Mapping[str, Any], before: Mapping[str, Any], first: Mapping[str, Any]) -> Row:
    return {
        "step": step["name"],
        "accuracy": step["accuracy"],
        "KL, nats": _kld(before),
        "equal labels": _percent(before),
        "points": _points(before),
        "KL to the first": _kld(first),
        "equal": _percent(first),
        "points to the first": _points(first),
    }


def _answer_row(step: Mapping[str, Any], before: Mapping[str, Any], first: Mapping[str, Any]) -> Row:
    return {
        "step": step["name"],
        "answer PPL ↓": step["perplexity"],
        "loss, nats": _change(before),
        "rows move": _moved(before),
        "rows alike": _percent(before),
        "loss to the first": _change(first),
        "move to the first": _moved(first),
        "alike": _percent(first),
    }


def _kld(entry: Mapping[str, Any]) -> str | None:
    return f"{entry['kld']:.2g} {_interval(entry['kld_interval'], '.1g') or ''}".strip() if entry else None


def _change(entry: Mapping[str, Any]) -> str | None:
    return f"{entry['loss_difference']:+.2g} {_interval(entry['loss_difference_interval'], '+.1g')}" if entry else None


def _moved(entry: Mapping[str, Any]) -> str | None:
    return f"{entry['moved']:.2g} {_interval(entry['moved_interval'], '.1g')}" if entry else None


def _percent(entry: Mapping[str, Any]) -> str | None:
    return f"{100 * entry['agreement']:.1f}\u00a0%" if entry else None


def _points(entry: Mapping[str, Any]) -> str | None:
    if not entry:
        return None
    low, high = (100 * limit for limit in entry["accuracy_difference_interval"])
    return f"{100 * entry['accuracy_difference']:+.1f} [{low:+.1f},\u00a0{high:+.1f}]"


def steps_reading(steps: Steps) -> str:
    """Which step cost most."""
    labelled = _kind(steps) is _LABELS
    place = max(range(1, len(steps)), key=lambda i: steps[i]["before"]["kld" if labelled else "moved"])
    costly, total = steps[place]["before"], steps[-1]["first"]
    which = f"{steps[place - 1]['name']} → {steps[place]['name']}"
    if labelled:
        low, high = (100 * limit for limit in total["accuracy_difference_interval"])
        return (
            f"The step that changes the answers' probabilities most is {which}: {costly['kld']:.2g} nats a row, "
            f"{100 * costly['agreement']:.1f} % equal labels. All steps together change accuracy by "
            f"{100 * total['accuracy_difference']:+.2f} points (95 % interval {low:+.2f} to {high:+.2f}) and keep "
            f"{100 * total['agreement']:.1f} % of the labels."
        )
    low, high = total["loss_difference_interval"]
    return (
        f"The step that moves the loss of the rows most is {which}: by {costly['moved']:.2g} nats a token on average, "
        f"while the mean changes by {costly['loss_difference']:+.2g}; the perplexity of "
        f"{100 * costly['agreement']:.1f} % of the rows stays within {steps[0]['margin_percent']:g} %. All steps "
        f"together change the mean loss by {total['loss_difference']:+.2g} nats a token (95 % interval {low:+.2g} to "
        f"{high:+.2g}), the perplexity by a factor of {math.exp(total['loss_difference']):.4f}."
    )


# The rows and sentences about real phones in notebook 07.


def phones(results: Iterable[Mapping[str, Any]], files: Iterable[Mapping[str, Any]], processor: str) -> list[Row]:
    """Speed and agreement of each phone, and below them this machine with the same files.

    Args:
        results: of `lib.stages.compare.speed.measured`.
        files: entries of the comparison.
        processor: of this machine, in words.
    """
    results = list(results)
    rows = [_phone(result) for result in results]
    types = {result["type"] for result in results}
    return rows + [_machine(entry, processor) for entry in files if entry["type"] in types]


def _phone(result: Mapping[str, Any]) -> Row:
    checks, rows, runtime = result["checks"], result["rows"], result["runtime"]
    gap = rows["largest_gap_nats"]
    return {
        "type": result["type"],
        "device": result["device"]["name"],
        "runtime": f"{result['device']['browser']}, wllama {runtime['wllama']}{', slower build' * runtime['compat']}",
        "threads": runtime["threads"],
        "load, s": statistics.median(result["load"]["seconds"]),
        "prompt, tokens/s": _spread(result["prompt"]["tokens_per_second"]),
        "generation, tokens/s": _spread(result["generation"]["tokens_per_second"]),
        "stored tokens": f"{checks['same_tokens']} of {checks['tokens']}",
        "stored labels": f"{rows['agree']} of {rows['n']}" if rows["n"] else None,
        "margins differ by ≤, nats": gap,
    }


def _machine(entry: Mapping[str, Any], processor: str) -> Row:
    return {
        "type": entry["type"],
        "device": f"this machine ({processor})",
        "runtime": "llama-cpp-python",
        "threads": None,
        "load, s": entry["load_seconds"],
        "prompt, tokens/s": _range(entry["prompt_tokens_per_second"], entry["prompt_tokens_per_second_range"]),
        "generation, tokens/s": _range(
            entry["generation_tokens_per_second"], entry["generation_tokens_per_second_range"]
        ),
        "stored tokens": None,
        "stored labels": None,
        "margins differ by ≤, nats": None,
    }


def _spread(values: Sequence[float]) -> str:
    return _range(statistics.median(values), (min(values), max(values)))


def _range(median: float, ends: Sequence[float]) -> str:
    low, high = ends
    return f"{median:,.1f} ({low:,.1f} – {high:,.1f})"


def phones_reading(results: Sequence[Mapping[str, Any]], left_out: Sequence[str], run_name: str) -> str:
    """What the table shows, or how to get one."""
    if not results:
        text = (
            "No phone has measured a file of this run. To do so: "
            f"`workbook package {run_name} --web`, then `workbook serve {run_name} --phone --host 0.0.0.0`."
        )
        return " ".join([text, *left_out])
    agree, rows = (sum(result["rows"][key] for result in results) for key in ("agree", "n"))
    same, tokens = (sum(result["checks"][key] for result in results) for key in ("same_tokens", "tokens"))
    what = "1 result of the phone page" if len(results) == 1 else f"{len(results)} results of the phone page"
    text = f"{what}, each for a file with the SHA-256 of a compared one: "
    text += f"{same:,} of {tokens:,} stored tokens came back the same"
    text += f", and {agree:,} of {rows:,} stored labels." if rows else "."
    return " ".join([text, *left_out])


# What pages 06 and 07 show of predicted and measured KL divergence: whether the sensitivities can be believed.

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
    """As 07 measured it: entries of comparison.json; `predicted`: `lib.stages.quantize.weights.predictions`."""
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


def forecast_table(forecast: Forecast) -> HTML | Markdown:
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


def forecast_chart(forecast: Forecast) -> HTML | None:
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


def forecast_reading(forecast: Forecast) -> Markdown | None:
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
