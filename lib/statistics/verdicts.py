"""From tests and intervals to the words a report may use; "no loss" is not one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lib.statistics.intervals import Interval, paired_bootstrap, paired_score_interval
from lib.statistics.paired import holm, mcnemar_exact, mde_paired, smallest_significant


@dataclass(frozen=True)
class PairedComparison:
    """A candidate against the reference on the same rows.

    Attributes:
        n: rows.
        losses, gains: rows only the reference, only the candidate got right.
        difference: accuracy of the candidate minus the reference's, a fraction. Its limits are the wider of the
            clustered bootstrap (near-duplicates count once) and Tango's score interval (which does not vanish when
            no row changed).
        p: exact McNemar. p_adjusted: after Holm over the candidates compared together.
        mde: smallest difference these rows could have shown with 80 % power, a fraction.
        verdict: "worse" | "better" | "equivalent within δ" | "cannot tell (MDE x)".
    """

    n: int
    losses: int
    gains: int
    difference: Interval
    p: float
    p_adjusted: float
    mde: float
    verdict: str

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; the interval as [low, high]."""
        value = asdict(self)
        value["difference"] = self.difference.estimate
        value["difference_interval"] = self.difference.to_json()
        return value


def verdict(difference: Interval, p_adjusted: float, margin_points: float, mde: float, alpha: float = 0.05) -> str:
    """The words that test, interval and sample size allow.

    "worse" and "better" need both the adjusted p below alpha and an interval without zero; "equivalent" needs the
    whole interval inside ±margin; everything else is "cannot tell".

    Args:
        difference: candidate minus reference, fractions.
        margin_points: what counts as equivalent, in accuracy points.
        mde: minimum detectable effect, a fraction.
    """
    if p_adjusted < alpha and difference.excludes_zero():
        return "worse" if difference.estimate < 0 else "better"
    if difference.within(margin_points / 100):
        return f"equivalent within {margin_points:g} {'point' if margin_points == 1 else 'points'}"
    return f"cannot tell (MDE {100 * mde:.1f} points)"


def compare_all(
    reference_correct: Sequence[bool] | np.ndarray,
    candidates: Mapping[str, Sequence[bool] | np.ndarray],
    groups: Sequence[Any] | np.ndarray | None,
    margin_points: float,
    seed: int = 0,
) -> dict[str, PairedComparison]:
    """Compare every candidate with the reference on the same rows, Holm-corrected over the candidates.

    Args:
        reference_correct: (n,) right or wrong.
        candidates: name -> (n,) right or wrong.
        groups: (n,) near-duplicate cluster of each row; None = every row its own.
        margin_points: equivalence margin in accuracy points.
    """
    reference = np.asarray(reference_correct, dtype=bool)
    tests = {name: mcnemar_exact(reference, correct) for name, correct in candidates.items()}
    adjusted = holm([test.p for test in tests.values()])
    result = {}
    for (name, test), p_adjusted in zip(tests.items(), adjusted, strict=True):
        n = len(reference)
        change = np.asarray(candidates[name], dtype=np.float64) - reference
        drawn = paired_bootstrap(change, groups, seed)
        score = paired_score_interval(test.b, test.c, n)
        difference = Interval(drawn.estimate, min(drawn.low, score.low), max(drawn.high, score.high))
        # Even in the best case fewer discordant rows than this cannot become significant.
        mde = max(mde_paired(n, (test.b + test.c) / n), smallest_significant() / n)
        words = verdict(difference, p_adjusted, margin_points, mde)
        result[name] = PairedComparison(n, test.b, test.c, difference, test.p, p_adjusted, mde, words)
    return result


def compare(
    reference_correct: Sequence[bool] | np.ndarray,
    candidate_correct: Sequence[bool] | np.ndarray,
    groups: Sequence[Any] | np.ndarray | None,
    margin_points: float,
    seed: int = 0,
) -> PairedComparison:
    """One candidate against the reference; see `compare_all`."""
    return compare_all(reference_correct, {"candidate": candidate_correct}, groups, margin_points, seed)["candidate"]
