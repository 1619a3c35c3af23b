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
from lib.stages.compare import child, files
from lib.stages.compare.changes import steps_of
from lib.stages.compare.files import Comparison

N = 60
CONTENT = {
    "steps": {"file": "Q8_0", "merged": "merged, transformers (bfloat16)", "merged_float32": None},
    "reference": "F16",
}
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
    content = {**CONTENT, "steps": {**CONTENT["steps"], "merged_float32": "merged, transformers (float32)"}}
    _, merged, exact, *rest = names(run, content)[0]
    assert (merged, exact) == ("merged, transformers (bfloat16)", "merged, transformers (float32)")
    assert rest == REST[1:]


@pytest.mark.parametrize(
    ("dtype", "fits", "file", "asked", "architecture"),
    [
        ("bfloat16", True, True, ["merged", "dequantized", "merged_float32"], "qwen2"),
        ("bfloat16", False, True, ["merged", "dequantized"], "qwen2"),
        ("float32", True, True, ["merged", "dequantized"], "qwen2"),
        ("float32", True, True, ["merged"], "qwen35"),
        ("bfloat16", True, False, ["merged"], "qwen2"),
    ],
)
def test_32_bits_are_scored_where_they_are_new_and_fit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    fits: bool,
    file: bool,
    asked: list[str],
    architecture: str,
) -> None:
    def score(way: str, _: dict) -> dict:
        return {"dtype": dtype, "log_probs": [], "score_seconds": 0.0, "found": ""}

    def run(function: str, argument: dict, what: str) -> dict:
        return child.score_in_transformers(argument)

    monkeypatch.setattr(child, "score_as", score)
    monkeypatch.setattr(files, "run_child", run)
    monkeypatch.setattr(files, "read_metadata", lambda _: {"general.architecture": architecture})
    monkeypatch.setattr("lib.models.loading.affordable_dtype", lambda _: "float32" if fits else "bfloat16")
    encoded = SimpleNamespace(rows=SimpleNamespace(scores=lambda *_: scores(0)))
    comparison = Comparison(tmp_path, [], [], None, tmp_path, merged=tmp_path)
    last = SimpleNamespace(name="Q8_0", path=tmp_path) if file else None
    merged, steps, notes = files._score_steps(comparison, encoded, {"n_threads": 1}, last)
    assert merged[0] == f"merged, transformers ({dtype})"
    exact = "merged, transformers (float32)" if "merged_float32" in asked else None
    known = architecture == "qwen2"
    named = {"merged": merged[0], "merged_float32": exact, "file": "Q8_0", "dequantized": known}
    assert steps == ({"steps": named} if file else {})
    wanted = ["does not fit"] * (not fits) + ["as one step"] * (file and not known)
    assert len(notes) == len(wanted) and all(part in note for part, note in zip(wanted, notes, strict=True))
    assert {path.name for path in tmp_path.glob("scores-*")} == {f"scores-{n.replace('_', '-')}.jsonl" for n in asked}
