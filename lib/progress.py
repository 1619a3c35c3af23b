"""Progress of long work: a bar in a terminal, a live line in JupyterLab, lines in a file for a headless run; and what
libraries and the workbook log, where that is asked for.

Where stderr is no terminal (a log, a pipe), a line every ten seconds at most, whatever works meanwhile.

Nothing is ever printed to a notebook's stderr, where it would end up in the report page.
"""

from __future__ import annotations

import contextlib
import html
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, TypeVar

from lib.language import told

Item = TypeVar("Item")

PROGRESS_FILE_VARIABLE = "WORKBOOK_PROGRESS_FILE"
"""Environment variable: a file that a headless notebook appends its progress lines to; the report runner shows them."""


PLAIN_SECONDS = 10.0
"""Between two lines of progress where stderr is no terminal."""
_told: list[float] = []
"""When the newest of them was written."""


def tell_rarely(line: str) -> None:
    """A line on stderr, unless another one was written less than `PLAIN_SECONDS` ago."""
    if not _told or time.monotonic() - _told[-1] >= PLAIN_SECONDS:
        _told[:] = [time.monotonic()]
        print(line, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def _in_notebook() -> bool:
    shell = sys.modules.get("IPython")
    instance = shell.get_ipython() if shell else None
    return instance is not None and hasattr(instance, "kernel")


def shown_live() -> bool:
    """Whether somebody may be watching the output of a cell: in a kernel whose progress does not go to a file."""
    return not os.environ.get(PROGRESS_FILE_VARIABLE) and _in_notebook()


def show_live(content: str | object, handle: Any = None) -> Any:
    """Show HTML, or an object of IPython.display, in the running cell, in place of what `handle` stands for.

    Returns:
        the handle of what is shown now.
    """
    from IPython.display import HTML, display

    shown = HTML(content) if isinstance(content, str) else content
    if handle is None:
        return display(shown, display_id=True)
    handle.update(shown)
    return handle


class Progress:
    """Counts `total` units of `what`, at most one message every `every` seconds; use as a context manager.

    Args:
        what: the work in words, e.g. "scoring test rows".
        total: number of units; None when unknown.
        every: seconds between messages in a file (a terminal is refreshed more often).
        already: units that were done before.
        pieces: how many things that `advance` counts make one unit (bytes a MiB).
    """

    def __init__(
        self, what: str, total: int | None = None, every: float = 5.0, already: int = 0, pieces: int = 1
    ) -> None:
        self.what, self.total, self.done, self.already = told(what), total, already, already
        self.pieces, self.counted = pieces, 0
        self.started = time.monotonic()
        self.last = 0.0
        self.file = os.environ.get(PROGRESS_FILE_VARIABLE)
        self.notebook = shown_live()
        self.terminal = not self.file and not self.notebook and sys.stderr.isatty()
        self.every = 0.2 if self.terminal else 1.0 if self.notebook else every
        self.handle = None

    def __enter__(self) -> Progress:
        self._say()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self.handle is not None:
            show_live("", self.handle)
        elif kind is None and self.done:
            took = _duration(time.monotonic() - self.started)
            self._write(told(f"{self.what}: {self.done} done in {took}"), final=True)
        elif self.terminal:
            sys.stderr.write("\n")

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` more; `note` is shown behind the count (e.g. the loss)."""
        self.counted += count
        self.done = self.already + self.counted // self.pieces
        if time.monotonic() - self.last >= self.every:
            self._say(note)

    def _say(self, note: str = "") -> None:
        self.last = time.monotonic()
        line, left = f"{self.what}: {self.done or '…'}", ""
        if self.total:
            if self.already < self.done < self.total:
                each = (self.last - self.started) / (self.done - self.already)
                left = told(f", about {_duration(each * (self.total - self.done))} left")
            line = f"{self.what}: {self.done}/{self.total} ({100 * self.done / self.total:.0f} %{left})"
        self._write(line + (f" · {note}" if note else ""))

    def _write(self, line: str, final: bool = False, always: bool = False) -> None:
        if self.file:
            with Path(self.file).open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")
        elif self.notebook:
            self.handle = show_live(f"<p role='status'><small>{html.escape(line)}</small></p>", self.handle)
        elif self.terminal:
            sys.stderr.write(f"\r\033[K{line}" + ("\n" if final else ""))
            sys.stderr.flush()
        elif always:
            print(line, file=sys.stderr, flush=True)
        else:
            tell_rarely(line)


def say(line: str) -> None:
    """One line of progress, at once, in the language of this process."""
    logging.getLogger(__name__).info(line)
    line = told(line)
    Progress(line)._write(line, final=True, always=True)


def track(items: Collection[Item], what: str) -> Iterator[Item]:
    """Yield `items`, counting each as one unit of `what`."""
    with Progress(what, len(items)) as progress:
        for item in items:
            yield item
            progress.advance()


# What libraries and the workbook log. Every process of a command appends it to one file, which the command shows on its
# stderr: that of a notebook would be part of its page.

LEVELS = ("debug", "info", "warning", "error")
LOG_LEVEL_VARIABLE, LOG_FILE_VARIABLE = "WORKBOOK_LOG_LEVEL", "WORKBOOK_LOG_FILE"
"""Environment variables: one of LEVELS, and the file; both are set where a log is shown."""


def keep_log() -> None:
    """From now on this process logs to the file; called where `lib` is imported and there is one."""
    handler = logging.FileHandler(os.environ[LOG_FILE_VARIABLE], encoding="utf-8")
    form = "%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"
    level = os.environ[LOG_LEVEL_VARIABLE].upper()
    logging.basicConfig(level=level, format=form, handlers=[handler], force=True)
    logging.captureWarnings(True)


def join_log(*loggers: str) -> bool:
    """Let loggers of libraries with handlers of their own write to the file alone; False where no log is shown."""
    if not os.environ.get(LOG_FILE_VARIABLE):
        return False
    for logger in map(logging.getLogger, loggers):
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)
    return True


@contextlib.contextmanager
def shown_log(level: str) -> Iterator[None]:
    """Show on stderr what this process and those that it starts log, from this level on."""
    with tempfile.NamedTemporaryFile("r", prefix="workbook-log-", encoding="utf-8", errors="replace") as told:
        os.environ |= {LOG_LEVEL_VARIABLE: level, LOG_FILE_VARIABLE: told.name}
        root, ended = logging.getLogger(), threading.Event()
        before = root.handlers[:], root.level
        root.handlers.clear()
        keep_log()

        def show() -> None:
            last = False
            while not last:
                last = ended.wait(0.2)
                sys.stderr.write(told.read())

        thread = threading.Thread(target=show, name="shown-log", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            del os.environ[LOG_LEVEL_VARIABLE], os.environ[LOG_FILE_VARIABLE]
            root.handlers[0].close()
            root.handlers[:], root.level = before
            logging.captureWarnings(False)
