"""Names that every table of a page marks, once they are known."""

from __future__ import annotations

import re
from collections.abc import Iterable

GRID_MARK = "‡"
_names: tuple[str, ...] = ()
_caption = ""


def mark_names(names: Iterable[str], caption: str) -> None:
    """From now on tables of this page (this process) write the mark behind these names, and the caption below.

    Args:
        names: of files and tensor types; a later call replaces them, none unmarks.
    """
    global _names, _caption
    _names, _caption = tuple(dict.fromkeys(names)), caption


def marked(text: str) -> str:
    """The text with the mark behind every name that stands in it as a word of its own."""
    if not _names:
        return text
    pattern = "|".join(map(re.escape, sorted(_names, key=len, reverse=True)))
    return re.sub(rf"(?<![\w-])({pattern})(?![\w‡-])", rf"\1{GRID_MARK}", text)


def caption_of_marks() -> str:
    """What the mark means."""
    return f"{GRID_MARK} {_caption}"
