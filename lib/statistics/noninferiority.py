"""The one rule by which a file is good enough, and what a number of rows can show by it: tests of non-inferiority.

A file is good enough when a loss of the margin or more is excluded, by a one-sided test at `LEVEL`, on all rows and on
the leak-free ones. Both have to show it, so asking twice costs nothing (Berger 1982, Technometrics 24:295). The files
are tested from the largest to the smallest until one is not good enough: such a fixed sequence keeps the level over all
files without a correction (Maurer, Hothorn & Lehmacher 1995). So the chance that a recommended file loses the margin or
more is at most `LEVEL`. Better than the reference is no reason against a file, and equivalence is not asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import gammaln, ndtr, ndtri, xlog1py, xlogy

from lib.statistics.intervals import Interval, paired_score_interval, tango_statistic
from lib.statistics.paired import clustered_score_interval

Entry = Mapping[str, Any]

LEVEL = 0.05
"""Of every one-sided test."""
ONE_SIDED = 1 - 2 * LEVEL
"""Confidence of the two-sided interval whose upper end is the one-sided limit."""
FEWEST_GROUPS = 20
"""Groups of alike rows below which nothing is judged: with fewer no interval of a skewed loss keeps its word."""
REFERENCE, GOOD_ENOUGH, WORSE, NOT_SHOWN, NO_VERDICT = "reference", "good enough", "worse", "not shown", "no verdict"
"""Verdicts. "worse": some loss is certain (Holm over the files). "no verdict": the comparison means nothing."""


def shown(entry: Entry, margin: float) -> bool:
    """Whether the rows show that a file loses less than the margin, on all rows and on the leak-free ones.

    Args:
        entry: with "loss_limit" (the one-sided upper limit of the loss, None: none can be told), and "leak_free": None,
            or the same of those rows. margin: in the unit of the limit.
    """
    limit = worst_limit(entry)
    return limit is not None and limit < margin


def worst_limit(entry: Entry) -> float | None:
    """The larger upper limit of the loss, of all rows or of the leak-free ones; None: none can be told."""
    limits = [part["loss_limit"] for part in (entry, entry.get("leak_free")) if part]
    return None if None in limits else max(limits)


def fewest_groups(reference: Entry) -> int:
    """Groups of alike rows behind a comparison: of all rows, or of the leak-free ones if those are judged and fewer."""
    return min(part["groups"] for part in (reference, reference.get("leak_free")) if part)


def good_enough(files: Sequence[Entry], margin: float) -> list[str]:
    """Types of the files that are good enough, the largest first; the last one is the smallest.

    Args:
        files: the reference not among them.
    """
    found = []
    for entry in by_size(files):
        if not shown(entry, margin):
            break
        found.append(entry["type"])
    return found


NO_HARM_NATS = 0.01
"""KL divergence of the answer words, nats a row, up to which a file shows no sign of harm: of the files of this
project's runs on 600 rows and more, all that stay below it lost less than a point (docs/statistics.md)."""


def no_sign_of_harm(files: Sequence[Entry], margin: float) -> list[str]:
    """Types of the files without a sign of harm, the largest first, to the first that has one: no proof.

    Their answer words' KL divergence from the reference is surely below `NO_HARM_NATS` (the upper end of its interval),
    and the loss seen is below the margin. Unlike a loss, that needs no hundreds of rows.
    """
    found = []
    for entry in by_size(files):
        limit = (entry.get("label_kld_interval") or [None, None])[1]
        if limit is None or limit > NO_HARM_NATS or entry["loss"] >= margin:
            break
        found.append(entry["type"])
    return found


def by_size(files: Sequence[Entry]) -> list[Entry]:
    """The order of the tests: the largest first, files of one size by name."""
    return sorted(files, key=lambda entry: (-entry["bytes"], entry["type"]))


def verdicts(files: Sequence[Entry], alone: Sequence[Entry], margin: float) -> dict[str, str]:
    """Verdict of every file, by type.

    Args:
        files: that can be recommended. alone: that cannot, e.g. folders for another program: each is asked by itself.
    """
    passed = {*good_enough(files, margin), *(entry["type"] for entry in alone if shown(entry, margin))}

    def word(entry: Entry) -> str:
        if entry["type"] in passed:
            return GOOD_ENOUGH
        return WORSE if entry["loss"] > 0 and entry["p_holm"] < LEVEL else NOT_SHOWN

    return {entry["type"]: word(entry) for entry in (*files, *alone)}


# Labels: the loss is a difference of two shares, in which every label may count alike.

IMBALANCE = 1.5
"""Ratio of the commonest to the rarest label (60 : 40) above which labels are imbalanced."""


def label_weights(labels: ArrayLike) -> np.ndarray:
    """Weight of each row, mean 1, with which every label counts alike; a label without a row has no part."""
    _, place, counts = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
    return len(place) / (len(counts) * counts[place])


def balanced_weights(labels: ArrayLike, balanced: bool | None = None) -> np.ndarray | None:
    """`label_weights`, with which a share of right rows is the balanced accuracy, where labels are imbalanced.

    None where they are balanced enough for the plain accuracy.

    Args:
        balanced: which of the two is judged, where it is already known, e.g. of a part of rows by all of them.
    """
    weights = label_weights(labels)
    return weights if (weights.max() > IMBALANCE * weights.min() if balanced is None else balanced) else None


def share_loss(
    change: ArrayLike,
    groups: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    folds: ArrayLike | None = None,
) -> Interval:
    """Loss in the share of right rows, points, with its one-sided limits; the test is `tango_statistic`.

    Args:
        change: (n,) -1 where only the reference is right, 1 where only the candidate is, else 0.
        groups: (n,) near-duplicate cluster of each row. weights: (n,) of `balanced_weights`. folds: (n,) fold of each
            row, of cross-validated rows.
    """
    gain = clustered_score_interval(change, groups, ONE_SIDED, weights, folds)
    return Interval(-100 * gain.estimate + 0.0, -100 * gain.high, -100 * gain.low, ONE_SIDED)


def loss_in_json(loss: Interval) -> dict[str, Any]:
    """ "loss", "loss_interval" (both one-sided limits) and "loss_limit", the upper one; None where there is none."""
    return {**loss.named("loss"), "loss_limit": loss.to_json()[1]}


# What a given number of rows can show.

POWER = 0.8
"""Share of tests that are to find a file good enough."""

_COUNTED = 2_000.0
"""Expected changed rows up to which every table is counted; with more the normal approximation is as good."""


def power(n: int, changed: float, margin: float, loss: float = 0.0) -> float:
    """Probability that n independent rows show a loss below the margin, over all tables that can occur.

    Args:
        changed: share of rows on which exactly one of the two models is right. loss: true loss of accuracy, a fraction
            of either sign, at most that share. margin: a fraction.

    Raises:
        ValueError: n < 1, no margin, or |loss| <= changed <= 1 does not hold.
    """
    if n < 1 or not abs(loss) <= changed <= 1 or not 0 < margin < 1:
        raise ValueError(f"need n >= 1, |loss| <= changed <= 1 and a margin, not {n}, {loss}, {changed}, {margin}")
    z = float(ndtri(1 - LEVEL))
    if n * changed > _COUNTED:
        return float(ndtr((margin - loss) / math.sqrt((changed - loss**2) / n) - z))
    p_loss, p_gain = ((changed + sign * loss) / 2 for sign in (1, -1))
    losses, gains = _likely(n, p_loss)[:, None], _likely(n, p_gain)[None, :]
    below = tango_statistic(-margin, losses, gains, n) > z
    return float(np.sum(_chances(n, losses, gains, p_loss, p_gain) * below))


def rows_for(changed: float, margin: float, loss: float = 0.0) -> int:
    """Fewest independent rows that show it with a probability of `POWER`; see `power`.

    With few changed rows the power zigzags as rows are added: searched upwards by a fifth, then by bisection.

    Raises:
        ValueError: a loss as large as the margin, which no number of rows shows to be below.
    """
    if loss >= margin:
        raise ValueError(f"a loss of {loss} is not below a margin of {margin}")

    def enough(n: int) -> bool:
        return power(n, changed, margin, loss) >= POWER

    # half of what the normal approximation says, or the lattice of a few rows, whichever is less
    low = max(1, min(int(6.2 * changed / (margin - loss) ** 2), int(3.2 / margin)) // 2)
    low, high = (1, 32) if enough(low) else (low, math.ceil(1.2 * low))
    while not enough(high):
        low, high = high, math.ceil(1.2 * high)
    return _least(enough, low, high)


def least_margin(n: float) -> float:
    """The loss that n independent rows exclude when not one of them changed, a fraction: what they can show at best."""
    return -paired_score_interval(0, 0, n, ONE_SIDED).low


def _least(enough: Callable[[int], bool], low: int, high: int) -> int:
    """The least number that is enough, by bisection: `low` is not enough, `high` is."""
    while high - low > 1:
        middle = (low + high) // 2
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
