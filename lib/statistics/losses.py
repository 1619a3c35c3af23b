"""Rows that weigh differently: mean losses, the ratio of two perplexities, and what a file keeps of a fine-tuning."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lib.language import sentences
from lib.statistics.intervals import Interval, estimate_text, normal_quantile, wilson
from lib.statistics.noninferiority import ONE_SIDED, loss_in_json
from lib.statistics.paired import cluster_mean, copies_effect, holm

# A mean of rows that weigh differently, as a loss over tokens does: Student's interval over groups of alike rows.

FEWEST = 3
"""Groups of rows below which an interval would be a pretence; `cluster_test` has the same limit."""


def weighted_mean(
    values: ArrayLike,
    weights: ArrayLike,
    groups: ArrayLike,
    confidence: float = 0.95,
    folds: ArrayLike | None = None,
) -> Interval:
    """Weighted mean with Student's interval: `clustered_mean`, but no limits from too few groups.

    It belongs to `cluster_test`: the 95 % interval excludes zero exactly where that p is below 0.05. A percentile
    bootstrap of so few groups covers far too rarely (docs/LOG.md).

    Args:
        values: (n,) one a row, e.g. mean losses. weights: (n,) positive, e.g. tokens. groups: (n,) of each row.
        folds: (n,) fold of each row, of cross-validated rows.

    Returns:
        The mean; its limits are infinite where fewer than `FEWEST` groups, or groups that all agree, show no spread.
    """
    mean = cluster_mean(values, groups, weights, folds)
    found = mean.interval(confidence)
    if mean.clusters < FEWEST or found.high - found.low <= 1e-12 * abs(found.estimate):  # rounding alone
        return Interval(found.estimate, -math.inf, math.inf, confidence)
    return found


def limits(found: Interval) -> list[float] | None:
    """[low, high] as JSON; None where there is no interval to tell."""
    return found.to_json() if math.isfinite(found.low) and math.isfinite(found.high) else None


def averaged_share(values: ArrayLike, groups: ArrayLike) -> Interval:
    """Share of right rows, each the mean of several tries in 0…1: Wilson's 95 % interval on the effective rows.

    The effective rows are p (1 - p) / variance of the mean over groups, times (z / t)², at most n (Korn & Graubard
    1998, Survey Methodology 24:193). Unlike Student's interval it has a width where all rows are right, or all wrong;
    there copies of a row count once. Infinite limits as in `weighted_mean` for fewer than `FEWEST` groups.
    """
    mean, n = cluster_mean(values, groups), len(values)
    if mean.clusters < FEWEST:
        return Interval(mean.mean, -math.inf, math.inf)
    if limits(weighted_mean(values, np.ones(n), groups)) is None:
        rows = n / copies_effect(groups, n)
    else:
        spread = (normal_quantile(0.95) / mean.quantile(0.975) / mean.error) ** 2
        rows = min(float(n), mean.mean * (1 - mean.mean) * spread)
    return wilson(mean.mean * rows, rows)


# Two models' losses on the same answers: the ratio of their perplexities, tested over groups of rows.


def cluster_test(
    differences: np.ndarray, tokens: np.ndarray, groups: np.ndarray, folds: np.ndarray | None = None
) -> float:
    """Two-sided p of "no difference" of a token-weighted mean over groups; 1.0 with fewer than three of them.

    The standard error is that of a ratio estimator (Cochran 1977, §6.4): groups, not rows, are independent.
    """
    mean = cluster_mean(differences, groups, tokens, folds)
    return 1.0 if mean.clusters < FEWEST or mean.mean == 0 else min(1.0, 2 * mean.tail(abs(mean.mean)))


def compare_losses(
    reference: np.ndarray,
    candidates: Mapping[str, np.ndarray],
    tokens: np.ndarray,
    groups: np.ndarray,
    folds: np.ndarray | None = None,
) -> dict[str, dict[str, Any]]:
    """Compare every candidate with the reference on the same rows, Holm-corrected over the candidates.

    Args:
        reference: (n,) mean loss of each row, nats a token.
        candidates: name -> (n,) the same.
        tokens: (n,) tokens of each row's answers.
        groups: (n,) group of each row.
        folds: (n,) fold of each row, of cross-validated rows.

    Returns:
        by name, JSON values: "answer_ratio" (of the perplexities, to the reference's) and its interval,
        "loss_difference" (candidate minus reference, nats a token) with Student's 95 % interval over groups (linearized
        ratio estimator), "loss" (of perplexity, percent, positive = worse), "loss_interval" and "loss_limit" (one-sided
        limits, from the same t), "p" (two-sided t-test of the difference over groups) and "p_holm". Limits that are not
        finite are None.
    """
    changes = [losses - reference for losses in candidates.values()]
    p_values = [cluster_test(change, tokens, groups, folds) for change in changes]
    found = {}
    for name, change, p, p_holm in zip(candidates, changes, p_values, holm(p_values), strict=True):
        mean = cluster_mean(change, groups, tokens, folds)
        difference, loss = mean.interval(), mean.interval(ONE_SIDED)
        ratio, *ends = (math.exp(x) for x in (difference.estimate, difference.low, difference.high))
        found[name] = {
            "answer_ratio": ratio,
            "answer_ratio_interval": ends if math.isfinite(difference.high) else [None, None],
            **difference.named("loss_difference"),
            **loss_in_json(Interval(*(100 * math.expm1(x) for x in (loss.estimate, loss.low, loss.high)), ONE_SIDED)),
            "p": p,
            "p_holm": p_holm,
        }
    return found


# How much of what fine-tuning changed a file keeps: the slope of one change on another, through the origin.

KEEPS_LITTLE = 0.9
"""Retention below which a file is named in warnings: losing a tenth of the training is more than rounding noise."""


def slope_through_origin(whole: np.ndarray, kept: np.ndarray, groups: ArrayLike) -> Interval:
    """The b that fits kept = b · whole best, Σ⟨whole, kept⟩ / Σ⟨whole, whole⟩ over rows, with an interval.

    It is a ratio of two sums over rows, a mean of the rows' own slopes weighted by ⟨whole, whole⟩, so its standard
    error is the linearized one of `clustered_mean` (Cochran 1977, §6.4), which for this slope is the sandwich of
    Liang & Zeger (1986) with whole groups and the factor groups / (groups - 1); Student's t with groups - 1 degrees.

    `whole` is taken as exact. Noise in `kept` alone does not move the slope; noise in `whole` of share s of Σ whole²
    would pull it to 1 / (1 + s) of itself, noise that both share (they are changes from the same base) to
    (slope + s) / (1 + s): both by less than s. The caller measures s and refuses where it is not small.

    Args:
        whole, kept: (n,) or (n, d) changes from the same start, the same unit.
        groups: (n,) near-duplicate cluster of each row.

    Returns:
        The slope; infinite limits where fewer than three groups moved, or where all agree.

    Raises:
        ValueError: shapes that differ, or nothing moved.
    """
    x, y = (np.asarray(values, dtype=np.float64) for values in (whole, kept))
    if x.shape != y.shape or len(x) != len(groups):
        raise ValueError(f"changes of shape {x.shape} and {y.shape} for {len(groups)} rows")
    x, y = x.reshape(len(x), -1), y.reshape(len(y), -1)
    size = np.sum(x * x, axis=1)
    moved = size > 0
    if not moved.any():
        raise ValueError("nothing moved: no slope")
    own = np.sum(x * y, axis=1)[moved] / size[moved]
    return weighted_mean(own, size[moved], np.asarray(groups)[moved])


def kept_words(entry: Mapping[str, Any]) -> str | None:
    """Retention of an entry of comparison.json as "0.28 [0.25, 0.31]"; None where it is unknown."""
    value = entry.get("retention")
    return None if value is None else estimate_text(value, entry.get("retention_interval"), ".2f")


def keeps_little(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of comparison.json keeps less than `KEEPS_LITTLE` by estimate, and surely not all: its interval,
    which may hold `KEEPS_LITTLE`, is below 1. Where there is none, the estimate alone decides."""
    value, limits = entry.get("retention"), entry.get("retention_interval")
    return value is not None and value < KEEPS_LITTLE and (not limits or limits[1] < 1)


def retention_warning(*entries: Mapping[str, Any]) -> str:
    """One warning on all files and folders that keep little, the first of them with its interval; empty where none
    does."""
    poor = [entry for entry in entries if keeps_little(entry)]
    if not poor:
        return ""
    first, *others = poor
    said = f"Warning: {first['type']} keeps only {kept_words(first)} of what fine-tuning changed on these rows"
    also = ", ".join(f"{entry['type']} ({entry['retention']:.2f})" for entry in others)
    return f"{said} (1 = all of it, 0 = the base again){f'; little is left, too, in {also}' if also else ''}."


def warns_of(warning: str, entry: Mapping[str, Any]) -> bool:
    """Whether a `retention_warning` names a file."""
    return re.search(rf"(?<![\w-]){re.escape(entry['type'])} (keeps only|\()", warning) is not None


def advice_words(advice: Mapping[str, Any]) -> str:
    """Headline, how sure it is, facts and warning as one paragraph."""
    return sentences(advice[key] for key in ("headline", "text", "warning"))
