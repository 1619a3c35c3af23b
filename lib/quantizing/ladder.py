"""Several types of one source, as many at once as cores and memory allow; stopped together, cleanly.

One thread a file is the best use of the cores: llama.cpp's threads wait for one another at every tensor, and reading,
checking and writing a file are work of one thread (measured: docs/LOG.md).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.device import available_memory, physical_cores
from lib.errors import InputError
from lib.progress import Progress
from lib.quantizing import recipes
from lib.quantizing.checks import check_output
from lib.quantizing.files import QuantizationReport, predict_sizes, quantize_predicted, require_matrix
from lib.quantizing.options import Options
from lib.run.files import require_space

_MEMORY_PER_CHILD = 768 << 20
"""Bytes: llama.cpp's buffers of at most 256 MiB, what of the mapped source is in use, the interpreter. 533 MiB were
measured for models of 0.5 and of 4 billion weights alike."""

_REFRESH = 0.2


@dataclass(frozen=True)
class Job:
    """One file to make: its prediction (see `predict_sizes`) and its path."""

    prediction: dict[str, Any]
    output: Path


@dataclass(frozen=True)
class Slots:
    """How many files at once, and with how many threads each."""

    files: int
    threads: int

    @classmethod
    def choose(cls, jobs: int, n_threads: int = 0) -> Slots:
        """As many files at once as threads (0 = physical cores), free memory and jobs allow."""
        threads = n_threads or physical_cores()
        files = max(1, min(jobs, threads, available_memory() // _MEMORY_PER_CHILD))
        return cls(files, max(1, threads // files))


def quantize_files(
    source: Path, folder: Path, types: Sequence[str], options: Options | None = None, n_threads: int = 0
) -> list[QuantizationReport]:
    """Quantize one GGUF file to several types: `folder`/<name of the source>-<TYPE>.gguf each.

    Every refusal comes before the first file is begun; each file is complete or absent.

    Raises:
        InputError: as `quantize_file`; a type named twice.
    """
    for name in types:
        recipes.file_type(name)
    if len(set(types)) != len(types):
        raise InputError(f"a type named twice: {' '.join(types)}.", "each type once.", "remove one of the two.")
    outputs = [folder / f"{recipes.stem(source)}-{name}.gguf" for name in types]
    for output in outputs:
        check_output(source, output)
    options = options or Options()
    predictions = predict_sizes(source, types, options)
    require_matrix(predictions, options)
    require_space(folder, sum(p["bytes"] for p in predictions), f"{len(types)} quantized files")
    jobs = [Job(prediction, output) for prediction, output in zip(predictions, outputs, strict=True)]
    return run_jobs(source, jobs, options, n_threads)


def run_jobs(
    source: Path,
    jobs: Sequence[Job],
    options: Options,
    n_threads: int,
    done: Callable[[QuantizationReport], None] = lambda report: None,
) -> list[QuantizationReport]:
    """Make all files, the longest first; reports in the order of `jobs`.

    Args:
        done: called (in the caller's thread) as each file is finished.

    Raises:
        BaseException: the first that a job raised, or that interrupted the caller (Ctrl-C, SIGTERM); every child is
            ended and no half file is left by then.
    """
    if not jobs:
        return []
    slots = Slots.choose(len(jobs), n_threads)
    stop = threading.Event()
    board = _Board(len(jobs), slots)
    order = sorted(range(len(jobs)), key=lambda place: -recipes.work(jobs[place].prediction["histogram"]))
    reports: dict[int, QuantizationReport] = {}

    def make(place: int) -> QuantizationReport:
        job = jobs[place]
        name = job.prediction["type"]
        heard = board.listener(name)
        try:
            return quantize_predicted(source, job.output, job.prediction, options, slots.threads, stop, heard)
        finally:
            board.forget(name)

    def take(future: Future[QuantizationReport]) -> None:
        place = waiting[future]
        reports[place] = future.result()
        del waiting[future]
        done(reports[place])

    pool = ThreadPoolExecutor(slots.files, thread_name_prefix="quantizing")
    waiting: dict[Future[QuantizationReport], int] = {}
    try:
        with board:
            waiting |= {pool.submit(make, place): place for place in order}
            while waiting:
                finished, _ = wait(waiting, _REFRESH, FIRST_COMPLETED)
                for future in finished:
                    take(future)
                board.show(len(finished))
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
        for future in [f for f in waiting if not f.cancelled() and f.exception() is None]:
            take(future)  # complete before the others were stopped
    return [reports[place] for place in range(len(jobs))]


class _Board:
    """One line of progress for all files together: how many are done, and where each running one is."""

    def __init__(self, jobs: int, slots: Slots) -> None:
        each = "" if slots.files == 1 else f" ({slots.files} at once)"
        self._progress = Progress(f"quantizing, types{each}", jobs)
        self._lines: dict[str, str] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> _Board:
        self._progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)

    def listener(self, name: str) -> Callable[[str], None]:
        """What hears the child that makes `name`."""

        def hear(line: str) -> None:
            with self._lock:
                self._lines[name] = line.partition(", tensors: ")[2].partition(" ")[0]

        return hear

    def forget(self, name: str) -> None:
        """`name` is made or given up."""
        with self._lock:
            self._lines.pop(name, None)

    def show(self, finished: int) -> None:
        """Count, and say where the running ones are, in tensors."""
        with self._lock:
            note = ", ".join(f"{name} {place}" for name, place in self._lines.items() if place)
        self._progress.advance(finished, note)
