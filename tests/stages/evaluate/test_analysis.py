"""What is said of scores, against counting by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lib.errors import InputError
from lib.scoring.log_probabilities import Scores
from lib.stages.evaluate.results import ALL, LEAK_FREE, SEEN, UNSEEN, evaluate_scores, subsets
from lib.statistics import paired

ROWS = [{"id": str(i), "text": f"row {i}", "label": i % 2, "leaked": i < 2, "group": i} for i in range(6)]
LOG_PROBS = np.log([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.3, 0.7], [0.51, 0.49], [0.6, 0.4]])


def scores(ids=None) -> Scores:
    labels = np.array([row["label"] for row in ROWS])
    return Scores(ids or [row["id"] for row in ROWS], labels, LOG_PROBS, np.zeros(6, dtype=bool), 3.0)


def test_subsets():
    masks = subsets(ROWS)
    assert list(masks) == [ALL, LEAK_FREE]
    assert masks[LEAK_FREE].tolist() == [False, False, True, True, True, True]
    patterned = [{**row, "pattern": "new" if i == 3 else "old"} for i, row in enumerate(ROWS)]
    masks = subsets(patterned, {"old"})
    assert np.flatnonzero(masks[UNSEEN]).tolist() == [3] and masks[SEEN].sum() == 5
    assert list(subsets(patterned, {"old", "new"})) == [ALL, LEAK_FREE, SEEN]
    assert list(subsets([{"id": "0"}])) == [ALL]
    assert list(subsets([{"leaked": True}])) == [ALL]


def test_one_model():
    found = evaluate_scores(scores(), ROWS, ("no", "yes"), subsets(ROWS))
    # predictions 0 0 1 1 0 0, labels 0 1 0 1 0 1: right are rows 0, 3 and 4
    assert found.reports[ALL].confusion == ((2, 1), (2, 1))
    assert found.reports[ALL].accuracy.estimate == 0.5
    assert found.reports[LEAK_FREE].n == 4
    assert [(m["id"], m["prediction"]) for m in found.mistakes] == [("1", 0), ("2", 1), ("5", 0)]
    assert found.mistakes[0]["probability"] == pytest.approx(0.8) and found.mistakes[0]["leaked"]
    value = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert value["all"]["accuracy"] == 0.5 and value["near_ties"] == 1
    assert value["seconds_per_sample"] == 0.5
    confidence, right = np.array([0.9, 0.8, 0.6, 0.7, 0.51, 0.6]), np.array([1, 0, 0, 1, 1, 0])
    ece = sum(abs((confidence - right)[np.floor(confidence * 10 + 1e-9) == b].sum()) for b in range(10)) / 6
    assert value["calibration"]["ece"] == pytest.approx(ece)


def test_mistakes_are_at_most_ten():
    rows = [{"id": str(i), "text": "", "label": 0} for i in range(30)]
    wrong = Scores([r["id"] for r in rows], np.zeros(30, dtype=int), np.log([[0.2, 0.8]] * 30), np.zeros(30, bool), 1.0)
    assert len(evaluate_scores(wrong, rows, ("no", "yes"), subsets(rows)).mistakes) == 10


def test_scores_of_other_rows_are_refused():
    with pytest.raises(InputError, match="scores of other rows"):
        evaluate_scores(scores(["5", "4", "3", "2", "1", "0"]), ROWS, ("no", "yes"), subsets(ROWS))


def test_comparisons_are_signed_and_corrected_together():
    candidate = np.array([True] * 30)
    references = {"weak": np.array([False] * 10 + [True] * 20), "near": np.array([False] * 5 + [True] * 25)}
    found = paired.compare_pairs({name: (own, candidate) for name, own in references.items()}, np.arange(30))
    assert found["weak"].gains == 10 and found["weak"].losses == 0
    assert found["weak"].difference.estimate == pytest.approx(1 / 3)
    assert found["weak"].p == pytest.approx(2 / 2**10) and found["weak"].p_holm == pytest.approx(4 / 2**10)
    assert found["near"].p_holm == pytest.approx(2 / 2**5)
    assert found["weak"].verdict == "better" and found["near"].verdict == "cannot tell"
