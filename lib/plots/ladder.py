"""The figures of notebooks 06 and 07: where the bits of a file go, and what size buys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.plots.charts import HATCHES, _axes
from lib.plots.display import figure
from lib.plots.style import BLUE, GREEN, GREY, ORANGE
from lib.statistics import power_mcnemar

if TYPE_CHECKING:
    from IPython.display import HTML

TYPE_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")


def tensor_types(files: Mapping[str, Mapping[str, float]]) -> HTML:
    """Megabytes of each tensor type in each file, stacked; `files` is {file: {type: megabytes}}."""
    fig, ax = _axes(height=0.9 + 0.38 * len(files))
    kinds = list(dict.fromkeys(kind for types in files.values() for kind in types))
    places = np.arange(len(files))[::-1]
    left = np.zeros(len(files))
    for index, kind in enumerate(kinds):
        widths = np.array([types.get(kind, 0.0) for types in files.values()])
        colour, hatch = TYPE_COLOURS[index % len(TYPE_COLOURS)], HATCHES[index // len(TYPE_COLOURS) % 4]
        ax.barh(places, widths, left=left, label=kind, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5)
        left += widths
    ax.set_yticks(places, list(files))
    ax.set_xlabel("tensor data, MB (10⁶ bytes)")
    ax.grid(axis="y", visible=False)
    ax.legend(title="tensor type", ncols=2, bbox_to_anchor=(1.01, 1), loc="upper left", fontsize=8)
    words = "; ".join(
        f"{name}: " + ", ".join(f"{kind} {size:.2f} MB" for kind, size in types.items())
        for name, types in files.items()
    )
    caption = (
        "Where the bytes of each file are: tensor data by the type really stored (exact, from the files' headers). "
        "The name of a file is only the name of a recipe."
    )
    return figure(fig, caption, f"Stacked bars of tensor data by type. {words}.")


def _mark(entry: Mapping[str, Any], frontier: Sequence[str]) -> tuple[str, str]:
    """Shape and colour of a file in `size_quality`."""
    if entry.get("kind") == "folder":
        return "^", GREEN
    if entry["kld_mean"] == 0:
        return "D", GREY
    return ("o", BLUE) if entry["type"] in frontier else ("s", ORANGE)


def size_quality(entries: Sequence[Mapping[str, Any]], frontier: Sequence[str]) -> HTML:
    """KL divergence against file size, and accuracy with intervals against file size; the frontier is joined.

    Args:
        entries: mappings with type, bytes, kld_mean, kld_low, kld_high, accuracy, accuracy_interval, n.
        frontier: types of which no other file is both smaller and closer to the reference.
    """
    fig, (left, right) = _axes(9.5, 3.8, columns=2)
    sizes = {entry["type"]: entry["bytes"] / 1e6 for entry in entries}
    for place, entry in enumerate(sorted(entries, key=lambda e: e["bytes"])):
        x = sizes[entry["type"]]
        shape, colour = _mark(entry, frontier)
        style = {"fmt": shape, "color": colour, "capsize": 3, "linestyle": "none"}
        if entry["kld_mean"] > 0:
            low, high = entry["kld_mean"] - entry["kld_low"], entry["kld_high"] - entry["kld_mean"]
            left.errorbar(x, entry["kld_mean"], yerr=[[low], [high]], **style)
            left.annotate(entry["type"], (x, entry["kld_mean"]), (4, 4), textcoords="offset points", fontsize=8)
        bounds = entry["accuracy_interval"]
        error = [[entry["accuracy"] - bounds[0]], [bounds[1] - entry["accuracy"]]]
        right.errorbar(x, entry["accuracy"], yerr=error, **style)
        end, sign = (bounds[1], 1) if place % 2 else (bounds[0], -1)  # names at alternate ends and distances, or they
        shift = sign * (4 + place // 2 % 2 * 22)  # would overlap
        side = {"ha": "center", "va": "bottom" if place % 2 else "top", "rotation": 45, "fontsize": 8}
        right.annotate(entry["type"], (x, end), (0, shift), textcoords="offset points", **side)
    joined = sorted((sizes[e["type"]], e["kld_mean"]) for e in entries if e["type"] in frontier and e["kld_mean"] > 0)
    if joined:
        left.plot(*zip(*joined, strict=True), color=GREY, linewidth=1, linestyle="-", zorder=0)
    left.set(
        xlabel="file size, MB (10⁶ bytes)", ylabel="KL divergence from the reference,\nnats a token ↓", yscale="log"
    )
    right.margins(y=0.3)
    right.set(xlabel="file size, MB (10⁶ bytes)", ylabel="accuracy ↑")
    n = entries[0]["n"]
    others = any(entry.get("kind") == "folder" for entry in entries)
    triangles = "triangles are formats for transformers (size of the weights alone); " if others else ""
    caption = (
        "What size buys. Left: mean KL divergence of the next-token distribution from the reference on held-out text "
        "(log scale; bars ± 1.96 standard errors over tokens); circles are on the efficient frontier, squares are "
        f"beaten in both size and divergence; {triangles}the diamond is the reference. Right: accuracy on "
        f"n = {n:,} test rows with 95 % Wilson intervals."
    )
    words = "; ".join(
        f"{e['type']} {sizes[e['type']]:.2f} MB, KL {e['kld_mean']:.2g}, accuracy {e['accuracy']:.3f}" for e in entries
    )
    return figure(fig, caption, f"Size against quality. {words}.")


def power(n: int, shares: Sequence[float], margin_points: float, tests: int = 1) -> HTML:
    """Chance that exact McNemar finds a difference in accuracy with n independent rows.

    Args:
        tests: how many Holm corrects together; the first step of that correction is drawn.
        shares: of rows on which exactly one of two files is right; a line each.
        margin_points: the equivalence margin, marked.
    """
    fig, ax = _axes(height=3.2)
    top, alpha = max(4 * margin_points, 3.0), 0.05 / tests
    words = []
    for share, colour, style in zip(shares, (BLUE, ORANGE, GREEN, GREY), ("-", "--", "-.", ":"), strict=False):
        points = np.linspace(top / 60, top, 60)
        found = [power_mcnemar(n, max(share, x / 100), x / 100, alpha) for x in points]
        ax.plot(points, found, color=colour, linestyle=style, label=f"{100 * share:.2g} %")
        at = power_mcnemar(n, max(share, margin_points / 100), margin_points / 100, alpha)
        words.append(f"{100 * share:.2g} % of rows changed: {100 * at:.0f} % at {margin_points:g} points")
    ax.axhline(0.8, color=GREY, linewidth=1, linestyle=":")
    ax.axvline(margin_points, color=GREEN, linewidth=1, linestyle="--")
    ax.set(xlabel="true difference in accuracy, points", ylabel="chance to find it", ylim=(0, 1.02))
    ax.legend(title="rows changed")
    caption = (
        f"What n = {n:,} independent rows can show: chance that the exact McNemar test (5 %, two-sided, after "
        f"correction for all {tests} tests of this page) finds a difference, by the share of rows on which exactly one "
        "of two files is right (or the difference, if larger). Dotted: 80 %; dashed: the margin of equivalence. "
        "Computed, not measured."
    )
    return figure(fig, caption, f"Power curves for {n:,} rows. {'; '.join(words)}.")
