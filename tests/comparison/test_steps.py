"""The error ladder against numbers from scipy and by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.special import rel_entr, softmax

from lib.comparison.steps import error_ladder, label_divergence, step_file
from lib.plots import steps as shown
from lib.scoring import Scores

LABELS = np.array([0, 1] * 50)


def scores(noise: float, seed: int = 0, words: int = 2) -> Scores:
    values = np.random.default_rng(0).normal(0, 1, (100, words))
    values[np.arange(100), LABELS] += 1.5
    values += noise * np.random.default_rng(seed).normal(0, 1, values.shape)
    return Scores([f"r{i}" for i in range(100)], LABELS, values - 3.0, np.zeros(100, bool), 1.0)


@pytest.mark.parametrize("words", [2, 3])
def test_divergence_is_that_of_scipy(words: int) -> None:
    first, second = scores(0.0, words=words), scores(0.7, words=words)
    expected = rel_entr(softmax(first.log_probs, axis=1), softmax(second.log_probs, axis=1)).sum(axis=1)
    np.testing.assert_allclose(label_divergence(first, second), expected, atol=1e-12)


def test_every_step_against_the_one_before_and_the_first() -> None:
    chain = [("adapter", scores(0.0)), ("merged", scores(0.0)), ("Q8_0", scores(0.1, 1)), ("Q2_K", scores(1.5, 2))]
    entries = error_ladder(chain, np.arange(100))
    assert entries[0]["before"] is None and entries[0]["first"] is None
    same = entries[1]["before"]
    assert same["kld"] == 0 and same["agreement"] == 1 and same["accuracy_difference"] == 0
    assert entries[2]["before"] == entries[2]["first"]  # the merged model is the adapter to the last bit
    last = entries[3]
    assert last["first"]["kld"] == pytest.approx(label_divergence(chain[0][1], chain[3][1]).mean())
    assert last["before"]["kld"] == pytest.approx(label_divergence(chain[2][1], chain[3][1]).mean())
    changed = chain[3][1].accuracy - chain[2][1].accuracy
    assert last["before"]["accuracy_difference"] == pytest.approx(changed)
    low, high = last["before"]["kld_interval"]
    assert 0 <= low < last["before"]["kld"] < high
    json.dumps(entries)


def test_copies_of_a_row_weigh_less() -> None:
    chain = [("a", scores(0.0)), ("b", scores(1.0, 3))]
    alone, together = error_ladder(chain, np.arange(100)), error_ladder(chain, np.arange(100) // 10)
    width = [entry[1]["before"]["kld_interval"][1] - entry[1]["before"]["kld"] for entry in (alone, together)]
    assert width[0] != width[1] and alone[1]["before"]["kld"] == together[1]["before"]["kld"]


def test_other_rows_are_refused() -> None:
    other = scores(0.0)
    other.ids.reverse()
    with pytest.raises(ValueError, match="other rows"):
        error_ladder([("a", scores(0.0)), ("b", other)], np.arange(100))


def test_the_ladder_ends_at_the_file_that_is_shipped() -> None:
    files = [
        {"type": "Q8_0", "bytes": 3, "verdict": "cannot tell"},
        {"type": "Q4_0", "bytes": 2, "verdict": "cannot tell"},
        {"type": "Q2_K", "bytes": 1, "verdict": "worse"},
    ]
    assert step_file(files, {"type": "Q8_0"}) == "Q8_0"
    assert step_file(files, {"type": None}) == "Q4_0"
    assert step_file(files[2:], {"type": None}) == "Q2_K"
    assert step_file([], {"type": None}) is None


def test_the_page_names_the_step_that_cost_most() -> None:
    entries = error_ladder([("adapter", scores(0.0)), ("merged", scores(0.01, 1)), ("Q2_K", scores(1.5, 2))], LABELS)
    assert "merged → Q2_K" in shown.reading(entries)
    table = shown.rows(entries)
    assert [row["step"] for row in table] == ["adapter", "merged", "Q2_K"]
    assert table[0]["KL, nats"] is None and float(table[2]["KL, nats"].split()[0]) > 0
    html = shown.ladder(entries).data
    assert "<figcaption>" in html and "merged: " in html
