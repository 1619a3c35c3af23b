"""Two models on the same rows: exact McNemar, Holm's correction; near-duplicates are kept together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import bdtr, stdtr, stdtrit

from lib.statistics.intervals import TAILS, Interval, cluster_sums, paired_score_interval, wilson


class McNemar(NamedTuple):
    """Exact McNemar test.

    Attributes:
        b: rows only the first model got right.
        c: rows only the second model got right.
        p: two-sided exact binomial p-value; 1.0 without any discordant row.
    """

    b: int
    c: int
    p: float


def mcnemar_exact(first_correct: ArrayLike, second_correct: ArrayLike) -> McNemar:
    """Exact McNemar test of two models' right/wrong answers on the same rows (binomial(b + c, 1/2), two-sided)."""
    first, second = np.asarray(first_correct, dtype=bool), np.asarray(second_correct, dtype=bool)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"mcnemar_exact needs two vectors of equal length, not {first.shape} and {second.shape}")
    b, c = int(np.sum(first & ~second)), int(np.sum(~first & second))
    return McNemar(b, c, min(1.0, 2 * float(bdtr(min(b, c), b + c, 0.5))))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the given order (Holm 1979)."""
    p = np.asarray(p_values, dtype=np.float64)
    if not len(p):
        return []
    order = np.argsort(p, kind="stable")
    adjusted = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    result = np.empty_like(p)
    result[order] = adjusted
    return [float(value) for value in result]


# Paired differences of rows that are not independent: near-duplicates are kept together.

_AT_ONCE = 200_000
"""Numbers computed at a time: what fits into a cache is twice as fast."""

_PRIOR = 4.0
"""Weight of the bound in `design_effect`, in changed rows for each row of the bound. With 2 or 3 one more lost row may
still narrow the interval: a random search over 60,000 sets of rows in groups found such cases, and none with 4."""


def copies_effect(clusters: ArrayLike | None, n: int, weights: ArrayLike | None = None) -> float:
    """The design effect of n rows if the rows of a cluster are copies, Σ size² / n: known before any result.

    Args:
        weights: (n,) of each row, with mean 1, e.g. `balanced_weights`. What changes may all have the same weight: the
            effect is then that of the rows whose weight times their own Σ size² / n is largest.
    """
    if weights is not None:
        weight = np.asarray(weights, dtype=np.float64)
        groups = np.arange(n) if clusters is None else np.asarray(clusters)
        kinds = ((value, groups[weight == value]) for value in np.unique(weight))
        return max(1.0, max(float(value) * copies_effect(own, len(own)) for value, own in kinds))
    if clusters is None:
        return 1.0
    _, sizes = cluster_sums(np.zeros(n), clusters)
    return float(np.sum(sizes**2) / n)


def design_effect(
    differences: ArrayLike,
    clusters: ArrayLike | None = None,
    prior: float | None = None,
    weights: ArrayLike | None = None,
    folds: ArrayLike | None = None,
) -> float:
    """How many rows say as much as one independent row (Kish 1965), at least 1: n / design effect is the real n.

    The variance of the mean with whole clusters as units (with clusters / (clusters - 1)) over the one with rows as
    units, drawn towards `copies_effect` as if `_PRIOR` times that many changed rows had been seen that change as copies
    do. So a few changed rows, which show nothing of how the rows of a cluster vary together, leave the effect near that
    bound, and one more does not make it jump. A single cluster counts as one row.

    Args:
        prior: weight of the bound in changed rows; None = `_PRIOR` for each row of the bound.
        weights: (n,) of each row, with mean 1; None = all alike. The rows as units are then counted once by weight, as
            `clustered_score_interval` counts them, so that unequal weights are part of the effect.
        folds: (n,) fold of each row; the effect is multiplied by `fold_effect`.
    """
    if folds is not None:
        alone = design_effect(differences, clusters, prior, weights)
        return alone * fold_effect(differences, folds, clusters, weights)
    sums, sizes = cluster_sums(differences, clusters, weights)
    n, groups = len(np.asarray(differences)), len(sums)
    if groups == n and weights is None:
        return 1.0
    if groups == 1:
        return float(n)
    values, bound = np.asarray(differences, dtype=np.float64), copies_effect(clusters, n, weights)
    weight, mean = 1.0 if weights is None else np.asarray(weights), float(sums.sum() / sizes.sum())
    by_row = float(np.sum(weight * (values - mean) ** 2)) * n / (n - 1)
    by_cluster = float(np.sum((sums - mean * sizes) ** 2)) * groups / (groups - 1)
    prior = _PRIOR * bound if prior is None else prior
    return max(1.0, (prior * bound + by_cluster) / (prior + by_row))


def fold_effect(
    values: ArrayLike, folds: ArrayLike, clusters: ArrayLike | None = None, weights: ArrayLike | None = None
) -> float:
    """Factor by which the variance of a mean over cross-validated rows is larger than their clusters say, at least 1.

    The rows of a fold share a model, and the models share training rows. What the means of the k folds differ more than
    their rows explain is the models' own; of it the mean has 1 / k + 1 / (k - 1) instead of 1 / k, because any two
    models share training rows (Nadeau & Bengio 2003, Machine Learning 52:239, with 1 / k of the rows as test rows).

    Args:
        folds: (n,) fold of each row.
    """
    error = cluster_mean(values, clusters, weights).error ** 2
    sums, sizes = cluster_sums(values, folds, weights)
    k = len(sums)
    if k == 1 or not 0 < error < np.inf:
        return 1.0
    spread = np.sum(sizes * (sums / sizes - sums.sum() / sizes.sum()) ** 2) / sizes.sum() * k / (k - 1)
    return float(1.0 + max(0.0, spread - k * error) * (1 / k + 1 / (k - 1)) / error)


def clustered_score_interval(
    change: ArrayLike,
    clusters: ArrayLike | None = None,
    confidence: float = 0.95,
    weights: ArrayLike | None = None,
    folds: ArrayLike | None = None,
) -> Interval:
    """Interval of a paired difference of two shares, rows in clusters.

    Tango's score interval on the counts divided by the design effect, as Rao & Scott (1992, Biometrics 48:577) do it
    for clustered counts. Unlike a bootstrap it does not vanish when no row changed. Many rows in a single cluster show
    nothing: -1 to 1.

    Args:
        change: (n,) -1 where only the reference is right, 1 where only the candidate is, else 0.
        clusters: (n,) group of each row; None = every row its own.
        weights: (n,) of each row, with mean 1, e.g. `balanced_weights`; None = all alike.
        folds: (n,) fold of each row, of cross-validated rows.
    """
    values = np.asarray(change)
    effect, n = design_effect(values, clusters, weights=weights, folds=folds), len(values)
    weight = np.ones(n) if weights is None else np.asarray(weights)
    losses, gains = (float(weight[side].sum()) for side in (values < 0, values > 0))
    if effect >= n > 1:
        return Interval((gains - losses) / n, -1.0, 1.0, confidence)
    return paired_score_interval(losses / effect, gains / effect, n / effect, confidence)


def clustered_share(hits: ArrayLike, clusters: ArrayLike | None = None) -> Interval:
    """Share of hits among rows in clusters: Wilson's 95 % interval on hits and rows divided by the design effect.

    Like Wilson's, it does not vanish where all rows are hits or none are. The bound of the design effect weighs as much
    as one miss: clusters may be whole documents, whose tokens are not copies.

    Args:
        hits: (n,) 0 or 1, True or False.
    """
    values = np.asarray(hits, dtype=np.float64)
    effect = design_effect(values, clusters, prior=1.0)
    return wilson(float(values.sum()) / effect, len(values) / effect)


@dataclass(frozen=True)
class ClusterMean:
    """A mean whose independent units are clusters of rows; everything that Student's t says about it.

    Attributes:
        mean: of the rows.
        error: its standard error from whole clusters; infinite with a single one, which shows no spread.
        clusters: how many there are; the degrees of freedom are one less.
    """

    mean: float
    error: float
    clusters: int

    def quantile(self, probability: float) -> float:
        """Student's t at these degrees of freedom."""
        return float(stdtrit(self.clusters - 1, probability))

    def interval(self, confidence: float = 0.95) -> Interval:
        """The mean with its limits, infinite with a single cluster."""
        half = self.quantile(0.5 + confidence / 2) * self.error if self.clusters > 1 else np.inf
        return Interval(self.mean, self.mean - half, self.mean + half, confidence)

    def tail(self, distance: float) -> float:
        """One-sided p-value of a mean that lies `distance` beyond a hypothesis; 0 or 1 where there is no spread."""
        if self.error == 0.0:
            return 0.0 if distance > 0 else 1.0
        return float(stdtr(self.clusters - 1, -distance / self.error))


def cluster_mean(
    values: ArrayLike,
    clusters: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    folds: ArrayLike | None = None,
) -> ClusterMean:
    """Mean of rows in clusters with the standard error of whole clusters.

    Args:
        weights: (n,) positive weight of each row in the mean, e.g. its tokens; None = all alike. With weights the mean
            is a ratio, and its standard error the linearized one (Cochran 1977, §6.4).
        folds: (n,) fold of each row, of cross-validated rows: the error grows by `fold_effect`.
    """
    if folds is not None:
        alone = cluster_mean(values, clusters, weights)
        return replace(alone, error=alone.error * fold_effect(values, folds, clusters, weights) ** 0.5)
    sums, sizes = cluster_sums(values, clusters, weights)
    mean, count = float(sums.sum() / sizes.sum()), len(sums)
    if count == 1:
        return ClusterMean(mean, np.inf, 1)
    error = np.sqrt(np.sum((sums - mean * sizes) ** 2) * count / (count - 1)) / sizes.sum()
    return ClusterMean(mean, float(error), count)


def clustered_mean(values: ArrayLike, clusters: ArrayLike | None = None, folds: ArrayLike | None = None) -> Interval:
    """Mean of rows in clusters with Student's 95 % interval.

    On differences with many small and a few large values it covers where the bootstrap does not (docs/LOG.md).
    """
    return cluster_mean(values, clusters, folds=folds).interval()


def clustered_bootstrap_t(
    values: ArrayLike, clusters: ArrayLike | None = None, seed: int = 0, resamples: int = 2_000
) -> Interval:
    """Mean of rows in clusters with a studentized 95 % bootstrap interval (bootstrap-t): whole clusters are drawn.

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
    low, high = np.quantile(t, TAILS, method="inverted_cdf")
    error = np.sqrt(np.sum((sums - mean * sizes) ** 2)) / sizes.sum()
    if error == 0:
        return Interval(mean, mean, mean)
    return Interval(mean, float(mean - high * error), float(mean - low * error))


def sign_flip_test(
    differences: ArrayLike, clusters: ArrayLike | None = None, seed: int = 0, flips: int = 9_999
) -> float:
    """Two-sided p-value that a mean paired difference is 0, by exchanging the two models cluster by cluster.

    If the models do not differ, the difference of a cluster could as well have the other sign. The share of sign
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


@dataclass(frozen=True)
class PairedComparison:
    """A candidate against a reference by right and wrong answers on the same rows.

    Attributes:
        n: rows. losses, gains: rows only the reference, only the candidate got right.
        difference: share of right rows of the candidate minus the reference's, weighted if rows have weights, with the
            95 % score interval for the rows' design effect (it does not vanish when no row changed).
        mcnemar_p: exact McNemar, every row by itself and counted once.
        p: of "no difference": the larger of McNemar's and, where rows come in groups, the sign-flip test of whole
            groups; with weights the latter alone. p_holm: after Holm over everything compared together.
        design_effect: rows that say as much as one independent row.
    """

    n: int
    losses: int
    gains: int
    difference: Interval
    mcnemar_p: float
    p: float
    p_holm: float
    design_effect: float

    @property
    def verdict(self) -> str:
        """ "better" or "worse" where both the corrected p and the interval say so, else "cannot tell"."""
        if self.p_holm < 0.05 and self.difference.excludes_zero():
            return "worse" if self.difference.estimate < 0 else "better"
        return "cannot tell"

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; the interval as [low, high]."""
        return {**asdict(self), **self.difference.named("difference"), "verdict": self.verdict}


def compare_pairs(
    pairs: Mapping[str, tuple[ArrayLike, ArrayLike]],
    groups: ArrayLike | None,
    seed: int = 0,
    weights: ArrayLike | None = None,
    folds: ArrayLike | None = None,
) -> dict[str, PairedComparison]:
    """Compare pairs of models on the same rows, p corrected over all of them.

    Args:
        pairs: name -> (n,) right or wrong under the reference, and under the candidate.
        groups: (n,) near-duplicate cluster of each row; None = every row its own.
        weights: (n,) of each row, with mean 1, e.g. `lib.statistics.noninferiority.balanced_weights`.
        folds: (n,) fold of each row, of cross-validated rows. The tests above ask whether rows changed evenly, not
            whether models did: then p is at least that of the mean over its widened standard error.
    """
    found = {}
    for name, (reference, candidate) in pairs.items():
        change = np.asarray(candidate, dtype=np.int64) - np.asarray(reference, dtype=np.int64)
        losses, gains, mcnemar_p = mcnemar_exact(reference, candidate)
        p, n = mcnemar_p, len(change)
        if weights is not None:
            p = sign_flip_test(change * np.asarray(weights), groups, seed)
        elif groups is not None and len(np.unique(np.asarray(groups))) < n:
            p = max(p, sign_flip_test(change, groups, seed))
        if folds is not None and change.any():
            mean = cluster_mean(change, groups, weights, folds)
            p = max(p, min(1.0, 2 * mean.tail(abs(mean.mean))))
        interval = clustered_score_interval(change, groups, weights=weights, folds=folds)
        effect = design_effect(change, groups, weights=weights, folds=folds)
        found[name] = PairedComparison(n, losses, gains, interval, mcnemar_p, p, p, effect)
    corrected = holm([one.p for one in found.values()])
    return {name: replace(one, p_holm=p) for (name, one), p in zip(found.items(), corrected, strict=True)}
