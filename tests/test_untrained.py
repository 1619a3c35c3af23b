"""A base model goes through all stages as it is (`finetuning_type: none`): its files are compared."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from lib.errors import InputError
from lib.models import offline_base
from lib.models.base_model import base_of
from lib.models.weights import open_weights
from lib.report import compare_page, evaluate_page, finetune_page, weights_page
from lib.report.index import read_notebook, summarise
from lib.runs.files import HOME_VARIABLE, read_json
from lib.runs.machine import llama_cpp_problem
from lib.select.candidates import read_candidate
from lib.settings import Settings, check
from lib.stages.compare.changes import UNTUNED
from lib.stages.finetune.stage import finetune
from lib.stages.merge.proof import prove_merge
from lib.stages.merge.verify import check_merge
from lib.stages.merge.weights import merge_folders
from tests import tiny_run
from tests.test_conversation_run import SHARED, TINY, run_stages, thinking_rows

pytestmark = [
    pytest.mark.skipif(llama_cpp_problem() is not None, reason="llama-cpp-python does not work here"),
    pytest.mark.usefixtures("unmeasured_children", "forked_children"),
]
NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
OF_A_TRAINING = re.compile(r"fine-tuned|the adapter|LoRA|both models|was trained on", re.IGNORECASE)
"""Words that a page of such a run has no use for."""


def asked(kind: str, home: Path) -> Settings:
    values = {**SHARED, "run_name": kind, "finetuning_type": "none"}
    if kind == "answers":
        own = {
            "task": "instruction",
            "thinking": True,
            "max_seq_length": 192,
            "dataset": str(thinking_rows(home / "sums.json")),
        }
        return check({**values, **own}, "the test")
    labels = {"system_prompt": Settings().system_prompt, "max_train_rows": 80, "max_eval_rows": 40, "terms": ""}
    return check({**values, **labels}, "the test")


@pytest.fixture(scope="module", params=["labels", "answers"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict]:
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(HOME_VARIABLE, str(home))
        patch.setattr(offline_base, "BaseRecipe", lambda **changes: replace(TINY, **changes))
        settings = asked(request.param, home)
        yield {**run_stages(settings), "settings": settings}


def shown(parts: object) -> str:
    """All text of what cells show."""
    found = parts if isinstance(parts, tuple) else (parts,)
    return " ".join(re.sub(r"data:image/png[^\"]*", "", part.data) for part in found if part is not None)


def test_no_adapter_and_why(results: dict) -> None:
    run, result = results["run"], results["adapter"]
    assert sorted(path.name for path in result.product.path.iterdir()) == [
        "README.md",
        "history.jsonl",
        "training.json",
    ]
    assert run.untrained and result.total == open_weights(base_of(run).path).parameters
    assert any(stamp.startswith("nothing was trained in this run (finetuning_type: none)") for stamp in run.stamps())
    assert "`finetuning_type: none`" in shown(finetune_page.card(result))
    assert "Nothing was trained" in shown(finetune_page.learned(result))
    for name in ("memory", "advice", "curves", "chosen", "speed", "resource_use"):  # in a notebook run by hand
        assert "Nothing was trained" in shown(getattr(finetune_page, name)(result))
    with pytest.raises(InputError, match="has no adapter"):
        run.adapter()
    with pytest.raises(InputError, match="has no adapter"):
        read_candidate(run)
    assert not finetune(results["settings"], run).product.made


def test_one_model_is_scored(results: dict) -> None:
    result = results["evaluation"]
    assert list(result.scores) == ["base"] and not (result.product.path / "scores-finetuned.jsonl").exists()
    page = evaluate_page.page_of(result)
    parts = (
        "quality parts compared verdict errors error_table reading examples believed certainty speed prompts learned"
    )
    for name in parts.split():
        assert not OF_A_TRAINING.search(shown(getattr(page, name)())), name
    summary = summarise(results["run"])
    assert "base" in summary.qualities and "fine-tuned" not in summary.qualities


def test_the_labels_are_compared_with_the_floor_alone(results: dict) -> None:
    result = results["evaluation"]
    if not result.task.label_names:
        assert "difference" not in result.part and "no other to compare" in shown(
            evaluate_page.page_of(result).compared()
        )
        return
    assert all(list(pairs) == ["linear floor"] for pairs in result.comparisons.values())
    test = result.comparisons["all"]["linear floor"]
    points = {point["name"]: point["estimate"] for point in result.accuracies()}
    assert test.difference.estimate == pytest.approx(points["base"] - points["linear floor"])


def test_the_weights_that_go_on_are_the_bases(results: dict) -> None:
    run, result = results["run"], results["merged"]
    base, passed = (open_weights(folder) for folder in (base_of(run).path, result.product.path))
    assert base.tensors.keys() == passed.tensors.keys()
    for name, tensor in base.tensors.items():
        assert np.array_equal(tensor.read(), passed.tensors[name].read())
    assert result.proof.weights_copied == base.parameters and result.proof.tensors_summed == 0
    assert result.check.mean_kld == result.check.effect_kld == 0.0 and result.report.rules == []
    words = [weights_page.proved(result), weights_page.merge_reading(result.check, result.trained)]
    words += [shown(weights_page.merge_card(result)), str(weights_page.costs(result.check, result.trained))]
    words.append((result.product.path / "README.md").read_text(encoding="utf-8"))
    assert not OF_A_TRAINING.search(" ".join(words))
    tags = yaml.safe_load(words[-1].split("---\n")[1])["tags"]
    assert "lora" not in tags and "each is the base's, bit for bit" in words[0]


def test_another_number_format_is_proved_and_measured(tmp_path: Path) -> None:
    base, prompts = tmp_path / "base", [[5, 6, 7, 8], [9, 10, 11]]
    tiny_run.make_base(base)
    report = merge_folders(base, None, tmp_path / "rounded", "bfloat16")
    assert prove_merge(base, None, tmp_path / "rounded", "BF16").weights_copied == report.parameters
    check = check_merge(base, None, tmp_path / "rounded", prompts, "bfloat16")
    assert check.effect_kld == 0.0 < check.mean_kld < 0.01
    with pytest.raises(InputError, match="is F32"):
        prove_merge(base, None, base, "BF16")


def test_the_files_are_compared(results: dict) -> None:
    result = results["comparison"]
    assert [entry["type"] for entry in result.files if entry["kind"] == "gguf"] == ["F16", "Q8_0"]
    assert result.retention_note == UNTUNED and all(entry["retention"] is None for entry in result.files)
    assert result.steps[0]["name"].startswith("merged") and result.steps_note == ""
    page = compare_page.page_of(result)
    assert "kept" not in shown(page.quality()) and not OF_A_TRAINING.search(shown(page.learned()))
    lineage = read_json(result.product.path / "comparison.json")["recommendation"]
    assert not OF_A_TRAINING.search("\n".join(lineage[part] for part in ("headline", "text", "details", "rule")))


def test_a_trained_run_begins_where_this_one_was(results: dict) -> None:
    """Another finetuning_type is another adapter: everything behind it is made again."""
    run, settings = results["run"], results["settings"]
    assert run.manifest.entries()["adapter"].parameters == {"finetuning_type": "none"}
    assert not run.is_current("adapter", settings.pick("lora_r"), ("data",))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_pages_say_nothing_of_a_training(path: Path) -> None:
    """What a report executes: no cell that needs an adapter, and no text about one; links and title stay."""
    whole, reduced = read_notebook(path), read_notebook(path, "none")
    text = "\n".join(cell.source for cell in reduced.cells if cell.cell_type == "markdown")
    assert not OF_A_TRAINING.search(text)
    assert reduced.cells[0].source.startswith(whole.cells[0].source.splitlines()[0])
    links = [re.findall(r"\((\w+\.ipynb)\)", notebook.cells[1].source) for notebook in (whole, reduced)]
    assert links[0]
    assert set(links[0]) == set(links[1])
    code = "\n".join(cell.source for cell in reduced.cells if cell.cell_type == "code")
    compile(code, path.name, "exec")
    assert "run.adapter()" not in code
    for kind in ("labels", "answers"):  # Markdown about rows of one kind stands on pages of that kind alone
        cells = [cell for cell in reduced.cells if not {kind, "remove_cell"} & set(cell.metadata.get("tags", []))]
        headings = [cell.source.startswith("## ") for cell in cells]
        assert not any(a and b for a, b in itertools.pairwise(headings)), "a heading without content"
