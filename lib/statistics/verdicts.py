"""From tests and intervals to the words a report may use; "no loss" is not one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri

from lib.statistics.intervals import Interval
from lib.statistics.paired import (
    cluster_mean,
    clustered_score_interval,
    design_effect,
    equivalence_paired,
    holm,
    mcnemar_exact,
    sign_flip_test,
)
from lib.statistics.power import mde_exact

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
        difference = {"difference": self.difference.estimate, "difference_interval": self.difference.to_json()}
        return {**asdict(self), **difference, "endpoint": self.endpoint}


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
