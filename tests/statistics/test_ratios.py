"""Weighted means over few groups: the interval belongs to the test, and covers where percentiles do not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lib.statistics import clustered_mean
from lib.statistics.losses import cluster_test
from lib.statistics.ratios import limits, weighted_mean


@pytest.mark.parametrize("count", [3, 4])
def test_few_groups_are_covered_and_interval_and_test_say_the_same(count: int) -> None:
    rng, excluded = np.random.default_rng(count), 0
    for _ in range(400):
        groups = np.repeat(np.arange(count), rng.integers(1, 4, count))
        tokens = rng.integers(40, 80, len(groups))
        change = rng.normal(0, 0.1, count)[groups] + rng.normal(0, 0.05, len(groups))
        found, (p, _) = weighted_mean(change, tokens, groups), cluster_test(change, tokens, groups)
        assert found.excludes_zero() == (p < 0.05)
        excluded += found.excludes_zero()
    assert excluded / 400 < 0.1, "about 0.06 for unequal weights; percentiles of four groups: 0.19"


def test_equal_weights_give_the_clustered_mean() -> None:
    rng = np.random.default_rng(1)
    values, groups = rng.normal(0, 1, 30), rng.integers(0, 9, 30)
    found, known = weighted_mean(values, np.ones(30), groups), clustered_mean(values, groups)
    assert [found.estimate, *found.to_json()] == pytest.approx([known.estimate, *known.to_json()])


@pytest.mark.parametrize("values", [[0.5], [0.1, 0.9], [0.3, 0.3, 0.3], [0.0, 0.0, 0.0]])
def test_no_interval_where_there_is_no_spread_to_see(values: list[float]) -> None:
    found = weighted_mean(values, [7.0, 3.0, 5.0][: len(values)], range(len(values)))
    assert math.isinf(found.low) and math.isinf(found.high) and not found.excludes_zero()
    assert limits(found) is None and math.isfinite(found.estimate)
