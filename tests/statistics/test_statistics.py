"""Statistics against scipy, statsmodels, scikit-learn and published numbers."""

from __future__ import annotations

import gc
import math
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from lib.scoring.log_probabilities import Scores
from lib.statistics import classification, intervals, paired
from lib.statistics.intervals import tango_statistic

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def test_import_is_light():
    code = (
        "import sys, lib.statistics\n"
        "print([m for m in ('scipy', 'sklearn', 'evaluate', 'datasets', 'statsmodels', 'pandas') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@given(st.integers(1, 5000), st.floats(0, 1))
def test_wilson_is_statsmodels(n: int, share: float):
    k = round(share * n)
    low, high = proportion_confint(k, n, method="wilson")
    mine = intervals.wilson(k, n)
    assert (mine.low, mine.high) == pytest.approx((low, high), abs=1e-12)
    assert mine.low <= mine.estimate <= mine.high


def test_wilson_published_values():
    assert intervals.wilson(85, 100).to_json() == pytest.approx([0.767, 0.907], abs=5e-4)
    assert intervals.wilson(1140, 1200).to_json() == pytest.approx([0.936, 0.961], abs=5e-4)
    assert intervals.wilson(0, 7).low == 0.0 and intervals.wilson(7, 7).high == 1.0
    with pytest.raises(ValueError, match="k=3, n=2"):
        intervals.wilson(3, 2)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80))
def test_mcnemar_is_statsmodels(pairs: list[tuple[bool, bool]]):
    first, second = np.array(pairs).T
    table = [[np.sum(first & second), np.sum(first & ~second)], [np.sum(~first & second), np.sum(~first & ~second)]]
    mine = paired.mcnemar_exact(first, second)
    assert (mine.b, mine.c) == (table[0][1], table[1][0])
    assert mine.p == pytest.approx(min(1.0, mcnemar(table, exact=True).pvalue), abs=1e-12)


@pytest.mark.parametrize(
    ("b", "c", "p"), [(6, 0, 0.031), (8, 1, 0.039), (10, 2, 0.039), (12, 4, 0.077), (15, 5, 0.041), (0, 0, 1.0)]
)
def test_mcnemar_known_splits(b: int, c: int, p: float):
    first = np.array([True] * b + [False] * c + [True] * 30)
    second = np.array([False] * b + [True] * c + [True] * 30)
    assert paired.mcnemar_exact(first, second).p == pytest.approx(p, abs=5e-4)


@given(P_VALUES)
@settings(max_examples=30, deadline=None)
def test_holm_is_statsmodels(p: list[float]):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "collect", lambda: 0)  # statsmodels calls it every time: a second where torch is loaded
        assert paired.holm(p) == pytest.approx(list(multipletests(p, method="holm")[1]), abs=1e-12)


def test_holm_of_nothing():
    assert paired.holm([]) == []


def test_score_interval_published_value():
    # Airway hyper-responsiveness, n = 21, discordant 7 and 1: Tango's limits in Fagerland, Lydersen & Laake,
    # Stat. Med. 2014;33:2850, table VI: -0.517 to -0.026.
    interval = intervals.paired_score_interval(7, 1, 21, adjustment=0)
    assert interval.estimate == pytest.approx(-6 / 21)
    assert interval.to_json() == pytest.approx([-0.517, -0.026], abs=5e-4)


def test_score_interval_without_discordance():
    z2 = scipy.stats.norm.ppf(0.975) ** 2
    for n in (1, 20, 1200):
        own = intervals.paired_score_interval(0, 0, n, adjustment=0)
        assert own.to_json() == pytest.approx([-z2 / (n + z2), z2 / (n + z2)], abs=1e-9)
    # (n d - a)² = z² n d (1 - d), solved for d
    a, n = 0.25, 1200
    roots = np.roots([n * n + z2 * n, -(2 * a * n + z2 * n), a * a])
    adjusted = intervals.paired_score_interval(0, 0, n)
    assert adjusted.to_json() == pytest.approx([-max(roots), max(roots)], abs=1e-9)
    assert adjusted.high == pytest.approx((z2 + 0.5) / (n + z2), rel=0.01)


@pytest.mark.parametrize(("losses", "gains"), [(9, 2), (4, 0), (3, 3), (30, 12)])
def test_score_statistic_at_zero_is_mcnemars(losses: int, gains: int):
    """Edwards' correction is an adjustment of one row."""
    table = [[100, losses], [gains, 50]]
    for adjustment, corrected in ((0.0, False), (1.0, True)):
        theirs = mcnemar(table, exact=False, correction=corrected)
        if corrected and losses == gains:
            continue  # statsmodels takes |0| - 1 for a distance of one
        found = tango_statistic(0.0, losses, gains, 150 + losses + gains, adjustment)
        assert 2 * scipy.stats.norm.sf(abs(found)) == pytest.approx(theirs.pvalue, abs=1e-12)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 200))
def test_score_interval_is_symmetric_and_holds_the_estimate(losses: int, gains: int, same: int):
    n = losses + gains + same + 1
    here, mirrored = (
        intervals.paired_score_interval(losses, gains, n),
        intervals.paired_score_interval(gains, losses, n),
    )
    assert -1 <= here.low <= here.estimate + 1e-9 and here.estimate - 1e-9 <= here.high <= 1
    assert (here.low, here.high) == pytest.approx((-mirrored.high, -mirrored.low), abs=1e-9)


@pytest.mark.parametrize("method", ["percentile", "BCa"])
def test_bootstrap_is_scipys(method: str):
    values = np.random.default_rng(3).gamma(1.0, size=150) - 0.4  # skewed, so that BCa differs from percentile
    mine = intervals.paired_bootstrap(values, seed=1)
    if method == "BCa":
        means, left_out = intervals.drawn_sums(values[:, None], 10_000, 1)[:, 0] / 150, (values.sum() - values) / 149
        mine = intervals.Interval(mine.estimate, *intervals.bca_limits(means, mine.estimate, left_out))
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method=method, rng=np.random.default_rng(2)
    ).confidence_interval
    assert (mine.low, mine.high) == pytest.approx(tuple(theirs), abs=0.012)
    assert mine.estimate == pytest.approx(values.mean())


def test_bootstrap_draws_whole_clusters():
    rng = np.random.default_rng(0)
    cluster_means = rng.normal(size=60)
    clusters = np.repeat(np.arange(60), 10)
    clustered = intervals.paired_bootstrap(cluster_means[clusters], clusters, seed=5)
    single = intervals.paired_bootstrap(cluster_means[clusters], None, seed=5)
    once = intervals.paired_bootstrap(cluster_means, None, seed=5)
    assert clustered.to_json() == pytest.approx(once.to_json(), abs=1e-12)  # copies of a row add no knowledge
    assert (single.high - single.low) < 0.5 * (clustered.high - clustered.low)


def test_bootstrap_is_seeded_and_refuses_nonsense():
    values = [0, 1, -1, 1, 0, 1, 1, 0]
    assert intervals.paired_bootstrap(values, seed=4) == intervals.paired_bootstrap(values, seed=4)
    assert intervals.paired_bootstrap([0.0] * 9).to_json() == [0.0, 0.0]
    assert intervals.paired_bootstrap([2.0]).to_json() == [2.0, 2.0]
    for bad in ([], [math.nan], [[1.0]]):
        with pytest.raises(ValueError, match="finite"):
            intervals.paired_bootstrap(bad)
    with pytest.raises(ValueError, match="2 clusters for 3"):
        intervals.paired_bootstrap([1, 2, 3], [0, 1])


def test_seed_error_e5_is_not_repeated():
    """TP 44, FP 7, TN 41, FN 8: the replaced system printed recall .88 and F1 .8699."""
    labels = [1] * 44 + [0] * 7 + [0] * 41 + [1] * 8
    predictions = [1] * 44 + [1] * 7 + [0] * 41 + [0] * 8
    report = classification.classification_report(labels, predictions, ["负面", "正面"])
    negative, positive = report.classes
    assert report.confusion == ((41, 7), (8, 44))
    assert (positive.precision, positive.recall, positive.f1) == pytest.approx((0.8627, 0.8462, 0.8544), abs=5e-5)
    assert (negative.precision, negative.recall, negative.f1) == pytest.approx((0.8367, 0.8542, 0.8454), abs=5e-5)
    assert (negative.support, positive.support, report.n) == (48, 52, 100)
    assert report.accuracy.estimate == 0.85
    value = report.to_json()
    assert list(value) == [
        "n",
        "accuracy",
        "accuracy_interval",
        "balanced_accuracy",
        "macro_f1",
        "per_class",
        "confusion",
    ]
    assert list(value["per_class"]) == ["负面", "正面"] and value["confusion"] == [[41, 7], [8, 44]]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=40))
def test_macro_f1_counts_absent_classes_as_zero(pairs: list[tuple[int, int]]):
    true, predicted = zip(*pairs, strict=True)
    report = classification.classification_report(true, predicted, ["a", "b", "c"])
    expected = f1_score(true, predicted, labels=[0, 1, 2], average="macro", zero_division=0)
    assert report.macro_f1 == pytest.approx(expected)
    assert sum(map(sum, report.confusion)) == len(pairs)


def test_report_refuses_foreign_labels():
    with pytest.raises(ValueError, match=r"0\.\.1"):
        classification.classification_report([0, 2], [0, 1], ["a", "b"])
    with pytest.raises(ValueError, match="non-empty"):
        classification.classification_report([], [], ["a", "b"])


def test_calibration_bins():
    result = classification.calibration([0.05, 0.95, 1.0, 0.91], [False, True, True, False])
    assert [b.n for b in result.bins] == [1, 0, 0, 0, 0, 0, 0, 0, 0, 3]
    assert result.bins[9].accuracy == pytest.approx(2 / 3)
    assert result.ece == pytest.approx((0.05 + abs(2 - 2.86)) / 4)
    assert math.isnan(result.bins[4].accuracy)


def test_a_calibrated_model_has_small_ece():
    rng = np.random.default_rng(0)
    p = rng.uniform(0.5, 1, 20_000)
    right = rng.uniform(size=p.size) < p
    assert classification.calibration(p, right).ece < 0.01
    assert classification.calibration(np.full(p.size, 0.99), right).ece == pytest.approx(0.24, abs=0.01)


def test_confidences_are_softmax_over_labels():
    def confidence(log_probs: np.ndarray) -> np.ndarray:
        rows = np.zeros(len(log_probs), dtype=int)
        return Scores([], rows, log_probs, rows, 1.0).probabilities.max(axis=1)

    assert confidence(np.log([[0.1, 0.3], [0.02, 0.02]])) == pytest.approx([0.75, 0.5])
    assert confidence(np.array([[-2000.0, -1000.0]])) == pytest.approx([1.0])


def test_compare_pairs_corrects_for_their_number():
    reference = np.ones(1000, dtype=bool)
    pairs = {"bad": np.arange(1000) >= 40, "hint": np.arange(1000) >= 6, "same": reference}
    result = paired.compare_pairs({name: (reference, own) for name, own in pairs.items()}, None)
    assert result["bad"].verdict == "worse" and result["bad"].losses == 40
    assert result["hint"].p == pytest.approx(0.03125) and result["hint"].p_holm == pytest.approx(0.0625)
    assert result["hint"].verdict == result["same"].verdict == "cannot tell"
    assert result["bad"].to_json()["difference"] == pytest.approx(-0.04)
