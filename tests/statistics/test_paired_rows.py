"""Clustered differences, margins, equivalence, power: against scipy, by counting, and by simulation."""

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
from lib.statistics import verdicts as statistics_verdicts
from lib.statistics.intervals import Interval
from lib.statistics.verdicts import MarginTest

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
    verdicts = [statistics_verdicts.compare(right, one, groups, 1.0).verdict for one in (right, lost)]
    assert verdicts[0].startswith("cannot tell") and verdicts[1].startswith("cannot tell")


@pytest.mark.parametrize("losses", [0, 1, 5])
def test_one_group_of_many_rows_shows_nothing(losses: int):
    right, lost = np.ones(1000, dtype=bool), np.arange(1000) >= losses
    found = statistics_verdicts.compare(right, lost, np.zeros(1000), 1.0)
    assert found.difference.to_json() == [-1.0, 1.0] and found.design_effect == 1000
    assert found.verdict == "cannot tell (MDE 100.0 points)" and found.equivalence_p > 0.05


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
    assert statistics_verdicts.margin_test([1.0, 2.0], [0, 0]).mde == math.inf


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


@pytest.mark.parametrize(
    ("losses", "gains", "n", "margin"), [(3, 5, 1200, 0.01), (12, 4, 400, 0.03), (0, 1, 200, 0.05), (40, 40, 865, 0.02)]
)
def test_equivalence_is_the_score_test(losses: int, gains: int, n: int, margin: float):
    found = paired.equivalence_paired(losses, gains, n, margin)
    low, high = (restricted_score(losses, gains, n, delta) for delta in (-margin, margin))
    worse, better = scipy.stats.norm.sf(low), scipy.stats.norm.cdf(high)
    assert found == pytest.approx(max(worse, better), rel=1e-3)


@given(COUNTS, st.floats(0.005, 0.2))
@settings(max_examples=60, deadline=None)
def test_equivalence_is_the_interval_inside_the_margin(counts: tuple[int, int, int], margin: float):
    losses, gains, n = counts[0], counts[1], sum(counts)
    inside = intervals.paired_score_interval(losses, gains, n, confidence=0.9).within(margin)
    assert (paired.equivalence_paired(losses, gains, n, margin) < 0.05) == inside


def test_equivalence_refuses_nonsense():
    for bad in ((-1, 0, 10, 0.1), (6, 6, 10, 0.1), (1, 1, 10, 0.0)):
        with pytest.raises(ValueError, match="counts within n"):
            paired.equivalence_paired(*bad)


# --- power -----------------------------------------------------------------------------------------------------------


def test_power_counts_every_table():
    """By hand for 12 rows: the chance of every outcome times McNemar's answer."""
    n, share, difference = 12, 0.7, -0.5
    loss, gain, total = 0.6, 0.1, 0.0
    for losses in range(n + 1):
        for gains in range(n + 1 - losses):
            discordant = losses + gains
            p = scipy.stats.binomtest(losses, discordant, 0.5).pvalue if discordant else 1
            if p < 0.05:
                same = n - discordant
                total += scipy.stats.multinomial.pmf([losses, gains, same], n, [loss, gain, 1 - share])
    assert statistics_verdicts.power_mcnemar(n, share, difference) == pytest.approx(total, abs=1e-9)
    assert statistics_verdicts.power_mcnemar(n, share, -difference) == pytest.approx(total, abs=1e-9)
    assert statistics_verdicts.power_mcnemar(50, 0.0, 0.0) == 0.0


def test_power_is_what_simulation_finds():
    rng, n, share, difference = np.random.default_rng(2), 865, 0.03, 0.015
    draws = rng.multinomial(n, [(share + difference) / 2, (share - difference) / 2, 1 - share], size=3000)[:, :2]
    kinds, times = np.unique(draws, axis=0, return_counts=True)
    p = [scipy.stats.binomtest(int(b), int(b + c), 0.5).pvalue for b, c in kinds]
    found = np.average(np.array(p) < 0.05, weights=times)
    assert statistics_verdicts.power_mcnemar(n, share, difference) == pytest.approx(found, abs=0.03)


@pytest.mark.parametrize(("n", "share"), [(50, 0.0), (200, 0.01), (865, 0.02), (1200, 0.05)])
def test_the_detectable_effect_is_detected(n: int, share: float):
    effect = statistics_verdicts.mde_exact(n, share)
    assert statistics_verdicts.power_mcnemar(n, max(share, effect), effect) == pytest.approx(0.8, abs=0.002)
    assert effect >= 6 / n and statistics_verdicts.mde_exact(5, share) == 1.0


def test_rows_needed_and_the_curve():
    needed = statistics_verdicts.rows_needed(0.02, 0.01)
    before, reached = (statistics_verdicts.power_mcnemar(n, 0.02, 0.01) for n in (needed - 1, needed))
    assert before < 0.8 <= reached
    usual = (2.8016 / 0.01) ** 2 * 0.02  # Miettinen's approximation
    assert usual < needed < 1.15 * usual
    curve = [statistics_verdicts.power_mcnemar(n, 0.02, 0.01) for n in range(200, 2000, 200)]
    assert curve == sorted(curve)
    for bad in ((0.02, 0.0), (0.01, 0.02)):
        with pytest.raises(ValueError, match="difference"):
            statistics_verdicts.rows_needed(*bad)


def inside(n: int, share: float, difference: float, margin: float, one_sided: bool) -> float:
    """The chance that the interval lies inside the margin, table by table, from the interval itself."""
    loss, gain, total = (share - difference) / 2, (share + difference) / 2, 0.0
    for losses in range(n + 1):
        for gains in range(n + 1 - losses):
            chance = scipy.stats.multinomial.pmf([losses, gains, n - losses - gains], n, [loss, gain, 1 - share])
            if chance > 1e-9:
                interval = intervals.paired_score_interval(losses, gains, n)
                total += chance * (interval.low > -margin if one_sided else interval.within(margin))
    return total


@pytest.mark.parametrize(("difference", "one_sided"), [(0.0, False), (-0.04, False), (-0.04, True), (0.04, True)])
def test_power_of_equivalence_counts_every_table(difference: float, one_sided: bool):
    expected = inside(40, 0.1, difference, 0.2, one_sided)
    assert statistics_verdicts.power_inside(40, 0.1, difference, 0.2, one_sided) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("share", "difference", "margin", "one_sided"),
    [
        *((1 / 200, 0.0, 0.01, False), (0.01, 0.0, 0.01, False), (0.01, -0.0025, 0.01, False)),
        *((0.1, 0.0, 0.01, False), (0.02, -0.005, 0.01, True), (0.02, 0.005, 0.01, True), (0.2, -0.009, 0.01, False)),
    ],
)
def test_rows_for_equivalence_have_the_power_they_promise(share, difference, margin, one_sided):
    n = statistics_verdicts.rows_for_inside(share, difference, margin, one_sided)
    assert statistics_verdicts.power_inside(n, share, difference, margin, one_sided) >= 0.79
    assert statistics_verdicts.power_inside(round(0.8 * n), share, difference, margin, one_sided) < 0.8
    if n < 20_000:  # against draws, by the interval that the verdict takes
        draws = np.random.default_rng(5).multinomial(
            n, [(share - difference) / 2, (share + difference) / 2, 1 - share], 400
        )
        kinds, times = np.unique(draws[:, :2], axis=0, return_counts=True)
        found = [intervals.paired_score_interval(int(b), int(c), n) for b, c in kinds]
        hits = [one.low > -margin if one_sided else one.within(margin) for one in found]
        assert np.average(hits, weights=times) > 0.72


def test_many_discordant_rows_are_approximated_alike():
    below, above = (statistics_verdicts.power_inside(n, 0.05, -0.007, 0.01) for n in (39_990, 40_010))
    assert below == pytest.approx(above, abs=0.006)
    with pytest.raises(ValueError, match="not inside"):
        statistics_verdicts.rows_for_inside(0.02, -0.01, 0.01)


def test_the_detectable_effect_is_that_of_holms_first_step():
    reference, lost = np.ones(400, dtype=bool), np.arange(400) >= 6
    alone, among = (
        statistics_verdicts.compare_all(reference, {f"q{i}": lost for i in range(k)}, None, 1.0) for k in (1, 5)
    )
    assert alone["q0"].mde == statistics_verdicts.mde_exact(400, 6 / 400)
    assert among["q0"].mde == statistics_verdicts.mde_exact(400, 6 / 400, alpha=0.01) > alone["q0"].mde
    changes = {f"q{i}": np.random.default_rng(i).normal(size=400) for i in range(5)}
    both = statistics_verdicts.compare_all(reference, dict.fromkeys(changes, lost), None, 1.0, margin_changes=changes)[
        "q0"
    ]
    assert both.mde == statistics_verdicts.mde_exact(400, 6 / 400, alpha=0.005)
    assert both.margin.mde == statistics_verdicts.margin_test(changes["q0"], alpha=0.005).mde


# --- margins and verdicts --------------------------------------------------------------------------------------------


def test_margins_against_scipy():
    values = np.random.default_rng(4).normal(-0.2, 1, 200)
    found = statistics_verdicts.margin_test(values, seed=1)
    theirs = scipy.stats.ttest_1samp(values, 0)
    assert found.change.to_json() == pytest.approx(list(theirs.confidence_interval()))
    assert found.p == pytest.approx(theirs.pvalue, abs=0.01)
    assert found.mde == pytest.approx(2.8016 * values.std(ddof=1) / math.sqrt(200), rel=1e-4)
    assert statistics_verdicts.margin_test(np.zeros(30)).p == 1.0


@pytest.mark.parametrize(
    ("difference", "change", "p", "words"),
    [
        (-0.002, -0.3, 0.001, "worse"),
        (0.0, 0.3, 0.001, "better"),
        (0.002, -0.3, 0.001, "cannot tell (MDE 1.2 points)"),  # accuracy points the other way
        (-0.002, -0.3, 0.06, "cannot tell (MDE 1.2 points)"),
        (-0.002, -0.05, 0.001, "cannot tell (MDE 1.2 points)"),  # its interval holds 0
    ],
)
def test_margins_decide_what_accuracy_leaves_open(difference: float, change: float, p: float, words: str):
    margin = MarginTest(Interval(change, change - 0.1, change + 0.1), p, p, 0.1)
    open_question = Interval(difference, difference - 0.02, difference + 0.02)
    assert statistics_verdicts.verdict(open_question, 0.5, 1.0, 0.012, margin=margin) == words
    narrow = Interval(difference, difference - 0.005, difference + 0.005)
    assert statistics_verdicts.verdict(narrow, 0.5, 1.0, 0.012, margin=margin) == "equivalent within 1 point"


def test_a_certain_difference_inside_the_margin_is_equivalent():
    """14 losses of 5,000: significant, and far below one point."""
    reference, lost = np.ones(5000, dtype=bool), np.arange(5000) >= 14
    found = statistics_verdicts.compare(reference, lost, None, 1.0)
    assert found.p_adjusted < 0.001 and (found.verdict, found.endpoint) == ("equivalent within 1 point", "accuracy")
    entry = {"verdict": found.verdict, "mcnemar_p_holm": found.p_adjusted, "accuracy_difference": -0.0028}
    entry["accuracy_difference_interval"] = found.difference.to_json()
    assert (
        statistics_verdicts.in_words(entry) == "equivalent within 1 point (a difference of -0.28 points is significant)"
    )
    assert statistics_verdicts.in_words({**entry, "mcnemar_p_holm": 0.2}) == "equivalent within 1 point"


def test_equivalence_is_also_corrected():
    reference = np.ones(600, dtype=bool)
    found = statistics_verdicts.compare_all(reference, {"a": reference, "b": reference}, None, 1.0)
    assert found["a"].verdict == "equivalent within 1 point" and 0.0 < found["a"].equivalence_p < 0.025
    assert found["a"].equivalence_p_adjusted == 2 * found["a"].equivalence_p


def test_holm_counts_both_endpoints():
    reference, lost = np.ones(200, dtype=bool), np.ones(200, dtype=bool)
    lost[:6] = False
    alone = statistics_verdicts.compare_all(reference, {"q": lost}, None, 1.0)["q"]
    both = statistics_verdicts.compare_all(reference, {"q": lost}, None, 1.0, margin_changes={"q": np.zeros(200)})["q"]
    assert (alone.p_adjusted, alone.verdict, alone.margin) == (0.03125, "worse", None)
    assert both.p_adjusted == 0.0625 and both.margin.p_adjusted == 1 and both.verdict.startswith("cannot tell")
    assert both.to_json()["margin"]["p"] == 1.0 and alone.to_json()["margin"] is None
    assert alone.equivalence_p > 0.05


def test_near_duplicates_take_the_word_back():
    """Eight losses in one group of copies are one loss."""
    reference, copies = np.ones(400, dtype=bool), np.ones(400, dtype=bool)
    copies[:8] = False
    groups = np.maximum(np.arange(400) - 7, 0)
    assert statistics_verdicts.compare(reference, copies, None, 1.0).verdict == "worse"
    grouped = statistics_verdicts.compare(reference, copies, groups, 1.0)
    assert grouped.verdict.startswith("cannot tell") and grouped.p_adjusted == 1.0 and grouped.p < 0.01
    assert grouped.design_effect > 5 and grouped.difference.high > 0


def test_several_labels_are_compared_by_right_and_wrong():
    """Three labels: a changed wrong answer that stays wrong counts nothing."""
    labels, first, second = np.array([0, 1, 2, 2]), np.array([0, 0, 2, 1]), np.array([0, 2, 2, 2])
    found = statistics_verdicts.compare(first == labels, second == labels, None, 1.0)
    assert (found.losses, found.gains, found.n) == (0, 1, 4)


# --- simulation: a small part of benchmarks/simulate_statistics.py ---------------------------------------------------


@pytest.mark.parametrize(("n", "share"), [(200, 0.05), (865, 0.02), (1200, 0.01)])
def test_false_alarms_and_coverage_are_counted(n: int, share: float):
    """Exact figures, every table counted."""
    nothing, half = simulation.exact(n, share, 0.0), simulation.exact(n, share, -share / 2)
    assert nothing["worse"] < 0.025 and nothing["better"] == pytest.approx(nothing["worse"])
    for found in (nothing, half):
        assert 0.945 <= found["coverage"] <= 0.965
        assert sum(found[word] for word in ("worse", "better", "equivalent", "cannot tell")) == pytest.approx(
            1, abs=1e-2
        )
    if share >= 0.01:
        assert simulation.exact(n, share, -0.01)["equivalent"] < 0.05


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
    assert found["student"] > 0.92 and found["false_alarm"] < 0.08
