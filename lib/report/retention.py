"""How much of what fine-tuning taught is left in each file's answers: the figure and what it says."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

from lib.language import retold
from lib.report import charts
from lib.report.display import Entry, tell
from lib.statistics.losses import KEEPS_LITTLE, keeps_little, kept_words
from lib.statistics.noninferiority import REFERENCE

if TYPE_CHECKING:
    from IPython.display import HTML, Markdown

_PAIRS = 3
"""Pairs of files that are named."""
_LEAST = 0.02
"""Share of the fine-tuning that a file must have lost before its loss is worth a word."""


def _known(files: Sequence[Entry]) -> list[Entry]:
    return [e for e in files if e["retention"] is not None and e["verdict"] != REFERENCE]


def kept_chart(files: Sequence[Entry], rows: int) -> HTML | None:
    """Retention of every file but the reference, the largest first; nothing where it is unknown."""
    known = sorted(_known(files), key=lambda e: -e["bytes"])
    if not known:
        return None
    return charts.estimates("compare.kept", known, at=1.0, n=rows, little=KEEPS_LITTLE)


def kept_reading(files: Sequence[Entry], note: str) -> Markdown:
    """What the rows say, which files keep little, and whether KL divergence on text shows it."""
    known = _known(files)
    words = {e["type"]: kept_words(e) for e in sorted(known, key=lambda e: e["retention"])}
    poor = [name for name in words if keeps_little(next(e for e in known if e["type"] == name))]
    order = _order(known)
    return tell("compare.kept_reading", words=words, poor=poor, little=KEEPS_LITTLE, note=retold(note), order=order)


def _order(known: Sequence[Entry]) -> dict[str, Any] | None:
    """How KL divergence on text orders the files, beside the distance of retention from 1: rank correlation, and pairs
    surely in opposite order; None for fewer than three files, or where one of the two tells none apart."""
    values = [[e["kld_mean"] for e in known], [abs(1 - e["retention"]) for e in known]]
    if len(known) < 3 or any(len(set(column)) == 1 for column in values):
        return None
    from scipy.stats import spearmanr

    pairs = [pair for e, other in combinations(known, 2) if (pair := _turned(e, other))]
    pairs.sort(key=lambda pair: pair[0]["retention"] - pair[1]["retention"])
    rank = float(spearmanr(*values).statistic)
    return {"files": len(known), "rank": rank, "pairs": len(pairs), "named": pairs[:_PAIRS]}


def _turned(first: Entry, second: Entry) -> tuple[Entry, Entry] | None:
    """The file that is surely nearer on text and the other, if it surely lost more, and not too little to speak of: its
    slope is below 1, and farther from 1 than the other's can be."""
    near, far = sorted((first, second), key=lambda e: e["kld_mean"])
    if near["retention"] > 1 - _LEAST:
        return None
    if near["kld_high"] >= far["kld_low"] or not (near["retention_interval"] and far["retention_interval"]):
        return None
    lost = 1 - near["retention_interval"][1]
    return (near, far) if lost > max(abs(1 - limit) for limit in far["retention_interval"]) else None
