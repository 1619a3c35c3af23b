"""A forked child is for its parent what one is that was started in earnest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import forking

pytestmark = [
    pytest.mark.skipif(not forking.possible(), reason="processes are not forked here"),
    pytest.mark.usefixtures("forked_children"),
]

TOLD = """
import json, os, signal, sys
found = {
    "arguments": sys.argv,
    "folder": os.getcwd(),
    "parent": os.getppid(),
    "environment": {k: v for k, v in os.environ.items() if k != "HF_DEACTIVATE_ASYNC_LOAD"},
    "read": sys.stdin.read(),
    "lib": sorted(name for name in sys.modules if name.split(".")[0] == "lib"),
    "session": os.getsid(0) == os.getpid(),
    "handlers": [signal.getsignal(n) in (signal.SIG_DFL, signal.default_int_handler) for n in (2, 15)],
    "customized": getattr(sys, "customized", None),
    "open": sorted(os.listdir("/proc/self/fd"))[:3],
    "name": __name__,
}
found["forked"] = "torch" in sys.modules
print(json.dumps(found))
print("ü", file=sys.stderr)
sys.exit(7)
"""


def told(start: type[subprocess.Popen], folder: Path) -> tuple[dict[str, Any], str, int]:
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text("import sys\nsys.customized = 'so'")
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{forking.PROJECT}", "MINE": "ü"}
    environment.pop(forking.MEASURED, None)
    command = [sys.executable, "-c", TOLD, "a b", "--c"]
    pipe = subprocess.PIPE
    streams = {"stdin": pipe, "stdout": pipe, "stderr": pipe, "text": True}
    with start(command, cwd=folder, env=environment, start_new_session=True, **streams) as process:
        out, said = process.communicate("line\n", timeout=60)
    return json.loads(out), said, process.returncode


def test_it_has_all_that_a_started_one_has(tmp_path: Path) -> None:
    forked, *ends = told(forking.CodePopen, tmp_path / "own")
    started, *started_ends = told(forking.REAL, tmp_path / "own")
    assert forked.pop("forked") and not started.pop("forked")
    assert forked == started and ends == started_ends == ["ü\n", 7]
    assert forked["parent"] == os.getpid() and forked["read"] == "line\n" and forked["customized"] == "so"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV])
def test_a_signal_is_its_exit_status(number: int) -> None:
    code = f"import os; os.kill(os.getpid(), {int(number)})"
    with forking.CodePopen([sys.executable, "-c", code]) as process:
        assert process.wait(60) == -number


def test_an_exception_is_a_traceback() -> None:
    with forking.CodePopen([sys.executable, "-c", "1 / 0"], stderr=subprocess.PIPE, text=True) as process:
        assert "ZeroDivisionError" in process.communicate(timeout=60)[1] and process.returncode == 1


def test_nothing_of_it_is_left(tmp_path: Path) -> None:
    """Killed: the server for its own children ends, and so does a child that asked to end with it."""
    child = "import os, sys, time; from lib.runs.child import die_with_parent; die_with_parent(os.getppid())\n"
    child += f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(100)"
    code = f"import sys, subprocess\nsubprocess.Popen.code = True\nsubprocess.run([sys.executable, '-c', {child!r}])"
    process = forking.CodePopen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    below = psutil.Process(process.pid).children(recursive=True)
    assert int((tmp_path / "pid").read_text()) in [one.pid for one in below] and len(below) == 2
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(below, timeout=20)
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


def test_what_libraries_read_at_import_is_read_in_earnest() -> None:
    code = "import sys; print('torch' in sys.modules)"
    for name, wanted in (("HF_HOME", "False"), ("WORKBOOK_HOME", "True")):
        environment = {**os.environ, name: "/elsewhere"}
        with forking.CodePopen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) as one:
            assert one.communicate(timeout=60)[0].strip() == wanted
