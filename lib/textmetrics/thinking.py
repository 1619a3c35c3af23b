"""The reasoning block of a generated answer: how far it got, and what stands behind it."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

TAG = re.compile(r"<\s*(/?)\s*(think|thinking)\s*>", re.IGNORECASE)
"""A tag around reasoning; group 1 is "/" for a closing one, group 2 its name as written."""

FILLERS = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
"""Characters of other categories that show nothing."""


def is_blank(text: str) -> bool:
    """True where there is nothing to see: white space, zero-width and other format characters, fillers."""
    return all(c.isspace() or c in FILLERS or unicodedata.category(c) in ("Cf", "Zl", "Zp") for c in text)


@dataclass(frozen=True)
class Block:
    """A reasoning block. Each attribute but the last implies the one before.

    Attributes:
        opened: the answer begins with an opening tag.
        closed: the next tag is the one that closes it.
        filled: there is text between the two.
        answered: there is text behind it.
        complete: all of that, and no further tag.
        answer: what stands behind the block; nothing where the block was opened and not closed.
    """

    opened: bool
    closed: bool
    filled: bool
    answered: bool
    complete: bool
    answer: str


def read_block(text: str) -> Block:
    """Read the block that an answer begins with; without an opening tag the whole text is the answer."""
    tags = list(TAG.finditer(text))
    opened = bool(tags) and not tags[0][1] and is_blank(text[: tags[0].start()])
    if not opened:
        return Block(False, False, False, False, False, text.strip())
    closed = len(tags) > 1 and bool(tags[1][1]) and tags[0][2].lower() == tags[1][2].lower()
    if not closed:
        return Block(True, False, False, False, False, "")
    answer = text[tags[1].end() :].strip()
    filled = not is_blank(text[tags[0].end() : tags[1].start()])
    answered = filled and not is_blank(answer)
    return Block(True, True, filled, answered, answered and len(tags) == 2, answer)
