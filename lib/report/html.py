"""An executed notebook as one self-contained page: no script, no request to any network, readable on a phone.
What must not be on a published page; used by the report runner before publishing and by the tests.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.errors import InputError
from lib.report.summary import Summary, commit_words
from lib.runs import manifest
from lib.runs.manifest import NOTEBOOK_OF

if TYPE_CHECKING:
    from jinja2 import Environment
    from nbformat import NotebookNode


# An executed notebook as one self-contained page: no script, no request to any network, readable on a phone.

TEMPLATES = Path(__file__).parent / "templates"

_TITLE = re.compile(r"^# +(.+)$", re.M)
_QUESTION = re.compile(r"^> *(.+)$", re.M)
_STAGE_LINK = re.compile(r'<a href="(?P<path>[^":#]+)(?P<anchor>#[^"]*)?"[^>]*>(?P<text>.*?)</a>', re.S)
_TABLE = re.compile(r"<table\b.*?</table>", re.S)


@dataclass(frozen=True)
class Stage:
    """A notebook of the report: file stem, heading, its one-sentence question, whether its page exists."""

    name: str
    title: str
    question: str
    exists: bool


def read_stage(notebook: Path, exists: bool = False) -> Stage:
    """Title and question from the notebook's first Markdown cell.

    Raises:
        InputError: the file is no notebook.
    """
    import nbformat

    try:
        content = nbformat.read(notebook, as_version=4)
    except (nbformat.reader.NotJSONError, nbformat.ValidationError, AttributeError, KeyError):
        raise InputError(f"{notebook} is damaged.", "a Jupyter notebook.", f"git checkout {notebook.name}.") from None
    first = next((c.source for c in content.cells if c.cell_type == "markdown"), "")
    title, question = _TITLE.search(first), _QUESTION.search(first)
    clean = re.compile(r"[*`]")
    return Stage(
        notebook.stem,
        clean.sub("", title[1]) if title else notebook.stem,
        clean.sub("", question[1]) if question else "",
        exists,
    )


@functools.cache
def pages() -> Environment:
    """The templates of page heads, feet and indexes (escaping on)."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES / "pages"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.tests["quantity"] = lambda text: bool(re.fullmatch(r"[-+−]?[\d.,]+( \[[\d.]+, [\d.]+\])?|–", str(text)))
    return environment


@functools.cache
def stylesheet() -> str:
    """The style of every page, code colours included."""
    from pygments.formatters import HtmlFormatter

    colours = HtmlFormatter(style="default").get_style_defs(".highlight")
    return (TEMPLATES / "workbook.css").read_text(encoding="utf-8") + colours


def shown(value: Any) -> str:
    """A parameter's value as text."""
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value)
    return str(value)


def code_caption(source: str) -> str:
    """What the folded code says of itself: its first comment, or 'Code'."""
    first = source.strip().splitlines()[0] if source.strip() else ""
    return f"Code: {first.lstrip('# ').strip()}" if first.startswith("# ") else "Code"


def duration(seconds: float) -> str:
    """Seconds in words."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def card(summary: Summary) -> list[tuple[str, str]]:
    """The line under the navigation: run, date, model, data, commit."""
    return [
        ("Run", summary.name),
        ("Date", summary.date),
        ("Model", summary.model),
        ("Data", summary.data),
        ("Commit", summary.commit),
    ]


def _papermill(notebook: NotebookNode) -> tuple[str, float]:
    """When the notebook was executed (local time of the metadata) and for how many seconds."""
    meta = notebook.metadata.get("papermill", {})
    return str(meta.get("end_time", ""))[:16].replace("T", " "), float(meta.get("duration") or 0.0)


def _bottom(notebook: NotebookNode, name: str, summary: Summary) -> str:
    date, seconds = _papermill(notebook)
    products = summary.products(name)
    given = notebook.metadata.get("papermill", {}).get("parameters", {})
    versions = next((e.versions for e in reversed(list(products.values()))), manifest.versions())
    return (
        pages()
        .get_template("bottom.html.j2")
        .render(
            current=name,
            date=f"{date} UTC" if date else "an unknown date",
            seconds=duration(seconds),
            parameters=[(k, shown(v)) for k, v in (given or summary.parameters(name)).items()],
            products=[
                {
                    "name": product,
                    "cost": f"{duration(entry.seconds)}, {entry.peak_memory_mib:.0f} MiB at most, {entry.device}, "
                    f"commit {commit_words(entry.git)}",
                    "files": [(f, f"{o['bytes']:,} · {o['sha256'][:16]}") for f, o in entry.outputs.items()],
                }
                for product, entry in products.items()
            ],
            versions=list(versions.items()),
        )
    )


def _prepare(notebook: NotebookNode, labelled: bool) -> NotebookNode:
    """Drop cells for rows of the other kind, and the parameters cell that papermill overrode: not true for this run."""
    other = "answers" if labelled else "labels"
    notebook.cells = [cell for cell in notebook.cells if other not in cell.metadata.get("tags", [])]
    tags = [set(cell.metadata.get("tags", [])) for cell in notebook.cells]
    if any("injected-parameters" in t for t in tags):
        notebook.cells = [c for c, t in zip(notebook.cells, tags, strict=True) if "parameters" not in t]
    return notebook


def _link(match: re.Match[str], there: set[str]) -> str:
    """A link to another notebook becomes one to its page, to the README one to the overview; to other files, text."""
    stem = Path(match["path"]).stem
    if stem == "README":
        return '<a href="index.html">Overview</a>'
    if match["path"].endswith(".ipynb") and stem in there:
        return f'<a href="{stem}.html{match["anchor"] or ""}">{match["text"]}</a>'
    return match["text"]


def _answered(body: str, answer: str) -> str:
    """The page's body with the answer directly under its title, before the evidence."""
    before, title, after = body.partition("</h1>")
    block = pages().get_template("answer.html.j2").render(text=answer)
    return f"{before}{title}\n{block}{after}" if title else block + body


def render(executed: Path, summary: Summary, stages: list[Stage]) -> str:
    """The page of one executed notebook; that of the comparison opens with its answer.

    Args:
        executed: papermill's output, named like the stage.
        stages: all stages of the report in order; those that exist are linked.
    """
    import nbformat
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    name = executed.stem
    labelled = summary.facts.get("task", "classification") == "classification"
    notebook = _prepare(nbformat.read(executed, as_version=4), labelled)
    title = next((s.title for s in stages if s.name == name), name)
    top = (
        pages()
        .get_template("top.html.j2")
        .render(stages=stages, current=name, card=card(summary), stamps=summary.stamps)
    )
    config = Config()
    config.TagRemovePreprocessor.enabled = True
    config.TagRemovePreprocessor.remove_input_tags = ("remove_input",)
    config.TagRemovePreprocessor.remove_cell_tags = ("remove_cell",)
    exporter = HTMLExporter(
        config=config,
        template_name="workbook",
        extra_template_basedirs=[str(TEMPLATES)],
        language_code="en",
        exclude_anchor_links=True,
        embed_images=True,
    )
    exporter.register_filter("code_caption", code_caption)
    resources = {
        "workbook": {
            "title": f"{title} – run {summary.name}",
            "css": stylesheet(),
            "top": top,
            "bottom": _bottom(notebook, name, summary),
        }
    }
    html, _ = exporter.from_notebook_node(notebook, resources=resources)
    head, separator, rest = html.partition('<main id="content">')
    body, end, foot = rest.partition("</main>")
    there = {s.name for s in stages if s.exists}
    body = _STAGE_LINK.sub(lambda m: _link(m, there), body)
    if name == NOTEBOOK_OF["comparison"] and summary.recommendation:
        body = _answered(body, summary.recommendation)
    body = _TABLE.sub(lambda m: f'<div class="scroll" tabindex="0" role="region" aria-label="table">{m[0]}</div>', body)
    return head + separator + body + end + foot


# What must not be on a published page; used by the report runner before publishing and by the tests.

_TEXT = {
    "a traceback": re.compile(r"Traceback \(most recent call last\)"),
    "a missing glyph": re.compile(r"missing from (?:current )?font|\bGlyph \d+"),
    "a bare figure object": re.compile(r"<Figure size \d+"),
    "a bare object": re.compile(r"<[\w.]+ object at 0x[0-9a-f]+>|<bound method|<function \w+ at 0x"),
}
_TEMPLATE = re.compile(r"\{\{.*?\}\}|\{%.*?%\}", re.S)
_CSS_URL = re.compile(r"@import|url\(\s*['\"]?(?!data:|#)", re.I)
_NETWORK = re.compile(r"^\s*(?:https?:)?//", re.I)
_NO_ALT = "No description has been provided for this image"
_VERBATIM = {"pre", "code", "td", "mark", "script", "style"}
_VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
_SOURCES = {"src", "srcset", "data", "poster"}


class _Page(HTMLParser):
    """Collects problems while the page is parsed."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[str] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.lang = self.titled = False
        self.svg_named: bool | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        if tag not in _VOID:
            self.open.append(tag)
        if tag == "html":
            self.lang = bool(values.get("lang"))
        mime = values.get("data-mime-type", "")
        if mime.endswith(".stderr"):
            self.found.append("text on stderr")
        if mime.endswith(".error"):
            self.found.append("an error output")
        self._resource(tag, values)
        if tag == "img" and (not values.get("alt", "").strip() or _NO_ALT in values["alt"]):
            self.found.append("a figure without description")
        if tag == "svg":
            self.svg_named = bool(values.get("aria-label")) or values.get("aria-hidden") == "true"
        if tag == "title" and "svg" in self.open:
            self.svg_named = True

    def _resource(self, tag: str, values: dict[str, str]) -> None:
        for key in _SOURCES & values.keys():
            if _NETWORK.match(values[key]):
                self.found.append("a network dependency")
            elif not values[key].startswith("data:"):
                self.found.append(f"a dependency on the file {values[key][:80]!r}")
        if tag == "link" and values.get("href") and not values["href"].startswith("data:"):
            self.found.append("a network dependency" if _NETWORK.match(values["href"]) else "a dependency on a file")
        if tag == "script" and values.get("type", "text/javascript") not in ("application/json",):
            self.found.append("a script")
        if _CSS_URL.search(values.get("style", "")):
            self.found.append("a network dependency")

    def handle_endtag(self, tag: str) -> None:
        if tag == "svg" and self.svg_named is False:
            self.found.append("a figure without description")
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            if _CSS_URL.search(data):
                self.found.append("a network dependency")
            return
        if "title" in self.open and "svg" not in self.open and data.strip():
            self.titled = True
        if "details" in self.open and "pre" in self.open:
            return  # folded code may speak of anything
        self.text.append(data)
        if not _VERBATIM & set(self.open) and _TEMPLATE.search(data):
            self.found.append("an unresolved template")


def problems_in(text: str) -> list[str]:
    """What is wrong with a page's HTML, each once; empty when nothing is."""
    page = _Page()
    page.feed(text)
    page.close()
    visible = "".join(page.text)
    found = page.found + [what for what, pattern in _TEXT.items() if pattern.search(visible)]
    if not page.lang:
        found.append("no language")
    if not page.titled:
        found.append("no title")
    return list(dict.fromkeys(found))


def problems(page: Path) -> list[str]:
    """What is wrong with a page, as sentences that name it: traceback, stderr, missing glyph, figure without
    description, network dependency, script, unresolved template, no language or title."""
    return [f"{page.name} contains {what}" for what in problems_in(page.read_text(encoding="utf-8"))]


def broken_links(folder: Path) -> list[str]:
    """Relative links of the pages in `folder` that lead nowhere, as sentences."""
    broken = []
    for page in sorted(folder.glob("*.html")):
        for href in re.findall(r'<a\b[^>]*\bhref="([^"]+)"', page.read_text(encoding="utf-8")):
            target = href.partition("#")[0]
            if target and not re.match(r"[a-z]+:", target) and not (folder / target).exists():
                broken.append(f"{page.name} links to {href}, which is not there")
    return list(dict.fromkeys(broken))
