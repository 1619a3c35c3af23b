"""Paired losses: the test against scipy's, clusters, the order of the words."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lib.statistics.intervals import paired_bootstrap
from lib.statistics.losses import cluster_test, compare_losses


def test_single_rows_of_equal_length_are_a_t_test() -> None:
    rng = np.random.default_rng(0)
    change = rng.normal(0.02, 0.1, 60)
    assert cluster_test(change, np.full(60, 7), np.arange(60)) == pytest.approx(stats.ttest_1samp(change, 0).pvalue)


def test_copies_are_no_new_evidence() -> None:
    rng = np.random.default_rng(1)
    change, tokens = rng.normal(0.02, 0.1, 40), rng.integers(5, 50, 40)
    once = cluster_test(change, tokens, np.arange(40))
    twice = cluster_test(np.tile(change, 2), np.tile(tokens, 2), np.tile(np.arange(40), 2))
    assert twice == pytest.approx(once)
    alone = paired_bootstrap(change, np.arange(40), weights=tokens)
    copied = paired_bootstrap(np.tile(change, 2), np.tile(np.arange(40), 2), weights=np.tile(tokens, 2))
    assert copied.low == pytest.approx(alone.low) and copied.high == pytest.approx(alone.high)
    assert alone.estimate == pytest.approx((change * tokens).sum() / tokens.sum())


def test_the_interval_covers_the_truth_nineteen_times_in_twenty() -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for trial in range(200):
        tokens, groups = rng.integers(10, 90, 80), np.repeat(np.arange(40), 2)
        change = 0.01 + np.repeat(rng.normal(0, 0.05, 40), 2) + rng.normal(0, 0.02, 80)
        found = paired_bootstrap(change, groups, trial, resamples=1000, weights=tokens)
        hits += found.low <= 0.01 <= found.high
    assert 0.88 <= hits / 200 <= 0.99


def test_holm_over_the_candidates_and_the_ratio() -> None:
    rng = np.random.default_rng(3)
    reference, tokens, groups = rng.uniform(1, 3, 50), rng.integers(5, 20, 50), np.arange(50)
    candidates = {"same": reference.copy(), "worse": reference + 0.2 + rng.normal(0, 0.01, 50)}
    found = compare_losses(reference, candidates, tokens, groups)
    assert found["same"]["loss"] == found["same"]["loss_limit"] == 0.0 and found["same"]["answer_ratio"] == 1.0
    worse = found["worse"]
    assert worse["p_holm"] == pytest.approx(2 * worse["p"])
    assert worse["answer_ratio"] == pytest.approx(math.exp(0.2), rel=0.01)
    assert worse["loss"] == pytest.approx(100 * (worse["answer_ratio"] - 1)) and worse["loss_limit"] > worse["loss"]


def test_limits_are_students_over_groups() -> None:
    change, tokens = np.random.default_rng(4).normal(0.002, 0.01, 25), np.full(25, 9)
    found = compare_losses(np.full(25, 2.0), {"q": 2.0 + change}, tokens, np.arange(25))["q"]
    theirs = stats.ttest_1samp(change, 0)
    assert found["loss_difference_interval"] == pytest.approx(list(theirs.confidence_interval()))
    limit = stats.ttest_1samp(change, 0, alternative="less").confidence_interval(0.95).high
    assert found["loss_limit"] == pytest.approx(100 * math.expm1(limit)) == found["loss_interval"][1]
    margin = math.log1p(found["loss_limit"] / 100)
    assert stats.ttest_1samp(change, margin, alternative="less").pvalue == pytest.approx(0.05)


def test_one_group_tells_nothing() -> None:
    """One group has no spread, which must not pass for certainty."""
    reference, tokens = np.array([1.0, 2.0, 1.5]), np.array([5, 6, 7])
    found = compare_losses(reference, {"other": reference + 1e-4}, tokens, np.zeros(3))
    assert found["other"]["loss_limit"] is None and found["other"]["answer_ratio_interval"] == [None, None]
    assert found["other"]["p"] == 1.0
