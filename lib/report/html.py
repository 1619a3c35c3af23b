"""An executed notebook as one self-contained page: no script, no request to any network, readable on a phone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from bs4 import BeautifulSoup

from lib.language import TAGS, language, translated
from lib.report.index import Stage, Summary, commit_words, fill, parameter_pairs, pretraining, stylesheet, versions_of
from lib.report.sections import Section, sections
from lib.report.sentences import TEMPLATES, sentence, unbroken

if TYPE_CHECKING:
    from nbconvert import HTMLExporter
    from nbformat import NotebookNode


# An executed notebook as a page.

_STAGE_LINK = re.compile(r'<a href="(?P<path>[^":#]+)(?P<anchor>#[^"]*)?"[^>]*>(?P<text>.*?)</a>', re.S)
_TABLE = re.compile(r"<table\b.*?</table>", re.S)


def code_caption(source: str) -> str:
    """What the folded code says of itself: its first comment, or 'Code'."""
    first = source.strip().splitlines()[0] if source.strip() else ""
    words = first.lstrip("# ").strip() if first.startswith("# ") else ""
    caption = translated(translated(words, "code"))  # that of the parameters is a word
    return f"{translated('Code')}{translated(': ')}{caption}" if caption else translated("Code")


def inert(markdown: str) -> str:
    """Markdown of an output without HTML but the folding of our own sentences: words of users may hold any."""
    return re.sub(r"<(?!/?(?:details|summary)>)", "&lt;", markdown)


def duration(seconds: float) -> str:
    """Seconds in words."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def _bottom(notebook: NotebookNode, name: str, summary: Summary) -> str:
    """How the page was made: time, parameters, products with their files, versions."""
    papermill, products = notebook.metadata.get("papermill", {}), []
    entries = summary.products(name)
    for product, entry in entries.items():
        told = {"duration": duration(entry.seconds), "entry": entry, "commit": commit_words(entry.git)}
        told["base_seconds"] = pretraining(entry)
        files = [(file, f"{o['bytes']:,} · {o['sha256'][:16]}") for file, o in entry.outputs.items()]
        products.append({"name": product, "cost": sentence("index.product_cost", **told), "files": files})
    return fill(
        "bottom.html.j2",
        current=name,
        date=sentence("index.page_date", date=str(papermill.get("end_time", ""))[:16].replace("T", " ")),
        seconds=duration(float(papermill.get("duration") or 0.0)),
        parameters=parameter_pairs(papermill.get("parameters") or summary.parameters(name)),
        products=products,
        versions=versions_of(entries.values()),
    )


_WARNING = re.compile(r"^\S.*:\d+: \w*Warning: ", re.M)


def _folded(output: NotebookNode) -> NotebookNode:
    """Warnings that a library wrote to stderr, as a note that can be opened; they are no fault of the page."""
    from nbformat import v4

    text = output.get("text", "") if output.get("name") == "stderr" else ""
    if not _WARNING.match(text):
        return output
    title = sentence("display.warnings")
    html = f"<details><summary>{title}</summary><pre>{escape(text)}</pre></details>"
    return v4.new_output("display_data", {"text/html": html})


def _link(match: re.Match[str], there: set[str]) -> str:
    """A link to another notebook becomes one to its page, to the README one to the overview; to other files, text."""
    stem = Path(match["path"]).stem
    if stem == "README":
        return f'<a href="index.html">{translated("Overview")}</a>'
    if match["path"].endswith(".ipynb") and stem in there:
        return f'<a href="{stem}.html{match["anchor"] or ""}">{match["text"]}</a>'
    return match["text"]


def _exporter() -> HTMLExporter:
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(
        template_name="workbook",
        extra_template_basedirs=[str(TEMPLATES)],
        language_code=TAGS[language()],
        exclude_anchor_links=True,
        embed_images=True,
    )
    exporter.register_filter("code_caption", code_caption)
    exporter.register_filter("inert", inert)
    exporter.register_filter("unbroken", lambda html: whole(unbroken(html)))
    return exporter


def _headed(found: list[Section]) -> list[Section]:
    """Sections as the template takes them: the heading of a folded one stands in its summary, not in its words."""
    for section in found:
        if section.tag == "evidence" and section.level == 2:
            section.cells[0].source = section.cells[0].source.partition("\n")[2]
    return found


_ESCAPED = re.compile(r"(?<!\\)(?:\\u[0-9a-fA-F]{4})+")


_HYPHENED = re.compile(r"(?<![\w./-])(?:\d+(?:\.\d+)?e-\d+|\d{4}-\d\d-\d\d)(?![\w/-])(?=[^<>]*(?:<|$))")


def whole(html: str) -> str:
    """HTML whose lines do not end at the hyphen of an exponent or of a date in its words."""
    return _HYPHENED.sub(r'<span class="whole">\g<0></span>', html)


def in_letters(source: str) -> str:
    """A cell with its letters where papermill writes \\uXXXX; half of a pair stays as it is."""

    def letters(escaped: re.Match[str]) -> str:
        found = str(json.loads(f'"{escaped[0]}"'))
        return escaped[0] if any("\ud800" <= letter <= "\udfff" for letter in found) else found

    return _ESCAPED.sub(letters, source)


def render(executed: Path, summary: Summary, stages: list[Stage], full: bool = False) -> str:
    """The page of one executed notebook.

    Args:
        executed: papermill's output, named like the stage.
        stages: all stages of the report in order; those that exist are linked.
        full: whether the evidence is unfolded, so that it is printed, too.
    """
    import nbformat

    name = executed.stem
    notebook = nbformat.read(executed, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = translated(cell.source.strip(), f"notebooks/{name}")
        if cell.cell_type == "code":
            if "injected-parameters" in cell.metadata.get("tags", []):
                cell.source = in_letters(cell.source)
            cell.outputs = [_folded(output) for output in cell.outputs]
    title = next((s.title for s in stages if s.name == name), name)
    resources = {
        "title": f"{title} – {translated('run')} {summary.name}",
        "css": stylesheet(),
        "top": fill("top.html.j2", stages=stages, current=name, run=summary),
        "bottom": _bottom(notebook, name, summary),
        "sections": _headed(sections(notebook.cells, summary.labelled)),
        "words": {
            "evidence": sentence("display.evidence"),
            "folded": sentence("display.folded"),
            "setup": sentence("display.setup"),
        },
        "full": full,
    }
    html, _ = _exporter().from_notebook_node(notebook, resources={"workbook": resources})
    head, separator, rest = html.partition('<main id="content">')
    body, end, foot = rest.partition("</main>")
    there = {s.name for s in stages if s.exists}
    body = harmless(body)
    body = _STAGE_LINK.sub(lambda m: _link(m, there), body)
    region = f'<div class="scroll" tabindex="0" role="region" aria-label="{translated("table")}">'
    body = _TABLE.sub(lambda table: f"{region}{table[0]}</div>", body)
    return head + separator + body + end + foot


# What must not be on a published page; used by the report runner before publishing and by the tests.

_BARE = re.compile(r"\s*<(Figure size \d+|[\w.]+ object at 0x[0-9a-f]+|bound method |function \w+ at 0x).*>\s*", re.S)
"""The whole text of an output that shows an object in place of what it holds. Words of rows are never looked at."""
_TEMPLATE = re.compile(r"\{\{.*?\}\}|\{%.*?%\}", re.S)
_CSS_URL = re.compile(r"@import|url\(\s*['\"]?(?!data:|#)", re.I)
_NETWORK = re.compile(r"^\s*(?:https?:)?//", re.I)
_NO_ALT = "No description has been provided for this image"
_VERBATIM = ["pre", "code", "td", "mark", "script", "style"]
_SOURCES = ("src", "srcset", "data", "poster")


def problems_in(text: str) -> list[str]:
    """What is wrong with a page's HTML, each once; empty when nothing is."""
    page = BeautifulSoup(text, "html.parser")
    found = [*_resources(page), *_figures(page)]
    found += ["text on stderr" for _ in page.select('[data-mime-type$=".stderr"]')]
    found += ["an error output" for _ in page.select('[data-mime-type$=".error"]')]
    found += [] if page.select_one("html[lang]:not([lang=''])") else ["no language"]
    found += [] if page.select_one("title") and page.select_one("title").get_text(strip=True) else ["no title"]
    for hidden in page.select("style, script, details pre"):  # folded code may speak of anything
        hidden.decompose()
    plain = page.select('[data-mime-type="text/plain"]')
    found += ["a bare object" for output in plain if _BARE.fullmatch(output.get_text())]
    for output in page.select(".output"):  # what a cell shows may hold any word of a row
        output.decompose()
    if any(_TEMPLATE.search(line) and not line.find_parent(_VERBATIM) for line in page.find_all(string=True)):
        found.append("an unresolved template")
    return list(dict.fromkeys(found))


def _resources(page: BeautifulSoup) -> Iterator[str]:
    """What a page would load, and scripts."""
    for tag in page.find_all(True):
        asked = [tag[key] for key in _SOURCES if key in tag.attrs]
        asked += [tag["href"]] if tag.name == "link" and tag.get("href") else []
        for address in asked:
            if _NETWORK.match(address):
                yield "a network dependency"
            elif not address.startswith("data:"):
                yield f"a dependency on the file {address[:80]!r}"
        if tag.name == "script" and tag.get("type", "text/javascript") != "application/json":
            yield "a script"
        live = tag.name in _ACTIVE or (tag.name in _OF_HEAD and tag.find_parent("body"))
        if live or any(_is_live(key, value) for key, value in tag.attrs.items()):
            yield "live markup"
        if _CSS_URL.search(tag.get("style", "") + (tag.get_text() if tag.name == "style" else "")):
            yield "a network dependency"


_ACTIVE = ("iframe", "object", "embed", "form", "base", "applet", "frame", "video", "audio", "input", "select")
_ACTIVE += ("plaintext", "textarea", "xmp", "template", "noscript")  # they take in what stands behind them
_OF_HEAD = ("style", "meta", "link")
_LIVE = re.compile(
    rf"<\s*(?:script|{'|'.join(_ACTIVE + _OF_HEAD)})\b|<img[^>]+src=[\"']?(?!data:)|[\s/\"']on\w+\s*="
    r"|script\s*:|href=[\"']?\s*data:|data:text",
    re.I,
)


def _is_live(key: str, value: object) -> bool:
    """Whether an attribute does something: a handler of events, or a link that is code."""
    code = re.sub(r"[\s\x00-\x1f]", "", str(value)).lower()
    link = key in ("href", "xlink:href", "action", "formaction") and code.startswith(
        ("javascript:", "vbscript:", "data:")
    )
    return link or key.lower().startswith("on") or (key == "src" and code.startswith(("javascript:", "data:text")))


def harmless(html: str) -> str:
    """HTML of outputs and narrative without markup that does something: text of users may hold any."""
    if not _LIVE.search(html):
        return html
    page = BeautifulSoup(html, "html.parser")
    for tag in page.find_all(True):
        foreign = tag.name == "img" and not str(tag.get("src", "")).startswith("data:")
        if foreign or tag.name in ("script", *_ACTIVE, *_OF_HEAD) or any(_is_live(*pair) for pair in tag.attrs.items()):
            tag.replace_with(str(tag))  # shown as it was written
    return str(page)


def _figures(page: BeautifulSoup) -> Iterator[str]:
    """Figures that say nothing to a reader who does not see them."""
    for image in page.find_all("img"):
        if not image.get("alt", "").strip() or _NO_ALT in image["alt"]:
            yield "a figure without description"
    for drawing in page.find_all("svg"):
        if not drawing.get("aria-label") and drawing.get("aria-hidden") != "true" and not drawing.find("title"):
            yield "a figure without description"
