"""Made comparisons: their truth is the one that was asked for, and the rule of 07 keeps its word on a few of them."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import simulated_pages as simulation


@pytest.mark.parametrize("loss", [0.0, 0.01])
def test_a_made_page_has_the_truth_that_was_asked_for(loss: float) -> None:
    known = simulation.truth(0.04, loss)
    rows = np.arange(60_000) // 2
    entries = simulation.page({"q": known}, rows, False, np.random.default_rng(4))
    found = entries["q"]
    assert (known.share, known.difference) == (0.04 + loss, -loss)
    assert entries[""]["accuracy"] == pytest.approx(simulation.RIGHT_SHARE, abs=0.005)
    assert (found["mcnemar_b"] + found["mcnemar_c"]) / len(rows) == pytest.approx(known.share, abs=0.004)
    assert found["accuracy_difference"] == pytest.approx(known.difference, abs=0.004)
    assert found["margin_change_mean"] == pytest.approx(known.margin, abs=0.02)
    assert found["design_effect"] > 1.3, "near-duplicates change together"


def test_files_of_a_page_err_alike() -> None:
    truths = {name: simulation.truth(0.08, 0.0) for name in "abcdef"}
    rng, rows = np.random.default_rng(6), np.arange(150)
    pages = [simulation.page(truths, rows, False, rng) for _ in range(60)]
    changes = np.array([[entries[name]["margin_change_mean"] for name in truths] for entries in pages])
    correlations = np.corrcoef(changes.T)[np.triu_indices(len(truths), 1)]
    assert correlations.mean() > 0.35


def test_the_rule_of_07_keeps_its_word_and_sees_a_loss() -> None:
    rng = np.random.default_rng(2)
    equal = {name: simulation.truth(share, 0.0) for name, share in simulation.LADDER.items()}
    lost = {name: simulation.truth(0.08, 0.08) for name in ("a", "b")}
    wrong = seen = 0
    for _ in range(50):
        group = simulation.groups(200, "near-duplicates", rng)
        found = simulation.observed(simulation.page(equal, group, True, rng), equal)
        wrong += found["either"]
        assert len(found["accuracy"]) == len(found["discordant"]) == len(equal)
        seen += simulation.observed(simulation.page(lost, group, False, rng), lost)["worse"]
    assert wrong <= 8, "5 % of 50 pages are 2.5; more than 8 come in one of 1,500 tries"
    assert seen >= 40


def test_the_tables_count_every_file() -> None:
    tables = simulation.pages(2, np.random.default_rng(1))
    settings = 2 * len(simulation.ROWS) * len(simulation.LADDER)
    assert len(tables["page_coverage"]) == settings == sum(row["settings"] for row in tables["coverage_expected"])
    assert sum(row["files"] for row in tables["coverage_observed"]) == 2 * settings / 2
    assert [row["rows"] for row in tables["pages"]] == [row["rows"] for row in tables["pages_at_the_margin"]]
