"""Clustered differences and paired comparisons: against scipy, by counting, and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import simulate_statistics as simulation
from lib.statistics import intervals, paired
from lib.statistics.noninferiority import balanced_weights, share_loss
from lib.statistics.paired import cluster_mean, fold_effect

COUNTS = st.tuples(st.integers(0, 25), st.integers(0, 25), st.integers(1, 300))


def changes(losses: int, gains: int, same: int) -> np.ndarray:
    return np.repeat([-1, 1, 0], [losses, gains, same])


# --- rows in clusters ------------------------------------------------------------------------------------------------


def test_copies_of_rows_add_nothing():
    """Every row four times, in one group: the interval and the p-value of the rows once."""
    once = changes(9, 2, 89)
    four, groups = np.repeat(once, 4), np.repeat(np.arange(100), 4)
    assert paired.design_effect(four, groups) == pytest.approx(4, rel=0.01)
    copied, single = paired.clustered_score_interval(four, groups), paired.clustered_score_interval(once)
    assert copied.to_json() == pytest.approx(single.to_json(), abs=5e-4)
    assert copied.estimate == pytest.approx(-0.07)
    assert paired.sign_flip_test(four, groups) == pytest.approx(paired.sign_flip_test(once), abs=1e-12)
    student = paired.clustered_mean(four, groups)
    reference = scipy.stats.ttest_1samp(once, 0).confidence_interval()
    assert student.to_json() == pytest.approx(list(reference))


def test_design_effect_without_a_changed_row_is_the_largest_possible():
    groups = np.array([0, 0, 0, 1, 2])
    assert paired.design_effect(np.zeros(5), groups) == paired.copies_effect(groups, 5) == (9 + 1 + 1) / 5
    assert paired.design_effect(np.zeros(5)) == 1.0
    wide, narrow = (paired.clustered_score_interval(np.zeros(5, int), g) for g in (groups, None))
    assert wide.low < narrow.low < 0 and narrow.to_json() == intervals.paired_score_interval(0, 0, 5).to_json()


@st.composite
def grouped_changes(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Changes of rows in groups of any sizes, some groups changed as a whole."""
    sizes = draw(st.lists(st.integers(1, 12), min_size=2, max_size=60))
    changed = draw(st.lists(st.tuples(st.integers(0, 59), st.sampled_from([-1, 0, 1]), st.booleans()), max_size=12))
    groups, change = np.repeat(np.arange(len(sizes)), sizes), np.zeros(sum(sizes), dtype=int)
    for group, sign, whole in changed:
        own = np.flatnonzero(groups == group % len(sizes))
        change[own if whole else own[:1]] = sign
    return change, groups


@given(grouped_changes(), st.integers(0, 2**20))
@settings(max_examples=150, deadline=None)
def test_one_more_lost_row_is_never_evidence_for_the_file(rows: tuple[np.ndarray, np.ndarray], place: int):
    """The design effect must not fall so far that the lower limit rises."""
    change, groups = rows
    same = np.flatnonzero(change == 0)
    if not len(same):
        return
    lost = change.copy()
    lost[same[place % len(same)]] = -1
    before, after = (paired.clustered_score_interval(one, groups) for one in (change, lost))
    assert after.low <= before.low + 1e-9 and after.high <= max(before.high, 0.0) + 0.02


@pytest.mark.parametrize("n", [500, 550, 600])
def test_one_lost_row_does_not_make_a_file_equivalent(n: int):
    """A bound for no change, and 1 for a single changed row, called a file equivalent because it had lost a row."""
    groups = np.arange(n) // 2
    right, lost = np.ones(n, dtype=bool), np.arange(n) < n - 1
    limits = [share_loss(one.astype(int) - right, groups).high for one in (right, lost)]
    assert 1.0 < limits[0] < limits[1]


@pytest.mark.parametrize("losses", [0, 1, 5])
def test_one_group_of_many_rows_shows_nothing(losses: int):
    right, lost = np.ones(1000, dtype=bool), np.arange(1000) >= losses
    found = compared(right, lost, np.zeros(1000))
    assert found.difference.to_json() == [-1.0, 1.0] and found.design_effect == 1000
    assert found.verdict == "cannot tell" and share_loss(lost.astype(int) - right, np.zeros(1000)).high == 100


def test_shares_of_rows_in_clusters():
    """Rows of their own: Wilson's interval. Copies: that of the rows once. All hits: an interval all the same."""
    hits = np.arange(200) % 20 > 0
    assert paired.clustered_share(hits) == intervals.wilson(190, 200)
    copied = paired.clustered_share(np.repeat(hits, 5), np.repeat(np.arange(200), 5))
    assert copied.to_json() == pytest.approx(intervals.wilson(190, 200).to_json(), rel=0.002)
    tokens = np.random.default_rng(0).random(8000) > 0.03  # of 40 documents, no copies
    wide, narrow = paired.clustered_share(tokens, np.arange(8000) // 200), intervals.wilson(tokens.sum(), 8000)
    assert 1 <= (wide.high - wide.low) / (narrow.high - narrow.low) < 1.6
    whole = paired.clustered_share(np.ones(800), np.repeat(np.arange(40), 20))
    assert whole.to_json() == pytest.approx(intervals.wilson(40, 40).to_json())


def test_groups_that_disagree_do_not_narrow_the_interval():
    """A gain and a loss in each group would give a variance of nothing: the effect stays at least 1."""
    cancelling, groups = np.tile([-1, 1], 200), np.arange(400) // 2
    assert paired.design_effect(cancelling, groups) == 1.0


@given(COUNTS)
@settings(max_examples=40, deadline=None)
def test_sign_flips_of_single_rows_are_mcnemar(counts: tuple[int, int, int]):
    losses, gains, same = counts
    change = changes(losses, gains, same)
    exact = paired.mcnemar_exact(change <= 0, change >= 0).p
    found = paired.sign_flip_test(change, seed=3)
    assert found == pytest.approx(exact, abs=1e-9 if losses + gains <= 13 else 0.025)


@pytest.mark.parametrize("n", [9, 60])
def test_sign_flips_are_scipys_permutation_test(n: int):
    values = np.random.default_rng(n).normal(0.25, 1, n)
    theirs = scipy.stats.permutation_test(
        (values, np.zeros(n)), lambda a, b, axis: np.mean(a - b, axis=axis), permutation_type="samples", vectorized=True
    )
    assert paired.sign_flip_test(values, seed=1) == pytest.approx(theirs.pvalue, abs=1e-9 if n == 9 else 0.015)
    assert paired.sign_flip_test(values, seed=1) == paired.sign_flip_test(values, seed=1)


def test_sign_flips_see_a_shift_and_no_change():
    shifted = np.random.default_rng(0).normal(0.5, 1, 300)
    assert paired.sign_flip_test(shifted) == 1e-4  # the least that 9,999 flips can give
    assert paired.sign_flip_test(np.zeros(50)) == 1.0
    with pytest.raises(ValueError, match="2 clusters for 3"):
        paired.sign_flip_test([1, 2, 3], [0, 1])


def test_one_cluster_shows_no_spread():
    alone = paired.clustered_mean([1.0, 2.0], [0, 0])
    assert (alone.estimate, alone.low, alone.high) == (1.5, -math.inf, math.inf) and alone.to_json() == [None, None]


def test_bootstrap_t_is_skewed_as_the_values_are():
    values = np.random.default_rng(5).exponential(size=40)
    interval = paired.clustered_bootstrap_t(values, seed=2)
    student = paired.clustered_mean(values)
    assert interval.high - interval.estimate > 1.15 * (interval.estimate - interval.low)
    assert interval.low < student.estimate < interval.high and interval.estimate == student.estimate
    again = paired.clustered_bootstrap_t(np.repeat(values, 3), np.repeat(np.arange(40), 3), seed=2)
    assert again.to_json() == pytest.approx(interval.to_json())
    assert paired.clustered_bootstrap_t([2.0] * 30).to_json() == [2.0, 2.0]


# --- equivalence -----------------------------------------------------------------------------------------------------


def restricted_score(losses: int, gains: int, n: int, delta: float) -> float:
    """The score statistic with the restricted maximum found numerically, not by the closed form."""
    cells = np.array([losses, gains, n - losses - gains])

    def loss(q: float) -> float:
        p = np.array([q, q + delta, 1 - 2 * q - delta])
        return -float(np.sum(scipy.special.xlogy(cells, p)))

    low, high = max(0.0, -delta), (1 - delta) / 2
    q = scipy.optimize.minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-14}).x
    distance = gains - losses - n * delta
    shortened = math.copysign(max(0.0, abs(distance) - 0.25), distance)  # a quarter of a row, for continuity
    return shortened / math.sqrt(n * (2 * q + delta - delta**2))


# --- the comparison --------------------------------------------------------------------------------------------------


def compared(
    reference: np.ndarray, candidate: np.ndarray, groups: np.ndarray | None = None, **more
) -> paired.PairedComparison:
    return paired.compare_pairs({"q": (reference, candidate)}, groups, **more)["q"]


def test_six_rows_are_the_fewest_that_are_significant():
    right = np.ones(200, dtype=bool)
    for lost, words in ((6, "worse"), (5, "cannot tell")):
        found = compared(right, np.arange(200) >= lost)
        assert found.p == found.p_holm == found.mcnemar_p == 2.0 ** (1 - lost) and found.verdict == words
    assert compared(np.arange(200) >= 6, right).verdict == "better"
    both = paired.compare_pairs(dict.fromkeys("ab", (right, np.arange(200) >= 6)), None)
    assert both["a"].p_holm == 2 * both["a"].p and both["a"].verdict == "cannot tell"


def test_near_duplicates_take_the_word_back():
    """Eight losses in one group of copies are one loss."""
    reference, copies = np.ones(400, dtype=bool), np.ones(400, dtype=bool)
    copies[:8] = False
    groups = np.maximum(np.arange(400) - 7, 0)
    assert compared(reference, copies).verdict == "worse"
    grouped = compared(reference, copies, groups)
    assert grouped.verdict == "cannot tell" and grouped.p == 1.0 and grouped.mcnemar_p < 0.01
    assert grouped.design_effect > 5 and grouped.difference.high > 0


def test_several_labels_are_compared_by_right_and_wrong():
    """Three labels: a changed wrong answer that stays wrong counts nothing."""
    labels, first, second = np.array([0, 1, 2, 2]), np.array([0, 0, 2, 1]), np.array([0, 2, 2, 2])
    found = compared(first == labels, second == labels)
    assert (found.losses, found.gains, found.n) == (0, 1, 4)


def test_weights_are_counted_in_p_and_interval():
    """Ten rare rows in 110: each weighs 5.5, so losing two of them is worse than losing two of the others."""
    labels = np.repeat([0, 1], [100, 10])
    weights, right = balanced_weights(labels), np.ones(110, dtype=bool)
    rare, common = right & (np.arange(110) < 108), right & (np.arange(110) >= 2)
    lost, few = compared(right, rare, None, weights=weights), compared(right, common, None, weights=weights)
    assert lost.difference.estimate == pytest.approx(-0.1) and few.difference.estimate == pytest.approx(-0.01)
    assert lost.design_effect > few.design_effect > 1 and lost.losses == few.losses == 2
    six = compared(right, np.arange(110) >= 6, None, weights=weights)
    assert six.p == pytest.approx(2.0**-5), "six rows of one weight are McNemar's six"


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from([-1, 0, 0, 1])), min_size=2, max_size=40))
@settings(max_examples=60, deadline=None)
def test_weights_of_one_are_no_weights(rows: list[tuple[int, int]]):
    groups, change = (np.array(column) for column in zip(*rows, strict=True))
    ones = np.ones(len(rows))
    assert paired.copies_effect(groups, len(rows), ones) == pytest.approx(paired.copies_effect(groups, len(rows)))
    plain = paired.clustered_score_interval(change, groups)
    assert paired.clustered_score_interval(change, groups, weights=ones).to_json() == pytest.approx(plain.to_json())


# --- simulation: a small part of benchmarks/simulate_statistics.py ---------------------------------------------------


@pytest.mark.parametrize(("n", "share"), [(200, 0.05), (865, 0.02), (1200, 0.01)])
def test_false_alarms_and_coverage_are_counted(n: int, share: float):
    """Exact figures, every table counted."""
    nothing, half = simulation.exact(n, share, 0.0), simulation.exact(n, share, -share / 2)
    assert nothing["worse"] < 0.025
    for found in (nothing, half):
        assert 0.945 <= found["coverage"] <= 0.965
        assert sum(found[word] for word in ("worse", "better", "good enough", "not shown")) == pytest.approx(
            1, abs=1e-2
        )
    if share >= 0.01:
        assert 0.03 < simulation.exact(n, share, -0.01)["good enough"] <= 0.05


def test_few_discordant_rows_are_covered():
    """Expected 4 to 10, where Tango's own interval falls below 0.94; with fewer, every interval covers more."""
    for expected in (4.0, 6.0, 9.0):
        found = simulation.few_discordant(expected)
        assert found["coverage, least"] >= 0.942 > 0.94 > found["Tango's own, least"]
        assert 0.95 < found["coverage"] < 0.98 and found["coverage"] > found["Tango's own"]
    assert simulation.few_discordant(1.0)["coverage, least"] > 0.99


def test_groups_and_margins_keep_their_word():
    rng = np.random.default_rng(8)
    grouped = simulation.clustered(400, 0.05, 0.0, "fours", 300, rng)
    assert grouped["coverage"] > 0.92 > grouped["coverage_without_groups"] and grouped["worse"] < 0.05
    found = simulation.margins(400, "one in ten large", 300, rng)
    assert found["student"] > 0.92


def test_folds_widen_by_what_their_models_differ():
    rng, k = np.random.default_rng(3), 5
    folds = np.repeat(np.arange(k), 4000)
    means = rng.normal(0, 1, k)
    found = cluster_mean(means[folds] + rng.normal(0, 0.1, len(folds)), folds=folds)
    # Nadeau & Bengio's variance of a mean over k folds; the rows add next to nothing
    assert found.error**2 == pytest.approx(np.var(means, ddof=1) * (1 / k + 1 / (k - 1)), rel=0.02)
    alike = np.tile([1.0, 0.0, 0.0, -1.0], 5000)
    assert fold_effect(alike, folds) == 1.0 == fold_effect(alike * 0, folds)
    assert fold_effect(alike, np.zeros(len(alike))) == 1.0, "a single fold"


def test_limits_of_cross_validated_rows_hold_where_models_differ():
    rng, k, n, margin, spread, shown = np.random.default_rng(4), 5, 600, 0.01, 0.01, np.zeros(2)
    folds = np.arange(n) % k
    for _ in range(400):
        own = spread * (rng.normal() * k**-0.5 + rng.normal(size=k) * (1 - 1 / k) ** 0.5)  # models share training rows
        lost = (0.03 + np.clip(margin + own, -0.03, 0.03)[folds]) / 2
        draw = rng.random(n)
        change = np.where(draw < lost, -1, np.where(draw < 0.03, 1, 0))
        limits = [share_loss(change, folds=given).high for given in (None, folds)]
        shown += np.less(limits, 100 * margin)
    assert shown[1] / 400 <= 0.06 < shown[0] / 400


def test_worse_needs_more_than_rows_where_folds_differ():
    folds = np.arange(500) % 5
    change = np.where((folds == 0) & (np.arange(500) < 200), -1, 0)  # one of five models lost 40 rows
    right = np.ones(500, dtype=int)
    plain, folded = (
        paired.compare_pairs({"q": (right, right + change)}, None, folds=given)["q"] for given in (None, folds)
    )
    assert plain.p < 1e-6 < 0.05 < folded.p and folded.design_effect > 5
    assert plain.verdict == "worse" and folded.verdict == "cannot tell"
