"""A mean of rows that weigh differently, as a loss over tokens does: Student's interval over groups of alike rows.
Two models' losses on the same answers: the ratio of their perplexities, tested over groups of rows.
How much of what fine-tuning changed a file keeps: the slope of one change on another, through the origin.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lib.statistics.intervals import Interval, wilson
from lib.statistics.paired import clustered_mean, holm

# A mean of rows that weigh differently, as a loss over tokens does: Student's interval over groups of alike rows.

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


# Two models' losses on the same answers: the ratio of their perplexities, tested over groups of rows.

FEWEST_GROUPS = 20
"""Fewest groups for "equivalent": with fewer even Student's interval covers too rarely where losses are skewed."""


@dataclass(frozen=True)
class LossComparison:
    """A candidate against the reference on the same answers.

    Attributes:
        n, groups, tokens: rows, groups of rows that are alike, tokens of the answers.
        difference: candidate's loss minus the reference's, nats a token, with Student's interval over groups
            (linearized ratio estimator); its exponential is the ratio of the perplexities.
        p: two-sided t-test of the difference over groups. p_adjusted: after Holm.
        mde: smallest difference these rows could have shown with 80 % power after that correction, nats a token.
        verdict: "equivalent within δ %" | "worse" | "better" | "cannot tell (MDE x %)" | "cannot tell (too few groups
            of rows)".
        equivalence_p: two one-sided t-tests against the margin, the larger p-value. equivalence_p_adjusted: after Holm.
    """

    n: int
    groups: int
    tokens: int
    difference: Interval
    p: float
    p_adjusted: float
    mde: float
    verdict: str
    equivalence_p: float = 1.0
    equivalence_p_adjusted: float = 1.0

    @property
    def ratio(self) -> Interval:
        """Perplexity of the candidate over that of the reference."""
        found = self.difference
        if not math.isfinite(found.low):
            return Interval(math.exp(found.estimate), -math.inf, math.inf)
        return Interval(*(math.exp(x) for x in (found.estimate, found.low, found.high)))


def loss_verdict(
    difference: Interval,
    p_adjusted: float,
    margin_percent: float,
    mde: float,
    alpha: float = 0.05,
    groups: int = FEWEST_GROUPS,
) -> str:
    """The words that interval and test allow.

    Equivalence comes first: over thousands of tokens even a difference far below the margin is certain to exist.

    Args:
        difference: of the losses, nats a token.
        margin_percent: change of perplexity that counts as equivalent.
        mde: minimum detectable effect, nats a token; infinite where there are too few groups for any test.
        groups: of rows that are alike; fewer than `FEWEST_GROUPS` show no equivalence.
    """
    if not math.isfinite(mde):
        return "cannot tell (too few groups of rows)"
    if difference.within(math.log1p(margin_percent / 100)):
        few = groups < FEWEST_GROUPS
        return "cannot tell (too few groups of rows)" if few else f"equivalent within {margin_percent:g} %"
    if p_adjusted < alpha and difference.excludes_zero():
        return "worse" if difference.estimate > 0 else "better"
    return f"cannot tell (MDE {100 * math.expm1(mde):.1f} %)"


def cluster_test(
    differences: np.ndarray, tokens: np.ndarray, groups: np.ndarray, alpha: float = 0.05
) -> tuple[float, float]:
    """p of "no difference", and the minimum detectable effect (80 % power), of a token-weighted mean over groups.

    The standard error is that of a ratio estimator (Cochran 1977, §6.4): groups, not rows, are independent.

    Args:
        alpha: level for the minimum detectable effect.

    Returns:
        (1.0, inf) where fewer than three groups leave nothing to test; (1.0, 0.0) for differences that are all zero.
    """
    from scipy.stats import t

    count = len(np.unique(groups))
    if count < 3:
        return 1.0, math.inf
    mean, error = _mean_and_error(clustered_mean(differences, groups, weights=tokens), count)
    if error == 0.0:
        return (1.0 if mean == 0 else 0.0), 0.0
    p = 2 * float(t.sf(abs(mean) / error, count - 1))
    return p, float(t.ppf(1 - alpha / 2, count - 1) + t.ppf(0.8, count - 1)) * error


def _mean_and_error(found: Interval, groups: int) -> tuple[float, float]:
    from scipy.stats import t

    return found.estimate, (found.high - found.estimate) / float(t.ppf(0.5 + found.confidence / 2, groups - 1))


def _not_equivalent(found: Interval, groups: int, margin: float) -> float:
    """p of "the difference is as large as the margin": two one-sided t-tests, the larger."""
    from scipy.stats import t

    if groups < 3:
        return 1.0
    mean, error = _mean_and_error(found, groups)
    room = margin - abs(mean)
    if error == 0.0:
        return 0.0 if room > 0 else 1.0
    return float(t.sf(room / error, groups - 1))


def compare_losses(
    reference: np.ndarray,
    candidates: Mapping[str, np.ndarray],
    tokens: np.ndarray,
    groups: np.ndarray,
    margin_percent: float,
) -> dict[str, LossComparison]:
    """Compare every candidate with the reference on the same rows, Holm-corrected over the candidates.

    Args:
        reference: (n,) mean loss of each row, nats a token.
        candidates: name -> (n,) the same.
        tokens: (n,) tokens of each row's answers.
        groups: (n,) group of each row.
    """
    changes = {name: losses - reference for name, losses in candidates.items()}
    count, alpha = len(np.unique(groups)), 0.05 / max(1, len(changes))
    tests = {name: cluster_test(change, tokens, groups, alpha) for name, change in changes.items()}
    intervals = {name: clustered_mean(change, groups, weights=tokens) for name, change in changes.items()}
    margin = math.log1p(margin_percent / 100)
    unequal = [_not_equivalent(found, count, margin) for found in intervals.values()]
    adjusted = zip(tests, holm([p for p, _ in tests.values()]), unequal, holm(unequal), strict=True)
    result = {}
    for name, p_adjusted, *equivalence in adjusted:
        (p, mde), difference = tests[name], intervals[name]
        words = loss_verdict(difference, p_adjusted, margin_percent, mde, groups=count)
        counts = (len(reference), count, int(tokens.sum()))
        result[name] = LossComparison(*counts, difference, p, p_adjusted, mde, words, *equivalence)
    return result


# How much of what fine-tuning changed a file keeps: the slope of one change on another, through the origin.

KEEPS_LITTLE = 0.9
"""Retention below which a file is named in warnings: losing a tenth of the training is more than rounding noise."""


def slope_through_origin(
    whole: np.ndarray, kept: np.ndarray, groups: Sequence[Any] | np.ndarray, confidence: float = 0.95
) -> Interval:
    """The b that fits kept = b · whole best, Σ⟨whole, kept⟩ / Σ⟨whole, whole⟩ over rows, with an interval.

    It is a ratio of two sums over rows, a mean of the rows' own slopes weighted by ⟨whole, whole⟩, so its standard
    error is the linearized one of `clustered_mean` (Cochran 1977, §6.4), which for this slope is the sandwich of
    Liang & Zeger (1986) with whole groups and the factor groups / (groups - 1); Student's t with groups - 1 degrees.

    `whole` is taken as exact. Noise in `kept` alone does not move the slope; noise in `whole` of share s of Σ whole²
    would draw it to 1 / (1 + s) of itself, noise that both share (they are changes from the same base) to
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
    return weighted_mean(own, size[moved], np.asarray(groups)[moved], confidence)


def kept_words(entry: Mapping[str, Any]) -> str | None:
    """Retention of an entry of comparison.json as "0.28 [0.25, 0.31]"; None where it is unknown."""
    value, limits = entry.get("retention"), entry.get("retention_interval")
    if value is None:
        return None
    return f"{value:.2f}" + (f" [{limits[0]:.2f},\u00a0{limits[1]:.2f}]" if limits else "")


def keeps_little(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of comparison.json keeps less than `KEEPS_LITTLE` by estimate, and surely not all: its interval,
    which may hold `KEEPS_LITTLE`, is below 1. Where there is none, the estimate alone decides."""
    value, limits = entry.get("retention"), entry.get("retention_interval")
    return value is not None and value < KEEPS_LITTLE and (not limits or limits[1] < 1)


def retention_warning(*entries: Mapping[str, Any]) -> str:
    """One warning on those of the files that keep little; empty where none does."""
    poor = [f"{entry['type']} keeps only {kept_words(entry)}" for entry in entries if keeps_little(entry)]
    if not poor:
        return ""
    said = poor[0] if len(poor) == 1 else ", ".join(poor[:-1]) + f" and {poor[-1]}"
    return f"Warning: {said} of what fine-tuning changed on these rows (1 = all of it, 0 = the base again)."
