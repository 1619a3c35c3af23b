"""What the characters of the rows are: what NFKC would change, what nobody sees, which script, what is damaged."""

from __future__ import annotations

import functools
import html.entities
import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lib.prompts.templates import FILLERS

# Simplified or traditional characters, told by two old character sets that each hold one script.
#
# A character is a simplified form when GB 2312 (1980, the mainland's common characters) has it and Big5 (1984,
# Taiwan's) has not; a traditional form when the common part of Big5 has it and GB 2312 has not. What both have says
# nothing. Of the 2,083 traditional forms so found, 1,894 are ones that OpenCC's table simplifies; the rest are rare or
# Taiwan's own.

SIMPLIFIED, TRADITIONAL = 1, 2
SCRIPTS = ("simplified", "traditional", "mixed", "neither")
MIXED = 0.1
"""Share of the rarer script from which on a text counts as mixed."""

_COMMON = b"\xc6\x7e"
"""Last character of Big5's common part."""

_COMMON_GB = (b"\xb0\xa1", b"\xd7\xf9")
"""First and last character of GB 2312's common part."""


@functools.cache
def script_of(character: str) -> int:
    """SIMPLIFIED, TRADITIONAL, or 0."""
    if not is_ideograph(character):
        return 0
    mainland, taiwan = _encoded(character, "gb2312"), _encoded(character, "big5")
    if mainland and not taiwan:
        return SIMPLIFIED
    return TRADITIONAL if taiwan and not mainland and taiwan <= _COMMON else 0


@functools.cache
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


def scripts_of_rows(rows: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """How many rows are written in which script.

    Args:
        rows: (simplified forms, traditional forms) of each row.

    Returns:
        {"rows", one count for each of SCRIPTS, "share of traditional forms" (None where no form was found)}.
    """
    shares = [traditional / (simplified + traditional) for simplified, traditional in rows if simplified + traditional]
    simplified, traditional = sum(share < MIXED for share in shares), sum(share > 1 - MIXED for share in shares)
    counts = (simplified, traditional, len(shares) - simplified - traditional, len(rows) - len(shares))
    forms = sum(map(sum, rows))
    share = sum(traditional for _, traditional in rows) / forms if forms else None
    return {"rows": len(rows), **dict(zip(SCRIPTS, counts, strict=True)), "share of traditional forms": share}


# What the characters of the rows are: what NFKC would change, what nobody sees, which script, what is damaged.
#
# Counted, never changed. Every character has at most one kind, looked up once for each character that occurs.

PUNCTUATION = "ordinary Chinese punctuation that NFKC would make ASCII (，！？：（）…)"
KINDS = (
    PUNCTUATION,
    "full-width letters and digits (Ａ１)",
    "half-width forms (ｱ､)",
    "spaces that are no plain space (U+00A0, U+3000)",
    "circled, squared, bracketed (①㎏㈱)",
    "ligatures and letters like them (ﬁ Ⅳ ℃)",
    "superscripts, subscripts, fractions (² ½)",
    "radicals and compatibility ideographs that look like common ones (⼈ \uf90a)",
    "other characters that NFKC would change",
    "zero-width characters, soft hyphens, fillers and U+2028",
    "marks that turn the direction of writing",
    "control characters",
    "private use and unassigned",
    "variation selectors (emoji)",
    "combining marks",
    "U+FFFD, a character lost before",
)
RARE = "14 % or more of the different characters rare: read in a wrong encoding?"
DAMAGE = (
    "UTF-8 read as Latin (ä½ å¥½)",
    "UTF-8 and GBK confused (锟斤拷)",
    "HTML entities (&nbsp;)",
    "HTML tags (<br>)",
)

RARE_SHARE, FEWEST = 0.14, 10
"""A text of at least FEWEST different ideographs is suspect from this share of rare ones on. In 19,766 reviews the five
that were read in a wrong encoding have 0.18 and more, all others 0.10 and less."""

_SEEN = frozenset("\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd")
"""Format characters (Cf) that are written: Arabic, Syriac and Kaithi number and verse signs."""

_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_BY_TAG = {
    "<narrow>": 2,
    "<noBreak>": 3,
    **dict.fromkeys(("<circle>", "<square>"), 4),
    **dict.fromkeys(("<super>", "<sub>", "<fraction>"), 6),
}
_LATIN_RUN = re.compile("[\u0080-\u00ff\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u2122]{3,}")
_GBK = re.compile("锟斤拷|烫烫烫|屯屯屯")
_ENTITY = re.compile(
    r"[&＆](?:([a-zA-Z][a-zA-Z0-9]{1,30})|#[0-9]{2,7}|#[xX][0-9a-fA-F]{2,6})(?:[;；]|(?![a-zA-Z0-9=]))"
)
_TAG = re.compile(
    r"</?(?:a|b|blockquote|body|br|code|div|em|font|h[1-6]|hr|html|i|img|li|ol|p|pre|script|span|strong|style|table|td|"
    r"th|tr|u|ul)(?:\s[^<>]{0,200})?/?>",
    re.IGNORECASE,
)


@functools.cache
def kind_of(character: str) -> int:
    """Place in KINDS + 1; 0 for a character that has nothing to report."""
    if character == "\ufffd":
        return 16
    if character in _BIDI:
        return 11
    category = unicodedata.category(character)
    if character in FILLERS or (category in ("Cf", "Zl", "Zp") and character not in _SEEN):
        return 10
    if category == "Cc":
        return 0 if character in "\n\t\r" else 12
    if category in ("Co", "Cn"):
        return 13
    if "\ufe00" <= character <= "\ufe0f" or "\U000e0100" <= character <= "\U000e01ef":
        return 14
    if unicodedata.normalize("NFKC", character) != character:
        return 1 + _kind_of_change(character, category)
    return 15 if category == "Mn" else 0


def _kind_of_change(character: str, category: str) -> int:
    """Place in KINDS of a character that NFKC changes."""
    tag = unicodedata.decomposition(character).split(" ")[0]
    if category == "Zs":
        return 3
    if tag == "<wide>":
        return 1 if character.isalnum() else 0
    if character in "…‥":
        return 0
    if "\u2e80" <= character <= "\u2fdf" or "\uf900" <= character <= "\ufaff" or character >= "\U0002f800":
        return 7
    if tag in _BY_TAG:
        return _BY_TAG[tag]
    if tag == "<compat>":
        bracketed = "\u2474" <= character <= "\u249b" or "\u3200" <= character <= "\u33ff"
        return 4 if bracketed else 5
    return 8


def audit_texts(splits: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Characters of the rows of each split (a conversation is one text).

    Returns:
        "rows"; "changed_by_nfkc" and "changed_beyond_punctuation" (rows); "findings": one line a kind that occurs,
        {"what", "group" (nfkc, invisible, unusual, damage), split: rows …, "characters", "most frequent", "example"};
        "scripts": one line a split, {"split", "rows", simplified, traditional, mixed, neither, "share of traditional
        forms"}.
    """
    findings = [Finding(what, dict.fromkeys(splits, 0)) for what in (*KINDS, *DAMAGE, RARE)]
    changed = beyond = 0
    scripts = []
    for name, texts in splits.items():
        forms = [_count_row(text, name, findings) for text in texts]
        for character, count in sorted(Counter(itertools.chain.from_iterable(texts)).items()):
            if kind := kind_of(character):
                findings[kind - 1].seen[character] += count
        changed += sum(not unicodedata.is_normalized("NFKC", text) for text in texts)
        beyond += sum(not unicodedata.is_normalized("NFKC", _PLAIN.sub("", text)) for text in texts)
        scripts.append({"split": name, **scripts_of_rows(forms)})
    return {
        "rows": sum(map(len, splits.values())),
        "changed_by_nfkc": changed,
        "changed_beyond_punctuation": beyond,
        "findings": [finding.to_json() for finding in findings if finding.seen],
        "scripts": scripts,
    }


_PLAIN = re.compile("[…‥\u3000\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\uffe0-\uffe6]")


@dataclass
class Finding:
    """What was found of one kind.

    Attributes:
        rows: with it, by split. seen: characters or places found, and how often. example: of the first row with it.
    """

    what: str
    rows: dict[str, int]
    seen: Counter[str] = field(default_factory=Counter)
    example: str = ""

    def add_row(self, split: str, text: str, start: int, stop: int) -> None:
        """Count a row that has it from `start` to `stop`."""
        self.rows[split] += 1
        self.example = self.example or _around(text, start, stop)

    def to_json(self) -> dict[str, Any]:
        """The line of the table, with the most frequent characters in words."""
        place = KINDS.index(self.what) if self.what in KINDS else len(KINDS)
        group = "nfkc" if place < 9 else "invisible" if place < 12 else "unusual" if place < 15 else "damage"
        top = (f"{''.join(map(visible, text[:20]))} ×{count:,}" for text, count in self.seen.most_common(5))
        characters = sum(len(text) * count for text, count in self.seen.items())
        line = {"what": self.what, "group": group, **self.rows, "characters": characters}
        return {**line, "most frequent": " ".join(top), "example": self.example}


def _count_row(text: str, split: str, findings: Sequence[Finding]) -> tuple[int, int]:
    """Add what a row holds to the findings, without the characters by kind; its (simplified, traditional) forms."""
    counts = Counter(text)
    first: dict[int, str] = {}
    for character in counts:  # in the order of their first appearance
        if kind := kind_of(character):
            first.setdefault(kind, character)
    for kind, character in first.items():
        start = text.index(character)
        findings[kind - 1].add_row(split, text, start, start + 1)
    written = [character for character in counts if is_ideograph(character)]
    rare = [character for character in written if is_rare(character)]  # a word that is said ten times counts once
    if len(written) >= FEWEST and len(rare) >= RARE_SHARE * len(written):
        findings[-1].add_row(split, text, 0, 24)
        findings[-1].seen.update({character: counts[character] for character in rare})
    for finding, matches in zip(findings[len(KINDS) :], _damage(text), strict=False):
        if matches:
            finding.add_row(split, text, *matches[0].span())
            finding.seen.update(match[0] for match in matches)
    forms: Counter[int] = Counter()
    for character in written:
        forms[script_of(character)] += counts[character]
    return forms[SIMPLIFIED], forms[TRADITIONAL]


def _damage(text: str) -> list[list[re.Match[str]]]:
    """Matches for each of DAMAGE."""
    marked, tagged = "&" in text or "＆" in text, "<" in text
    return [
        [] if text.isascii() else [match for match in _LATIN_RUN.finditer(text) if _was_utf8(match[0])],
        list(_GBK.finditer(text)),
        list(filter(_is_entity, _ENTITY.finditer(text))) if marked else [],
        list(_TAG.finditer(text)) if tagged else [],
    ]


def _is_entity(match: re.Match[str]) -> bool:
    """Whether HTML knows the entity, as it is written: not every name may lack its semicolon."""
    if match[1] is None:
        return True
    return match[1] + ";" * (match[0][-1] in ";；") in html.entities.html5 or match[1] in html.entities.html5


def _was_utf8(run: str) -> bool:
    """Whether letters are the bytes of UTF-8 text that was read as Latin-1 or Windows-1252."""
    raw = bytearray()
    for character in run:
        try:
            raw += character.encode("latin-1" if character <= "\u00ff" else "cp1252")
        except UnicodeEncodeError:
            return False
    try:
        return bool(raw.decode("utf-8"))
    except UnicodeDecodeError:
        return False


def _around(text: str, start: int, stop: int, width: int = 8) -> str:
    """The place with its surroundings, what cannot be seen as its code point."""
    shown = text[max(0, start - width) : stop + width].replace("\n", " ")
    return "".join(visible(character) for character in shown)


def visible(character: str) -> str:
    """The character, or its code point in angle brackets when a page would not show it."""
    hidden = kind_of(character) in (4, 10, 11, 12, 13, 14, 15)
    return f"⟨U+{ord(character):04X}⟩" if hidden else character
