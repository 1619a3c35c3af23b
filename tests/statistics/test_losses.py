"""Paired losses: the test against scipy's, clusters, the order of the words."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lib.statistics.intervals import Interval, paired_bootstrap
from lib.statistics.losses import cluster_test, compare_losses, loss_verdict
from lib.statistics.paired import holm


def test_single_rows_of_equal_length_are_a_t_test() -> None:
    rng = np.random.default_rng(0)
    change = rng.normal(0.02, 0.1, 60)
    p, mde = cluster_test(change, np.full(60, 7), np.arange(60))
    assert p == pytest.approx(stats.ttest_1samp(change, 0).pvalue)
    error = change.std(ddof=1) / math.sqrt(60)
    assert mde == pytest.approx((stats.t.ppf(0.975, 59) + stats.t.ppf(0.8, 59)) * error)


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


@pytest.mark.parametrize(
    ("low", "high", "p", "words"),
    [
        (0.001, 0.004, 1e-9, "equivalent within 1 %"),
        (0.004, 0.03, 1e-3, "worse"),
        (-0.03, -0.004, 1e-3, "better"),
        (-0.004, 0.03, 0.2, "cannot tell (MDE 2.0 %)"),
        (0.004, 0.03, 0.2, "cannot tell (MDE 2.0 %)"),
    ],
)
def test_words(low: float, high: float, p: float, words: str) -> None:
    assert loss_verdict(Interval((low + high) / 2, low, high), p, 1.0, math.log(1.02)) == words


def test_holm_over_the_candidates_and_the_ratio() -> None:
    rng = np.random.default_rng(3)
    reference, tokens, groups = rng.uniform(1, 3, 50), rng.integers(5, 20, 50), np.arange(50)
    candidates = {"same": reference.copy(), "worse": reference + 0.2 + rng.normal(0, 0.01, 50)}
    found = compare_losses(reference, candidates, tokens, groups, 1.0)
    assert found["same"]["verdict"] == "equivalent within 1 %" and found["same"]["answer_ratio"] == 1.0
    worse = found["worse"]
    assert worse["verdict"] == "worse" and worse["p_holm"] == pytest.approx(2 * worse["p"])
    assert worse["answer_ratio"] == pytest.approx(math.exp(0.2), rel=0.01)


def test_the_interval_is_students_over_groups() -> None:
    change, tokens = np.random.default_rng(4).normal(0.002, 0.01, 25), np.full(25, 9)
    found = compare_losses(np.full(25, 2.0), {"q": 2.0 + change}, tokens, np.arange(25), 1.0)["q"]
    assert found["loss_difference_interval"] == pytest.approx(list(stats.ttest_1samp(change, 0).confidence_interval()))
    sides = [stats.ttest_1samp(change, m, alternative=a).pvalue for m, a in ((-0.00995, "greater"), (0.00995, "less"))]
    assert found["equivalence_p"] == pytest.approx(max(sides), rel=1e-3)


def test_few_groups_are_not_equivalent() -> None:
    """With three groups a bootstrap called 12 to 36 % equivalent that were not."""
    words = []
    for count in (3, 19, 20):
        change = np.random.default_rng(0).normal(0, 1e-4, count)
        words.append(compare_losses(np.full(count, 2.0), {"q": 2.0 + change}, np.full(count, 9), np.arange(count), 1.0))
    assert [found["q"]["verdict"] for found in words] == [
        *("cannot tell (too few groups of rows)", "cannot tell (too few groups of rows)", "equivalent within 1 %")
    ]


def test_detectable_and_equivalent_after_correction() -> None:
    rng = np.random.default_rng(6)
    reference, tokens, groups = rng.uniform(1, 3, 30), rng.integers(5, 20, 30), np.arange(30)
    files = {name: reference + rng.normal(0, 0.02, 30) for name in "abcd"}
    found = compare_losses(reference, files, tokens, groups, 1.0)
    assert found["a"]["mde"] == cluster_test(files["a"] - reference, tokens, groups, 0.05 / 4)[1]
    p = [found[name]["equivalence_p"] for name in "abcd"]
    assert [found[name]["equivalence_p_holm"] for name in "abcd"] == holm(p)


def test_one_group_tells_nothing() -> None:
    """One group has no spread, which must not pass for certainty."""
    reference, tokens = np.array([1.0, 2.0, 1.5]), np.array([5, 6, 7])
    found = compare_losses(reference, {"other": reference + 1e-4}, tokens, np.zeros(3), 1.0)
    assert found["other"]["verdict"] == "cannot tell (too few groups of rows)"
    assert found["other"]["mde"] is None and found["other"]["answer_ratio_interval"] == [None, None]
