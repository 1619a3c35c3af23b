"""Rows without labels: stage 03 and `workbook evaluate` killed with SIGKILL; the result is that of one go."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lib.cli.evaluate import OpeningOptions, RowOptions
from lib.cli.evaluate import evaluate as command_line
from lib.runs.files import read_json, read_jsonl
from lib.scoring.backend import journal_path
from lib.settings import Settings
from lib.stages.evaluate.stage import evaluate
from lib.stages.evaluate.standalone import score_in_child
from tests.support.killing import kill_at

pytestmark = pytest.mark.usefixtures("unmeasured_children", "forked_children")

TALK = {"task": "dialogue", "dataset": "none.csv", "system_prompt": "", "prompts_file": "counselling"}
SETTINGS = Settings(
    **TALK,
    run_name="talk",
    dtype="float32",
    per_device_eval_batch_size=2,
    generated_rows=4,
    max_new_tokens=6,
    force=True,
)
STAGE = """
import sys
import torch
torch.set_num_threads(1)
from lib.stages.evaluate.stage import evaluate
from lib.runs.run import open_run
from lib.settings import Settings
evaluate(Settings.model_validate_json(sys.argv[1]), open_run("talk"))
"""


def untimed(value: Any) -> Any:
    """Without what a clock says."""
    if isinstance(value, dict):
        return {key: untimed(own) for key, own in value.items() if "second" not in key}
    return [untimed(own) for own in value] if isinstance(value, list) else value


def content(folder: Path) -> dict[str, Any]:
    """Every file of a product."""
    read = {".json": read_json, ".jsonl": read_jsonl}
    return {path.name: untimed(read[path.suffix](path)) for path in sorted(folder.iterdir())}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_killed_stage_continues(talk, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Killed among the scores of the second model, then among its answers; no row is scored or answered twice."""
    whole = evaluate(SETTINGS, talk)
    expected = content(whole.product.path)
    command = [sys.executable, "-c", STAGE, SETTINGS.model_dump_json()]
    part = talk.folder / ".evaluation.part"
    kill_at(command, part, "kept-finetuned.jsonl", 4, tmp_path / "slow")
    scored = (part / "kept-finetuned.jsonl").read_bytes()
    kill_at(command, part, "kept-finetuned-drawn-replies.jsonl", 2, tmp_path / "slow")
    assert (part / "kept-finetuned.jsonl").read_bytes().startswith(scored)
    drawn = (part / "kept-finetuned-drawn-replies.jsonl").read_bytes().count(b"\n") - 1
    assert 4 <= scored.count(b"\n") - 1 < 12 and 2 <= drawn < 5
    kept = read_jsonl(part / "kept-base-answers.jsonl")
    assert kept[0]["writing"] == {"most": 6, "ends": sorted(kept[0]["writing"]["ends"]), "sampling": None}
    capsys.readouterr()
    found = evaluate(SETTINGS, talk)
    said = capsys.readouterr().err
    assert "with the base model (12 rows already scored)" in said
    assert f"drawn replies of the fine-tuned model ({drawn} drawn replies already written)" in said
    assert content(found.product.path) == expected
    assert whole.product.entry.facts["found_done"] == {}
    everything = "12 rows already scored, 4 answers already written, 5 replies already written"
    assert found.product.entry.facts["found_done"] == {
        "base": f"{everything}, 5 drawn replies already written",
        "finetuned": f"{everything}, {drawn} drawn replies already written",
    }


@pytest.mark.slow  # the journal is the stage's, killed above; the command's with labels is in test_killed.py
def test_killed_command_continues(
    talk, small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """`workbook evaluate` on conversations with a folder and a file, killed in the second model."""
    models, folder = [str(small.folder), str(small.gguf)], tmp_path / ".cut.json.scores"
    command = [sys.executable, "-m", "lib.cli", "evaluate", *models, "--run", "talk", "--n-threads", "1"]
    command += ["--dtype", "float32", "--batch-size", "2", "--json", "--output", str(tmp_path / "cut.json")]
    journal = journal_path(folder, small.gguf)
    kill_at(command, folder, journal.name, 3, tmp_path / "slow")
    kept = journal.read_bytes().count(b"\n") - 1
    assert not (tmp_path / "cut.json").exists() and 3 <= kept < 12
    opening = OpeningOptions(dtype="float32", n_threads=1)
    options = {"opening": opening, "batch_size": 2, "as_json": True}
    monkeypatch.setattr("lib.stages.evaluate.standalone.run_child", here)
    for name in ("whole", "cut"):
        capsys.readouterr()
        command_line(models, RowOptions(run_name="talk"), output=tmp_path / f"{name}.json", **options)
        said = capsys.readouterr().err
        assert (f"{models[0]}: 12 rows already scored" in said) == (name == "cut")
        assert (f"{models[1]}: {kept} rows already scored" in said) == (name == "cut")
    assert not folder.exists()
    whole, cut = (untimed(read_json(tmp_path / f"{name}.json"))["models"] for name in ("whole", "cut"))
    for entry in (*whole, *cut):
        assert entry.pop("peak_memory_mib") > 50
    assert cut == whole


def here(function: str, argument: dict[str, Any], what: str) -> dict[str, Any]:
    """In place of `run_child`, in this process."""
    assert function == "lib.stages.evaluate.standalone:score_in_child" and what.startswith("evaluating")
    return score_in_child(json.loads(json.dumps(argument, default=str)))
