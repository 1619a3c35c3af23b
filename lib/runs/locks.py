"""One process at a time: locks of folders, of lock files and of files that are being written. The system gives all of
them up for a process that is killed.

On a disk that several machines share, the system's lock may hold on one machine alone. There a marker file is taken
besides, of filelock's `SoftFileLock`: it names host, process and start of the process. Of the same machine it is taken
over when that process is gone; of another it never is, for a silent process cannot be told from a dead one. So nothing
needs to renew it, and no clock is compared."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from filelock import FileLock, SoftFileLock, Timeout

from lib.errors import InputError, refusal

try:
    import fcntl
except ModuleNotFoundError:  # Windows: files beside what is locked stand in for locks of the system
    fcntl = None  # type: ignore[assignment]

VARIABLE = "WORKBOOK_LOCK"
"""Environment variable: `soft` takes marker files everywhere, `system` nowhere; unset: by the file system."""

ONE_MACHINE = frozenset(
    ("9p", "afs", "beegfs", "cifs", "fuse", "lustre", "nfs", "nfs4", "panfs", "smb3", "smbfs", "vboxsf", "virtiofs")
)
"""File systems, besides fuse.*, whose flock may be kept by each machine for itself, or not at all."""

PATIENCE = 10.0
"""Seconds of waiting for another machine after which its lock is named."""

_reasons: dict[int, str] = {}


def marker_reason(folder: Path) -> str:
    """Why a lock in an existing folder takes a marker file besides: the variable, the kind of the shared disk, or "no
    flock"; empty where the system's lock is enough.

    Raises:
        InputError: the environment variable says something else.
    """
    chosen = os.environ.get(VARIABLE, "")
    if chosen not in ("", "soft", "system"):
        raise refusal("runs/no-such-lock", variable=VARIABLE, chosen=chosen)
    if chosen or fcntl is None:  # Windows asks the server for its locks
        return f"{VARIABLE}=soft" if chosen == "soft" else ""
    device = folder.stat().st_dev
    if device not in _reasons:
        _reasons[device] = _shared_disk(folder) or "no flock" * _lies(folder)
    return _reasons[device]


def _shared_disk(folder: Path) -> str:
    """The kind of a file system whose locks other machines may not see; empty for others."""
    import psutil

    place, mounts = folder.resolve(), []
    with contextlib.suppress(OSError):  # a system that hides its mounts
        mounts = [one for one in psutil.disk_partitions(all=True) if place.is_relative_to(one.mountpoint)]
    mount = max(reversed(mounts), key=lambda one: len(one.mountpoint), default=None)  # of two there the later
    if mount is None or not (mount.fstype in ONE_MACHINE or mount.fstype.startswith("fuse.")):
        return ""
    return "" if mount.fstype == "lustre" and "flock" in mount.opts.split(",") else mount.fstype


def _lies(folder: Path) -> bool:
    """Whether the system gives two processes the same lock there, or none at all; False where no file can be made."""
    with contextlib.ExitStack() as files:
        try:
            first = files.enter_context(tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-"))
            second = files.enter_context(Path(first.name).open("rb+"))
        except OSError:
            return False
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # BlockingIOError is the right answer, another says that there are no locks
            return not isinstance(error, BlockingIOError)
    return True


@contextlib.contextmanager
def _marked(path: Path, wait: bool) -> Iterator[None]:
    """Hold the marker file of the lock `path`, where the disk wants one or another machine has put one there."""
    marker = path.with_name(f"{path.name}.soft")
    if not marker_reason(path.parent) and not os.path.lexists(marker):
        yield
        return
    lock, told = SoftFileLock(marker), False
    while not lock.is_locked:
        try:
            lock.acquire(timeout=PATIENCE if wait else 0)
        except Timeout as error:
            elsewhere = _elsewhere(error, marker)
            if not wait:
                raise elsewhere or error from None
            if elsewhere and not told:
                from lib.progress import say

                say(str(elsewhere))
                told = True
    try:
        yield
    finally:
        lock.release()


def _elsewhere(error: Timeout, marker: Path) -> InputError | None:
    """That a process holds a lock which cannot be asked from here, and since when; None for one of this machine."""
    holder = str(error).partition("It is held by ")[2].partition(", which this host")[0]  # filelock names only those
    try:
        hours = max(time.time() - marker.stat().st_mtime, 0) / 3600
    except OSError:  # given up a moment ago
        return None
    return refusal("runs/locked-elsewhere", holder=holder, hours=hours, marker=marker) if holder else None


@contextlib.contextmanager
def lock_file(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock file `path`, whose folder exists; the system gives it up for a process that is killed.

    Raises:
        InputError: a process of another machine holds it (without `wait`).
        Timeout: one of this machine does (without `wait`).
        OSError: there can be no file.
    """
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(FileLock(path, timeout=-1 if wait else 0, fallback_to_soft=False))
        except Timeout:
            raise
        except OSError:
            if not marker_reason(path.parent):
                raise
        held.enter_context(_marked(path, wait))
        yield


@contextlib.contextmanager
def folder_alone(folder: Path) -> Iterator[None]:
    """Be the one process that looks for abandoned folders there, or makes one: between its making and its lock, a
    folder looks abandoned."""
    path = folder / ".looking.lock"
    if fcntl is None:
        with lock_file(path):
            yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks of folders
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        with _marked(path, wait=True):
            yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path, found: str, expected: str, do: str) -> Iterator[None]:
    """Hold the lock file `path` as `lock_file` does.

    Raises:
        InputError: another process holds it; with these words.
        OSError: there can be no file.
    """
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(lock_file(path, wait=False))
        except Timeout:
            raise InputError(found, expected, do) from None
        yield


@contextlib.contextmanager
def writing_alone(file: IO[bytes], path: Path) -> Iterator[None]:
    """Be the only process that writes the open file at `path`; closing it gives it up.

    Raises:
        InputError: another process writes it.
    """
    with contextlib.ExitStack() as held:
        try:
            if fcntl is None:
                held.enter_context(lock_file(path.with_name(f"{path.name}.lock"), wait=False))
            else:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held.enter_context(_marked(path, wait=False))
        except OSError:  # Timeout is one
            raise InputError(f"another process writes {path}.", "one at a time.", "wait for its end.") from None
        yield
