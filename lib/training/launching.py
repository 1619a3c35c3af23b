"""Start the processes of a team, show the first one's progress, and bring them to one result."""

from __future__ import annotations

import os
import tempfile
import threading
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib import device
from lib.errors import InputError
from lib.progress import Progress
from lib.run.child import StoppedError, run_child
from lib.run.memory import PeakMemory

if TYPE_CHECKING:
    from lib.training.drawing import Drawing
    from lib.training.session import Job

GRACE = 5.0
"""Seconds that the others get to end by themselves when one process has failed."""


def train_in_processes(job: Job) -> dict[str, Any]:
    """Train with `num_processes` processes on this machine; as `lib.training.session.train` otherwise.

    Raises:
        InputError: fewer GPUs than processes; what the processes refuse; one of them was killed.
        torch.OutOfMemoryError: some process had no room for a micro-batch.
        Terminated, KeyboardInterrupt: stopped by a signal, with a checkpoint.
    """
    import torch

    from lib.training.watch import LIVE, stop_by_signal

    size = job.settings.num_processes
    with tempfile.TemporaryDirectory(prefix="workbook-team-") as name, PeakMemory() as peak:
        stop_file = Path(name) / "stop"
        members = _arguments(job, size, Path(name), stop_file)
        with stop_by_signal(stop_file.touch):
            results, failures = _run(members, size, job.draw(job.folder / LIVE))
            stopped = stop_file.exists() or any("stopped" in result for result in results)
            full = [result["out_of_memory"] for result in results if "out_of_memory" in result]
            if full and not stopped:
                raise torch.OutOfMemoryError(full[0])
            if failures and not stopped:
                raise failures[0]
        if stopped:  # the signal went to a member, not to this process
            raise KeyboardInterrupt("stopped with a checkpoint; run it again to continue")
    facts = next(result["facts"] for result in results if result.get("facts"))
    return {**facts, "peak_memory_mib": round(peak.bytes / 2**20, 1)}


def _arguments(job: Job, size: int, folder: Path, stop_file: Path) -> list[dict[str, Any]]:
    """What each process is told."""
    kind = device.torch_device()
    gpus = _gpus(size) if kind == "cuda" else [None] * size
    if kind == "mps":
        raise InputError(f"num_processes: {size} on Apple's GPU.", "one process there.", "set num_processes: 1.")
    shared = {
        "size": size,
        "backend": "nccl" if kind == "cuda" else "gloo",
        "threads": int(os.environ.get("OMP_NUM_THREADS") or max(1, device.physical_cores() // size)),
        "meeting": str(folder / "meeting"),
        "stop_file": str(stop_file),
        "settings": job.settings.model_dump(),
        "data": str(job.data.absolute()),
        "base": {**asdict(job.base), "path": str(job.base.path.absolute())},
        "folder": str(job.folder.absolute()),
        "in_4bit": job.in_4bit,
    }
    return [{**shared, "rank": rank, "gpu": gpu} for rank, gpu in enumerate(gpus)]


def _gpus(size: int) -> list[str]:
    """The GPU of each process, by the names that CUDA_VISIBLE_DEVICES takes."""
    import torch

    count = torch.cuda.device_count()
    if count < size:
        raise InputError(
            f"num_processes: {size}, and {count} GPU{'s' if count != 1 else ''} here.",
            "a GPU for every process.",
            f"set num_processes: {count} and gradient_accumulation_steps accordingly.",
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name.strip() for name in visible.split(",")] if visible else [str(index) for index in range(count)]


def _run(
    members: list[dict[str, Any]], size: int, drawing: Drawing
) -> tuple[list[dict[str, Any]], list[BaseException]]:
    """Results and failures of the processes; when one ends badly, the others are ended too."""
    give_up, lines = threading.Event(), {0: ""}

    def start(member: dict[str, Any]) -> dict[str, Any]:
        rank = member["rank"]
        what = f"training, process {rank + 1} of {size}"
        function = "lib.training.worker:train_rank"
        return run_child(function, member, what, stop=give_up, heard=lambda line: lines.update({rank: line}))

    with (
        ThreadPoolExecutor(size) as pool,
        Progress(f"training in {size} processes") as progress,
        drawing,
    ):
        pending = {pool.submit(start, member) for member in members[:size]}
        done: set[Future] = set()
        try:
            while pending:
                ended, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                done |= ended
                progress.advance(0, lines[0])
                drawing.update()
                if any(future.exception() or "facts" not in future.result() for future in ended) and pending:
                    wait(pending, timeout=GRACE)
                    give_up.set()
        except BaseException:
            give_up.set()
            raise
    errors = [error for future in done if (error := future.exception()) is not None]
    known = sorted(errors, key=lambda error: (isinstance(error, StoppedError), not isinstance(error, InputError)))
    return [future.result() for future in done if future.exception() is None], known
