"""Two models' losses on the same answers: the ratio of their perplexities, tested over groups of rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lib.statistics.intervals import Interval, paired_bootstrap
from lib.statistics.paired import holm


@dataclass(frozen=True)
class LossComparison:
    """A candidate against the reference on the same answers.

    Attributes:
        n, groups, tokens: rows, groups of rows that are alike, tokens of the answers.
        difference: candidate's loss minus the reference's, nats a token, with a bootstrap interval over groups; its
            exponential is the ratio of the perplexities.
        p: two-sided t-test of the difference over groups (linearized ratio estimator). p_adjusted: after Holm.
        mde: smallest difference these rows could have shown with 80 % power, nats a token.
        verdict: "equivalent within δ %" | "worse" | "better" | "cannot tell (MDE x %)".
    """

    n: int
    groups: int
    tokens: int
    difference: Interval
    p: float
    p_adjusted: float
    mde: float
    verdict: str

    @property
    def ratio(self) -> Interval:
        """Perplexity of the candidate over that of the reference."""
        return Interval(*(math.exp(x) for x in (self.difference.estimate, self.difference.low, self.difference.high)))


def loss_verdict(
    difference: Interval, p_adjusted: float, margin_percent: float, mde: float, alpha: float = 0.05
) -> str:
    """The words that interval and test allow.

    Equivalence comes first: over thousands of tokens even a difference far below the margin is certain to exist.

    Args:
        difference: of the losses, nats a token.
        margin_percent: change of perplexity that counts as equivalent.
        mde: minimum detectable effect, nats a token; infinite where there are too few groups for any test.
    """
    if not math.isfinite(mde):
        return "cannot tell (too few groups of rows)"
    if -math.log1p(margin_percent / 100) < difference.low and difference.high < math.log1p(margin_percent / 100):
        return f"equivalent within {margin_percent:g} %"
    if p_adjusted < alpha and difference.excludes_zero():
        return "worse" if difference.estimate > 0 else "better"
    return f"cannot tell (MDE {100 * math.expm1(mde):.1f} %)"


def cluster_test(differences: np.ndarray, tokens: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """p of "no difference", and the minimum detectable effect (80 % power), of a token-weighted mean over groups.

    The standard error is that of a ratio estimator (Cochran 1977, §6.4): groups, not rows, are independent.

    Returns:
        (1.0, inf) where fewer than three groups leave nothing to test; (1.0, 0.0) for differences that are all zero.
    """
    from scipy.stats import t

    numbers = np.unique(groups, return_inverse=True)[1]
    sums, sizes = np.bincount(numbers, differences * tokens), np.bincount(numbers, tokens)
    count = len(sums)
    if count < 3:
        return 1.0, math.inf
    mean = sums.sum() / sizes.sum()
    error = math.sqrt(count / (count - 1) * float(np.sum((sums - mean * sizes) ** 2))) / float(sizes.sum())
    if error == 0.0:
        return (1.0 if mean == 0 else 0.0), 0.0
    p = 2 * float(t.sf(abs(mean) / error, count - 1))
    return p, float(t.ppf(0.975, count - 1) + t.ppf(0.8, count - 1)) * error


def compare_losses(
    reference: np.ndarray,
    candidates: Mapping[str, np.ndarray],
    tokens: np.ndarray,
    groups: np.ndarray,
    margin_percent: float,
    seed: int = 0,
) -> dict[str, LossComparison]:
    """Compare every candidate with the reference on the same rows, Holm-corrected over the candidates.

    Args:
        reference: (n,) mean loss of each row, nats a token.
        candidates: name -> (n,) the same.
        tokens: (n,) tokens of each row's answers.
        groups: (n,) group of each row.
    """
    changes = {name: losses - reference for name, losses in candidates.items()}
    tests = {name: cluster_test(change, tokens, groups) for name, change in changes.items()}
    adjusted = holm([p for p, _ in tests.values()])
    result = {}
    for (name, (p, mde)), p_adjusted in zip(tests.items(), adjusted, strict=True):
        difference = paired_bootstrap(changes[name], groups, seed, weights=tokens)
        words = loss_verdict(difference, p_adjusted, margin_percent, mde)
        counts = (len(reference), len(np.unique(groups)), int(tokens.sum()))
        result[name] = LossComparison(*counts, difference, p, p_adjusted, mde, words)
    return result
