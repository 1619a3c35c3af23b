"""One process at a time: locks of folders, of lock files and of files that are being written. The system gives all of
them up for a process that is killed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from lib.errors import InputError

try:
    import fcntl
except ModuleNotFoundError:  # Windows: files beside what is locked stand in for locks of the system
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def folder_alone(folder: Path) -> Iterator[None]:
    """Be the one process that looks for abandoned folders there, or makes one: between its making and its lock, a
    folder looks abandoned."""
    if fcntl is None:
        with FileLock(folder / ".looking.lock"):
            yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks of folders
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path, found: str, expected: str, do: str) -> Iterator[None]:
    """Hold the lock file `path`; the system gives it up for a process that is killed.

    Raises:
        InputError: another process holds it; with these words.
        OSError: there can be no file.
    """
    try:
        held = FileLock(path, timeout=0).acquire()
    except Timeout:
        raise InputError(found, expected, do) from None
    with held:
        yield


@contextlib.contextmanager
def writing_alone(file: IO[bytes], path: Path) -> Iterator[None]:
    """Be the only process that writes the open file at `path`; closing it gives it up.

    Raises:
        InputError: another process writes it.
    """
    try:
        if fcntl is None:
            beside: contextlib.AbstractContextManager[Any] = FileLock(f"{path}.lock", timeout=0).acquire()
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            beside = contextlib.nullcontext()
    except OSError:  # Timeout is one
        raise InputError(f"another process writes {path}.", "one at a time.", "wait for its end.") from None
    with beside:
        yield
