"""One notebook in a process of its own: the process, who watches it, and whether the notebook really ran to its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from lib.runs import child
from lib.runs.files import HOME_VARIABLE, PROJECT, data_file, home, read_json, write_json

# The process that executes one notebook: ``python -m lib.report.execute REQUEST.json``.
#
# It does nothing but call papermill, and it never outlives the report runner: when its parent is gone, it ends its
# kernel and itself, so that a killed runner leaves no training behind.

OK, RAISED, DIED, BROKEN, TERMINATED = 0, 1, 3, 4, 128 + signal.SIGTERM
"""Exit codes: everything ran; a cell raised; the kernel died; papermill itself failed; ended by SIGTERM."""

PATIENCE = 25.0
"""Seconds that an interrupted kernel gets to leave its stage tidily (a training: with a checkpoint) before it is ended;
Slurm kills 30 seconds after SIGTERM."""

COMMAND = [
    *(sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"),
    "--InteractiveShellApp.exec_lines=import lib",
]
"""The kernel is this interpreter, whatever kernels are installed elsewhere. It imports `lib` before the first cell:
that quiets what libraries say on stderr when a cell imports them, which a page must not show."""

KERNEL_EXIT = "kernel exit code:"
"""How the line on stderr begins that tells how a dead kernel ended (negative: by that signal)."""


def _descendants(pid: int | None = None) -> list[psutil.Process]:
    """Processes below this one (or `pid`), children of children included; none where it is gone."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def _signal(processes: Iterable[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):  # gone in the meantime
            process.send_signal(number)


_ending = threading.Event()


def _end_at_once(*_: object) -> None:
    _signal(_descendants(), signal.SIGKILL)
    os._exit(TERMINATED)


def _end_tidily(*_: object) -> None:
    """SIGTERM: interrupt the kernel, so that a training leaves a checkpoint; after PATIENCE end everything."""
    if _ending.is_set():
        return
    _ending.set()
    _signal(_descendants(), signal.SIGINT)
    patience = threading.Timer(PATIENCE, _end_at_once)
    patience.daemon = True
    patience.start()


def _recording_manager() -> type:
    """A kernel manager that says on stderr how its kernel ended, and that leaves SIGTERM to this module."""
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    class Recording(AsyncKernelManager):
        kernel_spec = KernelSpec(argv=COMMAND, display_name="Python 3", language="python", metadata={"debugger": False})

        async def start_kernel(self, **options: Any) -> None:
            with contextlib.suppress(NotImplementedError):
                asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)  # nbclient's: kills after 5 seconds
            signal.signal(signal.SIGTERM, _end_tidily)
            await super().start_kernel(**options)

        async def is_alive(self) -> bool:
            alive = await super().is_alive()
            process = getattr(self.provisioner, "process", None)
            if not alive and process is not None and process.poll() is not None:
                print(KERNEL_EXIT, process.poll(), file=sys.stderr, flush=True)
            return alive

    return Recording


def main(request_file: str) -> int:
    """Execute the notebook of a request (what `execute` writes) and return the exit code."""
    request = read_json(Path(request_file))
    signal.signal(signal.SIGTERM, _end_tidily)
    child.die_with_parent(request["parent"], _end_at_once)
    from nbclient.exceptions import DeadKernelError
    from papermill import execute_notebook
    from papermill.exceptions import PapermillExecutionError

    try:
        execute_notebook(
            request["notebook"],
            request["output"],
            parameters=request["parameters"],
            cwd=str(PROJECT),
            kernel_manager_class=_recording_manager(),
            **data_file("report/execution.yaml")["papermill"],
        )
    except PapermillExecutionError:
        return TERMINATED if _ending.is_set() else RAISED
    except (DeadKernelError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        died = DIED if "kernel died" in str(error).lower() else BROKEN
        return TERMINATED if _ending.is_set() else died
    return OK


# One notebook, one process: start it, show its progress, end it and all its children on time-out or interruption.


@dataclass(frozen=True)
class Ended:
    """How the process ended: its exit code, whether it ran out of time, its own messages, seconds taken."""

    exit_code: int
    timed_out: bool
    log: str
    seconds: float


def _environment(progress_file: Path) -> dict[str, str]:
    """Of a notebook; a relative home is the current folder's, and the kernel starts in another."""
    environment = child.environment(progress_file) | data_file("report/execution.yaml")["environment"]
    environment[HOME_VARIABLE] = str(home())
    environment.pop("MPLBACKEND", None)
    return environment


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
        work: an existing temporary folder for the request and the log.
        timeout: seconds for the whole notebook.
        show: called with every progress line of the notebook.

    Raises:
        BaseException: whatever interrupts the wait (KeyboardInterrupt, SystemExit); the process, its kernel and all
            their children are ended first.
    """
    request = {"notebook": str(notebook), "output": str(output), "parameters": parameters, "parent": os.getpid()}
    write_json(work / "request.json", request)
    progress_file, log_file = work / "progress.txt", work / "log.txt"
    progress_file.touch()
    environment = _environment(progress_file)
    started = time.monotonic()
    timed_out = False

    def show_new_lines() -> None:
        for line in told:
            show(line.rstrip("\n"))

    with log_file.open("wb") as log, progress_file.open(encoding="utf-8", errors="replace") as told:
        process = subprocess.Popen(
            [sys.executable, "-m", "lib.report.execute", str(work / "request.json")],
            cwd=PROJECT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches the runner only, which then ends the child in order
        )
        try:
            while process.poll() is None:
                time.sleep(0.1)
                show_new_lines()
                if time.monotonic() - started > timeout:
                    timed_out = True
                    end(process)
        except BaseException:
            show("interrupted: ending this notebook and its processes …")
            end(process)
            raise
        show_new_lines()
    text = log_file.read_text(encoding="utf-8", errors="replace")
    return Ended(process.returncode, timed_out, text, time.monotonic() - started)


def end(process: subprocess.Popen) -> None:
    """End a notebook process and everything below it: tidily (`_end_tidily`), and at last by force."""
    below = _descendants(process.pid)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE + 3.0)
    _signal(below, signal.SIGKILL)
    process.kill()
    process.wait()


# Whether an executed notebook really ran to its end; papermill's own cell states are not believed.
#
# When a kernel dies, papermill 2.7 marks every cell as completed, also those that never ran; when a cell calls
# ``sys.exit(0)``, it stops there and reports success. So every code cell must carry an execution number.

_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_CHATTER = re.compile(r"^(\[IPKernelApp\] WARNING|Unable to parse line|Kernel died while waiting|kernel exit code:|$)")
_REFUSED = re.compile(r"Found: .+ Expected: .+ Do this: ", re.DOTALL)  # InputError and its kinds, by their text
_ADDED = {"papermill-error-cell-tag", "injected-parameters"}


@dataclass(frozen=True)
class Failure:
    """Why a notebook failed.

    Attributes:
        sentence: for the reader, without a traceback.
        exit_code: 2 when the input was refused, 143 when the kernel was ended by SIGTERM, 1 otherwise.
        detail: the last lines of the traceback or of the process's messages; empty for refused input.
    """

    sentence: str
    exit_code: int
    detail: str = ""


def _plain(text: str) -> str:
    return _COLOURS.sub("", text)


def _code_cells(notebook: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """Code cells with something in them, numbered as in the source notebook (cells that papermill added left out)."""
    cells = [c for c in notebook["cells"] if not _ADDED & set(c.get("metadata", {}).get("tags", []))]
    return [(i, c) for i, c in enumerate(cells, 1) if c["cell_type"] == "code" and c["source"].strip()]


def _raised(number: int, error: dict[str, Any]) -> Failure:
    name, value = error["ename"], _plain(error["evalue"])
    if _REFUSED.match(value):
        return Failure(value, 2)
    if name == "Terminated":
        return Failure(f"ended in cell {number}: {value}.", TERMINATED)
    if name == "SystemExit":
        return Failure(f"cell {number} called sys.exit({value}) and stopped the notebook.", 1)
    if name == "KeyboardInterrupt":
        return Failure(f"interrupted in cell {number}.", 1)
    detail = _plain("\n".join(error.get("traceback", []))).splitlines()[-15:]
    first = value.splitlines()[0] if value.strip() else ""
    return Failure(f"cell {number} raised {name}: {first}", 1, "\n".join(detail))


def _death(log: str) -> str:
    """How a kernel ended, in words."""
    codes = re.findall(rf"{re.escape(KERNEL_EXIT)} (-?\d+)", log)
    code = int(codes[-1]) if codes else -signal.SIGKILL
    if code >= 0:
        return f"it ended itself with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    if code == -signal.SIGKILL:
        return f"{name}: probably out of memory"
    if name in ("SIGTERM", "SIGINT", "SIGHUP"):
        return f"{name}: somebody ended it"
    return f"{name}: a native library crashed"


def judge(executed: Path, ended: Ended, timeout: float) -> Failure | None:
    """None when the notebook ran to its end, else why not."""
    import nbformat

    last_words = "\n".join(line for line in _plain(ended.log).splitlines() if not _CHATTER.match(line))[-2000:]
    if not executed.is_file():
        why = f"ran longer than {timeout:.0f} s" if ended.timed_out else "ended before its first cell"
        return Failure(f"the notebook {why}.", 1, last_words)
    try:
        cells = _code_cells(nbformat.read(executed, as_version=4))
    except (nbformat.reader.NotJSONError, nbformat.ValidationError):
        return Failure("the executed notebook is damaged: its process was killed while it saved.", 1, last_words)
    reached = [n for n, c in cells if c.get("metadata", {}).get("papermill", {}).get("start_time")]
    where = f"cell {reached[-1]}" if reached else "its first cell"
    if ended.timed_out:
        return Failure(f"the notebook ran longer than {timeout:.0f} s and was stopped in {where}.", 1)
    if ended.exit_code == TERMINATED:
        return Failure(f"ended by SIGTERM in {where}; finished products are kept.", TERMINATED)
    for number, cell in cells:
        for output in cell.get("outputs", []):
            if output["output_type"] == "error":
                return _raised(number, output)
    if ended.exit_code == DIED:
        return Failure(f"the kernel died ({_death(ended.log)}) in {where}.", 1, last_words)
    if ended.exit_code != OK:
        return Failure(f"the process that ran the notebook ended with code {ended.exit_code}.", 1, last_words)
    never = [number for number, cell in cells if cell.get("execution_count") is None]
    if never:
        return Failure(f"cell {never[0]} never ran.", 1, last_words)
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
