"""What page 07 shows of retention: how much of what fine-tuning taught is left in each file's answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

from lib.report.charts import estimates
from lib.report.display import mark_names, tell
from lib.report.sentences import sentence
from lib.report.weights_page import MARK
from lib.settings import GRID_SIZABLE
from lib.statistics.losses import KEEPS_LITTLE, keeps_little, kept_words

if TYPE_CHECKING:
    from IPython.display import HTML, Markdown

Entry = Mapping[str, Any]
"""A file's entry in comparison.json."""

_PAIRS = 3
"""Pairs of files that are named."""


def kept_mark(files: Sequence[Entry]) -> None:
    """From now on tables mark the files with a sizable share of weights on the grid of the base's."""
    mark_names([e["type"] for e in files if (e["source_grid"] or 0) >= GRID_SIZABLE], MARK)


def _known(files: Sequence[Entry]) -> list[Entry]:
    return [e for e in files if e["retention"] is not None and e["verdict"] != "reference"]


def kept_chart(files: Sequence[Entry]) -> HTML | None:
    """Retention of every file but the reference, the largest first; nothing where it is unknown."""
    known = sorted(_known(files), key=lambda e: -e["bytes"])
    if not known:
        return None
    points = []
    for entry in known:
        low, high = entry["retention_interval"] or (None, None)
        name = f"{entry['type']}, {entry['bytes'] / 1e6:.1f} MB"
        points.append({"name": name, "estimate": entry["retention"], "low": low, "high": high, "n": entry["n"]})
    caption = sentence("compare.kept", n=known[0]["n"], little=KEEPS_LITTLE)
    return estimates(points, "kept of what fine-tuning changed in the answers", caption, reference=1.0)


def kept_reading(files: Sequence[Entry], note: str) -> Markdown:
    """What the rows say, which files keep little, and whether KL divergence on text shows it."""
    known = _known(files)
    words = {e["type"]: kept_words(e) for e in sorted(known, key=lambda e: e["retention"])}
    poor = [name for name in words if keeps_little(next(e for e in known if e["type"] == name))]
    order = _order(known)
    return tell("compare.kept_reading", words=words, poor=poor, little=KEEPS_LITTLE, note=note, order=order)


def _order(known: Sequence[Entry]) -> dict[str, Any] | None:
    """How KL divergence on text orders the files, beside retention: rank correlation, and pairs surely in opposite
    order; None for fewer than three files, or where one of the two tells none apart."""
    values = [[e["kld_mean"] for e in known], [e["retention"] for e in known]]
    if len(known) < 3 or any(len(set(column)) == 1 for column in values):
        return None
    from scipy.stats import spearmanr

    pairs = [pair for e, other in combinations(known, 2) if (pair := _turned(e, other))]
    pairs.sort(key=lambda pair: pair[0]["retention"] - pair[1]["retention"])
    rank = -float(spearmanr(*values).statistic)
    return {"files": len(known), "rank": rank, "pairs": len(pairs), "named": pairs[:_PAIRS]}


def _turned(first: Entry, second: Entry) -> tuple[Entry, Entry] | None:
    """The file that is surely nearer on text and the other, if it surely keeps less (both pairs of intervals apart)."""
    near, far = sorted((first, second), key=lambda e: e["kld_mean"])
    if near["kld_high"] >= far["kld_low"] or not (near["retention_interval"] and far["retention_interval"]):
        return None
    return (near, far) if near["retention_interval"][1] < far["retention_interval"][0] else None
