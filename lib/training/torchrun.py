"""A notebook or script that torchrun or `accelerate launch` has started several times at once.

The stage starts its own processes (`num_processes`), so the launcher is not needed; but it does no harm: the first of
its processes makes the product, the others wait for it and read it. What a launcher sets for the processes of a Trainer
(a place in a process group, a compiler, DeepSpeed) is not what the run's parameters say: the training does not see it.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from lib.errors import InputError

if TYPE_CHECKING:
    from lib.run import Product, Run

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
