"""Do two backends choose the same label, and where not: only on rows that were nearly undecided, or also elsewhere?

Rows are sorted by how sure the first of the two is: the absolute margin between the two likeliest answer words.
Rounding flips labels in the first bin (near ties); flips in the last ones mean that the two compute different things.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lib.scoring import NEAR_TIE, Scores
from lib.statistics import wilson

EDGES = (0.0, NEAR_TIE, 0.5, 1.0, 2.0)
"""Lower edges of the bins, nats; the last bin has no upper one."""


def by_margin(first: Scores, second: Scores) -> list[dict[str, Any]]:
    """Label agreement of two models on the same rows by the first one's margin.

    Returns:
        one entry a bin and one for all rows (low 0, high None, "all" True): "low" (inclusive) and "high" (exclusive;
        None = no limit) in nats, "n" (rows), "agree", "share" and "interval" (95 % Wilson); the last two are None
        where there are no rows.
    """
    if first.ids != second.ids:
        raise ValueError("scores of different rows")
    sure = np.abs(first.margins)
    same = first.predictions == second.predictions
    bins = []
    for low, high in zip(EDGES, (*EDGES[1:], None), strict=True):
        inside = (sure >= low) & (sure < (np.inf if high is None else high))
        bins.append({"low": low, "high": high, "all": False, **_agreement(same[inside])})
    return [*bins, {"low": 0.0, "high": None, "all": True, **_agreement(same)}]


def _agreement(same: np.ndarray) -> dict[str, Any]:
    n, agree = len(same), int(same.sum())
    interval = wilson(agree, n) if n else None
    return {
        "n": n,
        "agree": agree,
        "share": interval.estimate if interval else None,
        "interval": interval.to_json() if interval else None,
    }


def agreements(scores: Mapping[str, Scores], merged: tuple[str, Scores] | None) -> list[dict[str, Any]]:
    """The pairs that are shown: the merged model in transformers against every file, the reference against the others.

    Args:
        scores: by type, the reference first.
        merged: the merged model in transformers in words, and its scores; None where there is none.

    Returns:
        {"first", "second", "near_ties" (of the first), "bins"} for each pair.
    """
    reference, *others = scores
    firsts = [] if merged is None else [(*merged, [reference, *others])]
    firsts.append((reference, scores[reference], others))
    return [
        {"first": name, "second": other, "near_ties": first.near_ties, "bins": by_margin(first, scores[other])}
        for name, first, against in firsts
        for other in against
    ]
