"""Results on stdout: JSON for machines, aligned text for people."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from lib.run.files import json_text


def width(text: str) -> int:
    """Columns that a text takes in a terminal (Chinese characters take two)."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


_LONGEST = 1000
"""Most characters of a value: a name inside a file may be megabytes long."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def cell(value: Any) -> str:
    """A value as text for a table."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(cell(v) for v in value) + "]"
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … ({len(text):,} characters)"


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows as aligned columns with a head line."""
    grid = [list(columns)] + [[cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(width(line[i]) for line in grid) for i in range(len(columns))]
    lines = ["  ".join(t + " " * (w - width(t)) for t, w in zip(line, widths, strict=True)).rstrip() for line in grid]
    return "\n".join(lines)


def printable(text: str) -> str:
    """Control characters written out: names inside a file must not move the cursor or colour the terminal."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def show(value: Mapping[str, Any], as_json: bool, text: str) -> None:
    """Print a result: JSON when asked for, else the text."""
    print(json_text(value, indent=1) if as_json else printable(text))
