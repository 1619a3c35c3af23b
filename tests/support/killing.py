"""A process that is killed with SIGKILL while it keeps work in a journal."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from tests.support import forking

PROJECT = Path(__file__).resolve().parents[2]

_SLOW = """
import time
from lib.scoring.backend import Work
take = Work.take
def slowly(*arguments):
    values = take(*arguments)
    time.sleep({pause})
    return values
Work.take = slowly
"""


def kill_at(command: Sequence[str], folder: Path, name: str, lines: int, slow: Path, pause: float = 0.1) -> None:
    """Run a command whose journals are written slowly, and kill it when one of them has some lines.

    Args:
        folder, name: where that journal appears: a folder, and a pattern of its path in it.
        lines: so many lines more than the header.
        slow: a folder for what makes the command and its children slow.
        pause: seconds after every write.
    """
    slow.mkdir(exist_ok=True)
    (slow / "sitecustomize.py").write_text(_SLOW.format(pause=pause), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": f"{slow}{os.pathsep}{PROJECT}", "OMP_NUM_THREADS": "1"}
    with (slow / "said.txt").open("wb") as said:
        process = forking.CodePopen(command, env=environment, cwd=PROJECT, stdout=said, stderr=said)
    deadline = time.monotonic() + 200
    while not any(path.read_bytes().count(b"\n") > lines for path in folder.glob(name)):
        assert process.poll() is None, (slow / "said.txt").read_text(encoding="utf-8")
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    time.sleep(0.3)  # the kernel ends its children with it
