"""Paired differences of rows that are not independent: near-duplicates come and go together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lib.statistics.intervals import Interval, paired_score_interval

_AT_ONCE = 200_000
"""Numbers computed together: what fits into a cache is twice as fast."""


def cluster_sums(
    values: Sequence[float] | np.ndarray, clusters: Sequence[Any] | np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of rows of each cluster, float64, (clusters,) each; None = every row its own.

    Raises:
        ValueError: no values, values that are not finite, or another number of clusters.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not len(numbers) or not np.isfinite(numbers).all():
        raise ValueError("paired differences must be a non-empty vector of finite numbers")
    if clusters is None:
        return numbers, np.ones(len(numbers))
    groups = np.unique(np.asarray(clusters), return_inverse=True)[1]
    if len(groups) != len(numbers):
        raise ValueError(f"{len(groups)} clusters for {len(numbers)} differences")
    return np.bincount(groups, numbers), np.bincount(groups).astype(np.float64)


def design_effect(
    differences: Sequence[float] | np.ndarray, clusters: Sequence[Any] | np.ndarray | None = None
) -> float:
    """How many rows say as much as one independent row (Kish 1965), at least 1: n / design effect is the real n.

    The variance of the mean with whole clusters as units over the one with rows as units. Where no row changed, there
    is no variance to compare: then the largest possible value, rows of a cluster taken as copies, Σ size² / n.
    """
    sums, sizes = cluster_sums(differences, clusters)
    if len(sums) == sizes.sum():
        return 1.0
    values = np.asarray(differences, dtype=np.float64)
    by_row = float(np.sum((values - values.mean()) ** 2))
    if by_row == 0:
        return float(np.sum(sizes**2) / sizes.sum())
    by_cluster = float(np.sum((sums - values.mean() * sizes) ** 2))
    return max(1.0, by_cluster / by_row)


def clustered_score_interval(
    change: Sequence[int] | np.ndarray, clusters: Sequence[Any] | np.ndarray | None = None, confidence: float = 0.95
) -> Interval:
    """Interval of a paired difference of two shares, rows in clusters.

    Tango's score interval on the counts divided by the design effect, as Rao & Scott (1992, Biometrics 48:577) do it
    for clustered counts. Unlike a bootstrap it does not vanish when no row changed.

    Args:
        change: (n,) -1 where only the reference is right, 1 where only the candidate is, else 0.
        clusters: (n,) group of each row; None = every row its own.
    """
    values = np.asarray(change)
    effect = design_effect(values, clusters)
    losses, gains = float(np.sum(values < 0)), float(np.sum(values > 0))
    return paired_score_interval(losses / effect, gains / effect, len(values) / effect, confidence)


def clustered_mean(
    values: Sequence[float] | np.ndarray, clusters: Sequence[Any] | np.ndarray | None = None, confidence: float = 0.95
) -> Interval:
    """Mean of rows in clusters with Student's interval: standard error of whole clusters, clusters - 1 degrees.

    On differences with many small and a few large values it covers where the bootstrap does not (docs/LOG.md). With one
    cluster there is no spread to see, and the limits are infinite.
    """
    from scipy.stats import t

    sums, sizes = cluster_sums(values, clusters)
    mean, groups = float(sums.sum() / sizes.sum()), len(sums)
    if groups < 2:
        return Interval(mean, -np.inf, np.inf, confidence)
    error = np.sqrt(np.sum((sums - mean * sizes) ** 2) * groups / (groups - 1)) / sizes.sum()
    half = float(t.ppf(0.5 + confidence / 2, groups - 1) * error)
    return Interval(mean, mean - half, mean + half, confidence)


def clustered_bootstrap_t(
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[Any] | np.ndarray | None = None,
    seed: int = 0,
    resamples: int = 2_000,
    confidence: float = 0.95,
) -> Interval:
    """Mean of rows in clusters with a studentized bootstrap interval (bootstrap-t): whole clusters are drawn.

    For few clusters of unequal size, where percentiles cover too rarely and Student's interval misses the skew
    (docs/LOG.md).
    """
    sums, sizes = cluster_sums(values, clusters)
    groups, mean = len(sums), float(sums.sum() / sizes.sum())
    rng, ratios, step = np.random.default_rng(seed), [], max(1, _AT_ONCE // groups)
    for start in range(0, resamples, step):
        drawn = rng.integers(0, groups, (min(step, resamples - start), groups))
        s, m = sums[drawn], sizes[drawn]
        means = s.sum(axis=1) / m.sum(axis=1)
        errors = np.sqrt(np.sum((s - means[:, None] * m) ** 2, axis=1)) / m.sum(axis=1)
        distance = means - mean
        # Drawing copies of one cluster gives no spread: infinitely far, or nowhere.
        far = np.where(distance == 0, 0.0, np.copysign(np.inf, distance))
        ratios.append(np.divide(distance, errors, out=far, where=errors > 0))
    t = np.concatenate(ratios)
    low, high = np.quantile(t, [(1 - confidence) / 2, (1 + confidence) / 2], method="inverted_cdf")
    error = np.sqrt(np.sum((sums - mean * sizes) ** 2)) / sizes.sum()
    if error == 0:
        return Interval(mean, mean, mean, confidence)
    return Interval(mean, float(mean - high * error), float(mean - low * error), confidence)


def sign_flip_test(
    differences: Sequence[float] | np.ndarray,
    clusters: Sequence[Any] | np.ndarray | None = None,
    seed: int = 0,
    flips: int = 9_999,
) -> float:
    """Two-sided p-value that a mean paired difference is 0, by exchanging the two models cluster by cluster.

    If both models are the same to a cluster, its difference could as well have the other sign. The share of sign
    patterns with a sum at least as far from 0 is the p-value: exact where all patterns can be counted, else from
    `flips` random ones, (1 + hits) / (1 + flips). On right/wrong answers of single rows it is the exact McNemar test.
    The order of sums is that of their t-statistics, so with many clusters it also holds where differences are skewed.
    """
    sums, _ = cluster_sums(differences, clusters)
    sums = sums[sums != 0]
    if not len(sums):
        return 1.0
    least = abs(sums.sum()) - 1e-9 * np.abs(sums).sum()
    if 2 ** len(sums) <= flips:
        patterns = (np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums))) & 1
        return float(np.mean(np.abs((2 * patterns - 1) @ sums) >= least))
    rng, hits, step = np.random.default_rng(seed), 0, max(1, _AT_ONCE // len(sums))
    for start in range(0, flips, step):
        count = min(step, flips - start)
        bits = np.frombuffer(rng.bytes(count * len(sums) // 8 + 1), np.uint8)
        patterns = np.unpackbits(bits)[: count * len(sums)].reshape(count, len(sums))
        hits += int(np.sum(np.abs(2 * (patterns @ sums) - sums.sum()) >= least))
    return (1 + hits) / (1 + flips)
