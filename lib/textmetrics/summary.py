"""Measured answers of several models to the same questions: estimates with intervals, and paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lib.statistics import (
    Interval,
    clustered_mean,
    clustered_score_interval,
    clustered_share,
)
from lib.textmetrics.measuring import MEAN, METRICS, RATIO, SHARE, Metric

FEWEST = 3
"""Groups of rows below which an interval would be a pretence."""

Measured = Sequence[Mapping[str, Any]]


def summarise(models: Mapping[str, Measured], groups: Sequence[int], reference: str) -> list[dict[str, Any]]:
    """One entry a metric that applies to these rows.

    Few rows, skewed values and many zeros are the rule here, so no percentile bootstrap, which covers far too rarely
    then (docs/LOG.md). Shares, and ratios as shares of all terms, have Wilson's interval with n divided by the design
    effect of the groups; differences of shares have Tango's, likewise. Means, and differences of means and ratios,
    have Student's with whole groups as units. With fewer than three groups, or where all rows agree in a mean, there
    is nothing to tell an interval from.

    Args:
        models: name -> measured rows (`measure`), the same questions in the same order.
        groups: group of each row.
        reference: name of the model that differences are taken from.

    Returns:
        {"key", "name", "meaning", "n" (rows), "groups", "wanted" (terms, of ratios; else None), "models": {name:
        {"estimate", "interval"}}, "differences": {name: {"estimate", "interval"}}}; an interval may be None.
    """
    numbers = np.asarray(groups)
    entries = []
    for metric in METRICS:
        values = {name: _values(metric, rows) for name, rows in models.items()}
        first, weights = values[reference]
        kept = np.isfinite(first) & (weights > 0)
        if not kept.any():
            continue
        mine = {name: value[kept] for name, (value, _) in values.items()}
        base, own, weight = mine[reference], numbers[kept], weights[kept]
        entries.append(
            {
                "key": metric.key,
                "name": metric.name,
                "meaning": metric.meaning,
                "n": int(kept.sum()),
                "groups": len(np.unique(own)),
                "wanted": int(weight.sum()) if metric.kind == RATIO else None,
                "models": {name: _own(metric, value, own, weight) for name, value in mine.items()},
                "differences": {
                    name: _difference(metric, value - base, own, weight)
                    for name, value in mine.items()
                    if name != reference
                },
            }
        )
    return entries


def _values(metric: Metric, rows: Measured) -> tuple[np.ndarray, np.ndarray]:
    """Value and weight of each row; not a number where the metric does not apply."""
    found = [row[metric.key] for row in rows]
    if metric.kind == RATIO:
        pairs = [value or [0, 0] for value in found]
        weights = np.array([wanted for _, wanted in pairs], dtype=np.float64)
        return np.array([kept / max(1, wanted) for kept, wanted in pairs]), weights
    values = np.array([np.nan if value is None else float(value) for value in found])
    return values, np.ones(len(values))


def _own(metric: Metric, values: np.ndarray, groups: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    estimate = float(np.average(values, weights=weights))
    if len(np.unique(groups)) < FEWEST:
        return _without(estimate)
    if metric.kind == MEAN:
        return _bounded(clustered_mean(values, groups), metric) if np.ptp(values) else _without(estimate)
    single, owners = _terms(values * weights, groups, weights) if metric.kind == RATIO else (values, groups)
    return _shown(clustered_share(single, owners))


def _difference(metric: Metric, change: np.ndarray, groups: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    count = len(np.unique(groups))
    if count < FEWEST:
        return _without(float(np.average(change, weights=weights)))
    if metric.kind == SHARE:
        return _shown(clustered_score_interval(change, groups))
    if metric.kind == RATIO:
        single, owners = _terms(change * weights, groups, weights)
        return _shown(clustered_mean(single, owners) if change.any() else clustered_score_interval(np.zeros(count)))
    return _shown(clustered_mean(change, groups)) if np.ptp(change) else _without(float(change[0]))


def _terms(sums: np.ndarray, groups: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One value a term (as many ±1 as the row's sum says, then zeros), and the group that it belongs to."""
    single = [
        np.where(np.arange(round(wanted)) < abs(round(total)), np.sign(total), 0.0)
        for total, wanted in zip(sums, weights, strict=True)
    ]
    return np.concatenate(single), np.repeat(groups, np.round(weights).astype(int))


def _bounded(found: Interval, metric: Metric) -> dict[str, Any]:
    """Within the values that the metric can have."""
    high = found.high if metric.most is None else min(metric.most, found.high)
    return {"estimate": found.estimate, "interval": [max(0.0, found.low), high]}


def _without(estimate: float) -> dict[str, Any]:
    return {"estimate": estimate, "interval": None}


def _shown(found: Interval) -> dict[str, Any]:
    return {"estimate": found.estimate, "interval": found.to_json()}
