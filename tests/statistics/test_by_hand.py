"""The code and an implementation of the page's words by somebody else say the same of random comparisons."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lib.scoring.log_probabilities import AnswerScores, Scores
from lib.scoring.metric import ACCURACY, ANSWER_PERPLEXITY, Metric, RowGroups, compare
from lib.stages.compare.recommend import judge, recommend
from tests.statistics import by_hand

SIZES = {"Q8_0": 8, "Q5_K_M": 5, "Q4_0": 4, "Q2_K": 2}
CASES = 60
"""Of each kind; 1,000 were compared when the rule was written (docs/LOG.md)."""


def _folds(rng: np.random.Generator, groups: np.ndarray) -> np.ndarray | None:
    """Fold of every row, whole groups together; None in half of the cases."""
    names, place = np.unique(groups, return_inverse=True)
    count = int(rng.choice([2, 3, 5]))
    if rng.random() < 0.5 or len(names) < 2 * count:
        return None
    return (np.arange(len(names)) % count)[place]


def _rows(rng: np.random.Generator) -> tuple[int, np.ndarray, np.ndarray | None]:
    """Rows, their groups (none, some or all with copies), and a mask of leak-free ones or None."""
    n = int(rng.choice([18, 25, 60, 200, 500]))
    groups = [np.arange(n), np.sort(rng.integers(0, max(1, 3 * n // 4), n)), np.arange(n) // 4, np.zeros(n, int)]
    group = groups[int(rng.choice(4, p=[0.4, 0.35, 0.2, 0.05]))]
    return n, group, [None, rng.random(n) < 0.7, np.arange(n) < 10][int(rng.choice(3, p=[0.5, 0.4, 0.1]))]


def _ours(
    metric: Metric, reference: Any, files: dict[str, Any], rows: RowGroups, margin: float, floor: float | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    found = compare(metric, reference, files, rows, 0)
    entries = [
        {**found[name], "type": name, "kind": "gguf", "bytes": SIZES.get(name, 9), "kld_mean": 0.0, "file": name}
        for name in ("", *files)
    ]
    verdicts = judge(metric, entries[0], entries[1:], margin, floor)
    chosen = recommend(metric, entries[0], entries[1:], margin, floor)["type"]
    return {entry["type"]: entry for entry in entries[1:]}, {"verdicts": verdicts, "recommended": chosen}


def _agree(entries: dict[str, Any], ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name, (limit, free) in theirs["limits"].items():
        own = entries[name]["leak_free"]
        if np.isfinite(limit):
            assert entries[name]["loss_limit"] == pytest.approx(limit, abs=1e-6)
        if free is not None and np.isfinite(free):
            assert own["loss_limit"] == pytest.approx(free, abs=1e-6)
    assert ours["recommended"] == theirs["recommended"]
    for name, word in theirs["verdicts"].items():
        near = {word, ours["verdicts"][name]} == {"worse", "not shown"} and abs(entries[name]["p_holm"] - 0.05) < 0.01
        assert word == ours["verdicts"][name] or near, "exchanges are drawn: near 0.05 two draws may differ"


@pytest.mark.parametrize("seed", range(CASES))
def test_labels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, groups, free = _rows(rng)
    n_labels = int(rng.integers(2, 5))
    shares = rng.dirichlet(np.full(n_labels, rng.choice([2.0, 50.0])))
    truth = rng.choice(n_labels, n, p=shares)
    truth[: 2 * n_labels] = np.arange(2 * n_labels) % n_labels

    def answered(before: np.ndarray, changed: float) -> np.ndarray:
        return np.where(rng.random(n) < changed, rng.integers(0, n_labels, n), before)

    reference = answered(truth, float(rng.choice([0.1, 0.3, 1.0])))
    files = {name: answered(reference, float(rng.choice([0, 0.005, 0.02, 0.2]))) for name in SIZES}
    margin, folds = float(rng.choice([1.0, 2.0, 5.0, 10.0])), _folds(rng, groups)
    if folds is not None:  # files of single folds that lose
        files = {name: np.where((folds == 0) & (rng.random(n) < 0.2), 0, own) for name, own in files.items()}

    def scores(predictions: np.ndarray) -> Scores:
        log_probs = np.full((n, n_labels), -3.0)
        log_probs[np.arange(n), predictions] = -0.2
        return Scores([str(i) for i in range(n)], truth, log_probs, np.zeros(n, bool), 1.0)

    commonest = np.bincount(truth).max() / n
    made = {name: scores(own) for name, own in files.items()}
    entries, ours = _ours(ACCURACY, scores(reference), made, RowGroups(groups, free, folds), margin, commonest)
    theirs = by_hand.labels(reference, files, SIZES, truth, groups, free, margin, n_labels, folds)
    _agree(entries, ours, theirs)


@pytest.mark.parametrize("seed", range(CASES))
def test_answers(seed: int) -> None:
    rng = np.random.default_rng(10_000 + seed)
    n, groups, free = _rows(rng)
    tokens = rng.integers(3, 90, n)
    reference = rng.gamma(4, 0.5, n) + 0.01
    files = {
        name: reference + rng.choice([0, 0.003, 0.02, 0.1]) + rng.normal(0, rng.choice([1e-4, 0.01, 0.2]), n)
        for name in SIZES
    }
    margin, floor = float(rng.choice([0.5, 1.0, 3.0])), rng.choice([None, 6.0, 500.0])
    folds = _folds(rng, groups)
    if folds is not None:
        files = {name: own + (folds == 0) * rng.choice([0, 0.01, 0.1]) for name, own in files.items()}

    def scores(losses: np.ndarray) -> AnswerScores:
        return AnswerScores([str(i) for i in range(n)], -losses * tokens, tokens, 1.0)

    made = {name: scores(own) for name, own in files.items()}
    entries, ours = _ours(ANSWER_PERPLEXITY, scores(reference), made, RowGroups(groups, free, folds), margin, floor)
    theirs = by_hand.answers(reference, files, SIZES, tokens, groups, free, margin, floor, folds)
    _agree(entries, ours, theirs)
