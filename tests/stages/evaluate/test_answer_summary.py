"""What 03 says of answer losses on few groups of rows."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np

from lib.report.evaluate_page import AnswerPage
from lib.scoring.log_probabilities import AnswerScores, exponentials
from lib.stages.evaluate.results import BASE, FINETUNED, SHOWN, summary


def _words(result: SimpleNamespace) -> str:
    return AnswerPage(result).verdict().data


def _result(losses: dict[str, np.ndarray], groups: list[int]) -> SimpleNamespace:
    tokens = np.arange(20, 20 + len(groups))
    ids = [str(i) for i in range(len(groups))]
    scores = {name: AnswerScores(ids, -values * tokens, tokens, 1.0) for name, values in losses.items()}
    parts = summary(scores, [{"group": group, "leaked": True} for group in groups])
    json.dumps(parts, allow_nan=False)
    return SimpleNamespace(content={"parts": parts}, part=parts["all"], trained=True, shown=SHOWN)


def test_a_direction_is_rare_where_there_is_none() -> None:
    rng, told = np.random.default_rng(0), 0
    for _ in range(300):
        base = rng.uniform(1, 3, 4)
        told += "**" in _words(_result({BASE: base, FINETUNED: base + rng.normal(0, 0.2, 4)}, [*range(4)]))
    assert told / 300 < 0.09, "percentiles of a bootstrap: 0.19"


def test_a_direction_that_the_rows_show_is_said() -> None:
    rng = np.random.default_rng(1)
    base = rng.uniform(2, 3, 8)
    better = _words(_result({BASE: base, FINETUNED: base - rng.uniform(0.4, 0.6, 8)}, [*range(8)]))
    worse = _words(_result({BASE: base, FINETUNED: base + rng.uniform(0.4, 0.6, 8)}, [*range(8)]))
    same = _words(_result({BASE: base, FINETUNED: base + rng.normal(0, 0.4, 8)}, [*range(8)]))
    assert "**likelier**" in better and "**less likely**" in worse and "t-test over groups" in better
    assert "do not show a difference" in same


def test_two_groups_and_equal_models_have_no_interval() -> None:
    base = np.array([1.0, 2.0, 3.0])
    for result in (
        _result({BASE: base, FINETUNED: 1.1 * base}, [0, 0, 1]),
        _result({BASE: base, FINETUNED: base}, [0, 1, 2]),
    ):
        assert result.part["difference_interval"] is result.part["ratio_interval"] is None
        assert "(no interval)" in _words(result) and "show nothing" in _words(result)
    few = _result({BASE: base, FINETUNED: base}, [0, 0, 1])
    assert few.part[BASE]["perplexity_interval"] is few.part[BASE]["loss_interval"] is None
    assert "<img" in AnswerPage(few).quality().data
    assert "<table" in AnswerPage(few).parts().data and "<table" in AnswerPage(few).compared().data


def test_limits_that_no_float_holds_are_infinite() -> None:
    assert exponentials([0.0, 1e4]) == [1.0, np.inf] and exponentials(None) is None
