"""Character integrity: what a display gets that shows an answer while it is written, token by token."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from dataclasses import dataclass

REPLACEMENT = "\ufffd"
BROKEN, UNFINISHED, WRITTEN = "bytes that are not UTF-8", "ends inside a character", "U+FFFD written"


@dataclass(frozen=True)
class Stream:
    """An answer as it arrived.

    Attributes:
        text: all of it; broken bytes as U+FFFD.
        problem: "" when every byte became a character and none is U+FFFD; else the first of BROKEN, UNFINISHED and
            WRITTEN that holds.
        split: pieces that end inside a character. They harm nobody who decodes incrementally; a display that decodes
            each piece alone shows U+FFFD for them.
    """

    text: str
    problem: str
    split: int

    @property
    def intact(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problem


def read_stream(pieces: Iterable[bytes]) -> Stream:
    """Read an answer as a display does: an incremental UTF-8 decoder, piece by piece, flushed at the end.

    Args:
        pieces: the bytes of each token, in order, the end-of-turn token left out.
    """
    strict = codecs.getincrementaldecoder("utf-8")("strict")
    tolerant = codecs.getincrementaldecoder("utf-8")("replace")
    text, problem, split = "", "", 0
    for piece in pieces:
        text += tolerant.decode(piece)
        split += bool(tolerant.getstate()[0])
        if not problem:
            try:
                strict.decode(piece)
            except UnicodeDecodeError:
                problem = BROKEN
    if not problem and strict.getstate()[0]:
        problem = UNFINISHED
    text += tolerant.decode(b"", final=True)
    return Stream(text, problem or (WRITTEN if REPLACEMENT in text else ""), split)
