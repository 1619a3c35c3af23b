"""SIGTERM from outside, at every level a training is started from: a checkpoint, exit code 143, nothing running."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from lib.runs.files import HOME_VARIABLE
from lib.stages.finetune import checkpoints
from lib.stages.finetune.stage import finetune
from tests.conftest import PROJECT
from tests.stages.finetune.conftest import tiny_settings
from tests.stages.finetune.test_stage import same, weights
from tests.support import forking

pytestmark = pytest.mark.usefixtures("unmeasured_children", "forked_children")

SLOW = """
import os, time
from pathlib import Path
from lib.models import offline_base
from lib.runs.run import open_run
from lib.stages.finetune.stage import finetune
from lib.stages.finetune.trainer import AnswerTrainer
from tests.stages.finetune.conftest import TINY, tiny_settings
offline_base.BaseRecipe = lambda: TINY
step = AnswerTrainer.training_step
def slow(self, *arguments, **options):
    if self.state.global_step >= 2:
        Path(os.environ["PID_FILE"]).write_text(str(os.getpid()))
        time.sleep(3)
    return step(self, *arguments, **options)
AnswerTrainer.training_step = slow
"""
STAGE = SLOW + 'finetune(tiny_settings(), open_run("fresh"))\n'
REPORT = """
import sys
from pathlib import Path
from lib.report.runner import run_report
run_report(sys.argv[1], notebooks=Path(sys.argv[2]))
"""


def write_notebook(folder: Path) -> Path:
    parameters = nbformat.v4.new_code_cell('run_name: str = "quick"', metadata={"tags": ["parameters"]})
    cells = [nbformat.v4.new_markdown_cell("# 02 · Fine-tune\n\n> ?"), parameters, nbformat.v4.new_code_cell(STAGE)]
    spec = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    folder.mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": spec}), folder / "02_finetune.ipynb")
    return folder


def command(kind: str, folder: Path) -> list[str]:
    """How the same stage is started: a script, our papermill child, the report."""
    if kind == "script":
        return [sys.executable, "-c", STAGE]
    notebooks = write_notebook(folder / "notebooks")
    if kind == "report":
        (folder / "params.yaml").write_text("run_name: fresh\n")
        return [sys.executable, "-c", REPORT, str(folder / "params.yaml"), str(notebooks)]
    request = {
        "notebook": str(notebooks / "02_finetune.ipynb"),
        "output": str(folder / "out.ipynb"),
        "parameters": {},
        "kernel_name": "python3",
        "cwd": str(PROJECT),
        "parent": os.getpid(),
    }
    (folder / "request.json").write_text(json.dumps(request))
    return [sys.executable, "-m", "lib.report.execute", str(folder / "request.json")]


@pytest.mark.parametrize("kind", ["script", pytest.param("papermill", marks=pytest.mark.slow), "report"])
def test_sigterm_saves_and_exits_143(runs, kind: str, tmp_path: Path) -> None:
    run, pid_file = runs("fresh"), tmp_path / "pid"
    environment = {**os.environ, "PID_FILE": str(pid_file), "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    assert environment[HOME_VARIABLE] == str(tmp_path / "home")
    log = (tmp_path / "log").open("wb")
    child = forking.CodePopen(command(kind, tmp_path), cwd=PROJECT, stdout=log, stderr=log, env=environment)
    deadline = time.monotonic() + 200
    while not pid_file.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert pid_file.exists(), (tmp_path / "log").read_text()
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) == 143, (tmp_path / "log").read_text()
    trainer = int(pid_file.read_text())
    assert not psutil.pid_exists(trainer) or psutil.Process(trainer).status() == psutil.STATUS_ZOMBIE
    assert "Traceback" not in (tmp_path / "log").read_text()
    good, problems = checkpoints.find(run.folder / ".adapter.part" / "checkpoints")
    assert [c.step for c in good] == [2, 3] and problems == []
    result = finetune(tiny_settings(), run)
    assert result.resumed_from == 3
    assert same(weights(result.product.path), weights(runs("straight").folder / "adapter"))
