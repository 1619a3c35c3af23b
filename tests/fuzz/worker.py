"""A process that tries broken files one after another, and is started again when it hangs or dies."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from tests.fuzz.targets import PATIENCE, TARGETS

MEMORY = 12 << 30
"""Bytes of address space of a worker: torch alone reserves some."""


def attempt(target: str, seed: int) -> str:
    """What went wrong with one broken file; "" = nothing."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        try:
            TARGETS[target](Path(folder), random.Random(f"{target} {seed}"))
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(last.filename).name}:{last.lineno}"
            return f"{type(error).__name__} at {place}: {' '.join(str(error).split())[:400]}"
    return ""


def _work(pipe: Any) -> None:
    """A worker: answers (target, seed) with what went wrong, until it is ended."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.environ["WORKBOOK_HOME"] = tempfile.mkdtemp(prefix="fuzz-home-")
    sys.stdin.close()
    for stream in (1, 2):  # progress, and what libraries say of broken files
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    while True:
        pipe.send(attempt(*pipe.recv()))


class Worker:
    """A child process that is started again when it hangs or dies."""

    def __init__(self) -> None:
        self.child: Any = None

    def ask(self, target: str, seed: int) -> str:
        """What went wrong with one try."""
        if self.child is None or not self.child.is_alive():
            self.pipe, inner = multiprocessing.Pipe()
            self.child = multiprocessing.get_context("spawn").Process(target=_work, args=(inner,), daemon=True)
            self.child.start()
            patience = PATIENCE + 120  # imports, and the good files
        else:
            patience = PATIENCE
        self.pipe.send((target, seed))
        try:
            if self.pipe.poll(patience):
                return self.pipe.recv()
        except EOFError:
            self.child.join()
            return f"the process ended with {self.child.exitcode}"
        self.child.kill()
        self.child.join()
        return f"no end within {PATIENCE} s"
