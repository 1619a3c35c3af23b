"""Several types of one source, as many at once as cores and memory allow; stopped together, cleanly.

Several files with few threads each use the cores better than one file with all of them: llama.cpp's threads wait for
one another at every tensor, and reading, checking and writing a file are work of one thread (docs/LOG.md).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.progress import Progress
from lib.runs.child import StoppedError
from lib.runs.files import require_space
from lib.runs.machine import available_memory, physical_cores
from lib.stages.quantize import recipes
from lib.stages.quantize.files import QuantizationReport, predict_sizes, quantize_predicted, require_matrix
from lib.stages.quantize.recipes import Options, check_output
from lib.stages.quantize.standalone import Budget, mix_of_text

_MEMORY_PER_CHILD = 512 << 20
"""Bytes: llama.cpp's buffers of at most 256 MiB (they do not grow with the model), the interpreter and the tokenizer
of the load check. The mapped source is not counted: its pages can be dropped at any time."""

_REFRESH = 0.2


@dataclass(frozen=True)
class Job:
    """One file to make: its prediction (see `predict_sizes`), its path, and options of its own if it has any."""

    prediction: dict[str, Any]
    output: Path
    options: Options | None = None


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
        spare = 0 if n_threads else 1  # keeps a core busy while another file is read, checked or written
        return cls(files, min(threads, max(1, threads // files) + spare))


def quantize_files(
    source: Path,
    folder: Path,
    types: Sequence[str],
    options: Options | None = None,
    n_threads: int = 0,
    budget: Budget | None = None,
) -> list[QuantizationReport]:
    """Quantize one GGUF file to several types, and under a budget: `folder`/<name of the source>-<TYPE>.gguf each.

    Every refusal comes before the first file is begun; each file is complete or absent.

    Raises:
        InputError: as `quantize_file` and `mix_of_text`; a type named twice.
    """
    for name in types:
        recipes.file_type(name)
    names = [*types, budget.name] if budget else types
    if len(set(names)) != len(names):
        raise InputError(f"a type named twice: {' '.join(names)}.", "each type once.", "remove one of the two.")
    outputs = [folder / f"{recipes.stem(source)}-{name}.gguf" for name in names]
    for output in outputs:
        check_output(source, output)
    options = options or Options()
    predictions = predict_sizes(source, types, options)
    require_matrix(predictions, options)
    mixed = mix_of_text(source, budget, options.imatrix, folder, n_threads) if budget else None
    predictions += [mixed.prediction] if mixed else []
    require_space(folder, sum(p["bytes"] for p in predictions), f"{len(names)} quantized files")
    own = [None] * len(types) + [mixed.options if mixed else None]
    jobs = [Job(*job) for job in zip(predictions, outputs, own, strict=False)]
    return run_jobs(source, jobs, options, Slots.choose(len(jobs), n_threads))


def run_jobs(
    source: Path,
    jobs: Sequence[Job],
    options: Options,
    slots: Slots,
    done: Callable[[QuantizationReport], None] = lambda report: None,
) -> list[QuantizationReport]:
    """Make all files, the longest first; reports in the order of `jobs`.

    Args:
        done: called (in the caller's thread) as each file is finished.

    Raises:
        BaseException: the first that a job raised, or that interrupted the caller (Ctrl-C, SIGTERM); every child is
            ended and no half file is left by then.
    """
    return _Crew(source, jobs, options, slots, done).run() if jobs else []


class _Crew:
    """The threads that make the files of one ladder, each by one child process after another."""

    def __init__(
        self,
        source: Path,
        jobs: Sequence[Job],
        options: Options,
        slots: Slots,
        done: Callable[[QuantizationReport], None],
    ) -> None:
        self._source, self._jobs, self._options, self._slots, self._done = source, jobs, options, slots, done
        self._stop = threading.Event()
        self._board = _Board(len(jobs), slots)
        self._reports: dict[int, QuantizationReport] = {}
        self._waiting: dict[Future[QuantizationReport], int] = {}

    def run(self) -> list[QuantizationReport]:
        order = sorted(
            range(len(self._jobs)), key=lambda place: -recipes.work(self._jobs[place].prediction["histogram"])
        )
        pool = ThreadPoolExecutor(self._slots.files, thread_name_prefix="quantizing")
        try:
            with self._board:
                for place in order:
                    self._waiting[pool.submit(self._make, place)] = place
                for future in list(self._waiting):
                    future.add_done_callback(self._ended)
                while self._waiting:
                    finished, _ = wait(self._waiting, _REFRESH, FIRST_COMPLETED)
                    for future in sorted(finished, key=lambda f: isinstance(f.exception(), StoppedError)):
                        self._take(future)  # the error that stopped the others comes before theirs
                    self._board.show(len(finished))
        finally:
            self._stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            for future in [f for f in self._waiting if not f.cancelled() and f.exception() is None]:
                self._take(future)  # complete before the others were stopped
        return [self._reports[place] for place in range(len(self._jobs))]

    def _make(self, place: int) -> QuantizationReport:
        job = self._jobs[place]
        name = job.prediction["type"]
        if self._stop.is_set():
            raise StoppedError(name)
        heard = self._board.listener(name)
        threads = self._slots.threads
        try:
            options = job.options or self._options
            return quantize_predicted(self._source, job.output, job.prediction, options, threads, self._stop, heard)
        finally:
            self._board.forget(name)

    def _ended(self, future: Future[QuantizationReport]) -> None:
        if future.cancelled() or future.exception() is not None:
            self._stop.set()

    def _take(self, future: Future[QuantizationReport]) -> None:
        place = self._waiting[future]
        self._reports[place] = future.result()
        del self._waiting[future]
        self._done(self._reports[place])


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
