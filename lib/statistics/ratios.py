"""A mean of rows that weigh differently, as a loss over tokens does: Student's interval over groups of alike rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lib.statistics.intervals import Interval

FEWEST = 3
"""Groups of rows below which an interval would be a pretence; `cluster_test` has the same limit."""


def weighted_mean(
    values: Sequence[float] | np.ndarray,
    weights: Sequence[float] | np.ndarray,
    groups: Sequence[Any] | np.ndarray,
    confidence: float = 0.95,
) -> Interval:
    """Weighted mean with Student's interval: the ratio estimator over whole groups (Cochran 1977, §6.4).

    It belongs to `cluster_test`: the 95 % interval excludes zero exactly where that p is below 0.05. A percentile
    bootstrap of so few groups covers far too rarely (docs/LOG.md).

    Args:
        values: (n,) one a row, e.g. mean losses. weights: (n,) positive, e.g. tokens. groups: (n,) of each row.

    Returns:
        The mean; its limits are infinite where fewer than `FEWEST` groups, or groups that all agree, show no spread.
    """
    numbers = np.unique(np.asarray(groups), return_inverse=True)[1]
    weight = np.asarray(weights, dtype=np.float64)
    sums, sizes = np.bincount(numbers, np.asarray(values, dtype=np.float64) * weight), np.bincount(numbers, weight)
    mean, count = float(sums.sum() / sizes.sum()), len(sums)
    error = 0.0
    if count >= FEWEST:
        error = math.sqrt(count / (count - 1) * float(np.sum((sums - mean * sizes) ** 2))) / float(sizes.sum())
    if error <= 1e-12 * abs(mean):  # rounding alone
        return Interval(mean, -math.inf, math.inf, confidence)
    from scipy.stats import t

    half = float(t.ppf(0.5 + confidence / 2, count - 1)) * error
    return Interval(mean, mean - half, mean + half, confidence)


def limits(found: Interval) -> list[float] | None:
    """[low, high] as JSON; None where there is no interval to tell."""
    return found.to_json() if math.isfinite(found.low) and math.isfinite(found.high) else None
