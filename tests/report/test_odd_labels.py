"""Every part and figure of the pages that know labels (01, 03); labels are mathematics, markup, long, pictures."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat import v4

from lib.report import data_page, evaluate_page
from lib.report.html import problems_in, render
from lib.report.index import summarise
from lib.runs.run import Run, open_run
from lib.settings import Settings
from lib.stages.data.stage import prepare
from lib.stages.evaluate.stage import evaluate
from tests.scoring.conftest import Tiny
from tests.scoring.conftest import small as whole  # noqa: F401
from tests.stages.data.test_stage import reviews, settings, write
from tests.stages.evaluate.conftest import run  # noqa: F401

pytestmark = pytest.mark.usefixtures("unmeasured_children", "forked_children")
LABELS = (
    ("$5-$10", "<b onmouseover=alert(1)>x</b>"),
    ("negative feelings about the stay in this hotel", "🙂 _y_ | **z** [a](javascript:b)"),
)


@pytest.fixture(params=LABELS, ids=["markup", "long"])
def small(whole: Tiny, request: pytest.FixtureRequest) -> Tiny:  # noqa: F811
    """The tiny model, asked for odd answers; what `run` is made with."""
    return whole._replace(task=replace(whole.task, label_names=request.param))


def parts(page: Any) -> list[Any]:
    """What all methods of a page give that need nothing."""
    found = []
    for name, method in inspect.getmembers(page, inspect.ismethod):
        if not name.startswith("_") and not inspect.signature(method).parameters:
            given = method()
            found += given if isinstance(given, (list, tuple)) else [given]
    return [part for part in found if hasattr(part, "data")]


def shown(parts: Sequence[Any], name: str, home: Path) -> str:
    """A published page of these parts."""
    kinds = {"HTML": "text/html", "Markdown": "text/markdown"}
    outputs = [v4.new_output("display_data", {kinds[type(part).__name__]: part.data}) for part in parts]
    cells = [v4.new_markdown_cell("# Title"), v4.new_code_cell("# a cell", outputs=outputs)]
    nbformat.write(v4.new_notebook(cells=cells, metadata={"papermill": {}}), home / f"{name}.ipynb")
    return render(home / f"{name}.ipynb", summarise(open_run("x")), [])


def check(html: str, labels: Sequence[str]) -> None:
    assert problems_in(html) == []
    text = " ".join(BeautifulSoup(html, "html.parser").select_one("main").get_text().split())
    assert all(label in text for label in labels)


@pytest.fixture(autouse=True)
def strict() -> Any:
    """A warning of matplotlib is a fault, but for a picture that no font has."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="Glyph")
        yield


def test_the_page_of_an_evaluation(run: Run, small: Tiny, home: Path) -> None:  # noqa: F811
    page = evaluate_page.page_of(evaluate(Settings(dtype="float32", per_device_eval_batch_size=8), run))
    made = parts(page)
    assert sum("<img" in part.data for part in made) == 4 and len(made) >= 13
    check(shown(made, "03_evaluate", home), small.task.label_names)
    for told in (page.reading(), page.prompts()):
        html = shown([told], "03_evaluate", home)
        assert any(label in BeautifulSoup(html, "html.parser").get_text() for label in small.task.label_names)
        assert "<strong>z" not in html and "<em>y" not in html


@pytest.mark.parametrize("labels", LABELS)
def test_the_page_of_the_data(labels: tuple[str, ...], home: Path) -> None:
    asked = settings(write(home / "a $x$ | <b>.jsonl", reviews(120)), label_names=list(labels), max_seq_length=400)
    result = prepare(asked, open_run("t"))
    made = parts(data_page.page_of(result))
    assert sum("<img" in part.data for part in made) >= 3
    html = shown(made, "01_data", home)
    check(html, labels)
    digest = result.product.entry.facts["prompt_hash"]
    assert digest not in html and f"{digest[:12]}…" in html  # 64 characters would leave their column
