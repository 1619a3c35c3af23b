"""A model whose weights are all trained goes through all stages (`finetuning_type: full`), without an adapter."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lib.errors import InputError
from lib.models import offline_base
from lib.models.base_model import base_of
from lib.models.loading import load_model
from lib.report import compare_page, evaluate_page, finetune_page, steps_page, weights_page
from lib.report.index import read_notebook, summarise
from lib.report.sentences import in_markdown
from lib.runs.files import HOME_VARIABLE
from lib.runs.machine import llama_cpp_problem
from lib.select.candidates import read_candidate
from lib.select.choice import best_of
from lib.settings import Settings, check
from lib.stages.evaluate.stage import candidates
from lib.stages.quantize import stage as quantize_stage
from tests.test_conversation_run import SHARED, TINY, run_stages
from tests.test_untrained import NOTEBOOKS, shown

pytestmark = [
    pytest.mark.skipif(llama_cpp_problem() is not None, reason="llama-cpp-python does not work here"),
    pytest.mark.usefixtures("unmeasured_children", "forked_children"),
]
OF_AN_ADAPTER = re.compile(r"(?<!`)adapter(?!`)|\blora\b|B·A", re.IGNORECASE)
"""Words that a page of such a run has no use for; the product keeps its name."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(HOME_VARIABLE, str(tmp_path_factory.mktemp("home")))
        patch.setattr(offline_base, "BaseRecipe", lambda **changes: replace(TINY, **changes))
        own = {"finetuning_type": "full", "learning_rate": 2e-3, "max_train_rows": 80, "max_eval_rows": 40, "terms": ""}
        settings = check(
            {**SHARED, "run_name": "whole", "system_prompt": Settings().system_prompt, **own, "num_train_epochs": 2.0},
            "the test",
        )
        yield {**run_stages(settings), "settings": settings}


def test_both_models_are_scored_and_the_trained_one_by_its_own_folder(results: dict) -> None:
    run, result = results["run"], results["evaluation"]
    assert list(result.scores) == ["base", "finetuned"] and run.whole
    assert "every weight trained (float32)" in result.titles["finetuned"]
    trained = load_file(run.adapter().path / "model.safetensors")
    with candidates(run, "float32")[1].opened(2) as backend:
        held = backend.model.state_dict()
        assert all(torch.equal(held[name], tensor) for name, tensor in trained.items())
    page = evaluate_page.page_of(result)
    for name in ("quality", "parts", "verdict", "speed", "learned"):
        assert not OF_AN_ADAPTER.search(shown(getattr(page, name)())), name
    assert "fine-tuned" in summarise(run).qualities


def test_the_trained_weights_go_on(results: dict) -> None:
    run, result = results["run"], results["merged"]
    trained = load_file(run.adapter().path / "model.safetensors")
    found, base = (load_file(folder / "model.safetensors") for folder in (result.product.path, base_of(run).path))
    assert all(torch.equal(found[name], tensor.to(base[name].dtype)) for name, tensor in trained.items())
    assert load_model(result.product.path, "float32").training is False
    words = [weights_page.proved(result), weights_page.merge_reading(result.check, whole=True)]
    words += [shown(weights_page.merge_card(result)), str(weights_page.costs(result.check, whole=True))]
    told = {"report": result.report, "check": result.check, "seconds": 1.0, "whole": True}
    words += [in_markdown("merge.learned", **told), (result.product.path / "README.md").read_text(encoding="utf-8")]
    for text in words:
        assert not OF_AN_ADAPTER.search(text), text
    assert "each is the trained one" in words[0] and "every weight was trained" in words[2]


def test_page_02_tells_of_a_model(results: dict) -> None:
    result = results["adapter"]
    assert result.whole and result.trainable == result.total
    for name in ("card", "memory", "curves", "chosen", "speed", "resource_use", "learned"):
        assert not OF_AN_ADAPTER.search(shown(getattr(finetune_page, name)(result))), name
    assert not OF_AN_ADAPTER.search((result.product.path / "README.md").read_text(encoding="utf-8"))


def test_files_are_compared_with_the_trained_model_and_with_the_base(results: dict) -> None:
    result = results["comparison"]
    assert all(entry["retention"] is not None for entry in result.files)
    assert "Fine-tuning moved the 40 test rows" in result.retention_note
    assert result.steps[0]["name"].startswith("trained model (full), transformers") and result.steps_note == ""
    assert not OF_AN_ADAPTER.search(shown(steps_page.shown(result.steps, result.steps_note)))
    assert not OF_AN_ADAPTER.search(shown(compare_page.page_of(result).learned()))
    kept = quantize_stage.retention(results["settings"], results["run"], results["quantized"])
    assert kept.reason == "" and kept.files


def test_such_a_run_can_be_compared_and_not_be_adopted(results: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    run = results["run"]
    candidate = read_candidate(run)
    assert candidate.facts["adapter_bytes"] > 4 * candidate.facts["weights"] > 0
    monkeypatch.setattr("lib.select.choice.select", lambda names: {"chosen": {"run": "whole"}})
    with pytest.raises(InputError, match="every weight was trained there"):
        best_of("best-of:whole,another", replace(run, name="third"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_pages_say_nothing_of_an_adapter(path: Path) -> None:
    cells = [cell for cell in read_notebook(path, "full").cells if "parameters" not in cell.metadata.get("tags", [])]
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert not OF_AN_ADAPTER.search(text)
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    compile(code, path.name, "exec")
    assert "run.adapter()" not in code


@pytest.mark.parametrize("name", ["02_finetune", "04_merge"])
def test_the_cells_of_such_a_page_run(name: str, results: dict) -> None:
    path = next(path for path in NOTEBOOKS if path.stem == name)
    names: dict[str, object] = {}
    for cell in read_notebook(path, "full").cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, path.name, "exec"), names)
            if "parameters" in cell.metadata.get("tags", []):
                asked = results["settings"].model_dump()
                names.update({key: asked[key] for key in asked.keys() & names.keys()})
    assert not names["result"].product.made  # type: ignore[attr-defined]
