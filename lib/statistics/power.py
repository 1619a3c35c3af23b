"""What a given number of rows can show: exact power of the exact McNemar test."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
from scipy.special import bdtr, gammaln, ndtr, xlog1py, xlogy

from lib.statistics.intervals import normal_quantile, tango_statistic

POWER = 0.8
"""Share of tests that are to find what is there."""

_COUNTED = 2_000.0
"""Expected discordant rows up to which every table is counted; with more the normal approximation is as good."""


@cache
def _critical(rows: int, alpha: float) -> np.ndarray:
    """Largest count on the smaller side that exact McNemar still calls significant, for 0 to rows discordant rows.

    -1 where none is.
    """
    from scipy.stats import binom

    discordant = np.arange(rows + 1)
    count = binom.ppf(alpha / 2, discordant, 0.5)
    return np.where(2 * binom.cdf(count, discordant, 0.5) < alpha, count, count - 1)


def power_mcnemar(n: int, discordant_share: float, difference: float, alpha: float = 0.05) -> float:
    """Probability that exact McNemar (two-sided) finds an accuracy difference, over all tables that can occur.

    Args:
        n: rows.
        discordant_share: share of rows on which exactly one of the two models is right.
        difference: true accuracy difference, a fraction of either sign; at most the share.

    Raises:
        ValueError: n < 1, or |difference| <= share <= 1 does not hold.
    """
    if n < 1 or not abs(difference) <= discordant_share <= 1:
        raise ValueError(f"need n >= 1 and |difference| <= share <= 1, not {n}, {difference}, {discordant_share}")
    if discordant_share == 0:
        return 0.0
    middle, reach = n * discordant_share, 8 * math.sqrt(n * discordant_share * (1 - discordant_share)) + 20
    count = np.arange(max(0, math.floor(middle - reach)), min(n, math.ceil(middle + reach)) + 1)
    chance = _chances(n, count, np.zeros(1), discordant_share, 0.0)
    limit = _critical(1 << int(count[-1]).bit_length(), alpha)[count]
    side = (1 + abs(difference) / discordant_share) / 2
    found = bdtr(np.maximum(limit, 0), count, 1 - side) + bdtr(np.maximum(limit, 0), count, side)
    return float(np.sum(chance * np.where(limit < 0, 0.0, found)))


def mde_exact(n: int, discordant_share: float, alpha: float = 0.05) -> float:
    """Smallest accuracy difference that exact McNemar finds with 80 % power, a fraction.

    A difference cannot be larger than the share of discordant rows: where more is needed, that many discordant rows are
    assumed, all on one side. So the result is never below what the fewest significant discordant rows
    can show. 1.0 where even a difference on every row would not be found.
    """
    if n < 1 or not 0 <= discordant_share <= 1:
        raise ValueError(f"mde_exact needs n >= 1 and a share in 0..1, not {n} and {discordant_share}")

    def enough(difference: float) -> bool:
        return power_mcnemar(n, max(discordant_share, difference), difference, alpha) >= POWER

    if not enough(1.0):
        return 1.0
    return _least(enough, 0.0, 1.0, 1e-6)


def rows_needed(discordant_share: float, difference: float, alpha: float = 0.05) -> int:
    """Fewest rows with which exact McNemar finds the difference with 80 % power.

    Raises:
        ValueError: no difference to find, or one larger than the share of discordant rows.
    """
    if not 0 < abs(difference) <= discordant_share <= 1:
        raise ValueError(f"need 0 < |difference| <= share <= 1, not {difference} and {discordant_share}")

    def enough(n: int) -> bool:
        return power_mcnemar(n, discordant_share, difference, alpha) >= POWER

    low, high = 0, 8
    while not enough(high):
        low, high = high, 2 * high
    return _least(enough, low, high)


def power_inside(n: int, discordant_share: float, difference: float, margin: float, one_sided: bool = False) -> float:
    """Probability that `paired_score_interval` of n rows lies inside ±margin, over all tables that can occur.

    Args:
        discordant_share: share of rows on which exactly one of the two models is right.
        difference: true accuracy difference, a fraction, negative = the candidate is worse; at most the share.
        one_sided: ask only for the lower limit to lie above -margin ("not worse by more").

    Raises:
        ValueError: n < 1, no margin, or |difference| <= share <= 1 does not hold.
    """
    if n < 1 or not abs(difference) <= discordant_share <= 1 or not 0 < margin < 1:
        raise ValueError(f"need n >= 1, |difference| <= share <= 1 and a margin, not {n}, {difference}, {margin}")
    z = normal_quantile(0.95)
    if n * discordant_share > _COUNTED:
        error = math.sqrt((discordant_share - difference**2) / n)
        above, below = ndtr((margin + difference) / error - z), ndtr((margin - difference) / error - z)
        return max(0.0, float(above if one_sided else above + below - 1))
    p_loss, p_gain = ((discordant_share + sign * difference) / 2 for sign in (-1, 1))
    losses, gains = _likely(n, p_loss)[:, None], _likely(n, p_gain)[None, :]
    inside = tango_statistic(-margin, losses, gains, n) > z
    if not one_sided:
        inside &= tango_statistic(margin, losses, gains, n) < -z
    return float(np.sum(_chances(n, losses, gains, p_loss, p_gain) * inside))


def _least(enough: Callable[[float], bool], low: float, high: float, step: float = 1) -> float:
    """The least number that is enough, by bisection: `low` is not enough, `high` is; whole numbers for step 1."""
    while high - low > step:
        middle = (low + high) // 2 if step == 1 else (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _likely(n: int, p: float) -> np.ndarray:
    """Counts among n rows with probability p: all but one in a million of those that can occur."""
    reach = 5.5 * math.sqrt(n * p * (1 - p)) + 10
    return np.arange(max(0, math.floor(n * p - reach)), min(n, math.ceil(n * p + reach)) + 1)


def _chances(n: int, losses: np.ndarray, gains: np.ndarray, p_loss: float, p_gain: float) -> np.ndarray:
    """Multinomial probabilities of these losses and gains (broadcast); 0 where they are more than the rows."""
    same = np.maximum(n - losses - gains, 0)
    ways = gammaln(n + 1) - gammaln(losses + 1) - gammaln(gains + 1) - gammaln(same + 1)
    log = ways + xlogy(losses, p_loss) + xlogy(gains, p_gain) + xlog1py(same, -min(1.0, p_loss + p_gain))
    return np.where(losses + gains <= n, np.exp(log), 0.0)


def rows_for_inside(discordant_share: float, difference: float, margin: float, one_sided: bool = False) -> int:
    """Rows with which the interval of the difference lies inside the margin with 80 % power; see `power_inside`.

    With few discordant rows the power zigzags as rows are added: searched upwards by a fifth, then by bisection.

    Raises:
        ValueError: a difference as large as the margin, which no number of rows shows to be inside.
    """
    if difference <= -margin or (difference >= margin and not one_sided):
        raise ValueError(f"{difference} is not inside a margin of {margin}")

    def enough(n: int) -> bool:
        return power_inside(n, discordant_share, difference, margin, one_sided) >= POWER

    # start from half of what the normal approximation says, or the lattice of a few rows, whichever is less
    room = margin + difference if one_sided else margin - abs(difference)
    low = max(1, min(int(7.8 * discordant_share / room**2), int(3.8 / margin)) // 2)
    low, high = (1, 32) if enough(low) else (low, math.ceil(1.2 * low))
    while not enough(high):
        low, high = high, math.ceil(1.2 * high)
    return _least(enough, low, high)
