"""llama.cpp's log: silenced, its last error lines kept for error messages, every line passed to one listener.

llama.cpp has one log callback for the whole process and calls whatever was set last, also after it is gone. So this is
the only place that sets it, once.
"""

from __future__ import annotations

import collections
import ctypes
import functools
from collections.abc import Callable
from types import ModuleType

from lib.device import llama_cpp_problem
from lib.errors import InputError

ERROR, _CONTINUED = 4, 5  # ggml_log_level
_errors: collections.deque[str] = collections.deque(maxlen=20)
_listeners: list[Callable[[int, str], None]] = []
_kept: list[object] = []  # the callback must outlive every call of llama.cpp


@functools.cache
def llama() -> ModuleType:
    """The module llama_cpp.llama_cpp, its backend started and its log silenced.

    Raises:
        InputError: llama-cpp-python cannot be imported here.
    """
    if problem := llama_cpp_problem():
        raise InputError(
            f"{problem}.", "llama-cpp-python.", "run `workbook doctor`; the README names the cure for each system."
        )
    import llama_cpp
    from llama_cpp import llama_cpp as api

    level_before = 0

    @api.llama_log_callback
    def keep_errors(level: int, text: bytes, _: ctypes.c_void_p) -> None:
        nonlocal level_before
        level = level_before if level == _CONTINUED else level
        level_before = level
        line = text.decode("utf-8", "replace")
        for listener in _listeners:
            listener(level, line)
        line = line.strip()
        if level == ERROR and line:
            _errors.append(line)

    _kept.extend([keep_errors, llama_cpp])
    api.llama_log_set(keep_errors, ctypes.c_void_p(0))
    api.llama_backend_init()
    return api


def listen(listener: Callable[[int, str], None]) -> None:
    """Pass (level, text) of everything that llama.cpp logs from now on to `listener`, and to no earlier one."""
    llama()
    _listeners[:] = [listener]


def forget_errors() -> None:
    """Drop the kept lines, before a call whose errors matter."""
    _errors.clear()


def last_error() -> str:
    """The last error lines of llama.cpp since `forget_errors`, as words for a message; empty when there is none."""
    return " | ".join(list(_errors)[-2:])
