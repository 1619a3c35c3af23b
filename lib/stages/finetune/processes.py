"""Start the processes of a team, show the first one's progress, and bring them to one result.
A notebook or script that torchrun or `accelerate launch` has started several times at once.
One process of a team that trains together; started by `lib.stages.finetune.processes` through `lib.runs.child`.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.errors import InputError
from lib.progress import Progress
from lib.runs import machine
from lib.runs.child import StoppedError, run_child
from lib.runs.machine import PeakMemory

if TYPE_CHECKING:
    from lib.runs.run import Product, Run
    from lib.stages.finetune.drawing import Drawing
    from lib.stages.finetune.session import Job


# Start the processes of a team, show the first one's progress, and bring them to one result.

GRACE = 5.0
"""Seconds that the others get to end by themselves when one process has failed."""


def train_in_processes(job: Job) -> dict[str, Any]:
    """Train with `num_processes` processes on this machine; as `lib.stages.finetune.session.train` otherwise.

    Raises:
        InputError: fewer GPUs than processes; what the processes refuse; one of them was killed.
        torch.OutOfMemoryError: some process had no room for a micro-batch.
        Terminated, KeyboardInterrupt: stopped by a signal, with a checkpoint.
    """
    import torch

    from lib.stages.finetune.watch import LIVE, stop_by_signal

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
    kind = machine.torch_device()
    gpus = _gpus(size) if kind == "cuda" else [None] * size
    if kind == "mps":
        raise InputError(f"num_processes: {size} on Apple's GPU.", "one process there.", "set num_processes: 1.")
    shared = {
        "size": size,
        "backend": "nccl" if kind == "cuda" else "gloo",
        "threads": int(os.environ.get("OMP_NUM_THREADS") or max(1, machine.physical_cores() // size)),
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
        function = "lib.stages.finetune.processes:train_rank"
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


# A notebook or script that torchrun or `accelerate launch` has started several times at once.
#
# The stage starts its own processes (`num_processes`), so the launcher is not needed; but it does no harm: the first of
# its processes makes the product, the others wait for it and read it. What a launcher sets for the processes of a
# Trainer (a place in a process group, a compiler, DeepSpeed) is not what the run's parameters say: the training does
# not see it.

VARIABLES = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"),
    *("ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ROLE_NAME", "KMP_AFFINITY", "KMP_BLOCKTIME"),
)
PREFIXES = ("TORCHELASTIC_", "ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_", "FP8_")
"""Set by torchrun and accelerate for their own processes."""

WAITING = dt.timedelta(days=7)
_calls = itertools.count()


def _size() -> int:
    size = os.environ.get("WORLD_SIZE", "1")
    ours = "RANK" in os.environ and "MASTER_ADDR" in os.environ  # a batch system may set WORLD_SIZE alone
    return int(size) if ours and size.isdigit() else 1


@contextlib.contextmanager
def _without_launcher() -> Iterator[None]:
    """Take what a launcher has set out of the environment, and give it back afterwards."""
    names = [name for name in os.environ if name in VARIABLES or name.startswith(PREFIXES)]
    found = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(found)


def made_once(make: Callable[[], Product], run: Run, product: str, num_processes: int) -> Product:
    """`make()`; under a launcher only in its first process, whose product or refusal the others take over.

    Raises:
        InputError: as `make`; or the launcher started another number of processes than the run asks for.
    """
    size = _size()
    if size == 1:
        with _without_launcher():
            return make()
    if size != num_processes or os.environ.get("LOCAL_WORLD_SIZE", str(size)) != str(size):
        raise InputError(
            f"a launcher (torchrun, accelerate) started {size} processes, and num_processes is {num_processes}.",
            "the same number, on one machine.",
            f"start without the launcher (num_processes is enough), or set num_processes: {size}.",
        )
    store, key = _store(size), f"workbook/{next(_calls)}"
    if os.environ["RANK"] == "0":
        return _tell(make, store, key, size)
    store.wait([f"{key}/outcome"], WAITING)
    refused = json.loads(store.get(f"{key}/outcome"))
    store.add(f"{key}/heard", 1)
    if refused:
        raise InputError(*refused)
    return run.require(product)


def _store(size: int) -> Any:
    """The launcher's own key-value store, which lives as long as its processes."""
    from torch.distributed import TCPStore

    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    first = os.environ["RANK"] == "0" and not agent
    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, first, wait_for_workers=False)


def _tell(make: Callable[[], Product], store: Any, key: str, size: int) -> Product:
    refused: list[str] = []
    try:
        with _without_launcher():
            return make()
    except InputError as error:
        refused = [error.found, error.expected, error.do]
        raise
    except BaseException as error:
        refused = [f"the first process failed ({type(error).__name__}).", "its product.", "see its message."]
        raise
    finally:
        store.set(f"{key}/outcome", json.dumps(refused))
        for _ in range(600):  # the store may be this process's own: a minute for the others to read it
            if store.add(f"{key}/heard", 0) >= size - 1:
                break
            time.sleep(0.1)


# One process of a team that trains together; started by `lib.stages.finetune.processes` through `lib.runs.child`.

PATIENCE = dt.timedelta(days=7)
"""A process waits so long for the others, e.g. while they validate; one that dies is noticed by the parent at once."""


def train_rank(argument: dict[str, Any]) -> dict[str, Any]:
    """Train as process `rank` of `size`.

    Args:
        argument: rank, size, backend, threads, meeting (a file that does not exist yet), stop_file, and the job:
            settings, data, base, folder, in_4bit.

    Returns:
        One of {"facts"} (of the first process; empty of others), {"out_of_memory": message}, {"stopped": True}.
    """
    _environment(argument)
    import torch
    import torch.distributed as dist

    from lib.errors import Terminated
    from lib.stages.finetune.session import train
    from lib.stages.finetune.trainer import Team

    dist.init_process_group(
        argument["backend"],
        init_method=Path(argument["meeting"]).as_uri(),
        rank=argument["rank"],
        world_size=argument["size"],
        timeout=PATIENCE,
    )
    team = Team(argument["rank"], argument["size"], Path(argument["stop_file"]))
    try:
        answer: dict[str, Any] = {"facts": train(_job(argument), team)}
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": str(error).splitlines()[0]}
    except (KeyboardInterrupt, Terminated):
        answer = {"stopped": True}
    with contextlib.suppress(RuntimeError):  # of whoever is last to leave; the answer is known by now
        dist.barrier()  # none leaves while another still waits for it in the training
        dist.destroy_process_group()
    return answer


def _job(argument: dict[str, Any]) -> Any:
    from lib.models.base_model import Base
    from lib.settings import Settings
    from lib.stages.finetune.session import Job

    base = Base(**{**argument["base"], "path": Path(argument["base"]["path"])})
    data, folder = Path(argument["data"]), Path(argument["folder"])
    return Job(Settings(**argument["settings"]), data, base, folder, argument["in_4bit"])


def _environment(argument: dict[str, Any]) -> None:
    """Before torch is imported: threads, the GPU of this process, loopback only."""
    os.environ["OMP_NUM_THREADS"] = str(argument["threads"])
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    if argument["gpu"] is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = argument["gpu"]
