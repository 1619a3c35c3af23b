"""Weighted means over few groups: the interval belongs to the test, and covers where percentiles do not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lib.statistics.intervals import wilson
from lib.statistics.losses import averaged_share, cluster_test, limits, weighted_mean
from lib.statistics.paired import clustered_mean


@pytest.mark.parametrize("count", [3, 4])
def test_few_groups_are_covered_and_interval_and_test_say_the_same(count: int) -> None:
    rng, excluded = np.random.default_rng(count), 0
    for _ in range(400):
        groups = np.repeat(np.arange(count), rng.integers(1, 4, count))
        tokens = rng.integers(40, 80, len(groups))
        change = rng.normal(0, 0.1, count)[groups] + rng.normal(0, 0.05, len(groups))
        found, p = weighted_mean(change, tokens, groups), cluster_test(change, tokens, groups)
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


def test_a_share_has_a_width_at_its_ends_and_is_near_wilsons_between() -> None:
    for value in (0.0, 1.0):
        assert averaged_share([value] * 40, range(40)).to_json() == pytest.approx(wilson(40 * value, 40).to_json())
    copies = averaged_share([1.0] * 40, np.repeat(np.arange(10), 4))
    assert copies.to_json() == pytest.approx(wilson(10, 10).to_json()), "copies count once"
    right = np.repeat([0.0, 1.0], [40, 360])
    assert averaged_share(right, range(400)).to_json() == pytest.approx(wilson(360, 400).to_json(), abs=1e-3)
    assert limits(averaged_share([1.0, 0.0], [0, 1])) is None


def test_shares_of_averaged_seeds_are_covered() -> None:
    rng, hits = np.random.default_rng(5), 0
    for _ in range(400):
        ease = rng.beta(9, 1, 30)[np.repeat(np.arange(30), 2)]
        found = averaged_share(rng.binomial(3, ease) / 3, np.repeat(np.arange(30), 2))
        hits += found.low <= 0.9 <= found.high
    assert hits / 400 >= 0.91
