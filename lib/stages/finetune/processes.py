"""Several processes that train one adapter together: started by torchrun's agent, joined by transformers' Trainer.

The agent runs in a child process of its own (`lib.runs.child`): it keeps signals from this process, and the processes
that train die with it. The inputs go there as a pickle, results and errors come back as JSON, and a request to stop is
a file.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import pickle
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lib.errors import InputError, Terminated, refusal
from lib.progress import PROGRESS_FILE_VARIABLE, Progress
from lib.runs import child, machine
from lib.runs.files import data_file, read_json, write_json
from lib.runs.machine import peak_memory
from lib.runs.run import Product, Run
from lib.stages.finetune.session import TrainingInputs

INPUTS, STOP, ANSWER = "inputs.pickle", "stop", "answer-{rank}.json"
"""Files in the folder where the processes meet: what to train, the request to stop, what each one answers."""


def train_in_processes(inputs: TrainingInputs) -> dict[str, Any]:
    """Train with `num_processes` processes on this machine; as `lib.stages.finetune.session.train` otherwise.

    Raises:
        InputError: fewer GPUs than processes; what the processes refuse; one of them was killed.
        torch.OutOfMemoryError: some process had no room for a micro-batch.
        Terminated, KeyboardInterrupt: stopped by a signal, with a checkpoint.
    """
    import torch

    from lib.stages.finetune.watch import stop_by_signal

    size = inputs.settings.num_processes
    _require_devices(size)
    with tempfile.TemporaryDirectory(prefix="workbook-training-") as name, peak_memory() as peak:
        meeting, stop_file = Path(name), Path(name) / STOP
        (meeting / INPUTS).write_bytes(pickle.dumps(replace(inputs, redraw=None, stop_file=stop_file)))
        words = f"training in {size} processes"
        with stop_by_signal(stop_file.touch), Progress(words) as progress:

            def heard(line: str) -> None:
                progress.advance(0, line)
                if inputs.redraw:
                    inputs.redraw()

            argument = {"meeting": name, "size": size}
            found = child.run_child("lib.stages.finetune.processes:launch", argument, words, heard=heard)
            if "out_of_memory" in found and not stop_file.exists():
                raise torch.OutOfMemoryError(found["out_of_memory"])
        if "facts" not in found:  # the signal went to one that trains, not to this process
            raise KeyboardInterrupt("stopped with a checkpoint; run it again to continue")
    return {**found["facts"], "peak_memory_mib": round(peak.bytes / 2**20, 1)}


def _require_devices(size: int) -> None:
    """A GPU for every process, where there are GPUs."""
    kind = machine.torch_device()
    if kind == "mps":
        raise InputError(f"num_processes: {size} on Apple's GPU.", "one process there.", "set num_processes: 1.")
    if kind == "cuda":
        import torch

        if (count := torch.cuda.device_count()) < size:
            raise refusal("finetune/too-few-gpus", size=size, count=count, plural="s" if count != 1 else "")


def launch(argument: dict[str, Any]) -> dict[str, Any]:
    """Start the processes and wait for them, as torchrun does.

    Returns:
        One of {"facts"}, {"out_of_memory": message}, {"stopped": True}.

    Raises:
        InputError: what a process refused; one of them was killed.
        RuntimeError: one of them failed otherwise.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    size, meeting = argument["size"], Path(argument["meeting"])
    inputs = pickle.loads((meeting / INPUTS).read_bytes())  # written by the parent a moment ago
    for number in (signal.SIGTERM, signal.SIGINT):  # a batch system signals all; those that train stop by themselves
        signal.signal(number, signal.SIG_IGN)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, machine.physical_cores() // size)))
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    config = LaunchConfig(nproc_per_node=size, **data_file("stages/finetune/launch.yaml"))
    failed = None
    try:
        elastic_launch(config, train_share)(meeting, inputs, os.getpid())
    except ChildFailedError as error:
        failed = error
    files = {rank: meeting / ANSWER.format(rank=rank) for rank in range(size)}
    return _together({rank: read_json(file) for rank, file in files.items() if file.is_file()}, failed, size)


def _together(answers: dict[int, dict[str, Any]], failed: Any, size: int) -> dict[str, Any]:
    """One answer from those of the processes: a refusal before what followed from it in the others."""
    for answer in answers.values():
        if "input_error" in answer:
            child.value_of(answer, "training")
    values = [answer["value"] for answer in answers.values() if "value" in answer]
    for key in ("out_of_memory", "stopped", "facts"):
        if (key != "facts" or not failed) and (found := next((v for v in values if v.get(key)), None)):
            return found
    rank, first = failed.get_first_failure()
    what = f"training, process {rank + 1} of {size}"
    if "error" in answers.get(rank, {}):
        child.value_of(answers[rank], what)
    raise child.death(first.exitcode, what, "")


def train_share(meeting: Path, inputs: TrainingInputs, parent: int) -> None:
    """What each process does; torchrun has put its place among them into its environment."""
    child.die_with_parent(parent)
    for number, usual in ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        signal.signal(number, usual)
    rank = int(os.environ["RANK"])
    if rank:
        os.environ[PROGRESS_FILE_VARIABLE] = os.devnull
    answer = child.answer(_train, inputs)
    write_json(meeting / ANSWER.format(rank=rank), answer)
    if "value" not in answer or "out_of_memory" in answer["value"]:
        sys.exit(1)  # torchrun ends the others


def _train(inputs: TrainingInputs) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from lib.stages.finetune.session import train

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        found: dict[str, Any] = {"facts": train(inputs)}
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": str(error).splitlines()[0]}
    except (KeyboardInterrupt, Terminated):
        found = {"stopped": True}
    with contextlib.suppress(RuntimeError):  # of whoever is last to leave; the answer is known by now
        dist.barrier()  # none leaves while another still waits for it in the training
        dist.destroy_process_group()
    return found


# A notebook or script that torchrun or `accelerate launch` has started several times at once.
#
# The stage starts its own processes (`num_processes`), so the launcher is not needed; but it does no harm: the first of
# its processes makes the product, the others wait for it and read it. What a launcher sets for the processes of a
# Trainer (a place in a process group, a compiler, DeepSpeed) is not what the run's parameters say: the training does
# not see it.

_OF_LAUNCHERS = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|KMP_(AFFINITY|BLOCKTIME)"
    r"|(TORCHELASTIC|ACCELERATE|FSDP|MEGATRON_LM|PARALLELISM_CONFIG|FP8)_.*"
)
"""Variables that torchrun and accelerate set for their own processes."""

WAITING = dt.timedelta(days=7)


@contextlib.contextmanager
def _without_launcher() -> Iterator[None]:
    """Take what a launcher has set out of the environment, and give it back afterwards."""
    found = {name: os.environ.pop(name) for name in filter(_OF_LAUNCHERS.fullmatch, [*os.environ])}
    try:
        yield
    finally:
        os.environ.update(found)


def made_once(make: Callable[[], Product], run: Run, num_processes: int) -> Product:
    """`make()`; under a launcher only in its first process, whose product or refusal the others take over.

    Raises:
        InputError: as `make`; or the launcher started another number of processes than the run asks for.
    """
    launched = "RANK" in os.environ and "MASTER_ADDR" in os.environ  # a batch system may set WORLD_SIZE alone
    size = os.environ.get("WORLD_SIZE", "1") if launched else "1"
    if size == "1":
        with _without_launcher():
            return make()
    if size != str(num_processes) or os.environ.get("LOCAL_WORLD_SIZE", size) != size:
        raise refusal("finetune/other-launcher", size=size, num_processes=num_processes)
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=WAITING)
    refused: list[Any] = [None]
    try:
        if os.environ["RANK"] == "0":
            with _without_launcher():
                return make()
        dist.broadcast_object_list(refused)
    except InputError as error:
        refused = [(error.found, error.expected, error.do)]
        raise
    except BaseException as error:
        refused = [(f"the first process failed ({type(error).__name__}).", "its product.", "see its message.")]
        raise
    finally:
        if os.environ["RANK"] == "0":
            dist.broadcast_object_list(refused)
        dist.destroy_process_group()
    if refused[0]:
        raise InputError(*refused[0])
    return run.require("adapter")
