"""A report in which nothing has changed starts no kernel; whatever a page depends on brings its notebook back."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lib.report import execute, unchanged
from lib.runs.run import Run, open_run
from tests.report.test_runner import GOOD, STAGE, report
from tests.support.pages import broken_links

pytestmark = pytest.mark.usefixtures("unmeasured_children", "forked_children")

Writer = Callable[..., Path]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The notebooks that were executed."""
    started: list[str] = []
    original = execute.execute

    def counted(notebook: Path, *arguments: Any) -> execute.Ended:
        started.append(notebook.stem)
        return original(notebook, *arguments)

    monkeypatch.setattr(execute, "execute", counted)
    return started


def test_only_what_changed_is_executed(home: Path, params: Path, write_notebook: Writer, kernels: list[str]) -> None:
    write_notebook("01_first", STAGE)
    write_notebook("02_second", GOOD)
    first, _ = report(params, home)
    assert kernels == ["01_first", "02_second"]
    before = {page: page.stat().st_mtime_ns for page in first.pages}

    again, lines = report(params, home)
    assert kernels[2:] == [] and again.pages == first.pages
    assert before == {page: page.stat().st_mtime_ns for page in again.pages}
    assert lines == [
        f"[{number}/2] {name}: unchanged, no kernel started (--rerun starts it)"
        for number, name in ((1, "01_first"), (2, "02_second"))
    ]
    assert "being made" not in again.index.read_text(encoding="utf-8") and not broken_links(again.folder)

    write_notebook("02_second", GOOD, "'one more cell'")
    report(params, home)
    assert kernels[2:] == ["02_second"]
    (home / "reports/test/01_first.html").unlink()
    made, _ = report(params, home)
    assert kernels[3:] == ["01_first", "02_second"], "behind a page that is made anew all are"
    assert '<a href="02_second.html">next</a>' in made.pages[0].read_text(encoding="utf-8")
    report(params, home, rerun=True)
    assert kernels[5:] == ["01_first", "02_second"]
    assert '<a href="02_second.html">next</a>' in made.pages[0].read_text(encoding="utf-8")
    assert report(params, home, end_at="01")[0].pages == (home / "reports/test/01_first.html",)
    assert kernels[7:] == []


@pytest.fixture
def made(home: Path) -> tuple[Path, Path, dict[str, Any], Run]:
    """A page of 02 with its record: page, notebook, parameters, run."""
    page, notebook, run = home / "02_page.html", home / "02_page.ipynb.source", open_run("test")
    for path in (page, page.with_suffix(".ipynb"), notebook, home / "rows.csv"):
        path.write_text("{}", encoding="utf-8")
    for name in ("data", "adapter", "evaluation"):
        run.produce(name, lambda work: (work.folder / "file").write_text("1"), {})
    parameters = {"seed": 1, "force": False, "dataset": str(home / "rows.csv"), "adapter": "best-of:other"}
    unchanged.remember_page(page, notebook, parameters, run)
    return page, notebook, parameters, run


def make_again(run: Run, product: str) -> None:
    run.produce(product, lambda work: (work.folder / "file").write_text("2"), {}, force=True)


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def phone_result(run: Run) -> None:
    (run.folder / "devices").mkdir()
    (run.folder / "devices" / "phone.json").write_text("{}")


def other_run(run: Run) -> None:
    (run.folder.parent / "other").mkdir()
    (run.folder.parent / "other" / "manifest.json").write_text("{}")


CHANGES: dict[str, Callable[[Path, Path, dict[str, Any], Run], Any]] = {
    "notebook": lambda page, notebook, parameters, run: notebook.write_text("{ }"),
    "a parameter": lambda page, notebook, parameters, run: parameters.update(seed=2),
    "force": lambda page, notebook, parameters, run: parameters.update(force=True),
    "its product": lambda page, notebook, parameters, run: make_again(run, "adapter"),
    "an earlier product": lambda page, notebook, parameters, run: make_again(run, "data"),
    "a file of a product": lambda page, notebook, parameters, run: touch(run.folder / "data" / "file"),
    "a product is gone": lambda page, notebook, parameters, run: run.manifest.remove("test", "data"),
    "no page": lambda page, notebook, parameters, run: page.unlink(),
    "no executed notebook": lambda page, notebook, parameters, run: page.with_suffix(".ipynb").unlink(),
    "another executed notebook": lambda page, notebook, parameters, run: page.with_suffix(".ipynb").write_text("[]"),
    "no record": lambda page, notebook, parameters, run: unchanged.record_of(page).unlink(),
    "a damaged record": lambda page, notebook, parameters, run: unchanged.record_of(page).write_text("{"),
    "the data set": lambda page, notebook, parameters, run: touch(Path(parameters["dataset"])),
    "a run to choose from": lambda page, notebook, parameters, run: other_run(run),
    "what a phone measured": lambda page, notebook, parameters, run: phone_result(run),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_brings_a_notebook_back(made: tuple[Path, Path, dict[str, Any], Run], change: str) -> None:
    assert unchanged.unchanged_page(*made)
    CHANGES[change](*made)
    assert not unchanged.unchanged_page(*made)


def test_a_later_product_and_the_library(made: tuple[Path, Path, dict[str, Any], Run], monkeypatch) -> None:
    make_again(made[3], "evaluation")
    assert unchanged.unchanged_page(*made), "03 is no matter of page 02"
    assert json.loads(unchanged.record_of(made[0]).read_text())["products"].keys() == {"data", "adapter"}
    monkeypatch.setattr(unchanged, "library", lambda: "another")
    assert not unchanged.unchanged_page(*made)
