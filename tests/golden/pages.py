"""What a reader sees of an executed notebook: tables, figures with the data they plot, sentences, in order."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from lxml import html

from tests.golden import varying

Axes = dict[str, list[dict[str, Any]]]


def read_figures(path: Path) -> Axes:
    """What the hook wrote: the axes of every picture, by the picture's SHA-256."""
    if not path.is_file():
        return {}
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {line["picture"]: line["axes"] for line in lines}


def notebook(path: Path, figures: Axes) -> list[Any]:
    """All outputs of an executed notebook."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [shown for cell in cells for output in cell.get("outputs", []) for shown in _output(output, figures)]


def overview(path: Path) -> list[Any]:
    """Headings, tables and sentences of an HTML page."""
    main = html.parse(str(path), html.HTMLParser(encoding="utf-8")).getroot().find(".//main")
    kinds = ("table", "figure", "h1", "h2", "h3", "p", "li", "summary")
    return [_element(node, {}) for node in main.iter(*kinds) if not _inside(node)] if main is not None else []


def _output(output: dict[str, Any], figures: Axes) -> list[Any]:
    data = output.get("data", {})
    if "text/html" in data:
        return _html("".join(data["text/html"]), figures)
    words = data.get("text/markdown", data.get("text/plain", output.get("text", output.get("evalue", ""))))
    return ["".join(words)]


def _html(source: str, figures: Axes) -> list[Any]:
    if not source.strip():
        return []
    root = html.fragment_fromstring(source, create_parent="div")
    found = [_element(node, figures) for node in root.iter("table", "figure", "p") if not _inside(node)]
    return found or [_words(root)]


def _inside(node: Any) -> bool:
    """Whether it stands in a table or figure, which shows it already."""
    return any(above.tag in ("table", "figure", "li") for above in node.iterancestors())


def _words(node: Any) -> str:
    return " ".join(node.text_content().split())


def _element(node: Any, figures: Axes) -> Any:
    if node.tag == "table":
        return _table(node)
    if node.tag != "figure":
        return _words(node)
    image, caption = node.find(".//img"), node.find(".//figcaption")
    shown = {"caption": _words(caption) if caption is not None else ""}
    if image is None:
        return {"figure": _words(node), **shown}
    picture = base64.b64decode(image.get("src").partition("base64,")[2])
    axes = figures.get(hashlib.sha256(picture).hexdigest(), [])
    return {"figure": image.get("alt"), **shown, "axes": [_without_costs(own) for own in axes]}


def _without_costs(axes: dict[str, Any]) -> dict[str, Any]:
    """Axes in units of time or memory keep their labels alone."""
    costs = any(varying.AXES.search(label) for label in axes["labels"][:3])
    return {"labels": axes["labels"]} if costs else axes


def _table(node: Any) -> dict[str, Any]:
    """A table with one text a row; cells that hold costs are left out."""
    caption = node.find("caption")
    title = _words(caption) if caption is not None else ""
    head = [_words(cell) for cell in node.iterfind("thead//th")]
    rows = [[_words(cell) for cell in row.iterfind("*")] for row in node.iterfind("tbody//tr")]
    left_out = {i for i, name in enumerate(head) if varying.HEADINGS.search(name)}
    if not head:
        rows = [row[:1] if row and varying.HEADINGS.search(row[0]) else row for row in rows]
    if varying.CAPTIONS.search(title):
        rows = [row[:1] for row in rows]
    return {
        "table": title,
        "head": " | ".join(head),
        "rows": [" | ".join("–" if i in left_out else cell for i, cell in enumerate(row)) for row in rows],
    }
