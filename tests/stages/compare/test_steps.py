"""The error ladder against numbers from scipy and by hand."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from scipy.special import rel_entr, softmax

from lib.report import steps_page
from lib.scoring.accuracy import label_divergence
from lib.scoring.log_probabilities import AnswerScores, Scores
from lib.scoring.metric import ACCURACY, ANSWER_PERPLEXITY
from lib.stages.compare.changes import error_ladder
from lib.stages.compare.recommend import step_file

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
    entries = error_ladder(ACCURACY, chain, np.arange(100))
    assert entries[0]["before"] is None and entries[0]["first"] is None
    same = entries[1]["before"]
    assert same["kld"] == 0 and same["agreement"] == 1 and same["accuracy_difference"] == 0
    assert entries[2]["before"] == entries[2]["first"]  # the merged model is the adapter to the last bit
    last = entries[3]
    assert last["first"]["kld"] == pytest.approx(label_divergence(chain[0][1], chain[3][1]).mean())
    assert last["before"]["kld"] == pytest.approx(label_divergence(chain[2][1], chain[3][1]).mean())
    changed = chain[3][1].correct.mean() - chain[2][1].correct.mean()
    assert last["before"]["accuracy_difference"] == pytest.approx(changed)
    low, high = last["before"]["kld_interval"]
    assert 0 <= low < last["before"]["kld"] < high
    json.dumps(entries)


def test_copies_of_a_row_weigh_less() -> None:
    chain = [("a", scores(0.0)), ("b", scores(1.0, 3))]
    alone, together = error_ladder(ACCURACY, chain, np.arange(100)), error_ladder(ACCURACY, chain, np.arange(100) // 10)
    width = [entry[1]["before"]["kld_interval"][1] - entry[1]["before"]["kld"] for entry in (alone, together)]
    equal = [entry[1]["before"]["agreement_interval"] for entry in (alone, together)]
    assert equal[1][0] < equal[0][0] < equal[0][1] < equal[1][1], "labels of copies are equal together"
    assert width[0] != width[1] and alone[1]["before"]["kld"] == together[1]["before"]["kld"]


def test_other_rows_are_refused() -> None:
    other = scores(0.0)
    other.ids.reverse()
    with pytest.raises(ValueError, match="other rows"):
        error_ladder(ACCURACY, [("a", scores(0.0)), ("b", other)], np.arange(100))


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
    entries = error_ladder(
        ACCURACY, [("adapter", scores(0.0)), ("merged", scores(0.01, 1)), ("Q2_K", scores(1.5, 2))], LABELS
    )
    ladder, table, reading = (shown.data for shown in steps_page.shown(entries, ""))
    assert "merged → Q2_K" in reading
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", line) for line in table.split("<tr>")[2:]]
    assert [row[0] for row in rows] == ["adapter", "merged", "Q2_K"]
    assert rows[0][2] == "–" and rows[2][2].startswith(f"{entries[2]['before']['kld']:.2g} [")
    assert "<figcaption>" in ladder and "merged: " in ladder


def answers(shift: float, noise: float, seed: int) -> AnswerScores:
    """Losses around 2 nats a token, `shift` added to every row."""
    tokens = np.random.default_rng(0).integers(20, 60, 100)
    losses = np.random.default_rng(1).uniform(1.5, 2.5, 100) + shift
    losses += noise * np.random.default_rng(seed).normal(0, 1, 100)
    return AnswerScores([f"r{i}" for i in range(100)], -losses * tokens, tokens, 1.0)


def loss(scores: AnswerScores) -> float:
    """Nats a token of the answers."""
    return -scores.log_probs.sum() / scores.tokens.sum()


def test_steps_without_labels() -> None:
    chain = [("adapter", answers(0, 0, 0)), ("merged", answers(0, 0, 0)), ("F16", answers(0.001, 0.001, 1))]
    entries = error_ladder(ANSWER_PERPLEXITY, [*chain, ("Q2_K", answers(0.2, 0.05, 2))], np.arange(100), 1.0, 0)
    assert entries[0]["before"] is None and entries[0]["loss"] == pytest.approx(loss(chain[0][1]))
    assert entries[1]["before"] == {
        "loss_difference": 0.0,
        "loss_difference_interval": [0.0, 0.0],
        "moved": 0.0,
        "moved_interval": [0.0, 0.0],
        "agreement": 1.0,
        "agreement_interval": entries[1]["before"]["agreement_interval"],
    }
    assert entries[1]["before"]["agreement_interval"][0] < 1
    assert entries[2]["before"] == entries[2]["first"]
    last = entries[3]
    scores = [answers(0.001, 0.001, 1), answers(0.2, 0.05, 2)]
    assert last["before"]["loss_difference"] == pytest.approx(loss(scores[1]) - loss(scores[0]), abs=1e-12)
    change = np.abs(scores[1].log_probs / scores[1].tokens - scores[0].log_probs / scores[0].tokens)
    assert last["before"]["moved"] == pytest.approx(np.average(change, weights=scores[0].tokens), abs=1e-12)
    assert last["before"]["agreement"] == np.mean(np.exp(change) < 1.01)
    low, high = last["first"]["loss_difference_interval"]
    assert low < last["first"]["loss_difference"] < high and low > 0.1
    json.dumps(entries)


def test_the_interval_is_that_of_whole_groups() -> None:
    """Copies of ten rows are as uncertain as the ten rows alone."""
    first, second = answers(0, 0, 0), answers(0.01, 0.02, 3)
    place = np.repeat(np.arange(10), 10)
    copies = [AnswerScores(s.ids, s.log_probs[place], s.tokens[place], 1.0) for s in (first, second)]
    few = np.arange(100) < 10
    alone = error_ladder(
        ANSWER_PERPLEXITY, [("a", first.subset(few)), ("b", second.subset(few))], np.arange(10), 1.0, 0
    )
    together = error_ladder(ANSWER_PERPLEXITY, [("a", copies[0]), ("b", copies[1])], place, 1.0, 0)
    for key in ("loss_difference", "moved", "agreement"):
        wanted = [alone[1]["before"][key], *alone[1]["before"][f"{key}_interval"]]
        found = [together[1]["before"][key], *together[1]["before"][f"{key}_interval"]]
        assert found == pytest.approx(wanted, rel=0.05 if key == "agreement" else 1e-6)


def test_the_page_without_labels() -> None:
    chain = [("adapter", answers(0, 0, 0)), ("merged", answers(0, 0.001, 1)), ("Q2_K", answers(0.2, 0.05, 2))]
    entries = error_ladder(ANSWER_PERPLEXITY, chain, np.arange(100), 2.0, 0)
    ladder, table, reading = (shown.data for shown in steps_page.shown(entries, ""))
    assert "merged → Q2_K" in reading and "within 2 %" in reading
    assert f"<td>{entries[2]['before']['loss_difference']:+.2g} [" in table.replace(' class="number"', "")
    assert "less than 2 %" in table and "answer tokens" in table
    assert "<figcaption>" in ladder and "mean loss" in ladder and "Q2_K: 0.2" in ladder
