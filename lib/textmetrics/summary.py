"""Measured answers of several models to the same questions: estimates with intervals, and paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lib.statistics import Interval, clustered_score_interval, design_effect, paired_bootstrap, wilson
from lib.textmetrics.measuring import METRICS, RATIO, SHARE, Metric

FEWEST = 3
"""Groups of rows below which an interval would be a pretence."""

Measured = Sequence[Mapping[str, Any]]


def summarise(models: Mapping[str, Measured], groups: Sequence[int], reference: str, seed: int) -> list[dict[str, Any]]:
    """One entry a metric that applies to these rows.

    Shares have Wilson's interval and, for differences, Tango's, with n divided by the design effect of the groups: a
    bootstrap of five answers that are all right would claim certainty. Means and ratios have a percentile bootstrap
    over groups. Where all rows agree it says nothing: ratios of 0 or 1, and differences of ratios, then have the
    interval of a share with the groups as its n, others none. With fewer than three groups there is none at all.

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
                "models": {name: _own(metric, value, own, weight, seed) for name, value in mine.items()},
                "differences": {
                    name: _difference(metric, value - base, own, weight, seed)
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


def _own(metric: Metric, values: np.ndarray, groups: np.ndarray, weights: np.ndarray, seed: int) -> dict[str, Any]:
    count = len(np.unique(groups))
    if metric.kind == SHARE and count >= FEWEST:
        effect = design_effect(values, groups)
        return _shown(wilson(values.sum() / effect, len(values) / effect))  # type: ignore[arg-type]
    if metric.kind == RATIO and count >= FEWEST and np.ptp(values) == 0 and values[0] in (0, 1):
        return _shown(wilson(int(values[0]) * count, count))
    return _bootstrapped(values, groups, weights, seed)


def _difference(
    metric: Metric, change: np.ndarray, groups: np.ndarray, weights: np.ndarray, seed: int
) -> dict[str, Any]:
    count = len(np.unique(groups))
    if metric.kind == SHARE and count >= FEWEST:
        return _shown(clustered_score_interval(change, groups))
    if metric.kind == RATIO and count >= FEWEST and not change.any():
        return _shown(clustered_score_interval(np.zeros(count)))
    return _bootstrapped(change, groups, weights, seed)


def _bootstrapped(values: np.ndarray, groups: np.ndarray, weights: np.ndarray, seed: int) -> dict[str, Any]:
    if len(np.unique(groups)) < FEWEST or np.ptp(values) == 0:
        return {"estimate": float(np.average(values, weights=weights)), "interval": None}
    return _shown(paired_bootstrap(values, groups, seed, weights=weights))


def _shown(found: Interval) -> dict[str, Any]:
    return {"estimate": found.estimate, "interval": found.to_json()}
