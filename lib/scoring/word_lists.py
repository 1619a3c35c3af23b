"""Lists of terms and of prompts, read from a file, and terms found in a text."""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lib import parameter_file
from lib.errors import InputError, refusal
from lib.progress import say
from lib.runs.files import sha256_file, user_path, utf8
from lib.settings import Settings

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
    for number, (term, *more) in _lines(path, "terms", known):
        for form in (term, *more):
            if (other := forms.setdefault(fold(form), term)) != term:
                raise refusal("scoring/form-of-two-terms", path=path, number=number, form=form, other=other, term=term)
    return TermList(path.stem if source in SHIPPED_TERMS else path.name, forms, sha256_file(path))


SHIPPED_PROMPTS = tuple(sorted(path.stem for path in (_HERE / "prompts").glob("*.txt")))
"""Names of the sets of prompts that come with the workbook."""


def prompt_set(settings: Settings) -> str:
    """The set or file of prompts of a run: `prompts_file`, else the shipped set of the domain that `terms` names."""
    return settings.prompts_file or (settings.terms if settings.terms in SHIPPED_PROMPTS else "")


def read_prompts(source: str, setting: str = "prompts_file") -> list[dict[str, str]]:
    """{"prompt", "reference"} of each line of a prompts file, or of a shipped set; none for "".

    Raises:
        InputError: no such file or set, not UTF-8, without prompts, or a line of more than two parts.
    """
    if not source:
        return []
    path = _HERE / "prompts" / f"{source}.txt" if source in SHIPPED_PROMPTS else user_path(source)
    prompts: list[dict[str, str]] = []
    for number, parts in _lines(path, setting, f"a file, or one of {', '.join(SHIPPED_PROMPTS)}"):
        if len(parts) > 2:
            raise refusal("scoring/too-many-parts", path=path, number=number, count=len(parts))
        if not prompts and [fold(part) for part in parts] in _HEADS:
            raise refusal("scoring/no-list", path=path, number=number, line=parts)
        for part in parts:
            parameter_file.refuse_escape("prompt", part, f"{path}, line {number}")
        prompts.append({"prompt": parts[0], "reference": parts[1] if len(parts) == 2 else ""})
    return prompts


_HEADS = (["prompt", "reference"], ["question", "answer"], ["question", "reference"], ["prompt", "answer"])
"""First lines that name the columns of a table."""
_OTHER_FORMS = (".csv", ".json", ".jsonl", ".parquet")
_END = re.compile(r"\r\n|\r|\n")
"""Other ends of lines that Python knows look like nothing."""


def _lines(path: Path, setting: str, known: str) -> Iterator[tuple[int, list[str]]]:
    """Number and TAB-separated parts of each line that is neither empty nor a comment; of a user's file how many are.

    Raises:
        InputError: no such file, not UTF-8, nothing in it; JSON or a table; a line whose first part is empty.
    """
    if not path.is_file():
        raise InputError(f"{setting}: {path}, which is no file.", f"{known}.", f"correct {setting}.")
    text = utf8(path, path.read_bytes()).removeprefix("\ufeff")
    refuse_other_forms(path, text)
    lines = [(number, line) for number, line in enumerate(_END.split(text), 1) if line.strip()]
    entries = [(number, line) for number, line in lines if not line.lstrip().startswith("#")]
    if not entries:
        raise InputError(f"{path} holds nothing but comments.", "one entry a line.", f"fill it, or clear {setting}.")
    if len(entries) < len(lines) and _HERE not in path.parents:
        say(f"{path}: {len(entries)} lines; left out as comments, which begin with #: {len(lines) - len(entries)}")
    for number, line in entries:
        first, *others = map(str.strip, line.split("\t"))
        if not first:
            raise refusal("scoring/no-first-part", path=path, number=number)
        yield number, [first, *filter(None, others)]


def refuse_other_forms(path: Path, text: str) -> None:
    """Refuse a table or JSON where one entry a line is read: names of columns and braces would be taken for entries.

    Raises:
        InputError: it is one.
    """
    if path.suffix.lower() in _OTHER_FORMS or _begins_with_json(text):
        raise refusal("scoring/no-list", path=path, number=1, line=_END.split(text)[0][:80])


def _begins_with_json(text: str) -> bool:
    """Whether the first line, or more, is an object or a list of JSON."""
    try:
        value, end = json.JSONDecoder().raw_decode(text.lstrip())
    except (ValueError, RecursionError):
        return False
    return isinstance(value, (dict, list)) and not _END.split(text.lstrip()[end:])[0].strip()
