"""A mean of rows that weigh differently, as a loss over tokens does: Student's interval over groups of alike rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lib.statistics.clustered import clustered_mean
from lib.statistics.intervals import Interval, wilson

FEWEST = 3
"""Groups of rows below which an interval would be a pretence; `cluster_test` has the same limit."""


def weighted_mean(
    values: Sequence[float] | np.ndarray,
    weights: Sequence[float] | np.ndarray,
    groups: Sequence[Any] | np.ndarray,
    confidence: float = 0.95,
) -> Interval:
    """Weighted mean with Student's interval: `clustered_mean`, but no limits from too few groups.

    It belongs to `cluster_test`: the 95 % interval excludes zero exactly where that p is below 0.05. A percentile
    bootstrap of so few groups covers far too rarely (docs/LOG.md).

    Args:
        values: (n,) one a row, e.g. mean losses. weights: (n,) positive, e.g. tokens. groups: (n,) of each row.

    Returns:
        The mean; its limits are infinite where fewer than `FEWEST` groups, or groups that all agree, show no spread.
    """
    found = clustered_mean(values, groups, confidence, weights)
    few = len(set(np.asarray(groups).tolist())) < FEWEST
    if few or found.high - found.low <= 1e-12 * abs(found.estimate):  # rounding alone
        return Interval(found.estimate, -math.inf, math.inf, confidence)
    return found


def limits(found: Interval) -> list[float] | None:
    """[low, high] as JSON; None where there is no interval to tell."""
    return found.to_json() if math.isfinite(found.low) and math.isfinite(found.high) else None


def averaged_share(values: Sequence[float] | np.ndarray, groups: Sequence[Any] | np.ndarray) -> Interval:
    """Share of right rows, each the mean of several tries in 0…1: Wilson's 95 % interval on the effective rows.

    Effective are p (1 - p) / variance of the mean over groups, times (z / t)², at most n (Korn & Graubard 1998, Survey
    Methodology 24:193). Unlike Student's interval it has a width where all rows are right, or all wrong; there copies
    of a row count once. Infinite limits as in `weighted_mean` for fewer than `FEWEST` groups.
    """
    from scipy.stats import norm, t

    values = np.asarray(values, dtype=np.float64)
    sizes = np.bincount(np.unique(np.asarray(groups), return_inverse=True)[1])
    share, n, count = float(values.mean()), len(values), len(sizes)
    if count < FEWEST:
        return Interval(share, -math.inf, math.inf)
    student = weighted_mean(values, np.ones(n), groups)
    quantile = float(t.ppf(0.975, count - 1))
    error = (student.high - share) / quantile
    rows = n * n / float(np.sum(sizes**2))
    if math.isfinite(error):
        rows = min(float(n), share * (1 - share) / error**2 * (float(norm.ppf(0.975)) / quantile) ** 2)
    return wilson(share * rows, rows)
