"""From exceptions to exit codes: a command line never shows a traceback unless it is asked to.

0 success · 1 a fault of the workbook or of a notebook · 2 input that was refused · 130 Ctrl-C · 143 SIGTERM
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import typer

from lib.cli.output import printable
from lib.errors import InputError
from lib.reporting import Terminated

DEBUG_VARIABLE = "WORKBOOK_DEBUG"
"""Environment variable: show tracebacks."""

REFUSED, FAULT, INTERRUPTED, TERMINATED = 2, 1, 130, 143

Command = TypeVar("Command", bound=Callable[..., Any])


def tell(text: str) -> None:
    """A line on stderr."""
    print(printable(text), file=sys.stderr, flush=True)


def _terminate(*_: object) -> None:
    raise Terminated


def _os_error(error: OSError) -> str:
    """What the system refused, in a paragraph; a full disk and missing rights are the usual ones."""
    where = f" ({error.filename})" if error.filename else ""
    what = error.strerror or type(error).__name__
    return (
        f"Found: {what}{where}. Expected: a file system that takes the output. "
        "Do this: check the path, its permissions and the free space, then run the command again; "
        "finished products are kept."
    )


def _code_of(error: BaseException) -> int:
    """Tell the user what happened; the exit code for it."""
    if isinstance(error, InputError):
        tell(str(error))
        return REFUSED
    if isinstance(error, (KeyboardInterrupt, Terminated)):
        tell("Interrupted: nothing half-written was left; run the command again to go on.")
        return INTERRUPTED if isinstance(error, KeyboardInterrupt) else TERMINATED
    if isinstance(error, BrokenPipeError):  # the reader of stdout has gone (| head): not a fault
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAULT
    if isinstance(error, OSError):
        tell(_os_error(error))
        return REFUSED
    if isinstance(error, MemoryError):
        tell("Found: no memory left. Expected: room for the model. Do this: close programs or take a smaller model.")
        return REFUSED
    first = str(error).strip().splitlines()[:1]
    tell(f"The workbook failed: {type(error).__name__}: {first[0] if first else 'no message'}")
    tell(f"This is a fault of the workbook or of a library. Set {DEBUG_VARIABLE}=1 to see the traceback.")
    return FAULT


def guarded(command: Command) -> Command:
    """Wrap a command so that every exception becomes a message and an exit code."""

    @functools.wraps(command)
    def run(*arguments: Any, **keywords: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _terminate)
        try:
            return command(*arguments, **keywords)
        except (typer.Exit, typer.Abort):
            raise
        except BaseException as error:
            if os.environ.get(DEBUG_VARIABLE) and not isinstance(error, (KeyboardInterrupt, Terminated)):
                import traceback

                traceback.print_exc()
            raise typer.Exit(_code_of(error)) from None

    return run  # type: ignore[return-value]
