"""One PDF of a run: what stands in it and in which order; and that Chromium prints it."""

from __future__ import annotations

from pathlib import Path

import pytest
from bs4 import BeautifulSoup, Tag
from nbformat import v4, write

from lib.errors import InputError
from lib.report import html, index, pdf
from lib.report.index import Stage, summarise
from lib.runs.run import open_run
from lib.settings import Settings
from tests.report.test_pages import COMPARISON, EVALUATION, FACTS, make
from tests.support.browser import needs_browser, sheets

FIGURE = '<figure><img alt="it falls" src="data:image/png;base64,AA=="><figcaption>{}</figcaption></figure>'
TABLE = "<table><caption>{}</caption><tbody><tr><td>1</td></tr></tbody></table>"
STAGES = [Stage("01_data", "01 · Data", "", True), Stage("02_finetune", "02 · Fine-tune", "", True)]


def shows(data: str) -> object:
    return v4.new_code_cell("page.x()", outputs=[v4.new_output("display_data", {"text/html": data})])


@pytest.fixture
def folder(home: Path) -> Path:
    """Overview and two pages, each with a figure, a table, and one of each in the evidence."""
    run, made = open_run("full"), home / "reports" / "full"
    make(run, "data", {"floor.json": {"test": {"accuracy": 0.1}}}, facts=FACTS, notes=["sample data"])
    make(run, "evaluation", {"evaluation.json": {}}, metrics=EVALUATION)
    make(run, "comparison", {"comparison.json": COMPARISON})
    made.mkdir(parents=True)
    for stage in STAGES:
        cells = [
            v4.new_markdown_cell(f"# {stage.title}\n\n> What?"),
            v4.new_markdown_cell("| Needs | [02](02_finetune.ipynb) |", metadata={"tags": ["setup"]}),
            v4.new_markdown_cell("## Proof\nSee [02](02_finetune.ipynb).", metadata={"tags": ["evidence"]}),
            shows(FIGURE.format(f"proof {stage.name}") + TABLE.format(f"rows {stage.name}")),
            v4.new_markdown_cell("## Seen"),
            shows(FIGURE.format(f"figure {stage.name}") + TABLE.format(f"table {stage.name}")),
        ]
        write(v4.new_notebook(cells=cells), made / f"{stage.name}.ipynb")
        page = html.render(made / f"{stage.name}.ipynb", summarise(run), STAGES)
        (made / f"{stage.name}.html").write_text(page, encoding="utf-8")
    index.write_run_index(made, summarise(run), STAGES)
    return made


def book(folder: Path, monkeypatch: pytest.MonkeyPatch, **given: str) -> Tag:
    """The document that is printed."""
    kept: list[str] = []

    def keep(page: Path, *options: str) -> None:
        kept.append(page.read_text(encoding="utf-8"))
        Path(options[-1].removeprefix("--print-to-pdf=")).write_bytes(b"%PDF")

    monkeypatch.setattr(pdf, "browser", lambda: "a browser")
    monkeypatch.setattr(pdf, "run_browser", keep)
    pages = [folder / f"{stage.name}.html" for stage in STAGES]
    assert pdf.write_pdf(folder, pages, summarise(open_run("full")), Settings(**given)) == folder / "report.pdf"
    return BeautifulSoup(kept[0], "html.parser").main


def test_the_title_page_has_course_author_stamps_and_the_answer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    title = book(folder, monkeypatch, course="Seminar <X>", author="A. Student").select_one(".title")
    assert title.h1.get_text() == "Seminar <X>" and "A. Student" in title.get_text()
    assert "sample data" in title.get_text() and COMPARISON["recommendation"]["headline"] in title.get_text()
    assert title.select_one("details") is None
    plain = book(folder, monkeypatch).select_one(".title")
    assert plain.h1.get_text() and "A. Student" not in plain.get_text()


def test_a_warning_stands_on_the_title_page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the box of every page: whoever reads the title alone must not miss it."""
    summary = summarise(open_run("full"))
    summary.recommendation["warning"] = "Warning: Q4_K_M keeps only 0.31."
    monkeypatch.setitem(globals(), "summarise", lambda run: summary)
    assert "keeps only 0.31" in book(folder, monkeypatch).select_one(".title .warning").get_text()


def test_chapters_stand_in_the_order_of_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = book(folder, monkeypatch)
    listed = [(link["href"], link.get_text()) for link in made.select("ol a")]
    titles = [("#chapter-0", "Run full"), ("#chapter-1", "01 · Data"), ("#chapter-2", "02 · Fine-tune")]
    assert [entry for entry in listed if entry[0].startswith("#chapter")] == titles and listed[3][0] == "#appendix"
    order = [section["id"] for section in made.select("section.chapter[id]")]
    assert order == ["chapter-0", "chapter-1", "chapter-2", "appendix"]
    assert [made.select_one(f"{href} h1").get_text() for href, _ in titles] == [title for _, title in titles]
    ids = [tag["id"] for tag in made.find_all(id=True)]
    assert len(ids) == len(set(ids)), "ids of two pages are alike"
    assert all(link["href"].startswith(("#", "http")) for link in made.select("a[href]")), "a link to a file"


@pytest.mark.parametrize("detail", ["short", "full"])
def test_every_figure_and_table_is_there_and_the_evidence_in_full_alone(
    detail: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = book(folder, monkeypatch, detail=detail)
    captions = [caption.get_text() for caption in made.select("figcaption, caption")]
    for stage in STAGES:
        assert captions.count(f"figure {stage.name}") == captions.count(f"table {stage.name}") == 1
        proof = captions.count(f"proof {stage.name}"), captions.count(f"rows {stage.name}")
        assert proof == ((1, 1) if detail == "full" else (0, 0))
    assert ("Evidence" in made.get_text()) == (detail == "full")
    for part in made.select("#appendix details"):
        assert part.has_attr("open"), "what is folded is not printed"
    assert "Needs" not in made.get_text() and "Parameters" in made.select_one("#appendix").get_text()


def test_without_a_browser_nothing_is_begun(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pdf, "BROWSERS", ("no-such-browser",))
    with pytest.raises(InputError, match="no-such-browser"):
        pdf.write_pdf(folder, [], summarise(open_run("full")), Settings())
    assert not (folder / pdf.PDF).exists()


@needs_browser
def test_chromium_prints_it_with_an_outline(folder: Path) -> None:
    pages = [folder / f"{stage.name}.html" for stage in STAGES]
    made = pdf.write_pdf(folder, pages, summarise(open_run("full")), Settings(author="A. Student"))
    assert sheets(made) >= 6, "title, contents, three chapters, appendix"
    assert b"/Outlines" in made.read_bytes()
