"""One process of a team that trains together; started by `lib.training.launching` through `lib.run.child`."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import sys
from pathlib import Path
from typing import Any

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
    from lib.training.session import train
    from lib.training.team import Team

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
    from lib.models.resolving import Base
    from lib.settings import Settings
    from lib.training.session import Job

    base = Base(**{**argument["base"], "path": Path(argument["base"]["path"])})
    data, folder = Path(argument["data"]), Path(argument["folder"])
    return Job(Settings(**argument["settings"]), data, base, folder, argument["in_4bit"])


def _environment(argument: dict[str, Any]) -> None:
    """Before torch is imported: threads, the GPU of this process, loopback only."""
    os.environ["OMP_NUM_THREADS"] = str(argument["threads"])
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    if argument["gpu"] is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = argument["gpu"]
