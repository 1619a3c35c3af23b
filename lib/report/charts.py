"""The figures: each takes plain numbers and returns a captioned <figure>."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.report.display import figure, rows_of, side_by_side, tell
from lib.report.sentences import TEMPLATES, sentence
from lib.runs.files import data_file
from lib.scoring.metric import metric_in
from lib.statistics import noninferiority

if TYPE_CHECKING:
    from IPython.display import HTML, Markdown
    from matplotlib.axes import Axes


# One look for every figure: colour-blind-safe colours that never carry meaning alone, and a font with Chinese.

CJK_FONTS = tuple(data_file("report/fonts.yaml"))

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6b6b6b"
"""Okabe and Ito's palette, the parts that stay apart for every common kind of colour blindness and in print."""


@functools.cache
def cjk_font() -> str | None:
    """The first installed font that has Chinese glyphs; None when there is none."""
    from matplotlib import font_manager

    listed = {font.fname for font in font_manager.fontManager.ttflist}
    for path in sorted(set(font_manager.findSystemFonts()) - listed):  # installed after matplotlib wrote its list
        with contextlib.suppress(RuntimeError, OSError):  # a file that FreeType cannot read
            font_manager.fontManager.addfont(path)
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return next((name for name in CJK_FONTS if name in installed), None)


LONGEST_NAME = 24
"""Characters of a label's name in a figure."""


def readable(names: Sequence[str]) -> list[str]:
    """Names as a figure can show them, or 'label 0', 'label 1', … where no Chinese font is installed.

    A long name is cut, a line end is a space, and a dollar sign is escaped: two of them would be mathematics.
    """
    if not cjk_font() and not all(name.isascii() for name in names):
        return [f"label {index}" for index in range(len(names))]
    lines = [" ".join(name.split()) for name in names]
    return [(name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…").replace("$", r"\$") for name in lines]


def replaced(names: Sequence[str]) -> list[tuple[str, str]]:
    """(what a figure shows, name) where names had to be replaced; none where they stand as they are."""
    shown = [name.replace(r"\$", "$") for name in readable(names)]
    return [] if shown == list(names) else list(zip(shown, names, strict=True))


def use_style() -> None:
    """Set the look of every following figure."""
    from matplotlib import rcParams, style

    style.use(TEMPLATES / "workbook.mplstyle")
    # concrete names: only then is a missing glyph looked for in the next font
    rcParams["font.family"] = [name for name in ("DejaVu Sans", cjk_font()) if name]


# The figures of notebooks 01 to 03: each takes plain numbers and returns a captioned <figure>.

HATCHES = ("", "//", "..", "xx")


def panels(width: float = 7.0, height: float = 3.6, columns: int = 1) -> tuple[Any, Any]:
    """An empty figure in the common style, and its axes: one panel, or several beside one another."""
    import matplotlib.pyplot as plt

    use_style()
    return plt.subplots(1, columns, figsize=(width, height), layout="constrained")


def label_balance(counts: Mapping[str, Sequence[int]], label_names: Sequence[str]) -> HTML:
    """Rows of each label in each split, as grouped bars; `counts` is {split: [rows of label 0, 1, …]}."""
    fig, ax = panels(height=3.0)
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
    caption = sentence("charts.balance", counts=counts, names=replaced(label_names))
    return figure(fig, caption, sentence("charts.balance_alt", counts=counts))


def length_histogram(lengths: Mapping[str, Sequence[int]], limit: int) -> HTML:
    """Tokens a row (prompt and answer) in each split, with the run's limit."""
    fig, ax = panels(height=3.0)
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
    caption = sentence("charts.lengths", n=sum(map(len, lengths.values())), shares=over)
    return figure(fig, caption, sentence("charts.lengths_alt", limit=limit, shares=over))


def learning_curves(history: Sequence[Mapping[str, Any]], chosen_step: int) -> HTML:
    """Training and validation loss with the chosen checkpoint, and the learning rate, over updates."""
    fig, (left, right) = panels(9.0, 3.3, columns=2)
    train, valid, rates = (series(history, key) for key in ("loss", "eval_loss", "learning_rate"))
    best = dict(valid)[chosen_step]
    plot_losses(left, train, valid, (chosen_step, best))
    right.plot(*zip(*rates, strict=True))
    right.set(xlabel="update (optimizer step)", ylabel="learning rate", ylim=(0, None))
    losses = {"train": [loss for _, loss in train], "valid": [loss for _, loss in valid]}
    alt = sentence("charts.learning_alt", **losses, best=best, chosen=chosen_step)
    return figure(fig, sentence("charts.learning", steps=train[-1][0], best=best), alt)


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
    points, axis = rows_of(name, entries, **values), sentence(f"{name}_axis", **values)
    fig, ax = panels(height=0.9 + 0.38 * len(points))
    places = np.arange(len(points))[::-1]
    if at is not None:
        ax.axvline(at, color=GREY, linestyle="--", linewidth=1)
    for place, point in zip(places, points, strict=True):
        bounded = point["low"] is not None and point["high"] is not None
        error = [[point["estimate"] - point["low"]], [point["high"] - point["estimate"]]] if bounded else None
        ax.errorbar(point["estimate"], place, xerr=error, fmt="o", color=BLUE, capsize=3, linestyle="none")
    ax.set_yticks(places, [f"{point['name']}  (n = {point['n']:,})" for point in points])
    ax.set_ylim(-0.6, len(points) - 0.4)
    if margin is not None:
        left, right = ax.get_xlim()
        ax.axvspan(min(left, 0.0), margin, color=GREEN, alpha=0.12, linewidth=0)
        ax.set_xlim(left, max(right, 1.1 * margin))
    ax.set_xlabel(axis)
    return figure(fig, sentence(name, **values), sentence("charts.estimates_alt", axis=axis, points=points))


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
        shown, label = np.clip(sample, bins[0], bins[-1]), f"{name} (n = {len(sample):,})"
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
    fig, ax = panels(height=0.9 + 0.38 * len(files))
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
    return figure(fig, sentence("charts.tensor_types"), sentence("charts.tensor_types_alt", files=files))


def _style(entry: Mapping[str, Any], frontier: Sequence[str]) -> dict[str, Any]:
    """Shape and colour of a file in `size_quality`."""
    shape, colour = ("o", BLUE) if entry["type"] in frontier else ("s", ORANGE)
    if entry["kld_mean"] == 0:
        shape, colour = "D", GREY
    if entry.get("kind") == "folder":
        shape, colour = "^", GREEN
    return {"fmt": shape, "color": colour, "capsize": 3, "linestyle": "none"}


_PANEL = (5.2, 3.7)
"""Inches: readable alone on a phone; on a wider screen two stand beside one another."""
_MB, _BITS = "file size, MB (10⁶ bytes)", "bits per weight (tensors alone)"


def size_quality(entries: Sequence[Mapping[str, Any]], frontier: Sequence[str]) -> HTML:
    """What size buys: KL divergence against file size and against bits per weight, the task's metric, speed and memory.

    Args:
        entries: mappings with type, bytes, bits_per_weight, kld_mean, kld_low, kld_high, the metric's point estimate
            with its interval, n, generation_tokens_per_second, generation_tokens_per_second_range, peak_memory_mib.
        frontier: types of which no other file is both smaller and closer to the reference.
    """
    others = any(entry.get("kind") == "folder" for entry in entries)
    sizes = {entry["type"]: entry["bytes"] / 1e6 for entry in entries}
    bits = {entry["type"]: entry["bits_per_weight"] for entry in entries}
    by_size, by_bits = sentence("charts.by_size", others=others), sentence("charts.by_bits", others=others)
    return side_by_side(
        [
            _divergence(entries, frontier, sizes, _MB, by_size),
            _divergence(entries, frontier, bits, _BITS, by_bits),
            _estimate(entries, frontier, sizes),
            _speed_and_memory(entries, frontier),
        ]
    )


_SIDES = [(1, 1), (-1, -1), (1, -1), (-1, 1)]
"""Where the name of a point may stand: to the right (1) or left (-1), above (1) or below (-1)."""


def _name_points(ax: Any, points: Mapping[str, tuple[float, float]]) -> None:
    """Write the name of every point beside it, where it covers no other point and no other name, if there is room."""
    from matplotlib.transforms import Bbox

    taken: list[Bbox] = []
    ax.figure.draw_without_rendering()  # places on the canvas are known only then
    marks = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in ax.transData.transform(list(points.values()))]
    for number, (name, place) in enumerate(sorted(points.items(), key=lambda point: point[1])):
        shown = None
        for right, above in _SIDES[number % 2 :] + _SIDES[: number % 2]:
            if shown:
                shown.remove()
            side = {"ha": "left" if right > 0 else "right", "va": "bottom" if above > 0 else "top", "fontsize": 8}
            shown = ax.annotate(name, place, (4 * right, 4 * above), textcoords="offset points", **side)
            box = shown.get_window_extent()
            if not any(box.overlaps(other) for other in (*taken, *marks)):
                break
        taken.append(box)


def _divergence(
    entries: Sequence[Mapping[str, Any]], frontier: Sequence[str], places: Mapping[str, float], axis: str, caption: str
) -> HTML:
    fig, ax = panels(*_PANEL)
    apart = [entry for entry in entries if entry["kld_mean"] > 0]
    for entry in apart:
        x, y = places[entry["type"]], entry["kld_mean"]
        ax.errorbar(x, y, yerr=[[y - entry["kld_low"]], [entry["kld_high"] - y]], **_style(entry, frontier))
    joined = sorted((places[e["type"]], e["kld_mean"]) for e in apart if e["type"] in frontier)
    if joined:
        ax.plot(*zip(*joined, strict=True), color=GREY, linewidth=1, linestyle="-", zorder=0)
    ax.margins(x=0.12)
    ax.set(xlabel=axis, ylabel="KL divergence from the reference,\nnats a token ↓", yscale="log")
    _name_points(ax, {entry["type"]: (places[entry["type"]], entry["kld_mean"]) for entry in apart})
    files = [(e["type"], places[e["type"]], e["kld_mean"]) for e in entries]
    return figure(fig, caption, sentence("charts.divergence_alt", axis=axis, files=files))


def _estimate(entries: Sequence[Mapping[str, Any]], frontier: Sequence[str], sizes: Mapping[str, float]) -> HTML:
    """The metric's point estimates, the largest file first."""
    fig, ax = panels(*_PANEL)
    key = metric_in(entries).point
    largest_first = sorted((e for e in entries if e["n"] == entries[0]["n"]), key=lambda e: -e["bytes"])
    places = np.arange(len(largest_first))[::-1]
    for place, entry in zip(places, largest_first, strict=True):
        x = entry[key]
        low, high = entry[f"{key}_interval"] or (x, x)
        ax.errorbar(x, place, xerr=[[x - low], [high - x]], **_style(entry, frontier))
    ax.set_yticks(places, [f"{e['type']}, {sizes[e['type']]:.1f} MB" for e in largest_first], fontsize=8)
    ax.locator_params(axis="x", nbins=5)
    ax.set(xlabel=sentence(f"charts.{key}_axis"))
    alt = sentence(f"charts.{key}_alt", files=largest_first)
    return figure(fig, sentence(f"charts.{key}", n=entries[0]["n"], apart=len(entries) - len(places)), alt)


def _speed_and_memory(entries: Sequence[Mapping[str, Any]], frontier: Sequence[str]) -> HTML:
    fig, (left, right) = panels(*_PANEL, columns=2)
    places = np.arange(len(entries))[::-1]
    for place, entry in zip(places, entries, strict=True):
        style, x = _style(entry, frontier), entry["generation_tokens_per_second"]
        low, high = entry["generation_tokens_per_second_range"]
        left.errorbar(x, place, xerr=[[x - low], [high - x]], **style)
        right.plot(entry["peak_memory_mib"], place, style["fmt"], color=style["color"])
    left.set_yticks(places, [entry["type"] for entry in entries], fontsize=8)
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
