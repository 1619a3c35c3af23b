"""The error ladder of 07: which step from the adapter to the quantized file changed what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.plots.charts import _axes
from lib.plots.display import figure
from lib.plots.ladder_rows import Row, _interval
from lib.plots.style import BLUE, GREY, ORANGE

if TYPE_CHECKING:
    from IPython.display import HTML


def ladder(steps: Sequence[Mapping[str, Any]]) -> HTML:
    """KL divergence of every step from the one before and from the first, and the accuracy after each."""
    fig, (left, right) = _axes(9.5, 1.2 + 0.5 * len(steps), columns=2)
    places = np.arange(len(steps))[::-1]
    for key, shift, colour, shape, words in (
        ("before", 0.12, BLUE, "o", "from the step before"),
        ("first", -0.12, ORANGE, "s", "from the first step"),
    ):
        shown = [(place, step[key]) for place, step in zip(places, steps, strict=True) if step[key]]
        middle = np.array([entry["kld"] for _, entry in shown])
        limits = np.array([entry["kld_interval"] for _, entry in shown])
        error = [middle - limits[:, 0], limits[:, 1] - middle]
        height = [place + shift for place, _ in shown]
        left.errorbar(middle, height, xerr=error, fmt=shape, color=colour, capsize=3, linestyle="none", label=words)
    left.set_xscale("symlog", linthresh=1e-6)
    left.set_xlim(left=0)
    left.set_yticks(places, [step["name"] for step in steps])
    left.set_ylim(-0.5, len(steps) - 0.5)
    right.set_ylim(left.get_ylim())
    left.set_xlabel("KL divergence, nats a row (log above 10⁻⁶)")
    left.legend(loc="upper center", bbox_to_anchor=(0.5, 1.22), ncols=2, fontsize=8)
    middle = np.array([step["accuracy"] for step in steps])
    limits = np.array([step["accuracy_interval"] for step in steps])
    right.errorbar(middle, places, xerr=[middle - limits[:, 0], limits[:, 1] - middle], fmt="o", color=GREY, capsize=3)
    right.set_yticks(places, [])
    right.set_xlabel("accuracy")
    n = steps[0]["n"]
    caption = (
        f"From the trained adapter to the quantized file, n = {n:,} test rows. Left: mean KL divergence over the "
        "answer words, with 95 % intervals (near copies together). Right: accuracy with 95 % Wilson intervals."
    )
    words = "; ".join(f"{row['step']}: {row['KL, nats']}" for row in rows(steps)[1:])
    return figure(fig, caption, f"Error ladder, KL divergence from the step before. {words}.")


def rows(steps: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One row a step."""
    nothing: dict[str, Any] = {}
    table = []
    for step in steps:
        before, first = step["before"] or nothing, step["first"] or nothing
        table.append(
            {
                "step": step["name"],
                "accuracy": step["accuracy"],
                "KL, nats": _kld(before),
                "equal labels": _percent(before),
                "points": _points(before),
                "KL to the first": _kld(first),
                "equal": _percent(first),
                "points to the first": _points(first),
            }
        )
    return table


def _kld(entry: Mapping[str, Any]) -> str | None:
    return f"{entry['kld']:.2g} {_interval(entry['kld_interval'], '.1g')}" if entry else None


def _percent(entry: Mapping[str, Any]) -> str | None:
    return f"{100 * entry['agreement']:.1f}\u00a0%" if entry else None


def _points(entry: Mapping[str, Any]) -> str | None:
    if not entry:
        return None
    low, high = (100 * limit for limit in entry["accuracy_difference_interval"])
    return f"{100 * entry['accuracy_difference']:+.1f} [{low:+.1f},\u00a0{high:+.1f}]"


def reading(steps: Sequence[Mapping[str, Any]]) -> str:
    """Which step cost most."""
    costly = max(steps[1:], key=lambda step: step["before"]["kld"])
    total = steps[-1]["first"]
    low, high = (100 * limit for limit in total["accuracy_difference_interval"])
    before = steps[[step["name"] for step in steps].index(costly["name"]) - 1]["name"]
    return (
        f"The step that changes the answers' probabilities most is {before} → {costly['name']}: "
        f"{costly['before']['kld']:.2g} nats a row, {100 * costly['before']['agreement']:.1f} % equal labels. All "
        f"steps together change accuracy by {100 * total['accuracy_difference']:+.2f} points (95 % interval {low:+.2f} "
        f"to {high:+.2f}) and keep {100 * total['agreement']:.1f} % of the labels."
    )
