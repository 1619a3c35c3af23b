"""The figures of notebooks 06 and 07: where the bits of a file go, and what size buys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.plots.charts import HATCHES, _axes
from lib.plots.display import figure, say, side_by_side
from lib.plots.style import BLUE, GREEN, GREY, ORANGE
from lib.statistics import frontier, power_mcnemar

if TYPE_CHECKING:
    from IPython.display import HTML, Markdown

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


def _style(entry: Mapping[str, Any], frontier: Sequence[str]) -> dict[str, Any]:
    """The same for a point with its interval."""
    shape, colour = _mark(entry, frontier)
    return {"fmt": shape, "color": colour, "capsize": 3, "linestyle": "none"}


_PANEL = (5.2, 3.7)
"""Inches: readable alone on a phone; on a wider screen two stand beside one another."""
_MB, _BITS = "file size, MB (10⁶ bytes)", "bits per weight (tensors alone)"


def size_quality(entries: Sequence[Mapping[str, Any]], frontier: Sequence[str]) -> HTML:
    """What size buys: KL divergence against file size and against bits per weight, accuracy, speed and memory.

    Args:
        entries: mappings with type, bytes, bits_per_weight, kld_mean, kld_low, kld_high, accuracy, accuracy_interval,
            n, generation_tokens_per_second, generation_tokens_per_second_range, peak_memory_mib.
        frontier: types of which no other file is both smaller and closer to the reference.
    """
    others = any(entry.get("kind") == "folder" for entry in entries)
    marks = (
        "circles are on the efficient frontier, squares are beaten in both size and divergence; "
        f"{'triangles are formats for transformers (size of the weights alone); ' if others else ''}"
    )
    sizes = {entry["type"]: entry["bytes"] / 1e6 for entry in entries}
    bits = {entry["type"]: entry["bits_per_weight"] for entry in entries}
    by_size = (
        "What size buys: mean KL divergence of the next-token distribution from the reference on held-out text by file "
        f"size (log scale; bars ± 1.96 standard errors over tokens); {marks}the line joins the frontier."
    )
    by_bits = (
        f"The same by bits per weight, which leaves out the header and the names of files; {marks}the line joins the "
        "same frontier."
    )
    return side_by_side(
        [
            _divergence(entries, frontier, sizes, _MB, by_size),
            _divergence(entries, frontier, bits, _BITS, by_bits),
            _accuracy(entries, frontier, sizes),
            _speed_and_memory(entries, frontier),
        ]
    )


def _name(ax: Any, name: str, x: float, y: float, place: int) -> None:
    """Above to the right and below to the left in turn, or neighbours' names would overlap."""
    sign = -1 if place % 2 else 1
    side = {"ha": "right" if place % 2 else "left", "va": "top" if place % 2 else "bottom", "fontsize": 8}
    ax.annotate(name, (x, y), (4 * sign, 4 * sign), textcoords="offset points", **side)


def _divergence(
    entries: Sequence[Mapping[str, Any]], frontier: Sequence[str], places: Mapping[str, float], axis: str, caption: str
) -> HTML:
    fig, ax = _axes(*_PANEL)
    apart = [entry for entry in entries if entry["kld_mean"] > 0]
    for place, entry in enumerate(sorted(apart, key=lambda e: places[e["type"]])):
        x, y = places[entry["type"]], entry["kld_mean"]
        ax.errorbar(x, y, yerr=[[y - entry["kld_low"]], [entry["kld_high"] - y]], **_style(entry, frontier))
        _name(ax, entry["type"], x, y, place)
    joined = sorted((places[e["type"]], e["kld_mean"]) for e in apart if e["type"] in frontier)
    if joined:
        ax.plot(*zip(*joined, strict=True), color=GREY, linewidth=1, linestyle="-", zorder=0)
    ax.margins(x=0.12)
    ax.set(xlabel=axis, ylabel="KL divergence from the reference,\nnats a token ↓", yscale="log")
    words = "; ".join(f"{e['type']} {places[e['type']]:.2f}, KL {e['kld_mean']:.2g}" for e in entries)
    return figure(fig, caption, f"KL divergence by {axis}. {words}.")


def _accuracy(entries: Sequence[Mapping[str, Any]], frontier: Sequence[str], sizes: Mapping[str, float]) -> HTML:
    fig, ax = _axes(*_PANEL)
    largest_first = sorted(entries, key=lambda e: -e["bytes"])
    places = np.arange(len(entries))[::-1]
    for place, entry in zip(places, largest_first, strict=True):
        x, (low, high) = entry["accuracy"], entry["accuracy_interval"]
        ax.errorbar(x, place, xerr=[[x - low], [high - x]], **_style(entry, frontier))
    ax.set_yticks(places, [f"{e['type']}, {sizes[e['type']]:.1f} MB" for e in largest_first], fontsize=8)
    ax.locator_params(axis="x", nbins=5)
    ax.set(xlabel="accuracy →")
    caption = (
        f"Accuracy of the files, the largest first, on n = {entries[0]['n']:,} test rows with 95 % Wilson intervals; "
        "the diamond is the reference. Their differences on these rows stand below."
    )
    words = "; ".join(f"{e['type']} {sizes[e['type']]:.2f} MB, accuracy {e['accuracy']:.3f}" for e in entries)
    return figure(fig, caption, f"Accuracy by file size. {words}.")


def _speed_and_memory(entries: Sequence[Mapping[str, Any]], frontier: Sequence[str]) -> HTML:
    fig, (left, right) = _axes(*_PANEL, columns=2)
    places = np.arange(len(entries))[::-1]
    for place, entry in zip(places, entries, strict=True):
        (shape, colour), x = _mark(entry, frontier), entry["generation_tokens_per_second"]
        low, high = entry["generation_tokens_per_second_range"]
        left.errorbar(x, place, xerr=[[x - low], [high - x]], **_style(entry, frontier))
        right.plot(entry["peak_memory_mib"], place, shape, color=colour)
    left.set_yticks(places, [entry["type"] for entry in entries], fontsize=8)
    right.set_yticks(places, [""] * len(entries))
    fastest = max(entry["generation_tokens_per_second_range"][1] for entry in entries)
    largest = max(entry["peak_memory_mib"] for entry in entries)
    left.set(xlabel="generation,\ntokens a second →", xlim=(0, 1.08 * fastest))
    right.set(xlabel="peak memory of\nthe process, MiB ←", xlim=(0, 1.08 * largest))
    caption = (
        "Speed and memory of the same files on this machine: median of writing tokens one at a time, bars from the "
        "slowest to the fastest run. A phone orders files otherwise."
    )
    words = "; ".join(
        f"{e['type']} {e['generation_tokens_per_second']:.0f} tokens a second, {e['peak_memory_mib']:.0f} MiB"
        for e in entries
    )
    return figure(fig, caption, f"Speed and memory of each file. {words}.")


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


def frontiers(files: Sequence[Mapping[str, Any]]) -> Markdown | None:
    """Which files no other beats in both size and loss, of text and of the task: KL divergence of the answer words, or
    for rows without labels the change of the answers' loss (entries of comparison.json; the reference is left out, and
    folders for transformers, which have no text divergence of a GGUF)."""
    files = [e for e in files if e["file"].endswith(".gguf") and e["kld_mean"] > 0]
    key = next((key for key in _TASK_LOSS if any(e.get(key) is not None for e in files)), None)
    if key is None:
        return None
    known = [e for e in files if e.get(key) is not None]
    text, task = (frontier(known, loss) for loss in ("kld_mean", key))
    said = f"Efficient by size and KL divergence of text: {', '.join(text)}; by size and {_TASK_LOSS[key]}: "
    said += f"{', '.join(task)}."
    lost, won = [t for t in text if t not in task], [t for t in task if t not in text]
    if lost:
        said += f" Efficient on text alone, so not for this task: {', '.join(lost)}."
    if won:
        said += f" Efficient for this task alone: {', '.join(won)}."
    return say(said)


_TASK_LOSS = {"label_kld": "that of the answer words", "loss_difference": "loss of the reference answers"}
