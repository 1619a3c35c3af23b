"""The order of a page: what everybody reads, then the evidence, then how the page was made.

Tags of a notebook's cells say where they stand on its page:

    answer         behind the title: what the page is opened for
    evidence       on a heading: its section stands behind all others, folded
    setup          needs, parameters, the stage itself: at the end, folded
    labels         Markdown about rows with labels, left out of runs without
    answers        Markdown about conversations, left out of runs with labels
    parameters     left out: papermill's own values stand below it
    remove_cell    left out: what the head of every page says, too

A section whose cells show nothing is left out with its heading and its words; so is a cell that shows nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lib.report.display import ABSENT

if TYPE_CHECKING:
    from nbformat import NotebookNode

_HEADING = re.compile(r"^(#{1,3}) +(.+)$", re.M)


@dataclass
class Section:
    """Cells below one heading of the page.

    Attributes:
        level: of the heading; 1 for the title of the page, 2 and 3 below it.
        tag: "evidence", "setup", or "" for what everybody reads.
    """

    level: int
    title: str
    tag: str = ""
    cells: list[NotebookNode] = field(default_factory=list)

    @property
    def shows(self) -> bool:
        """Whether anything but words stands in it: words that introduce nothing are not needed."""
        code = [cell for cell in self.cells if cell.cell_type == "code"]
        return not code or any(map(_shown, code))


def _shown(cell: NotebookNode) -> bool:
    """Whether a code cell left anything to see."""
    return any(map(_holds, cell.outputs))


def _holds(output: NotebookNode) -> bool:
    if "data" not in output:
        return True
    words = output.data.get("text/markdown", "words")
    return bool(words.strip()) and not output.metadata.get("text/markdown", {}).get(ABSENT)


def _tags(cell: NotebookNode) -> Sequence[str]:
    return cell.metadata.get("tags", ())


def sections(cells: Iterable[NotebookNode], labelled: bool) -> list[Section]:
    """The page's sections in their order on it, those without content left out.

    Args:
        cells: of the executed notebook. labelled: whether the rows of the run have labels.
    """
    left_out = {"parameters", "remove_cell", "answers" if labelled else "labels"}
    setup, found, answer = Section(2, "", "setup"), [Section(1, "")], []
    for cell in cells:
        tags = set(_tags(cell))
        if tags & left_out:
            continue
        if "setup" in tags or "injected-parameters" in tags or not (found[0].cells or cell.cell_type == "markdown"):
            setup.cells.append(cell)
            continue
        if "answer" in tags:
            answer.append(cell)
            continue
        heading = _HEADING.match(cell.source) if cell.cell_type == "markdown" else None
        if heading and (found[0].cells or found[1:]):
            level = len(heading[1])
            # a subheading belongs to the section that it stands in
            tag = found[-1].tag if level == 3 else "evidence" if "evidence" in tags else ""
            found.append(Section(level, heading[2].strip(), tag))
        found[-1].cells.append(cell)
    found[0].cells += answer
    kept = _with_content(found)
    kept.sort(key=lambda section: section.tag == "evidence")  # stable
    return [*kept, setup] if setup.cells else kept


def _with_content(found: Sequence[Section]) -> list[Section]:
    """Those with content; sections of level 3 become part of the one that they stand in."""
    kept: list[Section] = []
    below: list[NotebookNode] = []
    for section in reversed(found):
        if section.level == 3:
            below = [*section.cells, *below] if section.shows else below
        elif below or section.shows:
            section.cells = [cell for cell in section.cells + below if cell.cell_type != "code" or _shown(cell)]
            kept, below = [section, *kept], []
    return kept
