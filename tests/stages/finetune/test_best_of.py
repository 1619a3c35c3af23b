"""`train_seed`, and `adapter: best-of:RUN,RUN`: the adapter of the chosen run, recorded with the reason."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import numpy as np
import pytest

from lib.errors import InputError
from lib.runs.files import read_json, read_jsonl
from lib.runs.run import Run
from lib.scoring.log_probabilities import Scores
from lib.stages.finetune.stage import adopt, finetune
from lib.stages.merge.stage import merge
from tests.stages.finetune.conftest import tiny_settings

BEST = "best-of:straight,second"


def evaluated(run: Run, wrong: int) -> None:
    """An evaluation in which the first rows are wrong."""

    def build(work) -> None:
        rows = read_jsonl(run.folder / "data" / "test.jsonl")
        labels = np.array([row["label"] for row in rows])
        said = np.where(np.arange(len(rows)) < wrong, 1 - labels, labels)
        logs = np.where(np.arange(2) == said[:, None], -0.1, -3.0)
        scores = Scores([row["id"] for row in rows], labels, logs, np.zeros(len(rows), dtype=bool), 1.0)
        scores.save(work.folder / "scores-finetuned.jsonl")

    run.produce("evaluation", build, {"wrong": wrong}, inputs=("data", "adapter"))


@pytest.fixture
def pair(runs: Callable[[str], Run]) -> Callable[[str], Run]:
    """ "straight" and "second", which differ in train_seed alone; the second answers better."""
    straight = runs("straight")
    shutil.copytree(straight.folder, straight.folder.parent / "second")
    finetune(tiny_settings(train_seed=7), runs("second"))
    evaluated(straight, 12)
    evaluated(runs("second"), 0)
    return runs


def test_train_seed_changes_the_training_alone(pair: Callable[[str], Run]) -> None:
    first, second = (pair(name).require("adapter") for name in ("straight", "second"))
    assert first.entry.parameters["seed"] == 42 and second.entry.parameters["seed"] == 7
    assert {k for k, v in first.entry.parameters.items() if second.entry.parameters[k] != v} == {"seed"}
    assert first.entry.inputs == second.entry.inputs and first.entry.digest != second.entry.digest
    assert finetune(tiny_settings(train_seed=42), pair("straight")).product.made is False, "-1 means seed"


def test_the_chosen_runs_adapter_is_taken_and_why(pair: Callable[[str], Run]) -> None:
    run = pair("fresh")
    result = finetune(tiny_settings(adapter=BEST), run)
    wanted = pair("second").folder / "adapter" / "adapter_model.safetensors"
    assert (result.product.path / "adapter_model.safetensors").read_bytes() == wanted.read_bytes()
    chosen = result.product.entry.facts["chosen"]
    assert chosen["run"] == "second" and chosen["test_rows_seen"] == 0 and "Taken: run second" in chosen["text"]
    assert read_json(result.product.path / "model_analysis.json")["chosen"]["run"] == "second"
    assert any("the adapter of run second was taken" in stamp and "no test row" in stamp for stamp in run.stamps())
    assert adopt(tiny_settings(adapter=BEST), run).made is False


def test_04_merges_it_and_its_card_says_which(pair: Callable[[str], Run]) -> None:
    run, settings = pair("fresh"), tiny_settings(adapter=BEST)
    adopt(settings, run)
    product = merge(settings, run).product
    assert product.entry.facts["chosen"]["run"] == "second"
    assert "Taken: run second" in (product.path / "README.md").read_text(encoding="utf-8")


def test_when_the_answer_changes_another_adapter_is_taken(pair: Callable[[str], Run]) -> None:
    run, settings = pair("fresh"), tiny_settings(adapter=BEST)
    adopt(settings, run)
    evaluated(pair("second"), 18)
    again = adopt(settings, run)
    assert again.made and "adapter_revision" in again.message and again.entry.facts["chosen"]["run"] == "straight"


def test_refused(pair: Callable[[str], Run]) -> None:
    with pytest.raises(InputError, match="which is one of the candidates"):
        finetune(tiny_settings(adapter=BEST), pair("straight"))
    with pytest.raises(InputError, match="no run 'third'"):
        finetune(tiny_settings(adapter="best-of:straight,third"), pair("fresh"))
    run = pair("fresh")
    old = run.require("data")

    def other_prompt(work) -> None:
        shutil.copytree(old.path, work.folder, dirs_exist_ok=True)
        work.facts |= old.entry.facts | {"prompt_hash": "other"}

    run.produce("data", other_prompt, {"user_prompt": "other"})
    with pytest.raises(InputError, match="another prompt"):
        finetune(tiny_settings(adapter=BEST), run)
