"""The order of a page's sections, what folds, and what is left out."""

from __future__ import annotations

from typing import Any

import pytest
from nbformat import NotebookNode, v4

from lib.report import display
from lib.report.sections import sections


def words(source: str, *tags: str) -> NotebookNode:
    return v4.new_markdown_cell(source, metadata={"tags": list(tags)})


def code(shown: str | None = "A number.", *tags: str, metadata: dict[str, Any] | None = None) -> NotebookNode:
    """A cell that shows a paragraph; None: nothing at all."""
    output = v4.new_output("display_data", {"text/markdown": shown or ""}, metadata=metadata or {})
    return v4.new_code_cell("page.x()", outputs=[] if shown is None else [output], metadata={"tags": list(tags)})


PAGE = [
    words("# Title\n\n> What?"),
    words("| Needs | data |", "setup"),
    code("made", "setup"),
    code(None, "parameters", "setup"),
    code("stamps", "remove_cell"),
    words("## Proof\nWhy.", "evidence"),
    code("proof"),
    words("### In detail"),
    code("detail"),
    words("## First"),
    code("first"),
    code("the answer", "answer"),
    words("Next: [02](02.ipynb)", "setup"),
]


def shown(cells: list[NotebookNode], labelled: bool = True) -> list[tuple[str, str, list[str]]]:
    """(heading, tag, what its cells say)."""

    def said(cell: NotebookNode) -> str:
        if cell.cell_type == "markdown":
            return cell.source
        return "; ".join(output.data["text/markdown"] for output in cell.outputs)

    return [(found.title, found.tag, list(map(said, found.cells))) for found in sections(cells, labelled)]


def test_answer_then_what_all_read_then_evidence_then_setup() -> None:
    assert shown(PAGE) == [
        ("", "", ["# Title\n\n> What?", "the answer"]),
        ("First", "", ["## First", "first"]),
        ("Proof", "evidence", ["## Proof\nWhy.", "proof", "### In detail", "detail"]),
        ("", "setup", ["| Needs | data |", "made", "Next: [02](02.ipynb)"]),
    ]


def test_evidence_keeps_the_order_of_the_notebook() -> None:
    cells = [words("# T"), *(cell for name in "bac" for cell in (words(f"## {name}", "evidence"), code(name)))]
    assert [title for title, *_ in shown(cells)[1:]] == ["b", "a", "c"]


@pytest.mark.parametrize("labelled", [True, False])
def test_words_about_the_other_kind_of_rows_are_left_out(labelled: bool) -> None:
    cells = [words("# T"), words("## Accuracy", "labels"), words("## Perplexity", "answers"), code("0.5")]
    title = "Accuracy" if labelled else "Perplexity"
    assert shown(cells, labelled)[1:] == [(title, "", [f"## {title}", "0.5"])]


ABSENT = {"text/markdown": {display.ABSENT: True}}


@pytest.mark.parametrize("empty", [code(None), code(""), code("There is none.", metadata=ABSENT)])
def test_a_section_that_shows_nothing_vanishes_with_its_words(empty: NotebookNode) -> None:
    cells = [words("# T"), words("## Empty\nIt says"), empty, words("More."), words("## Full"), code("1")]
    assert [title for title, *_ in shown(cells)] == ["", "Full"]
    told = shown([*cells[:3], code("something"), *cells[3:]])
    assert [title for title, *_ in told] == ["", "Empty", "Full"], "one cell that shows something keeps the others"


def test_what_is_absent_is_marked_so_by_display() -> None:
    made = display.absent("written.nothing")
    output = v4.new_output("display_data", {"text/markdown": made.data}, metadata={"text/markdown": made.metadata})
    assert made.metadata[display.ABSENT] and made.data
    assert [title for title, *_ in shown([words("# T"), words("## A"), v4.new_code_cell("x", outputs=[output])])] == [
        ""
    ]


def test_a_subheading_vanishes_alone_and_keeps_the_section_it_stands_in() -> None:
    cells = [words("# T"), words("## Whole"), code("1"), words("### Part"), code(None), words("### Other"), code("2")]
    assert shown(cells)[1:] == [("Whole", "", ["## Whole", "1", "### Other", "2"])]
    cells[2] = code(None)
    assert shown(cells)[1][2][0] == "## Whole" and shown(cells)[1][2][-1] == "2", "a part that shows something is left"


def test_a_section_of_words_alone_stays() -> None:
    assert shown([words("# T"), words("## Why\nBecause.")])[1:] == [("Why", "", ["## Why\nBecause."])]


def test_a_comment_of_code_in_words_is_no_heading() -> None:
    source = "Run it:\n\n```\n# a comment\n```"
    assert shown([words("# T"), words("## A"), words(source), code("1")])[1] == ("A", "", ["## A", source, "1"])
