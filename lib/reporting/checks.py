"""What must not be on a published page; used by the report runner before publishing and by the tests."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

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
