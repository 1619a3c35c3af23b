"""The error ladder of 07: which step from the adapter to the quantized file changed what, with labels and without."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.plots.charts import _axes
from lib.plots.display import figure
from lib.plots.ladder_rows import _interval
from lib.plots.rows import Row
from lib.plots.style import BLUE, GREY, ORANGE

if TYPE_CHECKING:
    from IPython.display import HTML
    from matplotlib.axes import Axes

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


def reading(steps: Steps) -> str:
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
