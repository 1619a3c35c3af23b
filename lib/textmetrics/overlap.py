"""How much of a reference text a text shares: ROUGE-L over characters, and what it repeats of itself."""

from __future__ import annotations

import re

import numpy as np

from lib.textmetrics.terms import fold

LONGEST_UNIT = 64
"""Longest unit, in characters, whose immediate repetition is looked for."""

_WORD = re.compile(r"[a-z0-9]+|[^\W_]")
_SPACE = re.compile(r"\s+")


def units(text: str) -> list[str]:
    """What ROUGE-L counts: runs of Latin letters and digits as words, every other letter or digit alone.

    After NFKC and without case; white space, punctuation and symbols are left out.
    """
    return _WORD.findall(fold(text))


def common_length(one: list[str], other: list[str]) -> int:
    """Length of the longest common subsequence, by bits (Hyyrö 2004): one big number a row of the usual table."""
    where: dict[str, int] = {}
    for i, unit in enumerate(one):
        where[unit] = where.get(unit, 0) | 1 << i
    full = (1 << len(one)) - 1
    row = full
    for unit in other:
        match = row & where.get(unit, 0)
        row = (row + match | row - match) & full
    return len(one) - row.bit_count()


def rouge_l(text: str, reference: str) -> float:
    """F1 of ROUGE-L (Lin 2004, β = 1) over `units`; 0 where nothing is shared."""
    made, wanted = units(text), units(reference)
    common = common_length(made, wanted)
    return 2 * common / (len(made) + len(wanted)) if common else 0.0


def repeated_share(text: str, size: int = 4) -> float:
    """Share of a text's character 4-grams that occurred before in it, white space left out; 0 for shorter texts."""
    characters = _SPACE.sub("", text)
    grams = [characters[i : i + size] for i in range(len(characters) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def longest_loop(text: str) -> int:
    """Characters of the longest stretch in which a unit of 1 to 64 characters follows itself at least twice (xyxyxy).

    White space is left out; 0 where there is none.
    """
    codes = np.frombuffer(_SPACE.sub("", text).encode("utf-32-le", "surrogatepass"), np.uint32)
    longest = 0
    for period in range(1, min(LONGEST_UNIT, len(codes) // 3) + 1):
        same = np.concatenate([[False], codes[period:] == codes[:-period], [False]])
        edges = np.flatnonzero(same[1:] != same[:-1])
        runs = edges[1::2] - edges[::2]
        if runs.size and runs.max() >= 2 * period:
            longest = max(longest, int(runs.max()) + period)
    return longest
