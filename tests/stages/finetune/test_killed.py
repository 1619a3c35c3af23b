"""A training process that is really killed, or told to stop by the scheduler."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from lib.errors import Terminated
from lib.stages.finetune import checkpoints, trainer, watch
from lib.stages.finetune.layout import answer_loss
from lib.stages.finetune.stage import finetune
from lib.stages.finetune.trainer import AnswerTrainer
from tests.conftest import PROJECT
from tests.stages.finetune.conftest import tiny_settings
from tests.stages.finetune.test_stage import same, untimed, weights
from tests.support import forking

pytestmark = pytest.mark.usefixtures("unmeasured_children", "forked_children")

SLOW_TRAINING = """
import time
from lib.models import offline_base
from lib.runs.run import open_run
from lib.stages.finetune.stage import finetune
from lib.stages.finetune.trainer import AnswerTrainer
from tests.stages.finetune.conftest import TINY, tiny_settings
offline_base.BaseRecipe = lambda: TINY
step = AnswerTrainer.training_step
def slow(self, *arguments, **options):
    if self.state.global_step >= 4:
        time.sleep(60)
    return step(self, *arguments, **options)
AnswerTrainer.training_step = slow
finetune(tiny_settings(), open_run("fresh"))
"""


def test_kill_9_then_again_gives_the_same_weights(runs) -> None:
    run = runs("fresh")
    checkpoint = run.folder / ".adapter.part" / "checkpoints" / "checkpoint-4"
    child = forking.CodePopen(
        [sys.executable, "-c", SLOW_TRAINING], cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 300
        while not checkpoint.exists() and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert child.poll() is None and checkpoint.exists()
    finally:
        child.kill()
        child.wait()
    assert "adapter" not in run.manifest.entries()
    result = finetune(tiny_settings(), run)
    assert result.resumed_from == 4 and result.messages == []
    assert same(weights(result.product.path), weights(runs("straight").folder / "adapter"))


def signal_in_update_3(patch: pytest.MonkeyPatch, number: int, times: int = 1) -> None:
    original = AnswerTrainer.compute_loss

    def compute(self, *arguments, **options):
        if self.state.global_step == 2:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return original(self, *arguments, **options)

    patch.setattr(AnswerTrainer, "compute_loss", compute)


@pytest.mark.parametrize(
    ("number", "raised", "words"),
    [(signal.SIGTERM, Terminated, "SIGTERM"), (signal.SIGINT, KeyboardInterrupt, "again")],
)
def test_a_signal_stops_after_the_update_with_a_checkpoint(
    runs, monkeypatch: pytest.MonkeyPatch, number: int, raised: type, words: str
) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        signal_in_update_3(patch, number, times=2)  # from the batch system and from the report: one wish
        with pytest.raises(raised, match=words) as ended:
            finetune(tiny_settings(), runs("fresh"))
    assert raised is KeyboardInterrupt or ended.value.code == 143
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    result = finetune(tiny_settings(), runs("fresh"))
    assert result.resumed_from == 3  # no multiple of save_steps
    assert same(weights(result.product.path), weights(runs("straight").folder / "adapter"))


@pytest.mark.parametrize("step", [2, 4])
def test_a_signal_in_a_validation_does_not_wait_for_its_end(runs, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Nor does one while it is made up for; in the end all is as if there had been none."""
    run, measured = runs("fresh"), []
    settings = tiny_settings(per_device_train_batch_size=4, gradient_accumulation_steps=4, num_train_epochs=1.0)
    checkpoint = run.folder / ".adapter.part" / "checkpoints" / f"checkpoint-{step}"

    def counted(model, batch):
        if not model.training and checkpoint.is_dir():
            measured.append(len(batch["labels"]))
            os.kill(os.getpid(), signal.SIGTERM)
        return answer_loss(model, batch)

    for tries in (1, 2):
        with monkeypatch.context() as patch, pytest.raises(Terminated):
            patch.setattr(trainer, "answer_loss", counted)
            finetune(settings, run)
        good, _ = checkpoints.find(checkpoint.parent)
        assert (good[-1].step, good[-1].eval_loss) == (step, None) and len(measured) == tries
    result = finetune(settings, run)
    straight = finetune(settings, runs("straight"))
    assert result.resumed_from == step and straight.resumed_from is None
    assert untimed(result.history) == untimed(straight.history)
    assert same(weights(result.product.path), weights(straight.product.path))


def test_an_insistent_ctrl_c_does_not_wait_for_the_update(runs, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(watch, "INSISTENCE", 0.0)
        signal_in_update_3(patch, signal.SIGINT, times=2)
        with pytest.raises(KeyboardInterrupt):
            finetune(tiny_settings(), runs("fresh"))
    assert finetune(tiny_settings(), runs("fresh")).resumed_from == 2


def test_kill_9_while_a_checkpoint_is_written(prepared, tmp_path) -> None:
    """At file operations spread over one save, of every file of it: the next try ends with the same bytes."""
    shutil.copytree(prepared / "runs" / "fresh", tmp_path / "runs" / "fresh")
    command = [sys.executable, "-m", "tests.stages.finetune.forked", "kill", str(tmp_path)]
    environment = {**os.environ, "WORKBOOK_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, env=environment, timeout=400)
    assert answer.returncode == 0, answer.stderr[-3000:]
    straight, *killed = [json.loads(line) for line in answer.stdout.splitlines()]
    assert straight["resumed_from"] is None and len(killed) >= 7
    for found in killed:
        assert found["status"] == -signal.SIGKILL and "sha256" in found, (found, answer.stderr[-3000:])
        assert found["sha256"] == straight["sha256"] and found["resumed_from"] in (2, 3), found
    assert {found["resumed_from"] for found in killed} == {2, 3}  # before and after the rename that makes it count
    assert len({found["call"] for found in killed}) >= 4
