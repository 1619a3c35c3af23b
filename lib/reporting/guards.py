"""Around a report: alone in its folder, SIGTERM as an exception, progress on the terminal."""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from lib.errors import InputError
from lib.reporting import Terminated
from lib.settings import Settings
from lib.textmetrics import read_prompts, read_terms

DETAIL = "    "
"""How a line of progress inside a notebook begins."""


def check_lists(settings: Settings) -> None:
    """Refuse lists of terms and prompts that cannot be read before hours of training go by.

    Raises:
        InputError: no such list, or one that cannot be used.
    """
    if settings.task != "classification":
        read_terms(settings.terms)
        read_prompts(settings.prompts_file)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Refuse a second report of the same run; remove what a killed one left behind."""
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(
            f"another process makes the report {folder.name!r}.", "one at a time.", "wait for it, or set run_name."
        ) from None
    try:
        for left in folder.glob(".work-*"):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Turn SIGTERM into an exception while a report runs (in the main thread only, as Python demands)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def to_stderr(line: str) -> None:
    """One line of progress; in a terminal the lines inside a notebook replace one another."""
    if not sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)
        return
    detail = line.startswith(DETAIL)
    shown = line[: shutil.get_terminal_size().columns - 1] if detail else line
    sys.stderr.write(f"\r\033[K{shown}" + ("" if detail else "\n"))
    sys.stderr.flush()
