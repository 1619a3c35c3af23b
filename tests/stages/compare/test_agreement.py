"""Label agreement by margin, against counting by hand; a comparison that was interrupted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lib.scoring.log_probabilities import Scores
from lib.stages.compare import files
from lib.stages.compare.changes import EDGES, agreements, by_margin
from lib.stages.compare.files import Comparison, compare_files
from lib.statistics.intervals import wilson
from tests.stages.compare.conftest import Ladder

pytestmark = pytest.mark.usefixtures("forked_children")


def scores_of(margins: list[float], ids: str = "r") -> Scores:
    """Two labels with the given log-odds."""
    values = np.array([[0.0, margin] for margin in margins]) - 3.0
    n = len(margins)
    return Scores([f"{ids}{i}" for i in range(n)], np.zeros(n, dtype=int), values, np.zeros(n, dtype=bool), 1.0)


FIRST = scores_of([0.05, -0.09, 0.1, 0.3, -0.49, 0.7, -1.5, 2.0, 9.0])
SECOND = scores_of([-0.05, -0.2, -0.1, 0.3, -5.0, -0.7, -1.5, 2.0, 8.0])


def test_bins_by_the_first_margin() -> None:
    *bins, whole = by_margin(FIRST, SECOND)
    assert EDGES == (0.0, 0.1, 0.5, 1.0, 2.0)
    assert [(b["low"], b["high"]) for b in bins] == [(0, 0.1), (0.1, 0.5), (0.5, 1), (1, 2), (2, None)]
    assert [(b["n"], b["agree"]) for b in bins] == [(2, 1), (3, 2), (1, 0), (1, 1), (2, 2)]
    assert (whole["n"], whole["agree"], whole["share"]) == (9, 6, pytest.approx(6 / 9))
    assert bins[1]["interval"] == wilson(2, 3).to_json() and whole["interval"] == wilson(6, 9).to_json()


def test_an_empty_bin_has_no_share() -> None:
    bins = by_margin(scores_of([3.0]), scores_of([-3.0]))
    assert bins[0]["n"] == 0 and bins[0]["share"] is None and bins[0]["interval"] is None
    json.dumps(bins, allow_nan=False)


def test_three_labels_use_best_minus_second() -> None:
    three = Scores(["a"], np.array([0]), np.log([[0.5, 0.4, 0.1]]), np.array([False]), 1.0)
    assert [b["n"] for b in by_margin(three, three)] == [0, 1, 0, 0, 0, 1]


def test_other_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="different rows"):
        by_margin(FIRST, scores_of([0.0] * 9, "s"))


def test_pairs() -> None:
    found = agreements({"F16": SECOND, "Q8_0": FIRST}, ("merged", FIRST))
    assert [(p["first"], p["second"], p["near_ties"]) for p in found] == [
        ("merged", "F16", 2),
        ("merged", "Q8_0", 2),
        ("F16", "Q8_0", 1),
    ]
    assert found[1]["bins"][-1]["share"] == 1
    assert [p["first"] for p in agreements({"F16": SECOND, "Q8_0": FIRST}, None)] == ["F16"]


def test_interrupted_comparison_continues(
    ladder: Ladder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Stopped before the third file: the first two are not scored again, and the result is that of one go."""
    run_child, started = files.run_child, []

    def stopping(function: str, argument: dict, what: str) -> dict:
        started.append(what)
        if len(started) == 3:
            raise KeyboardInterrupt
        return run_child(function, argument, what)

    def compare() -> dict:
        others = [ladder.q8, ladder.q2]
        asked = Comparison(ladder.reference, others, ladder.rows, ladder.task, tmp_path, n_ctx=128, n_threads=1)
        return compare_files(asked)

    monkeypatch.setattr(files, "run_child", stopping)
    with pytest.raises(KeyboardInterrupt):
        compare()
    assert [path.name for path in tmp_path.iterdir()] == [".scores"]
    kept = {path.name: path.read_text() for path in (tmp_path / ".scores" / "measure_model").iterdir()}
    capsys.readouterr()
    compare()
    said = capsys.readouterr().err
    assert "m-F16.gguf: 40 rows already scored" in said and "m-Q8_0.gguf: 40 rows already scored" in said
    assert "m-Q2_K.gguf: 40 rows" not in said
    assert not (tmp_path / ".scores").exists()
    for text in kept.values():
        lines = [json.loads(line) for line in text.splitlines()[1:]]
        values = {row: own for line in lines for row, own in zip(line["rows"], line["values"], strict=True)}
        assert len(values) == 40
        assert any(
            [values[i] for i in scores.ids] == scores.log_probs.tolist()
            for scores in (Scores.load(path) for path in tmp_path.glob("scores-*.jsonl"))
        )
