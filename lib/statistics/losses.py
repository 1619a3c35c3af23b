"""Two models' losses on the same answers: the ratio of their perplexities, tested over groups of rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lib.statistics.clustered import clustered_mean
from lib.statistics.intervals import Interval
from lib.statistics.paired import holm

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
