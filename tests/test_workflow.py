"""workflow/: the runs of a sweep are planned and refused before anything runs; what Snakemake and Slurm read."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lib import settings
from lib.cli.__main__ import joined
from lib.cli.report import parsed
from lib.errors import InputError
from lib.runs.files import PROJECT, write_json
from workflow import grid
from workflow.grid import plan, table

WORKFLOW = PROJECT / "workflow"
SNAKEMAKE = PROJECT / ".venv-workflow" / "bin" / "snakemake"
QUICK = "params/quick.yaml"


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)


def shipped(name: str) -> dict[str, Any]:
    return yaml.safe_load((WORKFLOW / name).read_text(encoding="utf-8"))


def asked(run: dict[str, str]) -> settings.Settings:
    """The settings that `workbook report` takes from a planned run's options."""
    words = joined(["report", run["params"], *shlex.split(run["options"])])
    pairs = [words[place + 1] for place, word in enumerate(words) if word == "-p"]
    return settings.load(run["params"], parsed(pairs))


def test_the_shipped_sweep_is_six_runs_on_one_base() -> None:
    found = plan(shipped("sweep.yaml"))
    assert list(found["runs"]) == [f"quick-lora_r{rank}-s{seed}" for rank in (8, 16) for seed in (1, 2, 3)]
    assert list(found["bases"]) == ["quick-base"] and {run["base"] for run in found["runs"].values()} == {"quick-base"}
    run = asked(found["runs"]["quick-lora_r8-s3"])
    assert (run.run_name, run.lora_r, run.train_seed) == ("quick-lora_r8-s3", 8, 3)
    base = asked(found["bases"]["quick-base"])
    assert (base.run_name, base.finetuning_type) == ("quick-base", "none")
    assert found["home"] == str(Path(os.environ.get("WORKBOOK_HOME", PROJECT)))


def test_runs_that_differ_in_rows_or_model_have_bases_of_their_own() -> None:
    axes = {"base_model": ["offline", "Qwen/Qwen3-0.6B"], "learning_rate": ["1e-3", 0.0005], "max_train_rows": [100]}
    found = plan({"params": QUICK, "grid": axes, "set": {"run_name": "mine", "folds": 2, "system_prompt": "a 'b' c"}})
    assert list(found["bases"]) == [
        "mine-base-base_modeloffline-max_train_rows100",
        "mine-base-base_modelQwen3-0.6B-max_train_rows100",
    ]
    name, run = list(found["runs"].items())[2]
    assert name == "mine-base_modelQwen3-0.6B-learning_rate0.001-max_train_rows100"
    made, base = asked(run), asked(found["bases"][run["base"]])
    assert (made.base_model, made.learning_rate, made.folds) == ("Qwen/Qwen3-0.6B", 0.001, 2)
    assert (base.base_model, base.folds) == ("Qwen/Qwen3-0.6B", 1)
    assert made.system_prompt == base.system_prompt == "a 'b' c"


def test_several_parameter_files_are_a_class() -> None:
    found = plan({"params": [QUICK, "params/chnsenticorp-offline.yaml"]})
    assert list(found["runs"]) == ["quick", "chnsenticorp-offline"] and found["name"] == "quick" and found["files"]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"grid": {"lora_rr": [8]}}, "lora_rr"),
        ({"grid": {"lora_r": [8, "many"]}}, "lora_r"),
        ({"grid": {"lora_r": 8}}, "a list of values"),
        ({"grid": {"lora_r": []}}, "a list of values"),
        ({"grid": {"run_name": ["a"]}}, "a list of values"),
        ({"grid": {"lora_r": [8, 8]}}, "two runs 'quick-lora_r8'"),
        ({"grid": {"dataset": ["a/b", "c/b"]}}, "two runs 'quick-datasetb'"),
        ({"set": {"finetuning_type": "full"}, "grid": {"load_in_4bit": [True]}}, "load_in_4bit"),
        ({"set": {"lora_rr": 8}}, "lora_rr"),
        ({"params": "params/absent.yaml"}, "no file params/absent.yaml"),
        ({"params": []}, "no params"),
        ({"gird": {}}, "'gird'"),
        ({"exports": {"a": {"checkpoint": "x"}}}, "'params'"),
    ],
)
def test_what_a_run_would_refuse_is_refused_at_planning(config: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        plan({"params": QUICK, **config})


def test_a_refusal_is_the_workbooks_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps({"params": QUICK, "grid": {"lora_rank": [8]}})))
    assert grid.main(["plan"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("Found: ") and "Do this: " in said.err


def test_a_batch_of_exports() -> None:
    found = plan(shipped("export.yaml"))
    assert found["exports"] == {"quick": "runs/quick/adapter --formats fp16,int8,gguf:Q4_K_M"}
    entry = {"checkpoint": "a b", "base_model": "Qwen/Qwen3-0.6B"}
    more = plan({"exports": {"one": entry}, "formats": "int8", "options": ["--max-samples", 9]})
    words = ["a b", "--base-model", "Qwen/Qwen3-0.6B", "--formats", "int8", "--max-samples", "9"]
    assert shlex.split(more["exports"]["one"]) == words and more["output"] == "exports"


@pytest.mark.parametrize(
    ("exports", "said"),
    [
        ({"a/b": {"checkpoint": "x"}}, "a name of letters"),
        ({"a": {"adapter": "x"}}, "checkpoint, and base_model"),
        ({"a": "x"}, "checkpoint, and base_model"),
        ({}, "no exports"),
    ],
)
def test_a_batch_that_cannot_be(exports: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        plan({"exports": exports})
    with pytest.raises(InputError, match="Q4_M"):
        plan({"exports": {"a": {"checkpoint": "x"}}, "formats": "gguf:Q4_M"})


def test_the_table_over_all_exports(tmp_path: Path) -> None:
    checks = {"terms": [1, 2], "thinking": None, "same_text": 1, "prompts": 2, "chrf": 50.0, "whole": 2, "looping": 0}
    model = {"bytes": 2_000_000, "checks": checks}
    report = {"merged_model": model, "formats": [{"path": "int8", **model, "bytes": 1_000_000}], "evaluation": None}
    for name in ("one", "two"):
        write_json(tmp_path / f"{name}.json", report)
    lines = table([tmp_path / "one.json", tmp_path / "two.json"]).splitlines()
    assert lines[0].startswith("| export | format | MB |") and len(lines) == 6
    assert lines[3].startswith("| one | int8 | 1.0") and lines[5].startswith("| two | int8 | 1.0")


def test_what_snakemake_and_slurm_read() -> None:
    for profile in ("local", "slurm", "default"):
        values = yaml.safe_load((WORKFLOW / "profiles" / profile / "config.yaml").read_text(encoding="utf-8"))
        assert (
            values["rerun-incomplete"] and values["nolock"] and values["rerun-triggers"] == ["mtime", "params", "input"]
        )
    lines = (WORKFLOW / "requirements.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert {line.partition("==")[0] for line in lines} >= {"snakemake", "snakemake-executor-plugin-slurm"}
    assert subprocess.run(["bash", "-n", WORKFLOW / "single.sbatch"], check=False).returncode == 0


@pytest.mark.skipif(not SNAKEMAKE.is_file(), reason="no .venv-workflow: make workflow")
@pytest.mark.parametrize(
    ("python", "axes", "code", "said"),
    [
        (sys.executable, "{lora_r: [4, 8]}", 0, "train"),
        (sys.executable, "{lora_rr: [4]}", 1, "lora_rr"),
        ("/absent", "{lora_r: [4]}", 1, "no /absent"),
    ],
)
def test_a_dry_run(tmp_path: Path, home: Path, python: str, axes: str, code: int, said: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(f"params: {QUICK}\npython: {python}\ngrid: {axes}\n", encoding="utf-8")
    words = [SNAKEMAKE, "--configfile", path, "-n", "--cores", "1"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == code and said in done.stdout + done.stderr
    assert ("Expected: " in done.stdout + done.stderr) == bool(code) and not (home / "runs").exists()
