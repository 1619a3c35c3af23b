"""The reasoning block of a generated answer: how far it got, and what stands behind it."""

from __future__ import annotations

import re
from dataclasses import dataclass

_TAG = re.compile(r"<(/?)(think|thinking)>")


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
    tags = list(_TAG.finditer(text))
    opened = bool(tags) and not tags[0][1] and not text[: tags[0].start()].strip()
    if not opened:
        return Block(False, False, False, False, False, text.strip())
    closed = len(tags) > 1 and bool(tags[1][1]) and tags[0][2] == tags[1][2]
    if not closed:
        return Block(True, False, False, False, False, "")
    answer = text[tags[1].end() :].strip()
    filled = bool(text[tags[0].end() : tags[1].start()].strip())
    answered = filled and bool(answer)
    return Block(True, True, filled, answered, answered and len(tags) == 2, answer)
