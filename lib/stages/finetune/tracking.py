"""A tracker that the user has installed gets the losses of a training, too (`report_to`); its files lie in the run.

They are no product: a training is the same with and without them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from lib.errors import refusal
from lib.runs.files import data_file
from lib.runs.machine import has_module

NOBODY = "none"
FOLDER = "tracking"
"""In the run's folder."""

_TRACKERS: dict[str, dict[str, Any]] = data_file("stages/finetune/trackers.yaml")


def refuse_absent(name: str) -> None:
    """Refuse, before hours of training go by, a tracker whose package is not here.

    Raises:
        InputError: it is not.
    """
    if name != NOBODY and not any(map(has_module, _TRACKERS[name]["packages"])):
        raise refusal("finetune/no-tracker", name=name, package=_TRACKERS[name]["packages"][0])


@contextlib.contextmanager
def reporting(name: str, folder: Path) -> Iterator[None]:
    """The environment in which a tracker writes into `folder`, but for what the user has set.

    Args:
        name: as transformers calls the tracker, or `NOBODY`.
        folder: is made; of several trackers each has its own in it.
    """
    if name == NOBODY:
        yield
        return
    own = (folder / name).resolve()
    own.mkdir(parents=True, exist_ok=True)
    variables = {key: str(value).format(folder=own) for key, value in _TRACKERS[name]["variables"].items()}
    added = {key: value for key, value in variables.items() if key not in os.environ}
    os.environ.update(added)
    try:
        if name == "swanlab":  # transformers 5.17 asks 0.8 for its run before there is one, which it refuses to answer
            import_module(name).init()
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)
