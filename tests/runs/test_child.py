"""A function in a child process: its answer, its errors, its death, its memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lib.errors import InputError
from lib.progress import PROGRESS_FILE_VARIABLE, Progress
from lib.runs.child import StoppedError, run_child

HERE = "tests.runs.test_child"


def double(argument: dict) -> dict:
    print("chatter on stdout")
    print("chatter on stderr", file=sys.stderr)
    return {"text": argument["text"] * 2, "pid": os.getpid()}


def refuse(argument: dict) -> dict:
    raise InputError("a stone.", "bread.", "ask again.")


def fail(argument: dict) -> dict:
    raise KeyError("missing-key")


def die(argument: dict) -> dict:
    print("GGML_ASSERT(x) failed", file=sys.stderr, flush=True)
    os.kill(os.getpid(), argument["signal"])
    return {}


def abort_and_chatter(argument: dict) -> dict:
    print("ggml.c:7: GGML_ASSERT(n > 0) failed", *["libc.so.6(+0x1)"] * 9, sep="\n", flush=True)
    assert os.environ["GGML_NO_BACKTRACE"] == "1"
    os.abort()


def sleep(argument: dict) -> dict:
    Path(argument["pid_file"]).write_text(str(os.getpid()))
    time.sleep(60)
    return {}


def count(argument: dict) -> dict:
    with Progress("counting", 3) as progress:
        for _ in range(3):
            progress.advance()
    return {}


def slow_count(argument: dict) -> dict:
    with Progress("counting", 2, every=0.0) as progress:
        progress.advance()
        time.sleep(0.5)
        progress.advance()
    return {}


def test_value_comes_back_without_chatter(capfd):
    answer = run_child(f"{HERE}:double", {"text": "差\ud800"}, "doubling")
    assert answer["text"] == "差\ud800差\ud800"
    assert answer["pid"] != os.getpid()
    assert answer["peak_memory_mib"] > 5
    out, err = capfd.readouterr()
    assert "chatter" not in out + err


def test_peak_memory_is_the_childs_own():
    ballast = bytearray(600 << 20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    assert run_child(f"{HERE}:double", {"text": "a"}, "doubling")["peak_memory_mib"] < 500


def test_input_error_passes_through():
    with pytest.raises(InputError, match=r"Found: a stone\. Expected: bread\. Do this: ask again\."):
        run_child(f"{HERE}:refuse", {}, "refusing")


def test_other_errors_say_what_happened_first_and_carry_their_traceback():
    """The command line shows the first line only."""
    with pytest.raises(RuntimeError, match=r"(?s)^failing failed in its process: KeyError: 'missing-key'\nTraceback"):
        run_child(f"{HERE}:fail", {}, "failing")


@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGKILL, signal.SIGSEGV])
def test_death_is_reported_with_last_words(number):
    with pytest.raises(InputError, match=rf"dying was ended by signal {number.name}.*GGML_ASSERT\(x\) failed"):
        run_child(f"{HERE}:die", {"signal": number}, "dying")


def test_timeout_kills(tmp_path):
    pid_file = tmp_path / "pid"
    with pytest.raises(InputError, match="sleeping took longer than 2 s"):
        run_child(f"{HERE}:sleep", {"pid_file": str(pid_file)}, "sleeping", timeout=2)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel kills orphans only on Linux")
def test_child_dies_with_its_parent(tmp_path):
    pid_file = tmp_path / "pid"
    code = f"from lib.runs.child import run_child; run_child('{HERE}:sleep', {{'pid_file': {str(pid_file)!r}}}, 'x')"
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    child = int(pid_file.read_text())
    parent.kill()
    parent.wait()
    while Path(f"/proc/{child}/status").exists() and time.monotonic() < deadline:
        if "State:\tZ" in Path(f"/proc/{child}/status").read_text():
            break
        time.sleep(0.05)
    assert time.monotonic() < deadline


def test_progress_goes_to_the_progress_file(tmp_path, monkeypatch):
    monkeypatch.setenv(PROGRESS_FILE_VARIABLE, str(tmp_path / "progress"))
    run_child(f"{HERE}:count", {}, "counting")
    assert "counting: 3 done" in (tmp_path / "progress").read_text()


def test_several_children_are_stopped_together(tmp_path):
    stop, ended = threading.Event(), []

    def work(name):
        try:
            run_child(f"{HERE}:sleep", {"pid_file": str(tmp_path / name)}, name, stop=stop)
        except StoppedError:
            ended.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    while not all((tmp_path / name).exists() and (tmp_path / name).read_text() for name in ("a", "b")):
        time.sleep(0.02)
    stop.set()
    for thread in threads:
        thread.join(10)
    assert sorted(ended) == ["a", "b"]
    for name in ("a", "b"):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / name).read_text()), 0)


def test_newest_line_of_progress_is_heard(monkeypatch, tmp_path):
    monkeypatch.setenv(PROGRESS_FILE_VARIABLE, str(tmp_path / "all.txt"))
    heard = []
    run_child(f"{HERE}:slow_count", {}, "counting", heard=heard.append)
    assert any("counting: 1/2" in line for line in heard)
    assert not (tmp_path / "all.txt").exists()


def test_the_reason_of_an_abort_is_shown() -> None:
    with pytest.raises(InputError, match=r"SIGABRT\. Its last words: ggml\.c:7: GGML_ASSERT\(n > 0\) failed"):
        run_child(f"{HERE}:abort_and_chatter", {}, "aborting")
