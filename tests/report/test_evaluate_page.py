"""Page 03 of rows with labels, from an evaluation that was really made; answers: tests/test_conversation_run."""

from __future__ import annotations

import re

import pytest

from lib.report.evaluate_page import AccuracyPage, page_of
from lib.runs.run import Run
from lib.settings import Settings
from lib.stages.evaluate.results import FINETUNED
from lib.stages.evaluate.stage import evaluate
from tests.scoring.conftest import small  # noqa: F401
from tests.stages.evaluate.conftest import run  # noqa: F401

pytestmark = pytest.mark.usefixtures("unmeasured_children", "forked_children")


def test_every_part_of_the_page_has_the_numbers_of_the_result(run: Run) -> None:  # noqa: F811
    result = evaluate(Settings(dtype="float32", per_device_eval_batch_size=8), run)
    page = page_of(result)
    assert isinstance(page, AccuracyPage) and page.part == "leak_free"
    assert "<img" in page.quality().data and "<img" in page.errors().data and "<img" in page.certainty().data
    assert page.parts().data.count("<tr>") == 1 + 3 * len(result.floor)
    assert page.compared().data.count("<tr>") == 1 + 4
    said = {"better": "better** than", "worse": "worse** than", "cannot tell": "not clearly different** from"}
    for other, named in (("base", "its base"), ("linear floor", "the linear floor")):
        assert f"**{said[result.comparisons['leak_free'][other].verdict]} {named}" in page.verdict().data
    assert page.error_table().data.count("<tr>") == 1 + 4
    recall = min(scores.recall for scores in result.models[FINETUNED].reports["all"].classes)
    assert f"{100 * recall:.1f} %" in page.reading().data
    assert len(re.findall("test-0", page.examples().data)) == len(result.models[FINETUNED].mistakes)
    assert f"fine-tuned {result.models[FINETUNED].calibration.ece:.3f}" in page.believed().data
    assert "40 rows" in page.speed().data and "nothing is written" in page.prompts().data
    told = page.learned().data.split("\n- ")
    shown = result.models[FINETUNED].mistakes
    assert len(told) == 5 and f"{100 * recall:.1f} %" in told[2] and f"{len(shown)} most confident" in told[3]


def test_rows_that_all_are_free_of_leaks_are_told_once(run: Run) -> None:  # noqa: F811
    result = evaluate(Settings(dtype="float32", per_device_eval_batch_size=8), run)
    result.floor["leak_free"] = result.floor["all"]
    page = page_of(result)
    parts = [part for part in result.floor if part != "leak_free"]
    assert page.part == "all" and page.parts().data.count("<tr>") == 1 + 3 * len(parts)
    assert page.compared().data.count("<tr>") == 1 + 2
    assert page.verdict().data.startswith("On 40 rows the") and "- On 40 rows:" in page.learned().data
