"""The rule and what rows can show by it: against scipy, by counting every table, and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.statistics.intervals import paired_score_interval, tango_statistic
from lib.statistics.noninferiority import (
    LEVEL,
    balanced_weights,
    good_enough,
    label_weights,
    least_margin,
    power,
    rows_for,
    share_loss,
    shown,
    verdicts,
)
from tests.statistics.test_paired_rows import restricted_score


def entry(name: str, size: int, limit: float | None, free: float | None = None, **more) -> dict:
    leak_free = None if free is None else {"loss_limit": free}
    return {
        "type": name,
        "bytes": size,
        "loss_limit": limit,
        "leak_free": leak_free,
        "loss": 0.0,
        "p_holm": 1.0,
        **more,
    }


# --- the rule


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0, 3), st.floats(0, 3)), max_size=13), st.floats(0.1, 3))
@settings(max_examples=200, deadline=None)
def test_the_sequence_is_unbroken_from_the_largest(drawn: list[tuple[int, float, float]], margin: float) -> None:
    files = [entry(f"q{i}", size, limit, free) for i, (size, limit, free) in enumerate(drawn)]
    passed, words = good_enough(files, margin), verdicts(files, [], margin)
    for one in files:
        before = [e for e in files if (-e["bytes"], e["type"]) <= (-one["bytes"], one["type"])]
        assert (one["type"] in passed) == all(shown(e, margin) for e in before)
        assert (words[one["type"]] == "good enough") == (one["type"] in passed)


def test_both_kinds_of_rows_have_to_show_it() -> None:
    assert shown(entry("a", 1, 0.9), 1.0) and shown(entry("a", 1, 0.9, 0.9), 1.0)
    for other in (entry("a", 1, 1.0), entry("a", 1, 0.9, 1.1), entry("a", 1, 1.1, 0.9), entry("a", 1, None)):
        assert not shown(other, 1.0)


def test_folders_are_asked_by_themselves() -> None:
    lost = {"loss": 2.0, "p_holm": 0.01}
    found = verdicts([entry("Q8_0", 9, 2.0), entry("Q2_K", 1, 9.0, **lost)], [entry("int8", 5, 0.5)], 1.0)
    assert found == {"Q8_0": "not shown", "Q2_K": "worse", "int8": "good enough"}
    assert verdicts([entry("Q8_0", 9, 2.0, loss=-2.0, p_holm=0.01)], [], 1.0) == {"Q8_0": "not shown"}


# --- the limit


@pytest.mark.parametrize(("losses", "gains", "n"), [(0, 0, 621), (3, 5, 1200), (12, 4, 400), (40, 40, 865)])
def test_the_limit_is_that_of_the_one_sided_score_test(losses: int, gains: int, n: int) -> None:
    """The statistic is found by a numerical maximum, not by the closed form."""
    change = np.repeat([-1, 1, 0], [losses, gains, n - losses - gains])
    limit = share_loss(change).high / 100
    assert restricted_score(losses, gains, n, -limit) == pytest.approx(scipy.stats.norm.ppf(1 - LEVEL), abs=2e-3)


def test_with_nothing_changed_316_rows_exclude_a_point() -> None:
    assert least_margin(315) > 0.01 > least_margin(316)
    assert share_loss(np.zeros(400, int)).high == pytest.approx(100 * least_margin(400))


def test_weights_make_the_balanced_accuracy() -> None:
    labels, right = np.repeat([0, 1, 2], [60, 30, 10]), np.random.default_rng(0).random(100) < 0.7
    recalls = [right[labels == k].mean() for k in range(3)]
    assert np.average(right, weights=label_weights(labels)) == pytest.approx(np.mean(recalls))
    assert label_weights(labels).mean() == pytest.approx(1) and balanced_weights(labels) is not None
    assert (
        balanced_weights(np.repeat([0, 1], [60, 40])) is None
        and balanced_weights(np.repeat([0, 1], [61, 39])) is not None
    )


@pytest.mark.parametrize("shares", [(2 / 3, 1 / 3), (0.9, 0.1), (0.7, 0.1, 0.1, 0.1)])
@pytest.mark.parametrize("lost_in", ["rarest", "all"])
def test_a_loss_of_the_margin_is_excluded_in_one_of_twenty_at_most(shares: tuple[float, ...], lost_in: str) -> None:
    """Balanced accuracy, exactly two points lost: 400 draws, by the score statistic on weighted counts."""
    rng, margin, n, wrong = np.random.default_rng(7), 0.02, 600, 0
    labels = np.repeat(np.arange(len(shares)), [round(n * share) for share in shares])
    loss = np.full(len(shares), margin) if lost_in == "all" else np.eye(len(shares))[-1] * margin * len(shares)
    weights, chance = balanced_weights(labels), loss[labels]
    for _ in range(400):
        draw = rng.random(len(labels))
        change = np.where(draw < chance + 0.01, -1, np.where(draw < chance + 0.02, 1, 0))
        wrong += share_loss(change, None, weights).high < 100 * margin
    assert wrong <= 32, "5 % of 400 are 20; more than 32 come in one of 200 tries"


# --- power


def by_hand(n: int, changed: float, loss: float, margin: float) -> float:
    """The chance that the limit lies below the margin, table by table, from the interval itself."""
    p_loss, p_gain, total = (changed + loss) / 2, (changed - loss) / 2, 0.0
    for losses in range(n + 1):
        for gains in range(n + 1 - losses):
            cells = [losses, gains, n - losses - gains]
            chance = scipy.stats.multinomial.pmf(cells, n, [p_loss, p_gain, 1 - changed])
            if chance > 1e-9:
                total += chance * (-paired_score_interval(losses, gains, n, 1 - 2 * LEVEL).low < margin)
    return total


@pytest.mark.parametrize("loss", [0.0, 0.04, -0.04])
def test_power_counts_every_table(loss: float) -> None:
    assert power(40, 0.1, 0.2, loss) == pytest.approx(by_hand(40, 0.1, loss, 0.2), abs=1e-6)


@pytest.mark.parametrize(
    ("changed", "margin", "loss"), [(0.0, 0.01, 0.0), (0.01, 0.01, 0.0), (0.02, 0.01, 0.005), (0.1, 0.03, -0.01)]
)
def test_rows_have_the_power_they_promise(changed: float, margin: float, loss: float) -> None:
    n = rows_for(changed, margin, loss)
    assert power(n, changed, margin, loss) >= 0.8 > power(round(0.8 * n), changed, margin, loss)
    draws = np.random.default_rng(5).multinomial(n, [(changed + loss) / 2, (changed - loss) / 2, 1 - changed], 2000)
    shown_in = tango_statistic(-margin, draws[:, 0], draws[:, 1], n) > scipy.stats.norm.ppf(1 - LEVEL)
    assert shown_in.mean() == pytest.approx(power(n, changed, margin, loss), abs=0.035)


def test_many_changed_rows_are_approximated_alike() -> None:
    below, above = (power(n, 0.05, 0.01, 0.007) for n in (39_990, 40_010))
    assert below == pytest.approx(above, abs=0.006)


def test_what_no_number_of_rows_shows_is_refused() -> None:
    with pytest.raises(ValueError, match="not below"):
        rows_for(0.02, 0.01, 0.01)
    for bad in ((0, 0.1, 0.01, 0.0), (10, 0.1, 0.01, 0.2), (10, 0.1, 0.0, 0.0), (10, 1.1, 0.1, 0.0)):
        with pytest.raises(ValueError, match="need n >= 1"):
            power(*bad)
    assert math.isfinite(rows_for(0.3, 0.01))
