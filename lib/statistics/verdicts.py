"""What a given number of rows can show (exact power of the exact McNemar test), and from tests and intervals to the
words a report may use; "no loss" is not one of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import bdtr, gammaln, ndtr, ndtri, xlog1py, xlogy

from lib.statistics.intervals import Interval, normal_quantile, tango_statistic
from lib.statistics.paired import (
    cluster_mean,
    clustered_score_interval,
    design_effect,
    equivalence_paired,
    holm,
    mcnemar_exact,
    sign_flip_test,
)

# What a given number of rows can show: exact power of the exact McNemar test.

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


# The more powerful endpoint near the reference: did the right answers lose log-odds?
#
# Accuracy moves only when a row crosses the line; the margin of the right answer (its log-probability minus the largest
# of another answer, nats) moves on every row, so its mean shows a direction with far fewer rows. It never makes a file
# equivalent: a user notices accuracy, so accuracy decides that. Both endpoints are corrected together (Holm).


@dataclass(frozen=True)
class MarginTest:
    """Mean change of the right answer's margin, candidate minus reference, nats.

    Attributes:
        change: mean with its 95 % interval (Student's, from whole clusters).
        p: sign-flip test of the mean, whole clusters exchanged. p_adjusted: after Holm, where several are tested.
        mde: smallest mean change that would be found with 80 % power at this spread, nats, by a test at `alpha`.
    """

    change: Interval
    p: float
    p_adjusted: float
    mde: float


def margin_test(
    changes: ArrayLike, clusters: ArrayLike | None = None, seed: int = 0, alpha: float = 0.05
) -> MarginTest:
    """Test a mean margin change.

    A sign-flip permutation test of the mean rather than Wilcoxon's: it tests the number that is shown, keeps
    near-duplicates together, and needs no ranks where many changes are equal.

    Args:
        changes: (n,) margin under the candidate minus margin under the reference, nats.
        clusters: (n,) group of each row; None = every row its own.
        alpha: level for the smallest change; where m tests are corrected together by Holm, the first has 0.05 / m.
    """
    mean, p = cluster_mean(changes, clusters), sign_flip_test(changes, clusters, seed)
    mde = float(ndtri(1 - alpha / 2) + ndtri(0.8)) * mean.error
    return MarginTest(mean.interval(), p, p, mde)


# Accuracy, and the words that both endpoints allow.

_ALPHA = 0.05


@dataclass(frozen=True)
class PairedComparison:
    """A candidate against the reference on the same rows.

    Attributes:
        n: rows.
        losses, gains: rows only the reference, only the candidate got right.
        difference: accuracy of the candidate minus the reference's, a fraction, with Tango's score interval for the
            rows' design effect (near-duplicates count once, and the interval does not vanish when no row changed).
        p: exact McNemar. p_adjusted: after Holm over the candidates compared together (and over both endpoints where
            margins are compared too), taken of the larger of p and the same test with whole clusters exchanged.
        mde: smallest difference that these rows would have shown with 80 % power, a fraction (exact McNemar at the
            first step of Holm's correction: after correction for all tests made together).
        verdict: "worse" | "better" | "equivalent within δ" | "cannot tell (MDE x)".
        design_effect: rows that say as much as one independent row.
        equivalence_p: two one-sided score tests against ±δ, the larger p-value; below 0.025 where the verdict is
            "equivalent" (its 95 % interval is two one-sided tests at half of 0.05). equivalence_p_adjusted: after Holm
            over the candidates.
        margin: the test of the right answers' margins; None where none were given.
    """

    n: int
    losses: int
    gains: int
    difference: Interval
    p: float
    p_adjusted: float
    mde: float
    verdict: str
    design_effect: float
    equivalence_p: float
    margin: MarginTest | None = None
    equivalence_p_adjusted: float = 1.0

    @property
    def endpoint(self) -> str | None:
        """What the verdict rests on: "accuracy", "margin", or None where neither could tell."""
        if self.verdict.startswith("cannot"):
            return None
        by_accuracy = self.verdict.startswith("equivalent") or self.difference.excludes_zero()
        return "accuracy" if by_accuracy and (self.verdict[0] == "e" or self.p_adjusted < _ALPHA) else "margin"

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; the interval as [low, high]."""
        return {**asdict(self), **self.difference.named("difference"), "endpoint": self.endpoint}


def verdict(
    difference: Interval, p_adjusted: float, margin_points: float, mde: float, margin: MarginTest | None = None
) -> str:
    """The words that tests, intervals and sample size allow.

    In this order: "equivalent" needs the whole interval of the accuracy inside ±margin_points, for a difference may
    be certain and still too small to matter. "worse" and "better" need both an adjusted p below 0.05 and an interval
    without zero, of the accuracy. What neither settles, the margins of the right answers may: they call a candidate
    worse or better by the same two conditions, if accuracy does not point the other way. Everything else is "cannot
    tell".

    Args:
        difference: candidate minus reference, fractions.
        margin_points: what counts as equivalent, in accuracy points.
        mde: minimum detectable effect of the accuracy, a fraction.
        margin: the test of the margins, its p adjusted; None = judge by accuracy alone.
    """
    if difference.within(margin_points / 100):
        return f"equivalent within {margin_points:g} {'point' if margin_points == 1 else 'points'}"
    if p_adjusted < _ALPHA and difference.excludes_zero():
        return "worse" if difference.estimate < 0 else "better"
    if margin is not None and margin.p_adjusted < _ALPHA and margin.change.excludes_zero():
        direction = margin.change.estimate
        if direction * difference.estimate >= 0:
            return "worse" if direction < 0 else "better"
    return f"cannot tell (MDE {100 * mde:.1f} points)"


def compare_all(
    reference_correct: ArrayLike,
    candidates: Mapping[str, ArrayLike],
    groups: ArrayLike | None,
    margin_points: float,
    seed: int = 0,
    margin_changes: Mapping[str, ArrayLike] | None = None,
    family: int | None = None,
) -> dict[str, PairedComparison]:
    """Compare every candidate with the reference on the same rows, Holm-corrected over the candidates.

    Args:
        reference_correct: (n,) right or wrong.
        candidates: name -> (n,) right or wrong.
        groups: (n,) near-duplicate cluster of each row; None = every row its own.
        margin_points: equivalence margin in accuracy points.
        margin_changes: name -> (n,) margin of the right answer under the candidate minus under the reference, nats, for
            every candidate: the more powerful endpoint. Holm then corrects over candidates and both endpoints.
        family: how many tests the caller corrects together, for the minimum detectable effect; None = those made here.
    """
    reference = np.asarray(reference_correct, dtype=bool)
    changes = {name: np.asarray(correct, dtype=np.int64) - reference for name, correct in candidates.items()}
    tests = {name: mcnemar_exact(reference, correct) for name, correct in candidates.items()}
    alpha = _ALPHA / max(1, family or len(tests) * (2 if margin_changes else 1))
    margins = {name: margin_test(margin_changes[name], groups, seed, alpha) for name in tests} if margin_changes else {}
    p_values = [test.p for test in tests.values()]
    if groups is not None and len(np.unique(np.asarray(groups))) < len(reference):
        clustered = (sign_flip_test(change, groups, seed) for change in changes.values())
        p_values = [max(pair) for pair in zip(p_values, clustered, strict=True)]
    adjusted = holm([*p_values, *(margin.p for margin in margins.values())])
    for name, p_adjusted in zip(margins, adjusted[len(tests) :], strict=True):
        margins[name] = replace(margins[name], p_adjusted=p_adjusted)
    found, n = {}, len(reference)
    for (name, (losses, gains, p)), p_adjusted in zip(tests.items(), adjusted[: len(tests)], strict=True):
        effect, margin = design_effect(changes[name], groups), margins.get(name)
        difference = clustered_score_interval(changes[name], groups)
        mde = mde_exact(max(1, round(n / effect)), (losses + gains) / n, alpha=alpha)
        words = verdict(difference, p_adjusted, margin_points, mde, margin)
        equal = equivalence_paired(losses / effect, gains / effect, n / effect, margin_points / 100)
        found[name] = PairedComparison(
            *(n, losses, gains, difference, p, p_adjusted, mde, words, effect, equal), margin=margin
        )
    equal = holm([one.equivalence_p for one in found.values()])
    return {name: replace(one, equivalence_p_adjusted=p) for (name, one), p in zip(found.items(), equal, strict=True)}


def compare(
    reference_correct: ArrayLike,
    candidate_correct: ArrayLike,
    groups: ArrayLike | None,
    margin_points: float,
    seed: int = 0,
    family: int | None = None,
) -> PairedComparison:
    """One candidate against the reference; see `compare_all`."""
    one = {"candidate": candidate_correct}
    return compare_all(reference_correct, one, groups, margin_points, seed, family=family)["candidate"]


def in_words(entry: Mapping[str, Any]) -> str:
    """The verdict of an entry of comparison.json, with what decided it where that was not the accuracy.

    For an equivalent file it also says when the difference is certain, though too small to matter.
    """
    words = str(entry["verdict"]) + (", by the margins" if entry.get("endpoint") == "margin" else "")
    if words.startswith("equivalent") and entry.get("mcnemar_p_holm", 1.0) < _ALPHA:
        low, high = entry["accuracy_difference_interval"]
        if low > 0 or high < 0:
            words += f" (a difference of {100 * entry['accuracy_difference']:+.2f} points is significant)"
    return words


# Which files are worth their size.

SAME_SIZE = 1.001
"""Files whose sizes differ by less than a thousandth count as equally large: padding and headers differ by as much."""


def frontier(entries: Sequence[Mapping[str, Any]], loss: str = "kld_mean") -> list[str]:
    """Types of the files for which no other is as small and loses less, the smallest first.

    Args:
        entries: with type, bytes and the loss; the reference not among them.
        loss: key of what is lost, nats: by default mean KL divergence from the reference.
    """
    chosen: list[Mapping[str, Any]] = []
    for entry in sorted(entries, key=lambda e: (e["bytes"], e[loss])):
        if chosen and entry[loss] >= chosen[-1][loss]:
            continue
        while chosen and entry["bytes"] <= SAME_SIZE * chosen[-1]["bytes"]:
            chosen.pop()
        chosen.append(entry)
    return [entry["type"] for entry in chosen]
