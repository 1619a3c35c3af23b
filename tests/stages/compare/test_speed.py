"""How often something is timed, what is not counted, and what is made of the times."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lib.report import charts
from lib.report.display import rows_of
from lib.report.sentences import sentence
from lib.stages.compare.speed import LOADS, _number, rates, repeat


def clock(times: list[float]) -> Callable[[], float]:
    """A run that takes these seconds, one after another; the last one for ever."""
    left = list(times)
    return lambda: left.pop(0) if len(left) > 1 else left[0]


def test_the_first_run_is_a_warm_up() -> None:
    assert repeat(clock([99.0, 1.0]), 3, 5, 0.5) == [1.0] * 3


@pytest.mark.parametrize(("each", "runs"), [(10.0, 3), (1.0, 3), (0.3, 4), (0.25, 4), (0.001, 6)])
def test_slow_runs_are_repeated_less(each: float, runs: int) -> None:
    """At least three, at most six, and as many as one second holds between."""
    assert len(repeat(clock([each]), 3, 6, 1.0)) == runs


def test_loads_are_few() -> None:
    fewest, most, seconds = LOADS
    assert 3 <= fewest < most
    assert [len(repeat(clock([each]), *LOADS)) for each in (seconds, seconds / 100)] == [fewest, most]


def test_what_is_made_of_the_times() -> None:
    assert rates([4.0, 1.0, 2.0], 100, [4.0, 1.0, 2.0], [1.0]) == {
        "load_seconds": 2.0,
        "load_seconds_range": [1.0, 4.0],
        "load_runs": 3,
        "prompt_tokens_per_second": 50.0,
        "prompt_tokens_per_second_range": [25.0, 100.0],
        "prompt_runs": 3,
        "generation_tokens_per_second": 32.0,
        "generation_tokens_per_second_range": [32.0, 32.0],
        "generation_runs": 1,
    }


def test_the_page_says_how_often() -> None:
    first = {"type": "F16", **rates([0.5, 0.25, 1.0], 8, [1.0] * 5, [1.0] * 7)}
    first |= {"seconds_per_sample": 0.01, "peak_memory_mib": 50.0}
    second = {**first, **rates([1.0] * 5, 8, [1.0] * 5, [1.0] * 5)}
    runs = {"load": [3, 5], "prompt": [5, 5], "generation": [5, 7]}
    caption = sentence("compare.speeds", processor="a CPU", threads=2, runs=runs)
    assert "of 3 to 5 loads, 5 prompts, 5 to 7 generations a file" in caption
    assert "Measured once: ms a row" in caption and "peak memory" in caption
    (row, _) = rows_of("compare.speeds", [first, second], program=charts.program)
    assert row["load"] == 0.5 and row["load_range"] == "0.25 – 1"


@pytest.mark.parametrize(("value", "number"), [("12", 12), (7, 7), ("9" * 5000, None), ("²", None), ("-1", None)])
def test_a_number_of_the_header_may_be_a_text(value: object, number: int | None) -> None:
    assert _number(value) == number
