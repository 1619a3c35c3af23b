"""Several processes against one: the same updates, exact continuation, stops and failures that reach all of them."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.errors import InputError, Terminated
from lib.models.base_model import Base
from lib.runs.run import Run
from lib.stages.finetune import processes
from lib.stages.finetune.batches import GroupedOrder, MicroBatches
from lib.stages.finetune.session import TrainingInputs
from lib.stages.finetune.stage import finetune
from tests.conftest import PROJECT
from tests.stages.finetune.conftest import tiny_settings
from tests.stages.finetune.test_stage import same, weights
from tests.support import forking

pytestmark = pytest.mark.usefixtures("unmeasured_children", "forked_children")

ROUNDING = 1e-6
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
# One write call each: two processes share the pipe, and print writes the line and its end apart.
os.write(1, f"{product.entry.digest} {product.made}\\n".encode())
"""


ACCIDENT = """
import os
from pathlib import Path
from lib.stages.finetune import processes
train = processes._train

def train_until_the_accident(inputs):
    from lib.stages.finetune.trainer import AnswerTrainer
    Path(__file__).with_name(f"pid-{os.getpid()}").touch()
    step = AnswerTrainer.training_step

    def failing(self, *arguments, **options):
        if self.args.process_index == 1 and self.state.global_step == 2:
            if NUMBER:
                os.kill(os.getpid(), NUMBER)
            raise RuntimeError("an accident")
        return step(self, *arguments, **options)

    AnswerTrainer.training_step = failing
    return train(inputs)

processes._train = train_until_the_accident
"""
"""For `sitecustomize`, which every Python process loads at its start."""


@given(st.integers(1, 200), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 3))
def test_shares_are_the_updates_cut_up(rows: int, batch: int, passes: int, size: int, epoch: int) -> None:
    order = GroupedOrder([(i * 37) % 90 + 1 for i in range(rows)], batch * passes * size, 5)
    order.epoch = epoch
    shares = [MicroBatches(order, batch, rank, size) for rank in range(size)]
    drawn = [list(share) for share in shares]
    assert [len(share) for share in shares] == [len(batches) for batches in drawn]
    updates = [[own[i : i + passes] for i in range(0, len(own), passes)] for own in drawn]
    wanted = list(order)
    assert {len(own) for own in updates} == {math.ceil(rows / order.rows_per_update)}
    for number, parts in enumerate(zip(*updates, strict=True)):
        start = number * order.rows_per_update
        together = sorted(row for own in parts for micro_batch in own for row in micro_batch)
        assert together == sorted(wanted[start : start + order.rows_per_update])
        assert all(len(micro_batch) <= batch for own in parts for micro_batch in own)


@pytest.fixture(scope="module")
def teams(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `tests.stages.finetune.forked` found."""
    home = tmp_path_factory.mktemp("teams")
    command = [sys.executable, "-m", "tests.stages.finetune.forked", "team", str(home)]
    environment = {**os.environ, "WORKBOOK_HOME": str(home), "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, env=environment, timeout=300)
    assert answer.returncode == 0, answer.stderr[-3000:]
    return {**json.loads(answer.stdout), "home": home}


@pytest.mark.parametrize("team", ["two", "apart"])
def test_two_processes_train_what_one_trains(teams: dict[str, Any], team: str) -> None:
    """Also where each of them holds its share of the frozen layers alone."""
    one, two = weights(Path(teams["one"])), teams["home"] / team / "checkpoints"
    steps = sorted(int(path.name.rpartition("-")[2]) for path in two.iterdir())
    assert steps[-1] == 5 and len(steps) >= 2
    chosen = teams[team][0]["facts"]["chosen_step"]
    for name, value in weights(two / f"checkpoint-{chosen}").items():
        np.testing.assert_allclose(value, one[name], atol=ROUNDING)
    histories = [Path(teams["one"]) / "history.jsonl", teams["home"] / team / "history.jsonl"]
    first, second = ([json.loads(line) for line in path.read_text().splitlines()] for path in histories)
    for key in ("loss", "eval_loss", "grad_norm", "learning_rate"):
        values = [[row[key] for row in rows if key in row] for rows in (first, second)]
        assert values[0] == pytest.approx(values[1], rel=1e-5) and len(values[0]) == 5
    assert teams[team][1] == {"facts": {}}


@pytest.mark.parametrize("kind", ["", "apart-"])
def test_a_stopped_team_goes_on_exactly(teams: dict[str, Any], kind: str) -> None:
    assert teams[f"{kind}stopped"] == [{"stopped": True}, {"stopped": True}]
    facts = teams[f"{kind}again"][0]["facts"]
    assert facts["resumed_from"] == 3 and teams[f"{kind}dropout"][0]["facts"]["resumed_from"] is None
    straight, again = (teams["home"] / f"{kind}{name}" / "checkpoints" for name in ("dropout", "stopped"))
    assert same(weights(straight / "checkpoint-5"), weights(again / "checkpoint-5"))
    assert (again / "checkpoint-5" / "rng_state_1.pth").is_file()
    assert not list(again.glob(".*"))


def test_each_process_holds_its_share_of_the_layers(teams: dict[str, Any]) -> None:
    held, whole = zip(*(json.loads((teams["home"] / "apart" / f"held-{i}").read_text()) for i in range(2)), strict=True)
    assert sum(held) == whole[0] == whole[1] and max(held) < 0.6 * whole[0]
    assert not (teams["home"] / "two" / "held-0").exists()


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


def inputs(folder: Path) -> TrainingInputs:
    base = Base(folder, "offline", "x", True)
    return TrainingInputs(tiny_settings(num_processes=2), folder, base, folder)


def test_one_process_out_of_memory_is_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = {"out_of_memory": "CUDA out of memory. Tried to allocate 2.00 GiB"}
    monkeypatch.setattr("lib.runs.child.run_child", lambda *_, **__: full)
    with pytest.raises(torch.OutOfMemoryError, match=r"2\.00 GiB"):
        processes.train_in_processes(inputs(tmp_path))


def test_a_signal_reaches_every_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_child(function: str, argument: dict, what: str, **_: Any) -> dict:
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 30
        stop = Path(argument["meeting"]) / processes.STOP
        while not stop.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return {"stopped": stop.exists()}

    monkeypatch.setattr("lib.runs.child.run_child", run_child)
    with pytest.raises(Terminated) as ended:
        processes.train_in_processes(inputs(tmp_path))
    assert ended.value.code == 143


class Failed:
    """What torchrun says when a process has ended badly."""

    def __init__(self, rank: int, exitcode: int) -> None:
        self.first = (rank, SimpleNamespace(exitcode=exitcode))

    def get_first_failure(self) -> tuple:
        return self.first


REFUSED = {"input_error": ["target_modules nobody.", "names.", "set all-linear."]}
BROKEN = {"cause": "RuntimeError: connection closed by peer", "error": "Traceback …"}
FULL = {"value": {"out_of_memory": "CUDA out of memory"}}


def test_the_cause_is_told_before_what_followed_from_it() -> None:
    with pytest.raises(InputError, match="nobody"):
        processes._together({0: BROKEN, 1: REFUSED}, Failed(0, 1), 2)
    assert processes._together({0: BROKEN, 1: FULL}, Failed(0, 1), 2) == FULL["value"]
    with pytest.raises(RuntimeError, match="process 1 of 2 failed in its process: RuntimeError: connection closed"):
        processes._together({0: BROKEN}, Failed(0, 1), 2)
    with pytest.raises(InputError, match=r"training, process 2 of 2 was ended by signal SIGKILL.*free memory"):
        processes._together({0: BROKEN}, Failed(1, -signal.SIGKILL), 2)


def test_fewer_gpus_than_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib.runs.machine.torch_device", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="num_processes: 2, and 1 GPU here"):
        processes.train_in_processes(inputs(tmp_path))


@pytest.mark.parametrize(
    ("number", "words"),
    [(signal.SIGKILL, "signal SIGKILL"), pytest.param(None, "an accident", marks=pytest.mark.slow)],
)
def test_a_process_that_dies_ends_the_training_with_its_cause(
    runs: Callable[[str], Run], tmp_path: Path, number: int | None, words: str
) -> None:
    """Really: one process of two ends in the third update; the other does not go on, and nothing is left running."""
    runs("fresh")
    (tmp_path / "sitecustomize.py").write_text(ACCIDENT.replace("NUMBER", str(number and int(number))))
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{PROJECT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LAUNCHED]
    with forking.CodePopen(command, cwd=PROJECT, stderr=subprocess.PIPE, text=True, env=environment) as started:
        said = started.communicate(timeout=300)[1]
    assert started.returncode == 1 and "process 2 of 2" in said and words in said
    pids = [int(path.name.removeprefix("pid-")) for path in tmp_path.glob("pid-*")]
    assert len(pids) == 2 and not any(psutil.pid_exists(pid) for pid in pids)
