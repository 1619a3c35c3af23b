"""Run one function in a process of its own, so that a crash kills only the child; run jobs on a few threads."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from lib.errors import InputError, as_input_error, in_words, refusal
from lib.progress import PROGRESS_FILE_VARIABLE, Progress
from lib.runs.files import PROJECT

_POLL_SECONDS = 0.1
_LOG_TAIL = 4000

_REASON = re.compile(r"GGML_(ASSERT|ABORT)|fatal error", re.IGNORECASE)
"""Of a line in which llama.cpp says why it aborts."""


class StoppedError(Exception):
    """The work was given up because the caller asked for it (`stop` of `run_child`)."""


def run_child(
    function: str,
    argument: dict[str, Any],
    what: str,
    timeout: float | None = None,
    stop: threading.Event | None = None,
    heard: Callable[[str], None] | None = None,
    python: str = sys.executable,
) -> dict[str, Any]:
    """Call ``function(argument)`` in a new Python process.

    Args:
        function: "package.module:name" of a function that takes one dict and returns one dict, both JSON values.
        argument: its argument; a path in it arrives as text, absolute, and a dataclass as a dict of its fields.
        what: the work in words, as in "quantizing to Q4_K_M"; used in progress and error messages.
        timeout: seconds after which the child is killed; None waits forever.
        stop: for several children at once, each waited for in a thread: when it is set, the child is killed.
        heard: called with the child's newest line of progress; nothing is shown here then.
        python: of another environment (`lib.runs.packages.environment_python`).

    Returns:
        The function's dict, and where it has none "peak_memory_mib", the child's largest resident memory.

    Raises:
        InputError: the one that the function raised; or the child was killed (signal, memory, timeout).
        StoppedError: `stop` was set.
        RuntimeError: the function raised something else; its first line says what, its traceback follows.
    """
    with tempfile.TemporaryDirectory(prefix="workbook-child-") as name:
        folder = Path(name)
        request = {"function": function, "argument": argument, "parent": os.getpid()}
        (folder / "request.json").write_text(json.dumps(request, default=_plain), encoding="utf-8")
        log = logging.getLogger(__name__)
        log.debug("%s: %s in a process of its own", what, function)
        code = _start_and_wait(folder, what, timeout, stop, heard, python)
        log.debug("%s: ended with %s", what, code)
        result = folder / "result.json"
        if result.exists():
            return value_of(json.loads(result.read_text(encoding="utf-8")), what)
        words = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")[-_LOG_TAIL:].strip()
    raise death(code, what, words)


def _plain(value: Any) -> Any:
    """What JSON has not: a path as text, a dataclass as a dict."""
    return str(value.resolve()) if isinstance(value, Path) else vars(value)


def answer(function: Callable[[Any], dict[str, Any]], argument: Any) -> dict[str, Any]:
    """What `function(argument)` returned or raised, as JSON for another process (`value_of`)."""
    try:
        return {"value": function(argument)}
    except Exception as error:
        if refused := as_input_error(error):
            return {"input_error": [refused.found, refused.expected, refused.do]}
        return {"cause": in_words(error), "error": traceback.format_exc()}


def value_of(answer: dict[str, Any], what: str) -> dict[str, Any]:
    """The value of an answer; or raise what it says."""
    if "input_error" in answer:
        raise InputError(*answer["input_error"])
    if "error" in answer:
        raise RuntimeError(f"{what} failed in its process: {answer['cause']}\n{answer['error']}")
    return answer["value"]


def environment(progress: Path | str) -> dict[str, str]:
    """Of a process that imports this project's lib and writes its lines of progress to a file."""
    folders = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": folders, "PYTHONUTF8": "1", PROGRESS_FILE_VARIABLE: str(progress)}


def _start_and_wait(
    folder: Path,
    what: str,
    timeout: float | None,
    stop: threading.Event | None,
    heard: Callable[[str], None] | None,
    python: str,
) -> int:
    """Exit code of the child (negative: signal); the child never outlives this call.

    Its lines of progress go to the headless notebook's file where there is one, or to a file that is read here.
    """
    headless = None if heard else os.environ.get(PROGRESS_FILE_VARIABLE)
    lines = folder / "progress.txt"
    command = [python, "-P", "-m", "lib.runs.child", str(folder)]
    started = time.monotonic()
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment(headless or lines)
        )
    try:
        with contextlib.nullcontext() if heard or headless else Progress(what) as progress:
            heard = heard or (progress and partial(progress.advance, 0))
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(_POLL_SECONDS)
                if stop is not None and stop.is_set():
                    raise StoppedError(what)
                if timeout is not None and time.monotonic() - started > timeout:
                    raise refusal("runs/too-slow", what=what, timeout=timeout)
                if heard:
                    heard(_last_line(lines))
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def _last_line(path: Path) -> str:
    with contextlib.suppress(OSError):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        return lines[-1] if lines else ""
    return ""


def death(code: int, what: str, log: str) -> InputError:
    """The error for a child that ended without an answer."""
    if code == -signal.SIGXCPU:
        return refusal("runs/too-much-computing", what=what)
    how = f"ended by signal {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    last = [line for line in lines if _REASON.search(line)] or lines[-3:]
    said = f" Its last words: {' | '.join(last)}" if last else ""
    return refusal("runs/killed" if code == -9 else "runs/died", what=what, how=how, said=said)


_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int, end: Callable[[int], Any] | None = None) -> None:
    """End this process when its parent dies: on Linux the kernel does it at once, so that nothing more is written.

    Elsewhere, or with an `end` of its own (called with the exit code), a thread looks every half second.
    """
    if end is None and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit(1)
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        (end or os._exit)(1)

    threading.Thread(target=watch, name="die-with-parent", daemon=True).start()


def limit_computing(seconds: float) -> None:
    """End this process (SIGXCPU) when it has computed so many seconds more, however long it waits for a processor."""
    import resource

    so_far = resource.getrusage(resource.RUSAGE_SELF)
    end = math.ceil(so_far.ru_utime + so_far.ru_stime + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (end, end + 5))  # at the second it is killed, whatever it does by then


def peak_memory_mib() -> float:
    """Largest resident memory of this process, MiB.

    Linux: VmHWM, which starts afresh at exec; ru_maxrss would include what the parent had when it forked.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) / 1024, 1)
    if os.name == "nt":
        import psutil

        return round(psutil.Process().memory_info().peak_wset / 2**20, 1)
    import resource

    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


# Independent pieces of work on a few threads: NumPy, torch and file calls leave the interpreter free meanwhile.

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
        Exception: the first that a job raised; jobs that have not begun are dropped, running ones are waited for.
    """
    threads = max(1, min(MOST_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2))
    waiting = iter(jobs)
    with ThreadPoolExecutor(threads, initializer=prepare) as pool:
        try:
            running = {pool.submit(job) for job in islice(waiting, 2 * threads)}
            while running:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                running |= {pool.submit(job) for job in islice(waiting, len(finished))}
                for future in finished:
                    done(future.result())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def own_folder() -> Path:
    """Where a child's request lies and its answer goes: a confined child must be able to write there."""
    return Path(sys.argv[1])


def _main(folder: Path) -> None:
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    die_with_parent(request["parent"])
    module, _, name = request["function"].partition(":")

    def call(argument: dict[str, Any]) -> dict[str, Any]:
        value = getattr(importlib.import_module(module), name)(argument)
        return {"peak_memory_mib": peak_memory_mib(), **value}

    partial = folder / "result.json.part"
    partial.write_text(json.dumps(answer(call, request["argument"]), default=_plain), encoding="utf-8")
    partial.replace(folder / "result.json")


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
