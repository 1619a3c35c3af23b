"""`workbook evaluate`, killed with SIGKILL: the same command goes on where it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lib.prompts.tasks import ClassificationTask
from lib.settings import Settings
from lib.stages.data.stage import rows_from_file
from lib.stages.evaluate.standalone import ModelOptions, evaluate_models
from tests.scoring import tiny
from tests.stages.evaluate.test_stage import here

pytestmark = pytest.mark.usefixtures("unmeasured_children", "forked_children")

PROJECT = Path(__file__).resolve().parents[3]


def test_killed_command_continues(small, tmp_path, monkeypatch):
    """`workbook evaluate`, its process killed while llama.cpp scores; the same command goes on and leaves no rest."""
    rows = [{"text": row["text"] * 6, "label": row["label"]} for row in tiny.rows(600)]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    command = [sys.executable, "-m", "lib.cli", "evaluate", str(small.gguf), "--data", str(tmp_path / "rows.json")]
    command += ["--user-prompt", "评价：{text}", "--n-threads", "1", "--json", "--output"]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    folder = tmp_path / ".cut.json.scores"
    process = subprocess.Popen([*command, str(tmp_path / "cut.json")], env=environment, stdout=subprocess.DEVNULL)
    while not any(path.read_bytes().count(b"\n") > 20 for path in folder.glob("*.jsonl")):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.3)  # the kernel ends the child with its parent
    (journal,) = folder.glob("*.jsonl")
    kept = journal.read_bytes()
    assert 20 < kept.count(b"\n") < 601 and not (tmp_path / "cut.json").exists()
    answer = subprocess.run([*command, str(tmp_path / "cut.json")], env=environment, capture_output=True, check=True)
    assert "rows already scored" in answer.stderr.decode()
    (entry,) = json.loads((tmp_path / "cut.json").read_text(encoding="utf-8"))["models"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.json", "rows.json"]
    monkeypatch.setattr("lib.stages.evaluate.standalone.run_child", here)
    found, _ = rows_from_file(str(tmp_path / "rows.json"), ["负面", "正面"])
    plain = [{key: row[key] for key in ("id", "text", "label")} for row in found]
    task = ClassificationTask(("负面", "正面"), Settings().system_prompt, "评价：{text}", Settings().max_seq_length)
    (whole,) = evaluate_models([small.gguf], plain, task, options=ModelOptions(n_threads=1))["models"]
    timed = {"seconds", "seconds_per_sample", "peak_memory_mib"}
    assert {k: v for k, v in entry.items() if k not in timed} == {k: v for k, v in whole.items() if k not in timed}
