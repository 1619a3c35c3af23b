"""Several processes against one: the same updates, exact continuation, stops and failures that reach all of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.errors import InputError, Terminated
from lib.models.base_model import Base
from lib.runs.run import Run
from lib.stages.finetune import processes
from lib.stages.finetune.batches import GroupedOrder
from lib.stages.finetune.session import Job
from lib.stages.finetune.stage import finetune
from lib.stages.finetune.trainer import Share
from tests.conftest import PROJECT
from tests.stages.finetune.conftest import tiny_settings
from tests.stages.finetune.test_stage import same, weights

pytestmark = pytest.mark.usefixtures("unmeasured_children")

ROUNDING = 1e-5
"""Other shapes of micro-batches round otherwise, which Adam makes a little more of; an update moves weights by 5e-3."""

LAUNCHED = """
import os, sys
from lib.models import offline_base
from lib.runs.run import open_run
from lib.stages.finetune.stage import finetune
from tests.stages.finetune.conftest import TINY, tiny_settings
offline_base.BaseRecipe = lambda: TINY
settings = tiny_settings(
    num_processes=2, per_device_train_batch_size=8, lora_dropout=0.0, num_train_epochs=1.0, force=True
)
product = finetune(settings, open_run("fresh")).product
print(product.entry.digest, product.made, flush=True)
"""


@given(st.integers(1, 200), st.integers(1, 6), st.integers(1, 4), st.integers(0, 3))
def test_shares_are_the_updates_cut_up(rows: int, own: int, size: int, epoch: int) -> None:
    lengths = [(i * 37) % 90 + 1 for i in range(rows)]
    whole = GroupedOrder(lengths, own * size, 5)
    whole.epoch = epoch
    shares = [Share(GroupedOrder(lengths, own * size, 5), rank, size) for rank in range(size)]
    for share in shares:
        share.epoch = epoch
    drawn = [list(share) for share in shares]
    assert [len(share) for share in shares] == [len(indices) for indices in drawn]
    wanted = list(whole)
    for start in range(0, rows, own * size):
        first = start // size
        together = sorted(i for indices in drawn for i in indices[first : first + own] if i < rows)
        assert together == sorted(wanted[start : start + own * size])
        assert all(indices[first : first + own] for indices in drawn)  # nobody is without a batch
    assert len({-(-len(indices) // own) for indices in drawn}) == 1


@pytest.fixture(scope="module")
def teams(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `tests.stages.finetune.forked` found."""
    home = tmp_path_factory.mktemp("teams")
    command = [sys.executable, "-m", "tests.stages.finetune.forked", "team", str(home)]
    environment = {**os.environ, "WORKBOOK_HOME": str(home), "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, env=environment, timeout=300)
    assert answer.returncode == 0, answer.stderr[-3000:]
    return {**json.loads(answer.stdout), "home": home}


def test_two_processes_train_what_one_trains(teams: dict[str, Any]) -> None:
    one, two = weights(Path(teams["one"])), teams["home"] / "two" / "checkpoints"
    steps = sorted(int(path.name.rpartition("-")[2]) for path in two.iterdir())
    assert steps[-1] == 5 and len(steps) >= 2
    chosen = teams["two"][0]["facts"]["chosen_step"]
    for name, value in weights(two / f"checkpoint-{chosen}").items():
        np.testing.assert_allclose(value, one[name], atol=ROUNDING)
    histories = [Path(teams["one"]) / "history.jsonl", teams["home"] / "two" / "history.jsonl"]
    first, second = ([json.loads(line) for line in path.read_text().splitlines()] for path in histories)
    for key in ("loss", "eval_loss", "grad_norm", "learning_rate"):
        values = [[row[key] for row in rows if key in row] for rows in (first, second)]
        assert values[0] == pytest.approx(values[1], rel=1e-5) and len(values[0]) == 5
    assert teams["two"][1] == {"facts": {}}


def test_a_stopped_team_goes_on_exactly(teams: dict[str, Any]) -> None:
    assert teams["stopped"] == [{"stopped": True}, {"stopped": True}]
    facts = teams["again"][0]["facts"]
    assert facts["resumed_from"] == 3 and teams["dropout"][0]["facts"]["resumed_from"] is None
    straight, again = teams["home"] / "dropout" / "checkpoints", teams["home"] / "stopped" / "checkpoints"
    assert same(weights(straight / "checkpoint-5"), weights(again / "checkpoint-5"))
    assert (again / "checkpoint-5" / "rng_state_1.pth").is_file()
    assert not list(again.glob(".*"))


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--mixed_precision", "bf16"]


@pytest.mark.parametrize(
    "launcher", [TORCHRUN, pytest.param(ACCELERATE, marks=pytest.mark.slow)], ids=["torchrun", "accelerate"]
)
def test_under_a_launcher_the_stage_is_made_once(
    runs: Callable[[str], Run], tmp_path: Path, launcher: list[str]
) -> None:
    """Two processes of a launcher, of which the first starts the two that train; both end with the same product."""
    run = runs("fresh")
    (tmp_path / "script.py").write_text(LAUNCHED)
    command = [sys.executable, "-m", *launcher]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(
        [*command, str(tmp_path / "script.py")],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        env=environment,
        timeout=400,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    digest = run.manifest.entries()["adapter"].digest
    assert sorted(answer.stdout.split()) == sorted([digest, "True", digest, "False"])
    assert run.manifest.entries()["adapter"].parameters["num_processes"] == 2
    alone = finetune(tiny_settings(lora_dropout=0.0, num_train_epochs=1.0), runs("straight"))
    for name, value in weights(alone.product.path).items():
        np.testing.assert_allclose(value, weights(run.folder / "adapter")[name], atol=ROUNDING)


@pytest.mark.parametrize(
    "launcher",
    [
        {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
        {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    ],
    ids=["torchrun with one process", "accelerate with DeepSpeed"],
)
def test_what_a_launcher_sets_does_not_reach_the_training(
    runs: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch, launcher: dict[str, str]
) -> None:
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    result = finetune(tiny_settings(), runs("fresh"))
    assert same(weights(result.product.path), weights(runs("straight").folder / "adapter"))
    assert {name: os.environ.get(name) for name in launcher} == launcher


def test_another_number_than_the_launchers_is_refused(runs, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="started 3 processes, and num_processes is 1"):
        finetune(tiny_settings(), runs("fresh"))
    assert "adapter" not in runs("fresh").manifest.entries()


def job(folder: Path) -> Job:
    return Job(tiny_settings(num_processes=2), folder, Base(folder, "offline", "x", True), folder, False)


def test_one_member_out_of_memory_is_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_child(function: str, argument: dict, what: str, stop: Any, **_: Any) -> dict:
        if argument["rank"] == 1:
            return {"out_of_memory": "CUDA out of memory. Tried to allocate 2.00 GiB"}
        stop.wait(60)  # as a process that waits for the other's gradients
        raise processes.StoppedError(what)

    monkeypatch.setattr(processes, "run_child", run_child)
    monkeypatch.setattr(processes, "GRACE", 0.1)
    with pytest.raises(torch.OutOfMemoryError, match=r"2\.00 GiB"):
        processes.train_in_processes(job(tmp_path))


def test_a_signal_reaches_every_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_child(function: str, argument: dict, what: str, **_: Any) -> dict:
        if argument["rank"] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 30
        while not Path(argument["stop_file"]).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return {"stopped": Path(argument["stop_file"]).exists()}

    monkeypatch.setattr(processes, "run_child", run_child)
    with pytest.raises(Terminated) as ended:
        processes.train_in_processes(job(tmp_path))
    assert ended.value.code == 143


def test_a_refusal_is_told_before_what_followed_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_child(function: str, argument: dict, what: str, **_: Any) -> dict:
        if argument["rank"] == 1:
            raise InputError("target_modules nobody.", "names.", "set all-linear.")
        raise RuntimeError("connection closed by peer")

    monkeypatch.setattr(processes, "run_child", run_child)
    with pytest.raises(InputError, match="nobody"):
        processes.train_in_processes(job(tmp_path))


def test_fewer_gpus_than_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib.runs.machine.torch_device", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="num_processes: 2, and 1 GPU here"):
        processes.train_in_processes(job(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    members = processes._arguments(job(tmp_path), 2, tmp_path, tmp_path / "stop")
    assert [(m["gpu"], m["backend"]) for m in members] == [("3", "nccl"), ("5", "nccl")]
