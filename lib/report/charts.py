"""The figures: each takes plain numbers and returns a captioned <figure>."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.report.display import figure, rows_of, tell
from lib.report.looks import BLUE, GREEN, GREY, ORANGE, axis_label, panels, readable, replaced, word
from lib.report.sentences import sentence
from lib.stages.compare.recommend import program
from lib.statistics import noninferiority

if TYPE_CHECKING:
    from IPython.display import HTML, Markdown
    from matplotlib.axes import Axes


# The figures of notebooks 01 to 03: each takes plain numbers and returns a captioned <figure>.

PHONE_WIDE = 4.9
"""Inches of a figure whose letters of 8 points can be read in the window of a phone."""
HATCHES = ("", "//", "..", "xx")


def label_balance(counts: Mapping[str, Sequence[int]], label_names: Sequence[str]) -> HTML:
    """Rows of each label in each split, as grouped bars; `counts` is {split: [rows of label 0, 1, …]}."""
    fig, ax = panels(PHONE_WIDE, 3.0)
    names, width = readable(label_names), 0.8 / len(label_names)
    places = np.arange(len(counts))
    for index, name in enumerate(names):
        values = [count[index] for count in counts.values()]
        colour = (BLUE, ORANGE, GREEN)[index % 3]
        bars = ax.bar(places + index * width, values, width, label=name, color=colour, hatch=HATCHES[index % 4])
        ax.bar_label(bars, fmt="{:,.0f}", fontsize=8)
    ax.set_xticks(places + width * (len(names) - 1) / 2, [*map(word, counts)])
    ax.set_ylabel("rows")
    ax.legend(title="label")
    caption = sentence("charts.balance", counts=counts, names=replaced(label_names))
    return figure(fig, caption, sentence("charts.balance_alt", counts=counts))


def length_histogram(lengths: Mapping[str, Sequence[int]], limit: int) -> HTML:
    """Tokens a row (prompt and answer) in each split, with the run's limit."""
    fig, ax = panels(height=3.0)
    longest = max(max(values) for values in lengths.values())
    bins = np.linspace(0, min(longest, 2 * limit), 60)
    for split, values in lengths.items():
        shown = np.minimum(values, bins[-1])
        ax.hist(
            shown, bins=bins, histtype="step", density=True, label=f"{word(split)} (n = {len(values):,})", linewidth=1.5
        )
    ax.axvline(limit, color=GREY, linestyle=":", label=f"max_seq_length = {limit}")
    ax.set_xlabel("tokens a row, prompt and answer" + (" (longer rows in the last bin)" if longest > bins[-1] else ""))
    ax.set_ylabel("density")
    ax.legend()
    over = {split: float(np.mean(np.asarray(values) > limit)) for split, values in lengths.items()}
    caption = sentence("charts.lengths", n=sum(map(len, lengths.values())), shares=over)
    return figure(fig, caption, sentence("charts.lengths_alt", limit=limit, shares=over))


def learning_curves(history: Sequence[Mapping[str, Any]], chosen_step: int, guessing: float | None = None) -> HTML:
    """Training and validation loss with the chosen checkpoint, and the learning rate, over updates.

    Args:
        guessing: the loss of whoever gives every label the same probability; None without labels.
    """
    fig, (upper, lower) = panels(height=4.4, rows=2, heights=(2, 1))
    train, valid, rates = (series(history, key) for key in ("loss", "eval_loss", "learning_rate"))
    best = dict(valid)[chosen_step]
    plot_losses(upper, train, valid, (chosen_step, best))
    upper.set(xlabel="")  # below the lower one
    upper.sharex(lower)
    if guessing is not None:
        upper.axhline(guessing, color=GREY, linestyle=":", label="guessing")
        upper.legend()
    lower.plot(*zip(*rates, strict=True))
    lower.set(xlabel="update (optimizer step)", ylabel="learning rate", ylim=(0, None))
    losses = {"train": [loss for _, loss in train], "valid": [loss for _, loss in valid]}
    alt = sentence("charts.learning_alt", **losses, best=best, chosen=chosen_step)
    return figure(fig, sentence("charts.learning", steps=train[-1][0], best=best, guessing=guessing), alt)


def series(history: Iterable[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """(update, value) of the lines of a history that have this key."""
    return [(row["step"], row[key]) for row in history if row.get(key) is not None]


Series = Sequence[tuple[int, float]]


def plot_losses(ax: Axes, train: Series, valid: Series, chosen: tuple[int, float] | None = None) -> None:
    """Training and validation loss over the updates; a star marks the chosen checkpoint."""
    ax.plot(*zip(*train, strict=True), label="training", linewidth=1.0)
    if valid:
        ax.plot(*zip(*valid, strict=True), label="validation", marker="o", markersize=4)
    if chosen:
        ax.plot([chosen[0]], [chosen[1]], "*", color=GREEN, markersize=15, label=f"chosen (step {chosen[0]})")
    ax.set(xlabel="update (optimizer step)", ylabel="loss, nats a loss token", ylim=(0, None))
    ax.legend()


def estimates(
    name: str, entries: Iterable[Any], /, at: float | None = None, margin: float | None = None, **values: Any
) -> HTML:
    """Estimates with intervals, one an entry, by ``tables.yaml``; caption and axis: the sentences NAME and NAME_axis.

    The table gives "name", "estimate", "low" and "high" (None where a limit is open), and "n"; in the unit of the axis.

    Args:
        at: position of a vertical line; `margin` shades all that is less (a loss that is good enough).
        values: what both sentences take.
    """
    points, axis = rows_of(name, entries, **values), axis_label(f"{name}_axis", **values)
    fig, ax = panels(height=0.9 + 0.38 * len(points))
    places = np.arange(len(points))[::-1]
    if at is not None:
        ax.axvline(at, color=GREY, linestyle="--", linewidth=1)
    for place, point in zip(places, points, strict=True):
        bounded = point["low"] is not None and point["high"] is not None
        error = [[point["estimate"] - point["low"]], [point["high"] - point["estimate"]]] if bounded else None
        ax.errorbar(point["estimate"], place, xerr=error, fmt="o", color=BLUE, capsize=3, linestyle="none")
    ax.set_yticks(places, [f"{word(point['name'])}  (n = {point['n']:,})" for point in points])
    ax.set_ylim(-0.6, len(points) - 0.4)
    if margin is not None:
        left, right = ax.get_xlim()
        ax.axvspan(min(left, 0.0), margin, color=GREEN, alpha=0.12, linewidth=0)
        ax.set_xlim(left, max(right, 1.1 * margin))
    ax.set_xlabel(axis)
    ax.locator_params(axis="x", nbins=5)  # longer numbers would run into one another
    return figure(fig, sentence(name, **values), sentence("charts.estimates_alt", axis=axis, points=points))


_SERIES = (("o", BLUE), ("s", ORANGE), ("^", GREEN))


def grouped_estimates(name: str, entries: Iterable[Any], /, at: float, **values: Any) -> HTML:
    """Estimates with intervals below one another by group, the models apart by shape and colour; see `estimates`.

    The table of ``tables.yaml`` gives "group", "name", "estimate", "low", "high" and "n".
    """
    points, axis = rows_of(name, entries, **values), axis_label(f"{name}_axis", **values)
    groups, names = ([*dict.fromkeys(point[key] for point in points)] for key in ("group", "name"))
    fig, ax = panels(height=0.9 + 0.24 * len(points))
    ax.axvline(at, color=GREY, linestyle="--", linewidth=1)
    for number, name_shown in enumerate(names):
        shape, colour = _SERIES[number % len(_SERIES)]
        own = [point for point in points if point["name"] == name_shown]
        places = [-groups.index(point["group"]) + 0.22 * (1 - number) for point in own]
        error = [[p["estimate"] - p["low"] for p in own], [p["high"] - p["estimate"] for p in own]]
        style = {"fmt": shape, "color": colour, "capsize": 3, "linestyle": "none", "label": word(name_shown)}
        ax.errorbar([p["estimate"] for p in own], places, xerr=error, **style)
    counts = {point["group"]: point["n"] for point in points}
    ax.set_yticks([-i for i in range(len(groups))], [f"{word(group)}\n(n = {counts[group]:,})" for group in groups])
    ax.legend(loc="best", fontsize=8)
    ax.set_xlabel(axis)
    ax.locator_params(axis="x", nbins=5)
    return figure(fig, sentence(name, **values), sentence("charts.grouped_alt", axis=axis, points=points))


def confusion(matrices: Mapping[str, Sequence[Sequence[int]]], label_names: Sequence[str]) -> HTML:
    """Confusion matrices side by side: rows = true label, columns = predicted label, cells = number of rows."""
    names = readable(label_names)
    room = 0.09 * max(0, max(map(len, names)) - 8)  # inches for long names, which stand aslant below a matrix
    fig, axes = panels((3.2 + room) * len(matrices), 3.0 + room, columns=len(matrices))
    for ax, (title, matrix) in zip(np.atleast_1d(axes), matrices.items(), strict=True):
        values = np.asarray(matrix)
        ax.imshow(values, cmap="Blues", vmin=0, vmax=max(1, values.sum(axis=1).max()))
        for (row, column), value in np.ndenumerate(values):
            dark = value > 0.6 * values.sum(axis=1).max()
            ax.text(column, row, f"{value:,}", ha="center", va="center", color="white" if dark else "black")
        aslant: dict[str, Any] = {"rotation": 30, "ha": "right"} if room else {}
        ax.set_xticks(range(len(names)), names, **aslant)
        ax.set_yticks(range(len(names)), names)
        ax.set(xlabel="predicted", ylabel="true", title=title)
        ax.grid(False)
    total = int(np.sum(next(iter(matrices.values()))))
    plain = {title: np.asarray(matrix).tolist() for title, matrix in matrices.items()}
    caption = sentence("charts.confusion", n=total, names=replaced(label_names))
    return figure(fig, caption, sentence("charts.confusion_alt", matrices=plain))


def reliability(bins: Mapping[str, Sequence[Mapping[str, float]]], caption: str) -> HTML:
    """Confidence against accuracy; `bins` is {model: [{confidence, accuracy, low, high, n}, …]}."""
    fig, ax = panels(5.2, 3.8)
    ax.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1, label="perfectly calibrated")
    filled = {name: [row for row in rows if row["n"]] for name, rows in bins.items()}
    for (name, rows), marker, colour in zip(filled.items(), "osD^", (BLUE, ORANGE, GREEN, GREY), strict=False):
        x, y = [row["confidence"] for row in rows], [row["accuracy"] for row in rows]
        error = [[max(0, v - r["low"]) for v, r in zip(y, rows, strict=True)]]
        error.append([max(0, r["high"] - v) for v, r in zip(y, rows, strict=True)])
        ax.errorbar(x, y, yerr=error, marker=marker, color=colour, capsize=2, label=name, linewidth=1)
    ax.set(xlabel="confidence (mean probability of the answer given)", ylabel="share of right answers", ylim=(0, 1.02))
    ax.legend()
    return figure(fig, caption, sentence("charts.reliability_alt", bins=filled))


def overlay_histogram(values: Mapping[str, Sequence[float]], axis: str, caption: str) -> HTML:
    """Distributions of one quantity as outlines, one for each name, over a common range (1st to 99th percentile)."""
    fig, ax = panels(height=3.0)
    every = np.concatenate([np.asarray(v, dtype=float) for v in values.values()])
    low, high = np.percentile(every, [0.5, 99.5])
    bins = np.linspace(low, high if high > low else low + 1, 50)
    for name, sample in values.items():
        shown, label = np.clip(sample, bins[0], bins[-1]), f"{word(name)} (n = {len(sample):,})"
        ax.hist(shown, bins=bins, histtype="step", linewidth=1.5, label=label)
    ax.axvline(0, color=GREY, linestyle=":", linewidth=1)
    ax.set(xlabel=axis, ylabel="rows")
    ax.legend()
    medians = {name: float(np.median(sample)) for name, sample in values.items()}
    return figure(fig, caption, sentence("charts.overlay_alt", axis=axis, medians=medians))


# The figures of notebooks 06 and 07: where the bits of a file go, and what size buys.

TYPE_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")


def tensor_types(files: Mapping[str, Mapping[str, float]]) -> HTML:
    """Megabytes of each tensor type in each file, stacked; `files` is {file: {type: megabytes}}."""
    fig, ax = panels(PHONE_WIDE, 1.5 + 0.36 * len(files))
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
    fig.legend(title="tensor type", ncols=4, loc="outside lower center", fontsize=8)
    return figure(fig, sentence("charts.tensor_types"), sentence("charts.tensor_types_alt", files=files))


def _style(entry: Mapping[str, Any], frontier: Sequence[str]) -> dict[str, Any]:
    """Shape and colour of a file in `size_divergence`."""
    shape, colour = ("o", BLUE) if entry["type"] in frontier else ("s", ORANGE)
    if entry["kld_mean"] == 0:
        shape, colour = "D", GREY
    if entry.get("kind") == "folder":
        shape, colour = "^", GREEN
    return {"fmt": shape, "color": colour, "capsize": 3, "linestyle": "none"}


_MB = "file size, MB (10⁶ bytes)"


_VERDICTS = {
    noninferiority.GOOD_ENOUGH: ("o", GREEN),
    noninferiority.NOT_SHOWN: ("s", BLUE),
    noninferiority.WORSE: ("X", ORANGE),
    noninferiority.NO_VERDICT: ("D", GREY),
}
"""Shape and colour of a verdict."""


def size_loss(entries: Sequence[Mapping[str, Any]], recommended: str | None, margin: float, unit: str) -> HTML:
    """Loss against size, every file with its verdict: the picture of the whole comparison, with a tooltip a file.

    Args:
        entries: of comparison.json, the reference first. recommended: type of the file that is ringed.
        margin, unit: of the loss.
    """
    fig, ax = panels(PHONE_WIDE, 3.4)
    shown = [entry for entry in entries[1:] if entry["loss"] is not None]
    tips = {}
    for entry in shown:
        x, y = entry["bytes"] / 1e6, entry["loss"]
        low, high = entry["loss_interval"] or (y, y)
        low, high = y if low is None else low, y if high is None else high
        shape, colour = _VERDICTS[entry["verdict"]]
        ax.vlines(x, low, high, color=colour, linewidth=1.5)
        (point,) = ax.plot(x, y, shape, color=colour, markersize=8, linestyle="none")
        if entry["type"] == recommended:
            ax.plot(x, y, "o", markersize=16, markerfacecolor="none", markeredgecolor=GREEN, markeredgewidth=2)
        point.set_gid(f"file-{entry['type']}")
        tips[f"file-{entry['type']}"] = sentence("charts.size_loss_tip", e=entry, unit=unit, high=high)
    ax.axhline(0, color=GREY, linewidth=1)
    ax.axhline(margin, color=GREY, linewidth=1, linestyle="--")
    bottom, top = ax.get_ylim()
    judged = any(entry["verdict"] != noninferiority.NO_VERDICT for entry in shown)
    if judged:
        ax.axhspan(bottom, margin, color=GREEN, alpha=0.08, linewidth=0)
    ax.set_ylim(bottom, max(top, 1.2 * margin))
    _spread_sizes(ax, shown)
    ax.margins(x=0.08)
    ax.set(xlabel=_MB, ylabel=axis_label("charts.size_loss_axis", unit=unit))
    for verdict in dict.fromkeys(entry["verdict"] for entry in shown):
        shape, colour = _VERDICTS[verdict]
        ax.plot([], [], shape, color=colour, linestyle="none", label=verdict)
    ax.legend(loc="upper right", fontsize=8)
    _name_points(ax, {entry["type"]: (entry["bytes"] / 1e6, entry["loss"]) for entry in shown})
    told = {"margin": margin, "unit": unit, "recommended": recommended, "reference": entries[0]}
    alt = sentence("charts.size_loss_alt", files=shown, **told)
    return figure(fig, sentence("charts.size_loss", n=entries[0]["n"], judged=judged, **told), alt, tips)


def size_divergence(entries: Sequence[Mapping[str, Any]], frontier: Sequence[str]) -> HTML:
    """KL divergence from the reference against file size.

    Args:
        entries: mappings with type, bytes, kld_mean, kld_low, kld_high.
        frontier: types of which no other file is both smaller and closer to the reference.
    """
    fig, ax = panels(PHONE_WIDE, 3.4)
    apart = [entry for entry in entries if entry["kld_mean"] > 0]
    places = {entry["type"]: (entry["bytes"] / 1e6, entry["kld_mean"]) for entry in apart}
    for entry in apart:
        x, y = places[entry["type"]]
        ax.errorbar(x, y, yerr=[[y - entry["kld_low"]], [entry["kld_high"] - y]], **_style(entry, frontier))
    if joined := sorted(places[name] for name in frontier if name in places):
        ax.plot(*zip(*joined, strict=True), color=GREY, linewidth=1, linestyle="-", zorder=0)
    _spread_sizes(ax, entries)
    ax.margins(x=0.12)
    ax.set(xlabel=_MB, ylabel="KL divergence from the reference,\nnats a token ↓", yscale="log")
    _name_points(ax, places)
    files = [(name, *place) for name, place in places.items()]
    others = any(entry.get("kind") == "folder" for entry in entries)
    return figure(fig, sentence("charts.by_size", others=others), sentence("charts.divergence_alt", files=files))


_WIDE = 5
"""Largest size over the smallest from which sizes stand on a logarithmic axis."""


def _spread_sizes(ax: Any, entries: Sequence[Mapping[str, Any]]) -> None:
    """A logarithmic axis with plain numbers where one size is many times another."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    sizes = [entry["bytes"] for entry in entries]
    if sizes and max(sizes) > _WIDE * min(sizes):
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())


_SIDES = [(1, 1), (-1, -1), (1, -1), (-1, 1)]
"""Where the name of a point may stand: to the right (1) or left (-1), above (1) or below (-1)."""
_DISTANCES = [(4, 4), (14, 14), (6, 24), (24, 10), (26, 26), (8, 36), (38, 14), (40, 32), (10, 50), (54, 20)]
"""How far, in points, from near to far; a line joins a name to its point where it does not stand beside it."""


def _name_points(ax: Any, points: Mapping[str, tuple[float, float]]) -> None:
    """Write the name of every point beside it, where it covers no other point and no other name, if there is room."""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    taken: list[Bbox] = []
    ax.figure.draw_without_rendering()  # places on the canvas are known only then
    canvas = dict(zip(points, ax.transData.transform(list(points.values())), strict=True))
    inside = ax.get_window_extent()
    for number, (name, place) in enumerate(sorted(points.items(), key=lambda point: point[1])):
        # a name may stand closer to its own point than to another's, whose name it could be taken for
        marks = [
            Bbox.from_bounds(x - 4, y - 4, 8, 8) if other == name else Bbox.from_bounds(x - 14, y - 11, 28, 22)
            for other, (x, y) in canvas.items()
        ]
        shown, sides = None, _SIDES[number % 2 :] + _SIDES[: number % 2]
        for (x, y), (right, above) in itertools.product(_DISTANCES, sides):
            if shown:
                shown.remove()
            side = {"ha": "left" if right > 0 else "right", "va": "bottom" if above > 0 else "top", "fontsize": 8}
            shown = ax.annotate(name, place, (x * right, y * above), textcoords="offset points", **side)
            shown.set_path_effects([withStroke(linewidth=2, foreground="white")])  # readable on bars and lines
            box = shown.get_window_extent()
            free = not any(box.overlaps(other) for other in (*taken, *marks))
            if free and inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1:
                break
        taken.append(box.padded(6))  # pixels: two names side by side are not read as one
        if (x, y) != _DISTANCES[0]:
            line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
            ax.annotate("", place, (x * right, y * above), textcoords="offset points", arrowprops=line, zorder=1)


def speed_and_memory(entries: Sequence[Mapping[str, Any]], frontier: Sequence[str]) -> HTML:
    """Rate of writing tokens and memory of each file on this machine, in which program.

    Args:
        entries: with type, generation_tokens_per_second, generation_tokens_per_second_range, peak_memory_mib.
    """
    fig, (left, right) = panels(height=0.9 + 0.25 * len(entries), columns=2)
    places = np.arange(len(entries))[::-1]
    for place, entry in zip(places, entries, strict=True):
        style, x = _style(entry, frontier), entry["generation_tokens_per_second"]
        low, high = entry["generation_tokens_per_second_range"]
        left.errorbar(x, place, xerr=[[x - low], [high - x]], **style)
        right.plot(entry["peak_memory_mib"], place, style["fmt"], color=style["color"])
    names = [
        entry["type"] if program(entry) == "llama.cpp" else f"{entry['type']} ({program(entry)})" for entry in entries
    ]
    left.set_yticks(places, names, fontsize=8)
    right.set_yticks(places, [""] * len(entries))
    fastest = max(entry["generation_tokens_per_second_range"][1] for entry in entries)
    largest = max(entry["peak_memory_mib"] for entry in entries)
    left.set(xlabel="generation,\ntokens a second →", xlim=(0, 1.08 * fastest))
    right.set(xlabel="peak memory of\nthe process, MiB ←", xlim=(0, 1.08 * largest))
    return figure(fig, sentence("charts.speed"), sentence("charts.speed_alt", files=entries))


CHANGED = (0.0, 0.01, 0.02, 0.05)
"""Shares of rows on which exactly one of two files is right, for which it is said what rows can show."""


def power(n: float, margin_points: float) -> HTML:
    """Chance that a file which loses nothing is shown to be good enough, by the number of independent rows.

    Args:
        n: independent rows at hand, marked. margin_points: the largest loss that is good enough.
    """
    fig, ax = panels(height=3.2)
    rows = np.unique(np.geomspace(20, max(4 * n, 400 / margin_points), 60).astype(int))
    chances = []
    for share, colour, style in zip(CHANGED, (BLUE, ORANGE, GREEN, GREY), ("-", "--", "-.", ":"), strict=True):
        chance = [noninferiority.power(int(count), share, margin_points / 100) for count in rows]
        ax.plot(rows, chance, color=colour, linestyle=style, label=f"{100 * share:.2g} %")
        chances.append((share, noninferiority.power(max(1, round(n)), share, margin_points / 100)))
    ax.axhline(noninferiority.POWER, color="black", linewidth=1)
    ax.axvline(n, color="black", linewidth=1)
    ax.set(xscale="log", xlabel="independent test rows", ylabel="chance to be shown", ylim=(0, 1.02))
    ax.legend(title="rows changed")
    alt = sentence("charts.power_alt", n=n, margin=margin_points, chances=chances)
    return figure(fig, sentence("charts.power", n=n, margin=margin_points), alt)


def frontiers(files: Sequence[Mapping[str, Any]]) -> Markdown | None:
    """Which files no other beats in both size and loss, of text and of the task: KL divergence of the answer words, or
    for rows without labels the change of the answers' loss (entries of comparison.json; the reference is left out, and
    folders for transformers, which have no text divergence of a GGUF)."""
    files = [e for e in files if e["file"].endswith(".gguf") and e["kld_mean"] > 0]
    key = next((k for k in ("label_kld", "loss_difference") if any(e.get(k) is not None for e in files)), None)
    if key is None:
        return None
    known = [e for e in files if e.get(key) is not None]
    text, task = (noninferiority.frontier(known, loss) for loss in ("kld_mean", key))
    lost, won = [t for t in text if t not in task], [t for t in task if t not in text]
    return tell("charts.frontiers", text=text, task=task, loss=key, lost=lost, won=won)
