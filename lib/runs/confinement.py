"""A process that gives up what reading a stranger's file needs not: network, other programs, writing elsewhere.

On Linux the kernel holds it (seccomp, Landlock; neither needs rights), whatever code runs; where it cannot, and on
other systems, Python's audit hook alone does, which code in C passes by.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib.runs.child import limit_computing

try:
    import resource
except ModuleNotFoundError:  # Windows: no limits of memory and computing time
    resource = None  # type: ignore[assignment]

_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 22, 38
_CALLS = {
    "x86_64": (0xC000003E, (41, 59, 322, 101, 310, 311, 425)),
    "aarch64": (0xC00000B7, (198, 221, 281, 117, 270, 271, 425)),
}
"""Machine → the kernel's number for it, and those of socket, execve, execveat, ptrace, process_vm_readv, _writev and
io_uring_setup (which can do what the others do)."""
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_WRITING = 0b1_1111_1111_0010
"""Landlock's rights to write, remove and make files and folders of every kind; since its version 3 also to cut them."""
_CUTTING = 1 << 14
_NEVER = ("socket.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "ctypes.", "pty.")
_CHANGES = ("os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate")
"""Audit events that are refused; and those of whose paths all must lie in the places."""


def confine(places: Sequence[Path], more_bytes: int, seconds: int, but: tuple[str, ...] = ()) -> bool:
    """From here on: no network, no other program, writing below `places` only; limits of memory and computing time.

    Args:
        more_bytes: of address space, beyond what the process has now.
        seconds: of computing, beyond what it took so far.
        but: audit events that known code needs, by their beginnings; the kernel holds it without them, too.

    Returns:
        Whether the kernel holds all of it.
    """
    if resource is not None:
        with contextlib.suppress(OSError):  # no /proc
            taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (taken + more_bytes,) * 2)
        limit_computing(seconds)
    held = sys.platform == "linux" and _filter_calls() and _restrict_writing(places)
    inside = tuple(f"{os.path.realpath(place)}{os.sep}" for place in places)

    def refuse(event: str, values: tuple[Any, ...]) -> None:
        paths: tuple[Any, ...] = values[:2] if event in _CHANGES else ()
        if event == "open" and values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
            paths = values[:1]
        paths = tuple(os.path.realpath(os.fsdecode(path)) for path in paths if isinstance(path, (str, bytes)))
        if (event.startswith(_NEVER) and not event.startswith(but)) or not all(
            path.startswith(inside) for path in paths
        ):
            raise PermissionError(errno.EPERM, f"{event} is refused here", *paths[:1])

    sys.addaudithook(refuse)
    return held


def _filter_calls() -> bool:
    """Let the kernel refuse the calls of `_CALLS`, to this thread and those that it starts."""
    if platform.machine() not in _CALLS:
        return False
    machine, numbers = _CALLS[platform.machine()]
    end = len(numbers) + 1
    code = [(0x20, 0, 0, 4), (0x15, 1, 0, machine), (0x06, 0, 0, 0x80000000), (0x20, 0, 0, 0)]  # another ABI is killed
    code += [(0x35, end, 0, 0x40000000)]  # x32's numbers
    code += [(0x15, end - 1 - i, 0, number) for i, number in enumerate(numbers)]
    code += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x00050000 | errno.EPERM)]  # allowed, refused
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    head = ctypes.create_string_buffer(struct.pack("HP", len(code), ctypes.addressof(program)))
    libc = ctypes.CDLL(None)
    return libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 == libc.prctl(_PR_SET_SECCOMP, 2, head, 0, 0)


def _restrict_writing(places: Sequence[Path]) -> bool:
    """Let the kernel refuse writing anywhere else."""
    libc = ctypes.CDLL(None)
    version = libc.syscall(_CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    rights = _WRITING | (_CUTTING if version >= 3 else 0)
    rules = libc.syscall(_CREATE_RULESET, ctypes.c_char_p(struct.pack("Q", rights)), 8, 0)
    for place in places:
        folder = os.open(place, os.O_PATH)
        libc.syscall(_ADD_RULE, rules, 1, ctypes.c_char_p(struct.pack("=Qi", rights, folder)), 0)
        os.close(folder)
    held = libc.syscall(_RESTRICT_SELF, rules, 0) == 0
    os.close(rules)
    return held
