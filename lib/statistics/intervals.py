"""Intervals: Wilson for a share, Tango's score interval and the clustered bootstrap for a paired difference."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr, ndtri

# Quantiles and tails come from scipy.special here and in the other files of this room: scipy.stats returns the same
# numbers after two seconds of imports, statsmodels (with whose Wilson interval, Holm correction and McNemar test the
# tests compare these) after three, and every child process would pay for them. Besides, counts here are divided by
# design effects, and rows come in clusters with weights: scipy's Wilson interval and bootstrap know neither.

Counts = float | np.ndarray

ADJUSTMENT = 0.25
"""Continuity adjustment of paired counts, rows. Few changed rows make a coarse lattice, on which Tango's own interval
covers down to 0.928 instead of 0.95; a quarter of a row is what keeps it at 0.943 and above (docs/LOG.md)."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its lower and upper limit."""

    estimate: float
    low: float
    high: float
    confidence: float = 0.95

    def to_json(self) -> list[float | None]:
        """[low, high]; None for a limit that is not finite, which JSON cannot hold."""
        return [limit if math.isfinite(limit) else None for limit in (self.low, self.high)]

    def named(self, key: str) -> dict[str, Any]:
        """For JSON: the estimate under a key, and `to_json` under the key with "_interval" behind it."""
        return {key: self.estimate, f"{key}_interval": self.to_json()}

    @classmethod
    def from_json(cls, estimate: float, limits: Sequence[float | None] | None) -> Interval | float:
        """An estimate with its [low, high] of a JSON file; the bare estimate where there are no limits (null).

        A limit that JSON could not hold (None inside the list) becomes infinite again.
        """
        if limits is None:
            return estimate
        low, high = limits
        return cls(estimate, -math.inf if low is None else low, math.inf if high is None else high)

    def scaled(self, factor: float) -> Interval:
        """The same in another unit: a share in percent (100), nats in millinats (1000)."""
        return Interval(factor * self.estimate, factor * self.low, factor * self.high, self.confidence)

    def __format__(self, form: str) -> str:
        """f"{interval:.2f}" is "0.90 [0.85, 0.93]", or "0.90 (no interval)" where a limit is open."""
        return estimate_text(self.estimate, (self.low, self.high), form)

    def excludes_zero(self) -> bool:
        """True when both limits lie on the same side of zero."""
        return self.low > 0 or self.high < 0


IN_BRACKETS = "[{},\u00a0{}]"
"""How limits are written on a page: no line may end between the two."""
IN_WORDS = "{} to {}"
"""The same inside a sentence."""


def limits_text(
    limits: Sequence[float | None] | None, form: str = ".3f", factor: float = 1.0, pattern: str = IN_BRACKETS
) -> str | None:
    """The one way in which the limits of an interval are written; None where one is open or there are none.

    >>> limits_text([0.85, 0.93], ".1f", factor=100, pattern=IN_WORDS)
    '85.0 to 93.0'
    >>> limits_text([-0.001, 0.1], "+.2f")
    '[+0.00, +0.10]'

    Args:
        limits: low and high as in a JSON file; None, or an infinite number, for an open one.
        form: format specification of both numbers.
        factor: both are multiplied by it, e.g. 100 for percent.
        pattern: `IN_BRACKETS` or `IN_WORDS`.
    """
    if limits is None or any(limit is None or not math.isfinite(limit) for limit in limits):
        return None
    no_sign = re.sub(r"^([+ ]?)", r"\1z", form)  # of a zero after rounding: never -0.00
    return pattern.format(*(format(factor * limit, no_sign) for limit in limits))


def estimate_text(estimate: float, limits: Sequence[float | None] | None, form: str = ".3f") -> str:
    """An estimate with limits as `limits_text` writes them: "0.90 [0.85, 0.93]"; alone where `limits` is None.

    Open limits (three rows bound nothing) are said: "0.90 (no interval)".
    """
    alone = format(estimate, form)
    return alone if limits is None else f"{alone} {limits_text(limits, form) or '(no interval)'}"


def normal_quantile(confidence: float) -> float:
    """z of a two-sided interval: 1.96 for 0.95."""
    return float(ndtri(0.5 + confidence / 2))


def wilson(k: float, n: float, confidence: float = 0.95) -> Interval:
    """Wilson score interval of a share k/n (Wilson 1927, without continuity correction).

    Args:
        k, n: hits and rows; both may be divided by a design effect.

    Raises:
        ValueError: n < 1 or k outside 0..n.
    """
    # A sum of fractions may miss the whole by rounding.
    k = n if n < k <= n * (1 + 1e-9) else k
    if n < 1 - 1e-9 or not 0 <= k <= n:
        raise ValueError(f"wilson needs 0 <= k <= n and n >= 1, not k={k}, n={n}")
    z, share = normal_quantile(confidence), k / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low = 0.0 if k == 0 else max(0.0, centre - half)
    high = 1.0 if k == n else min(1.0, centre + half)
    return Interval(share, low, high, confidence)


def tango_statistic(
    delta: float, losses: Counts, gains: Counts, n: float, adjustment: float = ADJUSTMENT
) -> np.float64 | np.ndarray:
    """Tango's score statistic for the hypothesis that the true difference of `paired_score_interval` is `delta`.

    Continuity-adjusted as by Chang, Liu & Hou (2024, J. Appl. Stat. 51:139), and by Edwards for McNemar's test (with
    which it agrees for `delta` 0 and an adjustment of 1): the distance from the hypothesis is shortened by
    `adjustment` rows.

    Args:
        losses, gains: counts as of `paired_score_interval`, or arrays of many tables at once, broadcast.
    """
    # Restricted maximum-likelihood share q of losses: the larger root of 2n q² + b q + c = 0.
    b = delta * (2 * n + losses - gains) - losses - gains
    c = -losses * delta * (1 - delta)
    q = (np.sqrt(np.maximum(0.0, b * b - 8 * n * c)) - b) / (4 * n)
    distance = gains - losses - n * delta
    short = np.sign(distance) * np.maximum(0.0, np.abs(distance) - adjustment)
    return short / np.sqrt(np.maximum(n * (2 * q + delta - delta * delta), 1e-300))


def paired_score_interval(
    losses: float, gains: float, n: float, confidence: float = 0.95, adjustment: float = ADJUSTMENT
) -> Interval:
    """Score interval of the paired difference (gains - losses) / n of two shares (Tango 1998, Stat. Med. 17:891).

    Unlike a bootstrap it does not shrink to nothing when no row changed: for 0 of n it is about ±(z² + ½) / (n + z²).

    Args:
        losses: rows only the reference got right.
        gains: rows only the candidate got right.
        n: all rows. The three may be divided by a design effect.
        adjustment: for continuity, rows; 0 gives Tango's own interval.
    """
    if n <= 0 or losses < 0 or gains < 0 or losses + gains > n * (1 + 1e-9):
        raise ValueError(f"need losses, gains >= 0 and losses + gains <= n, not {losses}, {gains}, {n}")
    from scipy.optimize import brentq

    z, estimate, edge = normal_quantile(confidence), (gains - losses) / n, 1 - 1e-12

    def limit(sign: int) -> float:
        def excess(delta: float) -> float:
            statistic = float(tango_statistic(delta, losses, gains, n, adjustment))
            return min(max(statistic, -1e9), 1e9) - sign * z

        if sign * excess(-sign * edge) <= 0:
            return float(-sign)
        start = min(max(estimate, -edge), edge)
        return float(brentq(excess, *sorted((-sign * edge, start)), xtol=1e-12))

    return Interval(estimate, limit(1), limit(-1), confidence)


def cluster_sums(
    values: ArrayLike, clusters: ArrayLike | None = None, weights: ArrayLike | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the values and of the weights of each cluster, float64, (clusters,) each.

    Args:
        clusters: (n,) group of each row; None = every row its own.
        weights: (n,) positive; None = 1 each, so that the second sum counts rows.

    Raises:
        ValueError: no values, values that are not finite, or another number of clusters.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not len(numbers) or not np.isfinite(numbers).all():
        raise ValueError("a mean over clusters needs a non-empty vector of finite numbers")
    weight = np.ones(len(numbers)) if weights is None else np.asarray(weights, dtype=np.float64)
    if clusters is None:
        return numbers * weight, weight
    groups = np.unique(np.asarray(clusters), return_inverse=True)[1]
    if len(groups) != len(numbers):
        raise ValueError(f"{len(groups)} clusters for {len(numbers)} differences")
    return np.bincount(groups, numbers * weight), np.bincount(groups, weight)


def drawn_sums(by_cluster: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Sums of each resample of whole clusters (with replacement), (resamples, numbers).

    Args:
        by_cluster: (clusters, numbers), the sums in each cluster.
    """
    # Clusters with equal sums are interchangeable: drawing how often each kind comes is the same and faster.
    kinds, times = np.unique(by_cluster, axis=0, return_counts=True)
    rng = np.random.default_rng(seed)
    drawn = np.empty((resamples, kinds.shape[1]))
    step = max(1, 4_000_000 // len(kinds))
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        drawn[start : start + count] = rng.multinomial(len(by_cluster), times / len(by_cluster), size=count) @ kinds
    return drawn


TAILS = np.array([(1 - 0.95) / 2, (1 + 0.95) / 2])
"""Probabilities of the limits of 95 %, in this rounding: order statistics hang on the last bit."""


def bca_limits(values: np.ndarray, estimate: float, left_out: np.ndarray) -> tuple[float, float]:
    """Bias-corrected and accelerated 95 % limits of a bootstrap (Efron 1987).

    Args:
        values: the number in every resample. estimate: in the rows themselves.
        left_out: the number without each cluster in turn (jackknife), for the acceleration.
    """
    tails = TAILS
    below = np.mean(values < estimate) + np.mean(values == estimate) / 2
    spread = left_out.mean() - left_out
    scale = 6 * np.sum(spread**2) ** 1.5
    if 0 < below < 1 and scale > 0:
        bias, acceleration = ndtri(below), np.sum(spread**3) / scale
        shifted = bias + ndtri(tails)
        tails = ndtr(bias + shifted / (1 - acceleration * shifted))
    low, high = np.quantile(values, tails).tolist()
    return low, high


def paired_bootstrap(
    differences: ArrayLike,
    clusters: ArrayLike | None = None,
    seed: int = 0,
    resamples: int = 10_000,
    weights: ArrayLike | None = None,
) -> Interval:
    """95 % percentile bootstrap interval of a mean paired difference.

    Whole clusters are drawn, so near-duplicates count once.

    Args:
        differences: (n,) candidate minus reference, one a row.
        clusters: (n,) group of each row; None = every row its own.
        weights: (n,) positive weight of each row in the mean, e.g. its tokens; None = all alike.
    """
    sums, sizes = cluster_sums(differences, clusters, weights)
    drawn = drawn_sums(np.stack([sums, sizes], axis=1), resamples, seed)
    return Interval(float(sums.sum() / sizes.sum()), *np.quantile(drawn[:, 0] / drawn[:, 1], TAILS).tolist())
