"""Pages as a headless Chromium lays them out and prints them; tests that need it skip where none is installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from bs4 import BeautifulSoup

from lib.report.pdf import BROWSERS, print_page

BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is installed")

_POLICY = re.compile(r"<meta\b[^>]*\bContent-Security-Policy\b[^>]*>")
_MEASURE = """
<script>
addEventListener("load", () => {
  const root = document.documentElement, width = root.clientWidth, problems = [];
  const name = element => element.tagName.toLowerCase() + " " + element.textContent.trim().slice(0, 60);
  if (root.scrollWidth > width) problems.push("the document is " + root.scrollWidth + " px wide");
  for (const table of document.querySelectorAll("table")) {
    const frame = table.closest(".scroll") || table.parentElement;
    if (WIDE && frame.clientWidth && table.offsetWidth > frame.clientWidth + 1)
      problems.push("a table of " + table.offsetWidth + " px in " + frame.clientWidth + ": " + name(table));
    if (!table.querySelector("tbody td, tbody th")) problems.push("an empty table: " + name(table));
  }
  const blocks = "h1,h2,h3,p,li,figcaption,caption,td,th,dt,dd,summary,pre,blockquote,figure,.stamp,.answer";
  const shown = [...document.querySelectorAll(blocks)].filter(e => e.getClientRects().length && !e.matches(".skip"));
  const boxes = shown.map(element => ({element, box: element.getBoundingClientRect()}));
  boxes.sort((a, b) => a.box.top - b.box.top);
  for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length; j++) {
    const a = boxes[i], b = boxes[j];
    if (b.box.top >= a.box.bottom - 1) break;
    const across = Math.min(a.box.right, b.box.right) - Math.max(a.box.left, b.box.left);
    const nested = a.element.contains(b.element) || b.element.contains(a.element);
    if (!nested && across > 1 && Math.min(a.box.bottom, b.box.bottom) - b.box.top > 1)
      problems.push(name(a.element) + " lies over " + name(b.element));
  }
  parent.postMessage(JSON.stringify({width, boxes: boxes.length, problems}), "*");
});
</script>
"""


def measured(page: Path, width: int) -> dict[str, Any]:
    """What a window of so many CSS pixels shows of a page: "width", "boxes" (of text) and "problems", as sentences.

    A document wider than the window, an empty table, boxes of text over one another; in a window of 1,000 px or more
    also a table wider than what it stands in. Everything that folds is opened before.
    """
    text = _POLICY.sub("", page.read_text(encoding="utf-8")).replace("<details", "<details open")
    script = _MEASURE.replace("WIDE", str(width >= 1000).lower())
    # a window of Chromium is at least 500 px wide, so the page stands in a frame
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as profile:
        frame, copy = Path(folder) / "frame.html", Path(folder) / "page.html"
        copy.write_text(text.replace("</body>", f"{script}</body>"), encoding="utf-8")
        style = f"border:0;width:{width}px;height:900px"
        frame.write_text(
            '<pre id="out"></pre><script>addEventListener("message", '
            'found => document.getElementById("out").textContent = found.data)</script>'
            f'<iframe src="page.html" style="{style}"></iframe>',
            encoding="utf-8",
        )
        options = ["--headless", "--disable-gpu", "--no-sandbox", "--hide-scrollbars", "--dump-dom"]
        options += [f"--user-data-dir={profile}", "--window-size=1600,1000", "--virtual-time-budget=5000"]
        command = [str(BROWSER), *options, frame.as_uri()]
        ended = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    found = BeautifulSoup(ended.stdout, "html.parser").select_one("#out").get_text()
    return json.loads(found)


_PAGE = re.compile(rb"/Type\s*/Page\b(?!s)")


def printed(page: Path, folder: Path) -> int:
    """Sheets of A4 that a page prints on."""
    output = folder / f"{page.stem}.pdf"
    print_page(page, output)
    return sheets(output)


def sheets(pdf: Path) -> int:
    """Pages of a PDF that Chromium wrote: their objects are not compressed there."""
    return len(_PAGE.findall(pdf.read_bytes()))
