"""Lists of terms and of prompts: read from a file, and terms found in a text."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lib.errors import InputError
from lib.runs.files import sha256_file, user_path, utf8

_HERE = Path(__file__).parent
SHIPPED_TERMS = tuple(sorted(path.stem for path in (_HERE / "terms").glob("*.txt")))
"""Names of the shipped lists of terms."""


def fold(text: str) -> str:
    """The form in which texts and terms are compared: NFKC, without case."""
    return unicodedata.normalize("NFKC", text).casefold()


@dataclass(frozen=True)
class TermList:
    """Terms of a domain.

    Attributes:
        name: name of a shipped list, or of the file.
        forms: every way to write a term, folded -> the term as the list writes it.
        sha256: of the file.
    """

    name: str
    forms: dict[str, str]
    sha256: str

    def __len__(self) -> int:
        return len(set(self.forms.values()))

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.forms, key=len, reverse=True)
        return re.compile("|".join(map(_bounded, longest_first)))

    def found(self, text: str) -> set[str]:
        """The terms of a text. Of overlapping ones the first, and there the longest, counts, and no part of it.

        Latin terms must stand alone: AES is not found in "CAESAR".
        """
        return {self.forms[match[0]] for match in self._pattern.finditer(fold(text))}

    @functools.cached_property
    def _alone(self) -> dict[str, re.Pattern[str]]:
        """A pattern for every term: any of its forms."""
        forms: dict[str, list[str]] = {}
        for form, term in self.forms.items():
            forms.setdefault(term, []).append(_bounded(form))
        return {term: re.compile("|".join(patterns)) for term, patterns in forms.items()}

    def held(self, text: str) -> set[str]:
        """The terms that a text holds anywhere, also inside longer ones: who writes 密钥管理 has not lost 密钥."""
        folded = fold(text)
        return {term for term, pattern in self._alone.items() if pattern.search(folded)}


def _bounded(form: str) -> str:
    """A pattern for a term whose Latin ends touch no other letter or digit."""
    before = "(?<![a-z0-9])" if re.match("[a-z0-9]", form) else ""
    return before + re.escape(form) + ("(?![a-z0-9])" if re.search("[a-z0-9]$", form) else "")


def read_terms(source: str) -> TermList | None:
    """The list that the setting `terms` names; None for "".

    Raises:
        InputError: no such list or file, not UTF-8, without terms, or a form that belongs to two terms.
    """
    if not source:
        return None
    path = _HERE / "terms" / f"{source}.txt" if source in SHIPPED_TERMS else user_path(source)
    known = f"{', '.join(SHIPPED_TERMS)}, or a file"
    forms: dict[str, str] = {}
    for number, parts in _lines(path, "terms", known):
        for form in parts:
            if forms.setdefault(fold(form), parts[0]) != parts[0]:
                raise InputError(
                    f"{path}, line {number}: {form!r} belongs to {forms[fold(form)]!r} and to {parts[0]!r}.",
                    "each form with one term.",
                    "remove one of the two.",
                )
    return TermList(path.stem if source in SHIPPED_TERMS else path.name, forms, sha256_file(path))


def read_prompts(source: str) -> list[dict[str, str]]:
    """{"prompt", "reference"} of each line of a prompts file; "" = the shipped counselling prompts.

    Raises:
        InputError: no such file, not UTF-8, without prompts, or a line of more than two parts.
    """
    path = user_path(source) if source else _HERE / "prompts" / "counselling.txt"
    prompts = []
    for number, parts in _lines(path, "prompts_file", "a file"):
        if len(parts) > 2:
            raise InputError(
                f"{path}, line {number}: {len(parts)} parts.", "a prompt, a TAB, a reference.", "correct the line."
            )
        prompts.append({"prompt": parts[0], "reference": parts[1] if len(parts) == 2 else ""})
    return prompts


def _lines(path: Path, setting: str, known: str) -> Iterator[tuple[int, list[str]]]:
    """Number and TAB-separated parts of each line that is neither empty nor a comment."""
    if not path.is_file():
        raise InputError(f"{setting}: {path}, which is no file.", f"{known}.", f"correct {setting}.")
    text = utf8(path, path.read_bytes()).removeprefix("\ufeff")
    filled = False
    for number, line in enumerate(text.splitlines(), 1):
        parts = [part.strip() for part in line.split("\t")]
        parts = [part for part in parts if part]
        if parts and not parts[0].startswith("#"):
            filled = True
            yield number, parts
    if not filled:
        raise InputError(f"{path} holds nothing but comments.", "one entry a line.", f"fill it, or clear {setting}.")
