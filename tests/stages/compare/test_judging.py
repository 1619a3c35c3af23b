"""Statistics of a comparison on small synthetic scores with known answers, and the recommendation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.scoring.accuracy import f1_difference, f1_interval, label_divergence, macro_f1, right_margins
from lib.scoring.log_probabilities import Scores
from lib.scoring.metric import ACCURACY, RowGroups, compare
from lib.stages.compare import recommend as choosing
from lib.statistics.intervals import paired_score_interval
from lib.statistics.verdicts import frontier


def scores(labels: list[int], predictions: list[int], margin: float = 2.0, n_labels: int = 2) -> Scores:
    """Scores whose predictions are as wanted, each by `margin` nats."""
    log_probs = np.full((len(labels), n_labels), -margin - 1.0)
    log_probs[np.arange(len(labels)), predictions] = -1.0
    ids = [f"r{i}" for i in range(len(labels))]
    return Scores(ids, np.array(labels), log_probs, np.zeros(len(labels), bool), 1.0)


def judge(
    reference: Scores, others: dict[str, Scores], rows: RowGroups, margin_points: float, seed: int
) -> dict[str, dict]:
    return compare(ACCURACY, reference, others, rows, margin_points, seed)


def plain(n: int, leak_free: np.ndarray | None = None) -> RowGroups:
    return RowGroups(np.arange(n), leak_free)


def changed(labels: list[int], rows: range) -> list[int]:
    return [1 - label if i in rows else label for i, label in enumerate(labels)]


LABELS = [0, 1] * 100


def test_six_losses_are_the_fewest_that_are_significant() -> None:
    """6 : 0 has p = 2 · 2⁻⁶ = 0.03125 (shared/FEATURES.md A3); Holm over both endpoints asks for one loss more."""
    reference = scores(LABELS, LABELS)
    for lost, verdict in ((7, "worse"), (6, "cannot tell (MDE 4.5 points)")):
        entry = judge(reference, {"q": scores(LABELS, changed(LABELS, range(lost)))}, plain(200), 1.0, 0)["q"]
        assert (entry["mcnemar_b"], entry["mcnemar_c"], entry["flips"]) == (lost, 0, lost)
        assert entry["mcnemar_p"] == 2.0 ** (1 - lost)
        assert entry["mcnemar_p_holm"] == 2 * entry["mcnemar_p"]
        assert entry["accuracy_difference"] == pytest.approx(-lost / 200)
        low, high = entry["accuracy_difference_interval"]
        assert low < -lost / 200 < high < 0
        assert entry["verdict"] == verdict
        assert entry["endpoint"] == ("accuracy" if verdict == "worse" else None)


def test_holm_over_the_ladder_takes_the_word_back() -> None:
    reference = scores(LABELS, LABELS)
    files = {f"q{i}": scores(LABELS, changed(LABELS, range(7))) for i in range(2)}
    entries = judge(reference, files, plain(200), 1.0, 0)
    assert [entries[f"q{i}"]["mcnemar_p_holm"] for i in range(2)] == [0.0625, 0.0625]
    assert entries["q0"]["verdict"].startswith("cannot tell")


def test_margins_decide_where_accuracy_cannot() -> None:
    """No label changes, but every right answer is less sure; the equivalence margin is too narrow for 200 rows."""
    weaker = scores(LABELS, LABELS, 2.0)
    rng = np.random.default_rng(0)
    weaker.log_probs[:, 0] += rng.normal(0, 0.01, 200)
    entry = judge(scores(LABELS, LABELS, 2.3), {"q": weaker}, plain(200), 1.0, 0)["q"]
    assert entry["flips"] == 0 and entry["mcnemar_p"] == 1 and entry["equivalence_p"] > 0.05
    assert (entry["verdict"], entry["endpoint"]) == ("worse", "margin")
    assert entry["margin_p_holm"] < 0.05 and entry["margin_change_interval"][1] < 0
    wide = judge(scores(LABELS, LABELS, 2.3), {"q": weaker}, plain(200), 5.0, 0)["q"]
    assert (wide["verdict"], wide["endpoint"]) == ("equivalent within 5 points", "accuracy")


def test_the_same_scores_again() -> None:
    reference = scores(LABELS, changed(LABELS, range(20)))
    entries = judge(reference, {"same": reference}, plain(200), 3.0, 0)
    same = entries["same"]
    assert same["flips"] == same["mcnemar_b"] == same["mcnemar_c"] == 0
    assert same["margin_change_mean"] == 0 and same["margin_change_interval"] == [0, 0]
    assert same["verdict"] == "equivalent within 3 points"
    assert entries[""]["verdict"] == "reference" and entries[""]["mcnemar_p"] is None
    assert entries[""]["accuracy"] == same["accuracy"] == 0.9
    assert entries[""].keys() == same.keys()


def test_margin_change_counts_towards_the_right_answer() -> None:
    """Every right answer's log-odds fall by 0.5 nats: mean change −0.5 for both labels alike."""
    entry = judge(scores(LABELS, LABELS), {"q": scores(LABELS, LABELS, 1.5)}, plain(200), 1.0, 0)["q"]
    assert entry["margin_change_mean"] == pytest.approx(-0.5)
    assert entry["margin_change_interval"] == pytest.approx([-0.5, -0.5])
    assert entry["flips"] == 0


def test_margins_of_three_labels() -> None:
    three = scores([0, 1, 2], [0, 2, 2], 2.0, 3)
    assert right_margins(three).tolist() == [2.0, -2.0, 2.0]


def test_divergence_over_labels_and_the_difference_of_macro_f1() -> None:
    reference, other = scores(LABELS, LABELS), scores(LABELS, changed(LABELS, range(0, 60, 4)), 0.5)
    free = np.arange(200) >= 100
    entries = judge(reference, {"q": other, "same": reference}, plain(200, free), 1.0, 0)
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
    entries = compare(
        ACCURACY, scores(LABELS, LABELS), {"q": scores(LABELS, changed(LABELS, range(7)))}, plain(200, free), 1.0, 0
    )
    alone = compare(
        ACCURACY,
        scores(LABELS, LABELS),
        {"q": scores(LABELS, changed(LABELS, range(3)))},
        RowGroups(np.zeros(200), None),
        1.0,
        0,
    )
    json.dumps([entries, alone], allow_nan=False)
    assert entries["q"]["leak_free"]["margin_change_interval"] == [None, None]
    assert alone["q"]["margin_mde"] is None and alone["q"]["accuracy_difference_interval"] == [-1.0, 1.0]
    assert alone["q"]["verdict"].startswith("cannot tell") and alone["q"]["label_kld_interval"] == [None, None]


def test_leak_free_rows_apart() -> None:
    """All changes are on leaked rows: no change is left on the others."""
    free = np.arange(200) >= 10
    entries = compare(
        ACCURACY, scores(LABELS, LABELS), {"q": scores(LABELS, changed(LABELS, range(10)))}, plain(200, free), 5.0, 0
    )
    assert entries["q"]["verdict"] == "worse" and entries["q"]["leak_free"]["flips"] == 0
    assert entries["q"]["leak_free"]["n"] == 190 and entries["q"]["leak_free"]["accuracy"] == 1.0
    assert judge(scores(LABELS, LABELS), {}, plain(200), 1.0, 0)[""]["leak_free"] is None
    nothing_free = plain(200, np.zeros(200, bool))
    assert judge(scores(LABELS, LABELS), {}, nothing_free, 1.0, 0)[""]["leak_free"] is None


def test_clusters_widen_the_interval() -> None:
    """Ten losses that are near-duplicates of one another weigh less than ten of their own."""
    other = {"q": scores(LABELS, changed(LABELS, range(0, 40, 4)))}
    groups = np.array([0 if i in range(0, 40, 4) else i + 1 for i in range(200)])
    alone = judge(scores(LABELS, LABELS), other, plain(200), 1.0, 0)["q"]["margin_change_interval"]
    together = judge(scores(LABELS, LABELS), other, RowGroups(groups, None), 1.0, 0)["q"]["margin_change_interval"]
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


ENTRY = {
    "n": 400,
    "accuracy": 0.9,
    "accuracy_interval": [0.87, 0.93],
    "majority_share": 0.5,
    "flips": 3,
    "copies_effect": 1.0,
    "design_effect": 1.0,
    "equivalence_p_holm": 0.02,
    "accuracy_difference": -0.0025,
    "accuracy_difference_interval": [-0.008, 0.004],
    "mcnemar_b": 2,
    "mcnemar_c": 1,
    "mcnemar_p_holm": 1.0,
    "leak_free": None,
    "margin_change_mean": -0.02,
    "margin_change_interval": [-0.03, -0.01],
    "margin_p_holm": 0.002,
    "endpoint": "accuracy",
}
F16 = {**ENTRY, "type": "F16", "bytes": 100_000_000, "kld_mean": 0.0, "verdict": "reference"}


def entry(name: str, megabytes: int, kld: float, verdict: str, **more) -> dict:
    return {**ENTRY, "type": name, "bytes": megabytes * 1_000_000, "kld_mean": kld, "verdict": verdict, **more}


def recommend(entries: list[dict], margin_points: float, compared: int | None = None) -> dict:
    return choosing.recommend(ACCURACY, entries, margin_points, 0.5, compared)


LEAKY = {**ENTRY, "n": 300, "verdict": "worse", "mcnemar_p_holm": 0.01}


def test_the_smallest_equivalent_file_is_recommended() -> None:
    entries = [
        F16,
        entry("Q8_0", 53, 0.001, "equivalent within 1 point"),
        entry("Q4_K_M", 30, 0.03, "equivalent within 1 point", leak_free={**LEAKY, "verdict": "better"}),
        entry("Q3_K_M", 25, 0.1, "cannot tell (MDE 1.5 points)"),
        entry("Q2_K", 20, 0.5, "worse", mcnemar_p_holm=0.001),
    ]
    answer = recommend(entries, 1.0)
    assert answer["type"] == "Q4_K_M" and answer["reason"] == "equivalent"
    assert answer["next_higher"] == {"Q2_K": "Q3_K_M"}
    for words in (
        "Q4_K_M, 30.00 MB, 30 % of F16",
        "-0.25 points",
        "300 leak-free rows: better",
        "holds after correction for all 4 files (Holm-adjusted p = 0.02, below 0.025)",
        "Q3_K_M (about 1,",
    ):
        assert words in answer["text"]
    assert "take the next higher type, Q3_K_M" in answer["text"]
    assert "no loss" not in answer["text"].lower()
    assert "correction for all 7 files" in recommend(entries, 1.0, 7)["text"]


def test_an_equivalence_that_several_tries_may_have_found_is_not_sure() -> None:
    files = [entry(f"Q{i}", 10 * i, 0.01, "equivalent within 1 point", equivalence_p_holm=0.06) for i in (2, 3)]
    text = recommend([F16, *files], 1.0)["text"]
    assert "does not survive a correction for 2 files" in text and "confirm it on rows not used here" in text
    assert "correction" not in recommend([F16, files[0]], 1.0)["text"]


@pytest.mark.parametrize("endpoint", ["accuracy", "margin"])
def test_a_file_worse_on_the_leak_free_rows_is_not_recommended(endpoint: str) -> None:
    """Copies of training rows must not buy the word "equivalent"."""
    leaky = entry("Q4_K_M", 30, 0.03, "equivalent within 1 point", leak_free={**LEAKY, "endpoint": endpoint})
    answer = recommend([F16, entry("Q8_0", 53, 0.001, "equivalent within 1 point"), leaky], 1.0)
    assert answer["type"] == "Q8_0" and answer["next_higher"] == {"Q4_K_M": "Q8_0"}
    assert "Q4_K_M is worse on the 300 leak-free rows (" in answer["text"]
    alone = recommend([F16, leaky], 1.0)
    assert alone["type"] is None and alone["reason"] == "insufficient" and alone["rows_needed"] is None


def test_no_recommendation_without_evidence() -> None:
    entries = [F16, entry("Q8_0", 53, 0.001, "cannot tell (MDE 1.5 points)", mcnemar_b=20, mcnemar_c=20, n=400)]
    answer = recommend(entries, 1.0)
    assert answer["type"] is None and answer["reason"] == "insufficient"
    # (z.975 + z.8)² · (0.1 - 0.0025²) / (0.01 - 0.0025)², (z.975 + z.8)² = 7.849
    assert answer["rows_needed"] == pytest.approx(13_954, rel=0.02)
    assert "does not suffice" in answer["text"] and f"{answer['rows_needed']:,} rows" in answer["text"]


def test_a_difference_as_large_as_the_margin_is_not_decided_by_more_rows() -> None:
    seen = {"accuracy_difference": -0.01, "mcnemar_b": 4, "mcnemar_c": 0}
    answer = recommend([F16, entry("Q8_0", 53, 0.001, "cannot tell (MDE 1.5 points)", **seen)], 1.0)
    assert answer["rows_needed"] is None and "however many rows" in answer["text"]
    assert ACCURACY.rows_needed(entry("x", 1, 0, "", accuracy_difference=-0.02), 1.0) is None
    better = entry("x", 1, 0, "", accuracy_difference=0.02, mcnemar_c=8)
    assert ACCURACY.rows_needed(better, 1.0) is None and ACCURACY.rows_needed(better, 1.0, one_sided=True) == 401


def test_all_worse_keeps_the_reference() -> None:
    answer = recommend([F16, entry("Q2_K", 20, 0.5, "worse")], 1.0)
    assert answer["type"] is None and answer["rows_needed"] is None
    assert answer["next_higher"] == {"Q2_K": "F16"} and "keep F16" in answer["text"]


def test_margins_warn_but_do_not_recommend() -> None:
    answer = recommend(
        [
            F16,
            entry("Q8_0", 53, 0.001, "better", endpoint="margin"),
            entry("Q4_0", 25, 0.1, "worse", endpoint="margin"),
        ],
        1.0,
    )
    assert answer["type"] is None
    assert "Q4_0 is worse (its right answers lost log-odds, -0.020 nats" in answer["text"]
    assert answer["next_higher"] == {"Q4_0": "Q8_0"}


def test_a_reference_that_guesses_decides_nothing() -> None:
    guess = {**F16, "accuracy": 0.52, "accuracy_interval": [0.47, 0.57]}
    answer = recommend([guess, entry("Q8_0", 53, 0.001, "equivalent within 1 point")], 1.0)
    assert answer["type"] is None and answer["reason"] == "reference" and "No recommendation" in answer["text"]
    copies = {**F16, "accuracy": 0.56, "accuracy_interval": [0.511, 0.608]}  # clear on 400 rows, not on 100
    sure = [
        recommend([{**copies, "copies_effect": c}, entry("Q8_0", 53, 0.001, "equivalent within 1 point")], 1.0)
        for c in (1, 4)
    ]
    assert [one["reason"] for one in sure] == ["equivalent", "reference"]


@pytest.mark.parametrize(("seen", "n"), [((0, 0), 200), ((4, 2), 400), ((20, 20), 400)])
def test_rows_needed_show_equivalence_four_times_in_five(seen: tuple[int, int], n: int) -> None:
    """Drawn with the shares seen, the interval that the verdict takes lies inside the margin."""
    b, c = seen
    undecided = entry("x", 1, 0, "", n=n, mcnemar_b=b, mcnemar_c=c, accuracy_difference=(c - b) / n)
    rows, share = ACCURACY.rows_needed(undecided, 1.0), max(b + c, 1) / n
    loss, gain = (share + (b - c) / n) / 2, (share - (b - c) / n) / 2
    draws = np.random.default_rng(0).multinomial(rows, [loss, gain, 1 - share], 400)
    kinds, times = np.unique(draws[:, :2], axis=0, return_counts=True)
    inside = [paired_score_interval(int(one), int(two), rows).within(0.01) for one, two in kinds]
    assert 0.74 < np.average(inside, weights=times) < 0.93
    copies = ACCURACY.rows_needed({**undecided, "design_effect": 2.0}, 1.0)
    assert copies in (2 * rows, n + 1)


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
