"""Jobs on a few threads: every result once, the first error wins, no job begins after it."""

from __future__ import annotations

import threading

import pytest

from lib.runs.child import MOST_THREADS, run_jobs


def test_every_result_once_and_in_the_callers_thread() -> None:
    results, prepared = [], []
    jobs = ((lambda i=i: i * i) for i in range(100))
    run_jobs(jobs, lambda value: results.append((value, threading.current_thread())), lambda: prepared.append(1))
    assert sorted(value for value, _ in results) == [i * i for i in range(100)]
    assert {thread for _, thread in results} == {threading.main_thread()}
    assert 1 <= len(prepared) <= MOST_THREADS


def test_no_jobs() -> None:
    run_jobs([], lambda value: pytest.fail("nothing to hand over"))


def test_first_error_stops_the_rest() -> None:
    begun = []

    def job(i: int) -> int:
        begun.append(i)
        if i == 3:
            raise ValueError("third")
        return i

    with pytest.raises(ValueError, match="third"):
        run_jobs(((lambda i=i: job(i)) for i in range(10_000)), lambda value: None)
    assert len(begun) < 100


def test_error_in_the_callers_thread() -> None:
    def refuse(value: int) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        run_jobs(((lambda i=i: i) for i in range(1000)), refuse)
