"""What page 07 shows of retention: how much of what fine-tuning taught is left in each file's answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

from lib.formats import GRID_SIZABLE
from lib.plots.charts import estimates
from lib.plots.display import say
from lib.plots.marks import mark_names
from lib.plots.retention_map import MARK
from lib.statistics import KEEPS_LITTLE, keeps_little, kept_words

if TYPE_CHECKING:
    from IPython.display import HTML, Markdown

_PAIRS = 3
"""Pairs of files that are named."""


def mark(files: Sequence[Mapping[str, Any]]) -> None:
    """From now on tables mark the files with a sizable share of weights on the grid of the base's."""
    mark_names([entry["type"] for entry in files if (entry["source_grid"] or 0) >= GRID_SIZABLE], MARK)


def chart(files: Sequence[Mapping[str, Any]]) -> HTML | None:
    """Retention of every file but the reference, the largest first (entries of comparison.json); nothing where it is
    unknown."""
    known = [e for e in files if e["retention"] is not None and e["verdict"] != "reference"]
    if not known:
        return None
    points = []
    for entry in sorted(known, key=lambda e: -e["bytes"]):
        low, high = entry["retention_interval"] or (None, None)
        name = f"{entry['type']}, {entry['bytes'] / 1e6:.1f} MB"
        points.append({"name": name, "estimate": entry["retention"], "low": low, "high": high, "n": entry["n"]})
    caption = (
        "Slope of each file's change from the base on the tuned model's, row by row through the origin, with 95 % "
        f"intervals (near copies together), n = {known[0]['n']:,} test rows; the largest file first. 1 (dashed) is the "
        f"tuned model, 0 the base again; below {KEEPS_LITTLE:g} a file is named in warnings."
    )
    return estimates(points, "kept of what fine-tuning changed in the answers", caption, reference=1.0)


def reading(files: Sequence[Mapping[str, Any]], note: str) -> Markdown:
    """What the rows say, which files keep little, and whether KL divergence on text shows it."""
    known = [e for e in files if e["retention"] is not None and e["verdict"] != "reference"]
    if not known:
        return say(f"What the files keep of the fine-tuning is not known. {note}")
    poor = sorted((e for e in known if keeps_little(e)), key=lambda e: e["retention"])
    if poor:
        listed = "; ".join(f"{e['type']} {kept_words(e)}" for e in poor)
        text = f"**By estimate less than {KEEPS_LITTLE:g} of what fine-tuning changed is left in: {listed}.**"
    else:
        least = min(known, key=lambda e: e["retention"])
        text = (
            f"No file with an interval below 1 is estimated to keep less than {KEEPS_LITTLE:g}; least: {least['type']} "
            f"{kept_words(least)}."
        )
    return say(" ".join(part for part in (text, note, _order(known)) if part))


def _order(known: Sequence[Mapping[str, Any]]) -> str:
    """How KL divergence on text orders the files, beside retention."""
    if len(known) < 3:
        return ""
    from scipy.stats import spearmanr

    values = [[e["kld_mean"] for e in known], [e["retention"] for e in known]]
    if any(len(set(column)) == 1 for column in values):
        return ""
    rank = -float(spearmanr(*values).statistic)
    pairs = [pair for e, other in combinations(known, 2) if (pair := _turned(e, other))]
    pairs.sort(key=lambda pair: pair[0]["retention"] - pair[1]["retention"])
    beside = f"KL divergence on text and retention order the {len(known)} files with a rank correlation of {rank:.2f}"
    if not pairs:
        return f"{beside} (Spearman; 1 = alike); no two files are surely in opposite order."
    named = "; ".join(
        f"{near['type']} is nearer on text ({near['kld_mean']:.2g} against {far['kld_mean']:.2g} nats) but keeps "
        f"{near['retention']:.2f} where {far['type']} keeps {far['retention']:.2f}"
        for near, far in pairs[:_PAIRS]
    )
    count = f"{len(pairs)} {'pair is' if len(pairs) == 1 else 'pairs are'}"
    return f"{beside} (Spearman; 1 = alike); {count} surely in opposite order: {named}. Text does not show this loss."


def _turned(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """The file that is surely nearer on text and the other, if it surely keeps less (both pairs of intervals apart)."""
    near, far = sorted((first, second), key=lambda e: e["kld_mean"])
    if near["kld_high"] >= far["kld_low"] or not (near["retention_interval"] and far["retention_interval"]):
        return None
    return (near, far) if near["retention_interval"][1] < far["retention_interval"][0] else None
