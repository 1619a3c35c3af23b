"""Equivalence of two models on the same rows: two one-sided score tests."""

from __future__ import annotations

from typing import NamedTuple

from lib.statistics.intervals import tango_statistic


class Equivalence(NamedTuple):
    """Two one-sided tests (TOST) of a paired difference of shares against ±margin.

    Attributes:
        p_worse: p-value of "the candidate is worse by the margin or more".
        p_better: p-value of "the candidate is better by the margin or more".
        p: the larger of the two; below alpha the candidate is equivalent within the margin.
    """

    p_worse: float
    p_better: float
    p: float


def equivalence_paired(losses: float, gains: float, n: float, margin: float) -> Equivalence:
    """Score TOST for paired right/wrong answers (Liu, Hsueh, Hsieh & Chen 2002, Stat. Med. 21:231).

    The variance is taken at the hypothesis (restricted maximum likelihood), so it holds with few changed rows.
    p < alpha is the same as: `paired_score_interval` of confidence 1 - 2·alpha lies within ±margin.

    Args:
        losses: rows only the reference got right; gains: rows only the candidate got right.
        n: all rows. The three may be divided by a design effect.
        margin: what counts as equivalent, a fraction (0.01 = one accuracy point).

    Raises:
        ValueError: counts that cannot be, or a margin outside 0..1.
    """
    if n <= 0 or losses < 0 or gains < 0 or losses + gains > n * (1 + 1e-9) or not 0 < margin < 1:
        raise ValueError(f"need counts within n and 0 < margin < 1, not {losses}, {gains}, {n}, {margin}")
    from scipy.stats import norm

    p_worse = float(norm.sf(tango_statistic(-margin, losses, gains, n)))
    p_better = float(norm.cdf(tango_statistic(margin, losses, gains, n)))
    return Equivalence(p_worse, p_better, max(p_worse, p_better))
