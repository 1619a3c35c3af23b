"""Checks of published pages, as sentences that name the page."""

from __future__ import annotations

import re
from pathlib import Path

from lib.report.html import problems_in


def problems(page: Path) -> list[str]:
    """What is wrong with a page, as sentences that name it: error output, stderr, bare object, live markup, figure
    without description, network dependency, script, unresolved template, no language or title."""
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
