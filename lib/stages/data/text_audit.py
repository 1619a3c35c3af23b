"""What the characters of the rows are (what NFKC would change, what nobody sees, which script, what is damaged), and
what their tokens are: how many, and one row as the model sees it."""

from __future__ import annotations

import functools
import html.entities
import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from lib.progress import Progress
from lib.prompts.conversations import ExchangeTooLongError
from lib.prompts.templates import FILLERS
from lib.stages.data.cleaning import Row, RowsOfTask, Splits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    mainland, taiwan = character.encode("gb2312", "ignore"), character.encode("big5", "ignore")
    if mainland and not taiwan:
        return SIMPLIFIED
    return TRADITIONAL if taiwan and not mainland and taiwan <= _COMMON else 0


@functools.cache
def is_rare(character: str) -> bool:
    """Whether an ideograph is common in neither script."""
    mainland, taiwan = character.encode("gb2312", "ignore"), character.encode("big5", "ignore")
    first, last = _COMMON_GB
    return not (first <= mainland <= last or (taiwan and taiwan <= _COMMON))


def is_ideograph(character: str) -> bool:
    """Whether it stands in the block of the common Chinese characters."""
    return "\u4e00" <= character <= "\u9fff"


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

KINDS: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
"""What is looked for, by name: see text_audit.yaml."""

RARE_SHARE, FEWEST = 0.14, 10
"""A text of at least FEWEST different ideographs is suspect from this share of rare ones on. In 19,766 reviews the five
that were read in a wrong encoding have 0.18 and more, all others 0.10 and less."""

_SEEN = frozenset("\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd")
"""Format characters (Cf) that are written: Arabic, Syriac and Kaithi number and verse signs."""

_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_BY_TAG = {"<narrow>": "half_width", "<noBreak>": "space", "<circle>": "circled", "<square>": "circled"}
_BY_TAG |= dict.fromkeys(("<super>", "<sub>", "<fraction>"), "raised")
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
def kind_of(character: str) -> str:
    """Name in KINDS; empty for a character that has nothing to report."""
    category = unicodedata.category(character)
    if character == "\ufffd":
        return "lost"
    if character in _BIDI:
        return "direction"
    if character in FILLERS or (category in ("Cf", "Zl", "Zp") and character not in _SEEN):
        return "zero_width"
    if category == "Cc":
        return "" if character in "\n\t\r" else "control"
    if category in ("Co", "Cn"):
        return "private"
    if "\ufe00" <= character <= "\ufe0f" or "\U000e0100" <= character <= "\U000e01ef":
        return "selector"
    if unicodedata.normalize("NFKC", character) != character:
        return _kind_of_change(character, category)
    return "combining" if category == "Mn" else ""


def _kind_of_change(character: str, category: str) -> str:
    """Name in KINDS of a character that NFKC changes."""
    tag = unicodedata.decomposition(character).split(" ")[0]
    if category == "Zs":
        return "space"
    if tag == "<wide>":
        return "full_width" if character.isalnum() else "punctuation"
    if character in "…‥":
        return "punctuation"
    if "\u2e80" <= character <= "\u2fdf" or "\uf900" <= character <= "\ufaff" or character >= "\U0002f800":
        return "radical"
    if tag == "<compat>":
        bracketed = "\u2474" <= character <= "\u249b" or "\u3200" <= character <= "\u33ff"
        return "circled" if bracketed else "ligature"
    return _BY_TAG.get(tag, "changed")


def audit_texts(splits: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Characters of the rows of each split (a conversation is one text).

    Returns:
        "rows"; "changed_by_nfkc" and "changed_beyond_punctuation" (rows); "findings": one line a kind that occurs,
        {"what", "group" (nfkc, invisible, unusual, damage), split: rows …, "characters", "most frequent", "example"};
        "scripts": one line a split, {"split", "rows", simplified, traditional, mixed, neither, "share of traditional
        forms"}.
    """
    findings = {name: Finding(name, dict.fromkeys(splits, 0)) for name in KINDS}
    changed = beyond = 0
    scripts = []
    for name, texts in splits.items():
        forms = [_count_row(text, name, findings) for text in texts]
        for character, count in sorted(Counter(itertools.chain.from_iterable(texts)).items()):
            if kind := kind_of(character):
                findings[kind].seen[character] += count
        changed += sum(not unicodedata.is_normalized("NFKC", text) for text in texts)
        beyond += sum(not unicodedata.is_normalized("NFKC", _PLAIN.sub("", text)) for text in texts)
        scripts.append({"split": name, **scripts_of_rows(forms)})
    return {
        "rows": sum(map(len, splits.values())),
        "changed_by_nfkc": changed,
        "changed_beyond_punctuation": beyond,
        "findings": [finding.to_json() for finding in findings.values() if finding.seen],
        "scripts": scripts,
    }


_PLAIN = re.compile("[…‥\u3000\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\uffe0-\uffe6]")


@dataclass
class Finding:
    """What was found of one of KINDS.

    Attributes:
        rows: with it, by split. seen: characters or places found, and how often. example: of the first row with it.
    """

    name: str
    rows: dict[str, int]
    seen: Counter[str] = field(default_factory=Counter)
    example: str = ""

    def add_row(self, split: str, text: str, start: int, stop: int) -> None:
        """Count a row that has it from `start` to `stop`."""
        self.rows[split] += 1
        around = text[max(0, start - 8) : stop + 8].replace("\n", " ")
        self.example = self.example or "".join(map(visible, around))

    def to_json(self) -> dict[str, Any]:
        """The line of the table, with the most frequent characters in words."""
        top = (f"{''.join(map(visible, text[:20]))} ×{count:,}" for text, count in self.seen.most_common(5))
        characters = sum(len(text) * count for text, count in self.seen.items())
        kind = KINDS[self.name]
        line = {"what": kind["what"], "group": kind["group"], **self.rows, "characters": characters}
        return {**line, "most frequent": " ".join(top), "example": self.example}


def _count_row(text: str, split: str, findings: Mapping[str, Finding]) -> tuple[int, int]:
    """Add what a row holds to the findings, without the characters by kind; its (simplified, traditional) forms."""
    counts = Counter(text)
    first: dict[str, str] = {}
    for character in counts:  # in the order of their first appearance
        if kind := kind_of(character):
            first.setdefault(kind, character)
    for kind, character in first.items():
        start = text.index(character)
        findings[kind].add_row(split, text, start, start + 1)
    written = [character for character in counts if is_ideograph(character)]
    rare = [character for character in written if is_rare(character)]  # a word that is said ten times counts once
    if len(written) >= FEWEST and len(rare) >= RARE_SHARE * len(written):
        findings["rare"].add_row(split, text, 0, 24)
        findings["rare"].seen.update({character: counts[character] for character in rare})
    for kind, matches in _damage(text).items():
        if matches:
            findings[kind].add_row(split, text, *matches[0].span())
            findings[kind].seen.update(match[0] for match in matches)
    forms: Counter[int] = Counter()
    for character in written:
        forms[script_of(character)] += counts[character]
    return forms[SIMPLIFIED], forms[TRADITIONAL]


def _damage(text: str) -> dict[str, list[re.Match[str]]]:
    """Where a text is damaged, by name in KINDS."""
    return {
        "latin": [] if text.isascii() else [match for match in _LATIN_RUN.finditer(text) if _was_utf8(match[0])],
        "gbk": list(_GBK.finditer(text)),
        "entity": list(filter(_is_entity, _ENTITY.finditer(text))) if "&" in text or "＆" in text else [],
        "tag": list(_TAG.finditer(text)) if "<" in text else [],
    }


def _is_entity(match: re.Match[str]) -> bool:
    """Whether HTML knows the entity, as it is written: not every name may lack its semicolon."""
    name = match[1]
    return name is None or not {name, name + ";" * (match[0][-1] in ";；")}.isdisjoint(html.entities.html5)


def _was_utf8(run: str) -> bool:
    """Whether letters are the bytes of UTF-8 text that was read as Latin-1 or Windows-1252."""
    try:
        raw = b"".join(character.encode("latin-1" if character <= "\u00ff" else "cp1252") for character in run)
        return bool(raw.decode("utf-8"))
    except UnicodeError:
        return False


def visible(character: str) -> str:
    """The character, or its code point in angle brackets when a page would not show it."""
    hidden = KINDS.get(kind_of(character), {}).get("hidden")
    return f"⟨U+{ord(character):04X}⟩" if hidden else character


# How long the rows are for the run's tokenizer, and one row as the model sees it.


def token_lengths(
    tokenizer: PreTrainedTokenizerBase, kind: RowsOfTask, splits: Splits
) -> tuple[Splits, dict[str, list[int]], list[dict[str, Any]]]:
    """The rows that fit, their tokens before anything is cut, and a table with one line a split.

    A text is cut from its end; a conversation must have room for one exchange (with thinking: with its reasoning).
    """
    kept: Splits = {}
    lengths: dict[str, list[int]] = {}
    table = []
    with Progress("token lengths", sum(map(len, splits.values()))) as progress:
        for name, rows in splits.items():
            kept[name], lengths[name], counts = [], [], Counter[str]()
            for row in rows:
                progress.advance()
                try:
                    encoded = kind.task.encode(tokenizer, row.content)
                except ExchangeTooLongError:
                    counts["too long"] += 1
                    continue
                counts["truncated"] += encoded.truncated
                counts += Counter(cut=encoded.turns_cut, learned=len(encoded.answers), read=encoded.unlearned)
                kept[name].append(row)
                lengths[name].append(encoded.whole_length)
            if kept[name]:
                table.append({**_line(name, lengths[name], counts["truncated"]), **kind.length_columns(counts)})
    return kept, lengths, table


def _line(name: str, lengths: Sequence[int], truncated: int) -> dict[str, Any]:
    values = np.array(lengths)
    return {
        "split": name,
        "rows": len(values),
        "min": int(values.min()),
        **{f"p{p}": int(np.percentile(values, p, method="nearest")) for p in (50, 90, 95, 99)},
        "max": int(values.max()),
        "truncated rows": truncated,
        "truncated share": truncated / len(values),
    }


def worked_example(
    tokenizer: PreTrainedTokenizerBase, kind: RowsOfTask, rows: Sequence[Row], lengths: Sequence[int]
) -> dict[str, Any]:
    """The row of median length as the model sees it.

    Returns:
        text, what the kind of rows says of it, and `pieces`: {"text", "ids", "loss"} in order; tokens that are only
        part of a character are joined to one piece; `loss` marks the tokens that training counts.
    """
    row = rows[int(np.argsort(lengths, kind="stable")[len(lengths) // 2])]
    encoded = kind.task.encode(tokenizer, row.content)
    edges = [0, *(edge for span in encoded.spans for edge in span), len(encoded.ids)]
    pieces = [
        piece
        for number, (start, stop) in enumerate(itertools.pairwise(edges))
        for piece in _pieces(tokenizer, encoded.ids[start:stop], number % 2 == 1)
    ]
    return {
        "text": row.text,
        **kind.example(row, encoded, tokenizer),
        "pieces": pieces,
        "prompt_tokens": len(encoded.ids) - len(encoded.loss),
        "loss_tokens": len(encoded.loss),
        "truncated": encoded.truncated,
    }


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int], loss: bool) -> list[dict[str, Any]]:
    pieces: list[dict[str, Any]] = []
    pending: list[int] = []
    for at, token in enumerate(ids):
        pending.append(token)
        text = tokenizer.decode(pending, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if "\ufffd" not in text or len(pending) >= 8 or at == len(ids) - 1:
            pieces.append({"text": text, "ids": pending, "loss": loss})
            pending = []
    return pieces
