"""What a confined process can no longer do, asked of Python and, past its audit hook, of the C library."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lib.errors import InputError
from lib.runs.child import own_folder, run_child
from lib.runs.confinement import confine

HERE = "tests.runs.test_confinement"


def refusals(attempts: dict[str, Callable[[], object]]) -> list[str]:
    refused = []
    for name, attempt in attempts.items():
        try:
            attempt()
        except PermissionError:
            refused.append(name)
    return refused


def attempt(argument: dict) -> dict:
    libc = ctypes.CDLL(None)
    functions = [libc.open, libc.truncate, libc.unlink, libc.socket, libc.execv]  # found now, called below
    new, there = (os.fsencode(Path(argument["outside"]) / name) for name in ("new", "there"))
    program = (ctypes.c_char_p * 2)(b"true", None)
    place, outside = Path(argument["place"]), Path(argument["outside"])
    held = confine([place, own_folder()], 1 << 30, 60)
    (place / "written").write_text("here")
    (place / "written").rename(place / "renamed")
    attempts = {
        "write": lambda: (outside / "new").write_text("x"),
        "append": lambda: (outside / "there").open("a"),
        "rename": lambda: (place / "renamed").rename(outside / "moved"),
        "remove": lambda: (outside / "there").unlink(),
        "through a link": lambda: (place / "link" / "new").write_text("x"),
        "socket": socket.socket,
        "program": lambda: subprocess.run(["true"]),
        "shell": lambda: os.system("true"),
    }
    native = {
        "write": lambda: functions[0](new, os.O_WRONLY | os.O_CREAT, 0o600),
        "cut": lambda: functions[1](there, ctypes.c_long(0)),
        "remove": lambda: functions[2](there),
        "socket": lambda: functions[3](socket.AF_INET, socket.SOCK_STREAM, 0),
        "program": lambda: functions[4](b"/bin/true", program),
    }
    return {
        "held": held,
        "python": refusals(attempts),
        "c": [name for name, ask in native.items() if ask() == -1],
        "read": (outside / "there").read_text(),
        "asked": [[*attempts], [*native]],
    }


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    place, outside = tmp_path / "place", tmp_path / "outside"
    for folder in (place, outside):
        folder.mkdir()
    (outside / "there").write_text("before")
    (place / "link").symlink_to(outside)
    return {"place": place, "outside": outside}


def test_no_network_no_program_and_no_writing_elsewhere(places: dict[str, Path]) -> None:
    found = run_child(f"{HERE}:attempt", {**places}, "trying")
    assert found["python"] == found["asked"][0] and found["read"] == "before"
    assert sorted(path.name for path in places["outside"].iterdir()) == ["there"]
    assert (places["place"] / "renamed").read_text() == "here"
    if not found["held"]:
        pytest.skip("this kernel has no Landlock, or no seccomp for this machine")
    assert found["c"] == found["asked"][1]


def take(argument: dict) -> dict:
    confine([own_folder()], 64 << 20, 1)
    if argument["what"] == "memory":
        return {"taken": len(bytearray(1 << 28))}
    while True:
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="limits are Linux's")
def test_memory_and_time_end() -> None:
    with pytest.raises(RuntimeError, match="MemoryError"):
        run_child(f"{HERE}:take", {"what": "memory"}, "taking memory")
    with pytest.raises(InputError, match="computed longer than it may"):
        run_child(f"{HERE}:take", {"what": "time"}, "taking time", timeout=30)
