"""Simplified or traditional characters, told by two old character sets that each hold one script.

A character is a simplified form when GB 2312 (1980, the mainland's common characters) has it and Big5 (1984, Taiwan's)
has not; a traditional form when the common part of Big5 has it and GB 2312 has not. What both have says nothing. Of
the 2,083 traditional forms so found, 1,894 are ones that OpenCC's table simplifies; the rest are rare or Taiwan's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SIMPLIFIED, TRADITIONAL = 1, 2
SCRIPTS = ("simplified", "traditional", "mixed", "neither")
MIXED = 0.1
"""Share of the rarer script from which on a text counts as mixed."""

_COMMON = b"\xc6\x7e"
"""Last character of Big5's common part."""

_COMMON_GB = (b"\xb0\xa1", b"\xd7\xf9")
"""First and last character of GB 2312's common part."""


def script_of(character: str) -> int:
    """SIMPLIFIED, TRADITIONAL, or 0."""
    if not is_ideograph(character):
        return 0
    mainland, taiwan = _encoded(character, "gb2312"), _encoded(character, "big5")
    if mainland and not taiwan:
        return SIMPLIFIED
    return TRADITIONAL if taiwan and not mainland and taiwan <= _COMMON else 0


def is_rare(character: str) -> bool:
    """Whether an ideograph is common in neither script."""
    mainland, taiwan = _encoded(character, "gb2312"), _encoded(character, "big5")
    first, last = _COMMON_GB
    return not (first <= mainland <= last or (taiwan and taiwan <= _COMMON))


def is_ideograph(character: str) -> bool:
    """Whether it stands in the block of the common Chinese characters."""
    return "\u4e00" <= character <= "\u9fff"


def _encoded(character: str, codec: str) -> bytes:
    try:
        return character.encode(codec)
    except UnicodeEncodeError:
        return b""


def scripts_of_rows(rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """How many rows are written in which script.

    Args:
        rows: (simplified forms, traditional forms) of each row.

    Returns:
        {"rows", one count for each of SCRIPTS, "share of traditional forms" (None where no form was found)}.
    """
    found = dict.fromkeys(SCRIPTS, 0)
    for simplified, traditional in rows:
        share = traditional / (simplified + traditional) if simplified + traditional else None
        if share is None:
            found["neither"] += 1
        else:
            found["simplified" if share < MIXED else "traditional" if share > 1 - MIXED else "mixed"] += 1
    forms = sum(map(sum, rows))
    return {
        "rows": len(rows),
        **found,
        "share of traditional forms": sum(row[1] for row in rows) / forms if forms else None,
    }
