"""The page checks find every fault they name, and none in a good page."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib.report.html import problems_in
from tests.support.pages import broken_links, problems

GOOD = (
    '<!DOCTYPE html><html lang="en"><head><title>t</title><style>p { color: #111; }</style></head><body><p>{}</p>'
    '<img src="data:image/png;base64,AA==" alt="a line that falls"><a href="https://example.org/">elsewhere</a>'
    '<pre>{{ chat_template }}</pre><svg aria-label="a curve"><path d="M0 0"/></svg>'
    "<table><tr><td>Traceback (most recent call last) of a row</td></tr></table>"
    "<details><pre>Traceback (most recent call last) in a comment of folded code</pre></details></body></html>"
)

FAULTS = {
    "text on stderr": '<div data-mime-type="application/vnd.jupyter.stderr"><pre>careful</pre></div>',
    "an error output": '<div data-mime-type="application/vnd.jupyter.error"><pre>E</pre></div>',
    "a figure without description": '<img src="data:image/png;base64,AA==" alt=" ">',
    "a network dependency": '<img alt="a" src="https://example.org/a.png">',
    "a script": "<script>fetch('/')</script>",
    "a dependency on the file 'plot.png'": '<img alt="a" src="plot.png">',
    "an unresolved template": "<p>accuracy {{ value }}</p>",
    "live markup": '<a href="javascript:alert(1)">x</a>',
    "a bare object": "<pre data-mime-type='text/plain'>&lt;lib.runs.run.Product object at 0x7f12&gt;</pre>",
}


def test_a_good_page_has_no_problem() -> None:
    assert problems_in(GOOD) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_found(fault: str) -> None:
    assert problems_in(GOOD.replace("<p>{}</p>", FAULTS[fault])) == [fault]


@pytest.mark.parametrize(
    "resource",
    [
        '<link rel="stylesheet" href="//cdn.example.org/a.css">',
        '<style>@import "a.css";</style>',
        '<div style="background: url(https://example.org/a.png)"></div>',
        '<iframe src="https://example.org/"></iframe>',
    ],
)
def test_every_kind_of_network_dependency_is_found(resource: str) -> None:
    assert "a network dependency" in problems_in(GOOD.replace("<p>{}</p>", resource))


def test_svg_needs_a_name() -> None:
    assert problems_in(GOOD.replace(' aria-label="a curve"', "")) == ["a figure without description"]
    named = GOOD.replace(' aria-label="a curve"', "").replace("<path", "<title>a curve</title><path")
    assert problems_in(named) == []


def test_language_and_title_are_required() -> None:
    assert problems_in("<html><body>x</body></html>") == ["no language", "no title"]


def test_problems_name_the_page_and_links_must_lead_somewhere(tmp_path: Path) -> None:
    page = tmp_path / "01_first.html"
    page.write_text(GOOD.replace("<p>{}</p>", '<a href="02_second.html#top">next</a><a href="#content">up</a>'))
    assert problems(page) == []
    assert broken_links(tmp_path) == ["01_first.html links to 02_second.html#top, which is not there"]
    (tmp_path / "02_second.html").write_text(GOOD.replace(' alt="a line that falls"', ""))
    assert broken_links(tmp_path) == []
    assert problems(tmp_path / "02_second.html") == ["02_second.html contains a figure without description"]
