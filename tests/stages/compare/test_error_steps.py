"""The error ladder of a run: whose scores it takes, and what it says of those that it does not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lib.prompts.tasks import ClassificationTask
from lib.runs.files import read_jsonl, write_json, write_jsonl
from lib.runs.run import Run, open_run
from lib.scoring.log_probabilities import Scores
from lib.scoring.metric import ACCURACY, RowGroups
from lib.stages.compare import files
from lib.stages.compare.error_ladder import steps_of
from lib.stages.compare.files import Comparison

N = 60
CONTENT = {"steps": {"file": "Q8_0", "merged": "merged, transformers (bfloat16)"}, "reference": "F16"}
CONTENT["conditions"] = {"equivalence_margin_points": 1.0, "seed": 1}


def scores(shift: float) -> Scores:
    margins = np.random.default_rng(0).normal(1, 1, N) + shift
    log_probs = np.stack([-np.logaddexp(0, -margins), -np.logaddexp(0, margins)], axis=1)
    return Scores([f"r{i}" for i in range(N)], np.zeros(N, int), log_probs, np.zeros(N, bool), 1.0)


def train(run: Run, weights: str) -> None:
    def build(work) -> None:
        (work.folder / "w").write_text(weights)
        work.facts["method"] = "LoRA"

    run.produce("adapter", build, {"weights": weights}, ("data",))


def keep(run: Run, product: str, *names: str, inputs: tuple[str, ...] = ("data", "adapter")) -> None:
    def build(work) -> None:
        for place, name in enumerate(names):
            scores(0.001 * place).save(work.folder / f"scores-{name}.jsonl")

    run.produce(product, build, {"of": run.manifest.entries()["adapter"].digest}, inputs)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("WORKBOOK_HOME", str(tmp_path))
    run = open_run("t")

    def data(work) -> None:
        write_jsonl(
            work.folder / "test.jsonl", [{"id": f"r{i}", "text": "x", "label": 0, "group": i} for i in range(N)]
        )
        write_json(work.folder / "task.json", ClassificationTask(("a", "b"), "s", "{text}", 64).to_json())

    run.produce("data", data, {})
    train(run, "old")
    keep(run, "evaluation", "finetuned")
    keep(run, "merged", "x")
    keep(run, "comparison", "merged", "F16", "dequantized", "Q8_0", "merged-float32", inputs=("data",))
    return run


def names(run: Run, content: dict = CONTENT) -> tuple[list[str], str]:
    rows = RowGroups.of(read_jsonl(run.folder / "data" / "test.jsonl"))
    steps, note = steps_of(run, run.folder / "comparison", content, ACCURACY, rows)
    return [step["name"] for step in steps], note


REST = ["merged, transformers (bfloat16)", "GGUF F16, llama.cpp", "weights of Q8_0, transformers (float32)"]
REST.append("Q8_0, llama.cpp")


def test_the_adapter_that_was_merged_is_the_first_step(run: Run) -> None:
    assert names(run) == (["adapter (LoRA), transformers", *REST], "")


def test_scores_of_an_older_adapter_are_left_out(run: Run) -> None:
    train(run, "new")
    assert names(run) == (REST, "03 was not run again after the training, so the adapter is left out.")
    keep(run, "evaluation", "finetuned")
    assert names(run) == (REST, "04 was not run again after the training, so the adapter is left out.")
    keep(run, "merged", "x")
    assert names(run)[1] == ""


def test_damaged_scores_are_left_out(run: Run) -> None:
    (run.folder / "evaluation" / "scores-finetuned.jsonl").write_text("{}\n")
    found, note = names(run)
    assert found == REST and note.startswith("The adapter is left out: ")


def test_32_bit_arithmetic_is_a_step_of_its_own(run: Run) -> None:
    content = {**CONTENT, "steps": {**CONTENT["steps"], "merged_float32": files.merged_name("float32")}}
    _, merged, exact, *rest = names(run, content)[0]
    assert (merged, exact) == ("merged, transformers (bfloat16)", "merged, transformers (float32)")
    assert rest == REST[1:]


def test_32_bits_are_scored_where_they_are_new_and_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def child(function: str, path: Path, argument: dict, *_: object) -> dict:
        asked.append(argument["way"])
        return {"dtype": "float32", "log_probs": [], "score_seconds": 0.0, "found": ""}

    monkeypatch.setattr(files, "run_kept", child)
    encoded = SimpleNamespace(argument=lambda *_: {}, rows=SimpleNamespace(scores=lambda *_: scores(0)))
    comparison = Comparison(tmp_path, [], [], None, tmp_path, merged=tmp_path, n_threads=1)
    merged_float32 = files.Processes(comparison, encoded).merged_float32
    assert merged_float32(files.merged_name("float32")) == (None, []) and not asked
    monkeypatch.setattr("lib.models.loading.affordable_dtype", lambda _: "bfloat16")
    name, notes = merged_float32(files.merged_name("bfloat16"))
    assert name is None and "does not fit" in notes[0] and not asked
    monkeypatch.setattr("lib.models.loading.affordable_dtype", lambda _: "float32")
    assert merged_float32(files.merged_name("bfloat16")) == ("merged, transformers (float32)", [])
    assert asked == ["merged_float32"] and (tmp_path / "scores-merged-float32.jsonl").is_file()
