"""One PDF of a whole run, to hand in: title, contents, overview, pages, and how they were made; Chromium prints it."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bs4 import BeautifulSoup, Tag

from lib.errors import refusal
from lib.report.index import Summary, fill, stylesheet
from lib.runs.files import atomic_path, write_text
from lib.settings import Settings

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PDF = "report.pdf"
"""In the folder of a report."""
_SECONDS = 300


def browser() -> str:
    """The first browser found that prints.

    Raises:
        InputError: none is installed.
    """
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise refusal("report/no-browser", names=", ".join(BROWSERS))
    return found


def run_browser(page: Path, *options: str) -> None:
    """Open a page of this machine in a headless browser with a profile of its own.

    Raises:
        InputError: no browser, or one that failed.
    """
    with tempfile.TemporaryDirectory() as profile:
        command = [browser(), "--headless", "--disable-gpu", "--no-sandbox", "--hide-scrollbars"]
        command += [f"--user-data-dir={profile}", *options, page.resolve().as_uri()]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS)
        except subprocess.SubprocessError as error:
            raise refusal("report/browser-failed", browser=command[0], error=error) from error


def print_page(page: Path, output: Path) -> None:
    """One page as it prints."""
    run_browser(page, "--no-pdf-header-footer", f"--print-to-pdf={output.resolve()}")


def write_pdf(folder: Path, pages: Sequence[Path], summary: Summary, settings: Settings) -> Path:
    """The whole report as one PDF.

    Args:
        folder: reports/<run>/, with index.html. pages: of the notebooks, in order.
        settings: author, course and detail; with detail "full" the evidence of every page stands in the appendix.

    Raises:
        InputError: no browser that prints.
    """
    browser()
    chapters, evidence = [], []
    overview = _parsed(folder / "index.html")
    notes = overview.select_one("footer details")
    notes.summary.decompose()
    for number, path in enumerate([folder / "index.html", *pages]):
        content = _parsed(path).select_one("main")
        for setup in content.select("details.setup, details.code, nav"):
            setup.decompose()
        title = content.select_one("h1").get_text()
        folded = [found.extract() for found in content.select("details.evidence")]
        if heading := content.select_one("#evidence"):
            heading.parent.decompose()
        _own_ids(content, f"c{number}")
        chapters.append({"id": f"chapter-{number}", "title": title, "html": content.decode_contents()})
        if folded and settings.detail == "full":
            for found in folded:
                found["open"] = ""
                _own_ids(found, f"e{number}")
            evidence.append({"id": f"evidence-{number}", "title": title, "html": "".join(map(str, folded))})
    values = {"chapters": chapters, "evidence": evidence, "notes": notes.decode_contents(), "settings": settings}
    output = folder / PDF
    with tempfile.TemporaryDirectory() as work, atomic_path(output) as part:
        book = Path(work) / "report.html"
        write_text(book, fill("book.html.j2", css=stylesheet(), run=summary, **values))
        run_browser(
            book, "--no-pdf-header-footer", "--generate-pdf-document-outline", f"--print-to-pdf={part.resolve()}"
        )
    return output


def _parsed(page: Path) -> BeautifulSoup:
    return BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")


def _own_ids(content: Tag, prefix: str) -> None:
    """Ids that are those of no other chapter; links to other pages become text."""
    for tag in content.find_all(id=True):
        tag["id"] = f"{prefix}-{tag['id']}"
    for tag in content.find_all(True):
        for key, value in tag.attrs.items():
            if isinstance(value, str) and (value.startswith("#") or "url(#" in value):
                tag[key] = value.replace("url(#", f"url(#{prefix}-") if "url(#" in value else f"#{prefix}-{value[1:]}"
    for link in content.select("a[href]"):
        if not link["href"].startswith(("#", "http")):
            link.unwrap()
