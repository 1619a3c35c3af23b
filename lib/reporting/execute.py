"""The child process that executes one notebook: ``python -m lib.reporting.execute REQUEST.json``.

It does nothing but call papermill, and it never outlives the report runner: when its parent is gone, it ends its
kernel and itself, so that a killed runner leaves no training behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from lib.run.files import read_json

OK, RAISED, DIED, BROKEN, TERMINATED = 0, 1, 3, 4, 128 + signal.SIGTERM
"""Exit codes: everything ran; a cell raised; the kernel died; papermill itself failed; ended by SIGTERM."""

PATIENCE = 25.0
"""Seconds that an interrupted kernel gets to leave its stage tidily (a training: with a checkpoint) before it is ended;
Slurm kills 30 seconds after SIGTERM."""

KERNEL_EXIT = "kernel exit code:"
"""How the line on stderr begins that tells how a dead kernel ended (negative: by that signal)."""

PR_SET_PDEATHSIG = 1


def _end_descendants() -> None:
    import psutil

    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            process.kill()


_ending = threading.Event()


def _end_at_once() -> None:
    _end_descendants()
    os._exit(TERMINATED)


def _end_tidily(parent: int) -> None:
    """SIGTERM: interrupt the kernel, so that a training leaves a checkpoint; after PATIENCE end everything."""
    import psutil

    if os.getppid() != parent:
        _end_at_once()
    if _ending.is_set():
        return
    _ending.set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGINT)
    patience = threading.Timer(PATIENCE, _end_at_once)
    patience.daemon = True
    patience.start()


def _follow_parent(parent: int) -> None:
    """End this process and its kernel within about a second of the end of `parent`."""
    if sys.platform == "linux":  # the watching thread below would do, but this is immediate
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        _end_at_once()

    signal.signal(signal.SIGTERM, lambda *_: _end_tidily(parent))
    threading.Thread(target=watch, name="follow-parent", daemon=True).start()


def _recording_manager(parent: int) -> type:
    """A kernel manager that says on stderr how its kernel ended, and that leaves SIGTERM to this module."""
    from jupyter_client.manager import AsyncKernelManager

    class Recording(AsyncKernelManager):
        async def start_kernel(self, **options: Any) -> None:
            with contextlib.suppress(NotImplementedError):
                asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)  # nbclient's: kills after 5 seconds
            signal.signal(signal.SIGTERM, lambda *_: _end_tidily(parent))
            await super().start_kernel(**options)

        async def is_alive(self) -> bool:
            alive = await super().is_alive()
            process = getattr(self.provisioner, "process", None)
            if not alive and process is not None and process.poll() is not None:
                print(KERNEL_EXIT, process.poll(), file=sys.stderr, flush=True)
            return alive

    return Recording


def main(request_file: str) -> int:
    """Execute the notebook of a request (see `lib.reporting.process.Request`) and return the exit code."""
    request = read_json(Path(request_file))
    _follow_parent(request["parent"])
    from nbclient.exceptions import DeadKernelError
    from papermill import execute_notebook
    from papermill.exceptions import PapermillExecutionError

    try:
        execute_notebook(
            request["notebook"],
            request["output"],
            parameters=request["parameters"],
            kernel_name=request["kernel_name"],
            cwd=request["cwd"],
            progress_bar=False,
            log_output=False,
            start_timeout=120,
            autosave_cell_every=5,
            kernel_manager_class=_recording_manager(request["parent"]),
        )
    except PapermillExecutionError:
        return TERMINATED if _ending.is_set() else RAISED
    except (DeadKernelError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        died = DIED if "kernel died" in str(error).lower() else BROKEN
        return TERMINATED if _ending.is_set() else died
    return OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
