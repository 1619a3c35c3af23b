"""Statistics of a comparison on small synthetic scores with known answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.scoring.accuracy import ODDS_LIMIT, f1_difference, f1_interval, label_divergence, macro_f1, right_log_odds
from lib.scoring.log_probabilities import Scores
from lib.scoring.metric import ACCURACY, RowGroups, compare
from lib.statistics.noninferiority import frontier, least_margin


def scores(labels: list[int], predictions: list[int], margin: float = 2.0, n_labels: int = 2) -> Scores:
    """Scores whose predictions are as wanted, each by `margin` nats."""
    log_probs = np.full((len(labels), n_labels), -margin - 1.0)
    log_probs[np.arange(len(labels)), predictions] = -1.0
    ids = [f"r{i}" for i in range(len(labels))]
    return Scores(ids, np.array(labels), log_probs, np.zeros(len(labels), bool), 1.0)


def judge(reference: Scores, others: dict[str, Scores], rows: RowGroups) -> dict[str, dict]:
    return compare(ACCURACY, reference, others, rows, 0)


def plain(n: int, leak_free: np.ndarray | None = None) -> RowGroups:
    return RowGroups(np.arange(n), leak_free)


def changed(labels: list[int], rows: range) -> list[int]:
    return [1 - label if i in rows else label for i, label in enumerate(labels)]


LABELS = [0, 1] * 100


def test_the_numbers_of_six_losses() -> None:
    """6 : 0 has p = 2 · 2⁻⁶ = 0.03125 (shared/FEATURES.md A3)."""
    entry = judge(scores(LABELS, LABELS), {"q": scores(LABELS, changed(LABELS, range(6)))}, plain(200))["q"]
    assert (entry["mcnemar_b"], entry["mcnemar_c"], entry["flips"]) == (6, 0, 6)
    assert entry["mcnemar_p"] == entry["p"] == entry["p_holm"] == 2.0**-5
    assert entry["accuracy_difference"] == pytest.approx(-0.03) and entry["loss"] == pytest.approx(3.0)
    low, high = entry["accuracy_difference_interval"]
    assert low < -0.03 < high < 0
    assert entry["loss_interval"][0] < 3 < entry["loss_limit"] == entry["loss_interval"][1] < -100 * low


def test_holm_is_over_the_ladder() -> None:
    files = {f"q{i}": scores(LABELS, changed(LABELS, range(7))) for i in range(2)}
    entries = judge(scores(LABELS, LABELS), files, plain(200))
    assert [entries[f"q{i}"]["p_holm"] for i in range(2)] == [2.0**-5, 2.0**-5]


def test_lost_log_odds_are_a_warning() -> None:
    """No label changes, but every right answer is less sure."""
    weaker = scores(LABELS, LABELS, 2.0)
    weaker.log_probs[:, 0] += np.random.default_rng(0).normal(0, 0.01, 200)
    for before, warned in ((2.3, True), (2.0 + 0.8 * ODDS_LIMIT, False)):
        entry = judge(scores(LABELS, LABELS, before), {"q": weaker}, plain(200))["q"]
        assert entry["flips"] == 0 and entry["p"] == 1 and entry["loss"] == 0
        assert entry["odds_change_interval"][1] < 0 and entry["odds_warning"] is warned


@pytest.mark.parametrize("n_labels", [2, 3, 4])
def test_a_shift_towards_a_label_moves_no_log_odds(n_labels: int) -> None:
    """Labels 2 : 1 (: 1 …) and a model that leans towards the commonest: nothing was learned or lost."""
    labels = [0, *range(n_labels)] * 30
    reference = scores(labels, labels, 2.0, n_labels)
    leaning = scores(labels, labels, 2.0, n_labels)
    leaning.log_probs[:, 0] += 0.3
    entry = judge(reference, {"q": leaning}, plain(len(labels)))["q"]
    assert entry["odds_change"] == pytest.approx(0, abs=1e-12) and not entry["odds_warning"]
    plain_mean = (right_log_odds(leaning) - right_log_odds(reference)).mean()
    assert abs(plain_mean) > 0.01, "a mean over rows would have called it a change"


def test_imbalanced_labels_count_alike() -> None:
    """30 of 300 rows have the rare label: three of them lost are 5 points of balanced accuracy, not 1."""
    labels = [1] * 30 + [0] * 270
    entry = judge(scores(labels, labels), {"q": scores(labels, changed(labels, range(3)))}, plain(300))["q"]
    assert entry["balanced"] and entry["loss"] == pytest.approx(5.0)
    even = judge(scores(LABELS, LABELS), {"q": scores(LABELS, changed(LABELS, range(3)))}, plain(200))["q"]
    assert not even["balanced"] and even["loss"] == pytest.approx(1.5)
    none_lost = judge(scores(labels, labels), {"q": scores(labels, labels)}, plain(300))["q"]
    assert none_lost["loss_limit"] == pytest.approx(100 * least_margin(60), rel=1e-6), "30 rare rows are worth 60"


def test_the_same_scores_again() -> None:
    reference = scores(LABELS, changed(LABELS, range(20)))
    entries = judge(reference, {"same": reference}, plain(200))
    same = entries["same"]
    assert same["flips"] == same["mcnemar_b"] == same["mcnemar_c"] == 0
    assert same["odds_change"] == same["loss"] == 0 and 0 < same["loss_limit"] < 2
    assert entries[""]["mcnemar_p"] is None and entries[""]["loss_limit"] is None
    assert entries[""]["accuracy"] == same["accuracy"] == 0.9
    assert entries[""].keys() == same.keys()


def test_log_odds_of_three_labels() -> None:
    assert right_log_odds(scores([0, 1, 2], [0, 2, 2], 2.0, 3)).tolist() == [2.0, -1.0, 2.0]


def test_divergence_over_labels_and_the_difference_of_macro_f1() -> None:
    reference, other = scores(LABELS, LABELS), scores(LABELS, changed(LABELS, range(0, 60, 4)), 0.5)
    free = np.arange(200) >= 100
    entries = judge(reference, {"q": other, "same": reference}, plain(200, free))
    found, kept = label_divergence(reference, other), entries["q"]["leak_free"]
    assert entries["q"]["label_kld"] == pytest.approx(found.mean())
    assert kept["label_kld"] == pytest.approx(found[free].mean()) != entries["q"]["label_kld"]
    low, high = entries["q"]["label_kld_interval"]
    assert 0 <= low < found.mean() < high and entries[""]["label_kld"] == 0
    change, (low, high) = entries["q"]["macro_f1_difference"], entries["q"]["macro_f1_difference_interval"]
    assert change == pytest.approx(entries["q"]["macro_f1"] - 1) and low < change < high < 0
    assert entries["same"]["macro_f1_difference"] == 0 and entries["same"]["macro_f1_difference_interval"] is None


def test_the_interval_of_a_macro_f1_difference_covers_the_truth() -> None:
    """Both are right on 80 %, one third of the wrong rows swapped: no difference in truth, paired."""
    rng, inside, widths = np.random.default_rng(3), 0, []
    for trial in range(100):
        labels = rng.integers(0, 2, 200)
        first = np.where(rng.random(200) < 0.8, labels, 1 - labels)
        second = np.where(rng.random(200) < 0.1, rng.permutation(first), first)
        pair = [scores(labels.tolist(), own.tolist()) for own in (second, first)]
        _, limits = f1_difference(*pair, np.arange(200), trial)
        truth = -0.1 * (0.8 - 0.5)
        inside += limits[0] <= truth <= limits[1]
        widths.append(limits[1] - limits[0])
    assert 88 <= inside <= 100 and np.mean(widths) < 0.1


def test_what_one_row_or_one_group_cannot_show_is_null() -> None:
    """JSON has no infinity."""
    import json

    free = np.arange(200) == 5
    seven = {"q": scores(LABELS, changed(LABELS, range(7)))}
    entries = judge(scores(LABELS, LABELS), seven, plain(200, free))
    alone = judge(scores(LABELS, LABELS), seven, RowGroups(np.zeros(200), None))
    json.dumps([entries, alone], allow_nan=False)
    assert entries["q"]["leak_free"]["odds_change_interval"] == [None, None]
    assert alone["q"]["accuracy_difference_interval"] == [-1.0, 1.0] and alone["q"]["loss_limit"] == 100.0
    assert alone["q"]["groups"] == 1 and alone["q"]["label_kld_interval"] == [None, None]


def test_leak_free_rows_apart() -> None:
    """All changes are on leaked rows: no change is left on the others."""
    free = np.arange(200) >= 10
    entries = judge(scores(LABELS, LABELS), {"q": scores(LABELS, changed(LABELS, range(10)))}, plain(200, free))
    assert entries["q"]["loss"] == pytest.approx(5.0) and entries["q"]["leak_free"]["flips"] == 0
    assert entries["q"]["leak_free"]["n"] == 190 and entries["q"]["leak_free"]["accuracy"] == 1.0
    assert judge(scores(LABELS, LABELS), {}, plain(200))[""]["leak_free"] is None
    nothing_free = plain(200, np.zeros(200, bool))
    assert judge(scores(LABELS, LABELS), {}, nothing_free)[""]["leak_free"] is None


def test_clusters_widen_the_interval() -> None:
    """Ten losses that are near-duplicates of one another weigh less than ten of their own."""
    other = {"q": scores(LABELS, changed(LABELS, range(0, 40, 4)))}
    groups = np.array([0 if i in range(0, 40, 4) else i + 1 for i in range(200)])
    alone = judge(scores(LABELS, LABELS), other, plain(200))["q"]["odds_change_interval"]
    together = judge(scores(LABELS, LABELS), other, RowGroups(groups, None))["q"]["odds_change_interval"]
    assert together[0] < alone[0] and together[1] > alone[1]


def test_rows_without_audit() -> None:
    rows = RowGroups.of([{"id": "a"}, {"id": "b", "group": 7, "leaked": True}])
    assert rows.leak_free is None and rows.groups.tolist() == [0, 7]
    assert RowGroups.of([{"leaked": True}, {"leaked": False}]).leak_free.tolist() == [False, True]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=60))
def test_macro_f1_is_that_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    from sklearn.metrics import f1_score

    labels, predictions = (list(column) for column in zip(*pairs, strict=True))
    wanted = f1_score(labels, predictions, labels=[0, 1, 2], average="macro", zero_division=0.0)
    value, (low, high) = f1_interval(scores(labels, predictions, 2.0, 3), np.arange(len(labels)), 0)
    assert value == pytest.approx(wanted) and 0 <= low <= high <= 1


def test_f1_interval_covers_the_truth() -> None:
    """Accuracy 0.8 with even errors: macro-F1 0.8; of 200 samples about 95 % of the intervals hold it."""
    rng, inside = np.random.default_rng(1), 0
    for trial in range(200):
        labels = rng.integers(0, 2, 300)
        predictions = np.where(rng.random(300) < 0.8, labels, 1 - labels)
        _, (low, high) = f1_interval(scores(labels.tolist(), predictions.tolist()), np.arange(300), trial)
        inside += low <= 0.8 <= high
    assert 180 <= inside <= 199


def test_macro_f1_of_an_empty_class() -> None:
    assert macro_f1(np.array([[3.0, 0.0], [0.0, 0.0]])) == 0.5


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=12))
def test_frontier_is_what_nothing_else_beats(points: list[tuple[int, int]]) -> None:
    entries = [{"type": f"t{i}", "bytes": size, "kld_mean": kld} for i, (size, kld) in enumerate(points)]
    chosen = frontier(entries)
    for e in entries:
        beaten = any(
            o["bytes"] <= e["bytes"]
            and o["kld_mean"] <= e["kld_mean"]
            and (o["bytes"], o["kld_mean"]) != (e["bytes"], e["kld_mean"])
            for o in entries
        )
        twins = [o["type"] for o in entries if (o["bytes"], o["kld_mean"]) == (e["bytes"], e["kld_mean"])]
        assert sum(t in chosen for t in twins) == (0 if beaten else 1)


def test_a_file_that_is_larger_by_padding_alone_beats_one_that_loses_more() -> None:
    sizes = {"Q4_0": (91_893_024, 0.256), "mixed": (91_893_440, 0.072), "Q3_K_M": (93_510_000, 0.155)}
    entries = [{"type": name, "bytes": size, "kld_mean": loss} for name, (size, loss) in sizes.items()]
    assert frontier(entries) == ["mixed"]
