"""Two models on the same rows: exact McNemar, Holm's correction, the smallest effect that could have been seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


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


def mcnemar_exact(first_correct: Sequence[bool] | np.ndarray, second_correct: Sequence[bool] | np.ndarray) -> McNemar:
    """Exact McNemar test of two models' right/wrong answers on the same rows (binomial(b + c, 1/2), two-sided)."""
    first, second = np.asarray(first_correct, dtype=bool), np.asarray(second_correct, dtype=bool)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"mcnemar_exact needs two vectors of equal length, not {first.shape} and {second.shape}")
    b, c = int(np.sum(first & ~second)), int(np.sum(~first & second))
    if b + c == 0:
        return McNemar(0, 0, 1.0)
    from scipy.stats import binomtest

    return McNemar(b, c, float(binomtest(b, b + c, 0.5).pvalue))


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


def mde_paired(n: int, discordant_share: float, power: float = 0.8, alpha: float = 0.05) -> float:
    """Minimum detectable accuracy difference of a paired comparison, as a fraction.

    (z(1 - alpha/2) + z(power)) · sqrt(share / n): the normal approximation of McNemar's test (Miettinen 1968).

    Args:
        n: rows.
        discordant_share: share of rows on which exactly one of the two models is right.
    """
    if n < 1 or not 0 <= discordant_share <= 1:
        raise ValueError(f"mde_paired needs n >= 1 and a share in 0..1, not {n} and {discordant_share}")
    from scipy.stats import norm

    return float((norm.ppf(1 - alpha / 2) + norm.ppf(power)) * math.sqrt(discordant_share / n))


def smallest_significant(alpha: float = 0.05) -> int:
    """Fewest discordant rows, all on one side, that exact McNemar calls significant (6 for alpha .05)."""
    return next(k for k in range(1, 1100) if 2.0 ** (1 - k) < alpha)
