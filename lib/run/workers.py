"""Independent pieces of work on a few threads: NumPy, torch and file calls leave the interpreter free meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any

MOST_THREADS = 4
"""More threads do not write one file faster."""


def run_jobs(
    jobs: Iterable[Callable[[], Any]], done: Callable[[Any], None], prepare: Callable[[], None] | None = None
) -> None:
    """Run every job and hand its result to `done`, in the order of completion and in the caller's thread.

    Args:
        jobs: taken one by one, so that a generator never runs far ahead.
        prepare: called once in every thread before its first job.

    Raises:
        Exception: the first that a job raised; jobs that were not begun are dropped, those running are waited for.
    """
    threads = max(1, min(MOST_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2))
    waiting = iter(jobs)
    running: set[Future[Any]] = set()
    with ThreadPoolExecutor(threads, initializer=prepare or (lambda: None)) as pool:
        try:
            while True:
                running |= {pool.submit(job) for job in islice(waiting, 2 * threads - len(running))}
                if not running:
                    return
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    done(future.result())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
