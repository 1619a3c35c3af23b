"""One notebook, one process: start it, show its progress, end it and all its children on time-out or interruption."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lib.progress import PROGRESS_FILE_VARIABLE
from lib.reporting.execute import PATIENCE
from lib.run.files import write_json
from lib.run.folders import PROJECT

KERNEL = "python3"
"""Name of the generated kernel: the same as in the notebooks, so that an executed copy opens anywhere."""


@dataclass(frozen=True)
class Request:
    """What the child process is asked to do (written as JSON for `lib.reporting.execute`)."""

    notebook: str
    output: str
    parameters: dict[str, Any]
    kernel_name: str
    cwd: str
    parent: int


@dataclass(frozen=True)
class Ended:
    """How the process ended: its exit code, whether it ran out of time, its own messages, seconds taken."""

    exit_code: int
    timed_out: bool
    log: str
    seconds: float


def _kernelspec(folder: Path) -> None:
    """A kernel that is this interpreter, whatever kernels are installed elsewhere."""
    spec = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "metadata": {"debugger": False},
    }
    write_json(folder / "kernels" / KERNEL / "kernel.json", spec)


def _environment(folder: Path, progress_file: Path) -> dict[str, str]:
    """The environment of the notebook: this interpreter's kernel, this project's lib, quiet libraries, UTF-8."""
    environment = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"}
    path = [str(PROJECT), *filter(None, [environment.get("PYTHONPATH")])]
    jupyter = [str(folder / "jupyter"), *filter(None, [environment.get("JUPYTER_PATH")])]
    fixed = {
        "JUPYTER_PATH": os.pathsep.join(jupyter),
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONHASHSEED": "0",
        "PYTHONUTF8": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        PROGRESS_FILE_VARIABLE: str(progress_file),
    }
    return environment | fixed


class _Tail:
    """New lines of the progress file, as they come."""

    def __init__(self, path: Path, show: Callable[[str], None]) -> None:
        self.path, self.show, self.position = path, show, 0

    def read(self) -> None:
        with contextlib.suppress(OSError), self.path.open("rb") as stream:
            stream.seek(self.position)
            content = stream.read()
            complete = content[: content.rfind(b"\n") + 1]
            self.position += len(complete)
            for line in complete.decode("utf-8", "replace").splitlines():
                self.show(line)


def execute(
    notebook: Path,
    output: Path,
    parameters: dict[str, Any],
    work: Path,
    timeout: float,
    show: Callable[[str], None],
) -> Ended:
    """Execute `notebook` into `output` in a process of its own.

    Args:
        work: an existing temporary folder for the kernel description, the request and the log.
        timeout: seconds for the whole notebook.
        show: called with every progress line of the notebook.

    Raises:
        BaseException: whatever interrupts the wait (KeyboardInterrupt, SystemExit); the process, its kernel and all
            their children are ended first.
    """
    _kernelspec(work / "jupyter")
    request = Request(str(notebook), str(output), parameters, KERNEL, str(PROJECT), os.getpid())
    (work / "request.json").write_text(json.dumps(asdict(request), ensure_ascii=False), encoding="utf-8")
    progress_file, log_file = work / "progress.txt", work / "log.txt"
    progress_file.touch()
    tail = _Tail(progress_file, show)
    started = time.monotonic()
    timed_out = False
    with log_file.open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "lib.reporting.execute", str(work / "request.json")],
            cwd=PROJECT,
            env=_environment(work, progress_file),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches the runner only, which then ends the child in order
        )
        try:
            while child.poll() is None:
                time.sleep(0.1)
                tail.read()
                if time.monotonic() - started > timeout:
                    timed_out = True
                    end(child)
        except BaseException:
            show("interrupted: ending this notebook and its processes …")
            end(child)
            raise
    tail.read()
    text = log_file.read_text(encoding="utf-8", errors="replace")
    return Ended(child.returncode, timed_out, text, time.monotonic() - started)


def end(child: subprocess.Popen) -> None:
    """End a notebook process: interrupt its kernel, wait, then terminate and at last kill everything below it."""
    import psutil

    try:
        below = psutil.Process(child.pid).children(recursive=True)
    except psutil.Error:
        below = []
    for process in below:  # the kernel gets a KeyboardInterrupt, so that the stage removes its temporary files
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGINT)
    try:
        child.wait(PATIENCE if below else 1.0)
    except subprocess.TimeoutExpired:
        child.terminate()
    gone = [process for process in below if process.is_running()]
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(3.0)
    for process in gone:
        with contextlib.suppress(psutil.Error):
            process.kill()
    if child.poll() is None:
        child.kill()
    child.wait()
