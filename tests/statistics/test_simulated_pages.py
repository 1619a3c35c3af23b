"""Made comparisons: their truth is the one that was asked for, and the rule of 07 keeps its word on a few of them."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import simulated_pages as simulation


@pytest.mark.parametrize("balance", [(1, 1), (9, 1), (2, 1, 1, 1)])
@pytest.mark.parametrize("kind", simulation.KINDS)
def test_a_made_page_has_the_truth_that_was_asked_for(balance: tuple[int, ...], kind: str) -> None:
    truths, rng = simulation.ladder(3, len(balance), kind), np.random.default_rng(4)
    labels, _, reference, files = simulation.draw(200_000, balance, truths, True, rng)
    for one, right in zip(truths, files, strict=True):
        change, weights = right.astype(int) - reference, simulation.balanced_weights(labels)
        assert -100 * np.average(change, weights=weights) == pytest.approx(one.loss(labels), abs=0.35)
    if kind == "a bias" and balance != (1, 1):
        assert [one.loss(labels) for one in truths] == pytest.approx([0, 0, 0], abs=1e-9)


def test_the_rule_of_07_keeps_its_word_and_sees_a_loss() -> None:
    rng = np.random.default_rng(2)
    lost = simulation.setting(600, (1, 1), 3, "the margin lost", True, 100, rng)
    assert lost["false"] <= 0.12, "5 of 100 pages; more than 12 come in one of 600 tries"
    nothing = simulation.setting(600, (1, 1), 3, "nothing lost", False, 60, rng)
    assert nothing["recommended"] > 0.75 and nothing["worse"] < 0.15 and nothing["size"] > nothing["old size"] - 0.1
    few = simulation.setting(20, (1, 1), 3, "nothing lost", True, 5, rng)
    assert few["recommended"] == 0 == few["false"], "fewer than 20 groups"


def test_every_setting_is_asked_once() -> None:
    wanted = list(simulation.settings())
    assert len(wanted) == len(set(wanted)) == 6 * 6 * 3 * 5 * 2
