"""A share of `make fuzz`: the same broken files each time, so a find is a change of the code."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fuzz.worker import Worker

SHARES = {"parameters": 25, "table": 25, "conversations": 25, "gguf": 8, "safetensors": 8}
"""Seeds of each target."""


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    """A process, as some files make libraries hang or die."""
    worker = Worker()
    yield worker
    if worker.child is not None:
        worker.child.kill()
        worker.child.join()


@pytest.mark.parametrize("target", SHARES)
def test_nothing_is_found(worker: Worker, target: str) -> None:
    found = {seed: worker.ask(target, seed) for seed in range(SHARES[target])}
    assert not {seed: wrong for seed, wrong in found.items() if wrong}
