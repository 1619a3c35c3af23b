"""The more powerful endpoint near the reference: did the right answers lose log-odds?

Accuracy moves only when a row crosses the line; the margin of the right answer (its log-probability minus the largest
of another answer, nats) moves on every row, so its mean shows a direction with far fewer rows. It never makes a file
equivalent: a user notices accuracy, so accuracy decides that. Both endpoints are corrected together (Holm).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lib.statistics.clustered import cluster_sums, clustered_mean, sign_flip_test
from lib.statistics.intervals import Interval


@dataclass(frozen=True)
class MarginTest:
    """Mean change of the right answer's margin, candidate minus reference, nats.

    Attributes:
        n, clusters: rows, and groups of near-duplicates among them.
        change: mean with its 95 % interval (Student's, from whole clusters).
        p: sign-flip test of the mean, whole clusters exchanged. p_adjusted: after Holm, where several are tested.
        mde: smallest mean change that would be found with 80 % power at this spread, nats, by a test at `alpha`.
    """

    n: int
    clusters: int
    change: Interval
    p: float
    p_adjusted: float
    mde: float

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; the change as its mean and [low, high]; None for what is not finite."""
        value = {**asdict(self), "mde": self.mde if math.isfinite(self.mde) else None}
        return {**value, "change": self.change.estimate, "change_interval": self.change.to_json()}


def margin_test(
    changes: Sequence[float] | np.ndarray,
    clusters: Sequence[Any] | np.ndarray | None = None,
    seed: int = 0,
    alpha: float = 0.05,
) -> MarginTest:
    """Test a mean margin change.

    A sign-flip permutation test of the mean rather than Wilcoxon's: it tests the number that is shown, keeps
    near-duplicates together, and needs no ranks where many changes are equal.

    Args:
        changes: (n,) margin under the candidate minus margin under the reference, nats.
        clusters: (n,) group of each row; None = every row its own.
        alpha: level for the smallest change; where m tests are corrected together by Holm, the first has 0.05 / m.
    """
    from scipy.stats import norm, t

    sums, sizes = cluster_sums(changes, clusters)
    change, groups = clustered_mean(changes, clusters), len(sums)
    p = sign_flip_test(changes, clusters, seed)
    error = (change.high - change.estimate) / t.ppf(0.975, groups - 1) if groups > 1 else np.inf
    mde = float((norm.ppf(1 - alpha / 2) + norm.ppf(0.8)) * error)
    return MarginTest(int(sizes.sum()), groups, change, p, p, mde)
