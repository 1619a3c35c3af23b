"""The language of pages, figures, tables, papers and commands: English, or what the catalogues of another one say.

A message is what stands in a source file: the body of a macro or a whole text in a Jinja template, a cell of a
notebook, a word of a table or figure. Its context says where it stands (`report/evaluate.wilson`,
`notebooks/03_evaluate`, `word`), so that one English text may have two translations. `python -m scripts.messages`
collects all messages into the catalogues and marks those whose English has changed as fuzzy; a test fails on fuzzy and
missing ones, and on values that only one of the two languages uses.

What a command says (help, refusals, lines on stderr) stands in a catalogue of its own. A refusal is made in English,
as products and JSON keep it, and told in the language of the process where it is shown (`told`).
"""

from __future__ import annotations

import contextlib
import functools
import locale
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from babel.messages import Catalog

VARIABLE = "WORKBOOK_LANGUAGE"
"""Environment variable: the language of this process and of all that it starts."""
ENGLISH, CHINESE, AUTO = "en", "zh", "auto"
TAGS = {ENGLISH: "en", CHINESE: "zh-CN"}
"""Of HTML, by language."""
PAGES, COMMANDS = "workbook", "commands"
"""The two catalogues of a language: pages, figures, papers and notebooks; what the command line says."""
_FOLDERS = {CHINESE: Path(__file__).with_name("locale") / "zh_CN"}
WORD = "word"
"""Context of single words and short phrases of tables and figures."""
HELP, LABEL, MESSAGE = "help", "label", "message"
"""Contexts of `COMMANDS`: texts that are said as they stand; heads of columns, keys and short values; sentences with
{values}."""
TEMPLATES_OF_COMMANDS = "cli/"
"""Beginning of the contexts of templates whose messages are in `COMMANDS`, too."""


def language() -> str:
    """Of this process: by `VARIABLE`, else by the locale."""
    wanted = os.environ.get(VARIABLE, AUTO)
    return wanted if wanted in TAGS else _of_locale()


def _of_locale() -> str:
    """As gettext looks for it; C and POSIX are English."""
    names = (os.environ.get(name) for name in ("LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG"))
    name = next(filter(None, names), None) or locale.getlocale()[0] or ""
    return CHINESE if name.lower().startswith(("zh", "chinese")) else ENGLISH


def use(wanted: str) -> None:
    """From now on; `AUTO` leaves what the environment says."""
    if wanted in TAGS:
        os.environ[VARIABLE] = wanted


def catalogue(wanted: str, part: str = PAGES) -> Catalog:
    """The messages of a language and their translations, as Babel reads them."""
    from babel.messages.pofile import read_po

    with catalogue_file(wanted, part).open("rb") as file:
        return read_po(file, locale=_FOLDERS[wanted].name)


def catalogue_file(wanted: str, part: str) -> Path:
    """Where a catalogue lies."""
    return _FOLDERS[wanted] / f"{part}.po"


_ESCAPE = re.compile(r"\\(.)")
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r"}


def _unquoted(lines: str) -> str:
    """A text of a catalogue: quoted, over one line or several."""
    text = "".join(line[1:-1] for line in lines.rstrip().split("\n"))
    return _ESCAPE.sub(lambda escape: _ESCAPED.get(escape[1], escape[1]), text) if "\\" in text else text


@functools.cache
def _translations(wanted: str, part: str = PAGES) -> dict[tuple[str, str], str]:
    """By context and English. Babel would take longer to read them than most commands take."""
    if wanted not in _FOLDERS:
        return {}
    found = {}
    for block in catalogue_file(wanted, part).read_text(encoding="utf-8").split("\n\n"):
        flags, _, entry = block.partition("msgctxt ")
        context, _, texts = entry.partition("\nmsgid ")
        message, _, other = texts.partition("\nmsgstr ")
        if other and "fuzzy" not in flags and (said := _unquoted(other)):
            found[_unquoted(context), _unquoted(message)] = said
    return found


@contextlib.contextmanager
def speaking(wanted: str) -> Iterator[None]:
    """For a while another language."""
    former = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = wanted
    try:
        yield
    finally:
        os.environ.pop(VARIABLE) if former is None else os.environ.update({VARIABLE: former})


def translated(message: str, context: str = WORD) -> str:
    """The message in the language of this process; as it is where that is English."""
    of_commands = context in (HELP, LABEL, MESSAGE) or context.startswith(TEMPLATES_OF_COMMANDS)
    known = _translations(language(), COMMANDS) if of_commands else _translations(language())
    return known.get((context, message), message)


STORED = "stored"
"""Context of messages of pages that products keep in English, with {values}."""


PHONE = "phone"
"""Context of the words of a package's phone page, which speaks the language of the phone's browser."""


def words_of_phones(texts: Iterable[str] = ()) -> dict[str, dict[str, str]]:
    """{language: {English: translation}} of the phone page, with further texts that a package holds."""
    found = {message: other for (context, message), other in _translations(CHINESE).items() if context == PHONE}
    with speaking(CHINESE):
        return {CHINESE: found | {text: retold(text) for text in texts}}


def retold(text: str) -> str:
    """A word of the list, or a message that a product keeps in English, in the language of this process; as it is where
    none fits."""
    if (word := translated(text)) != text:
        return word
    return _said_by(text, STORED) or text


def told(text: str) -> str:
    """What a command says, in the language of this process: a help text, a sentence with values, or several sentences
    one behind another; as it is where no message fits, for no sentence is half in one language and half in another."""
    return _told(text) or text


def _told(text: str) -> str | None:
    if not text or language() == ENGLISH:
        return text
    if (whole := _sentence(text)) is not None:
        return whole
    for end in re.finditer(r"(?<=[.)?]) ", text):
        first, rest = _sentence(text[: end.start()]), text[end.end() :]
        if first is not None and (other := _told(rest)) is not None:
            return sentences((first, other))
    return None


def _sentence(text: str) -> str | None:
    """A message, with the full stop that it has or has not in the catalogue; None where it is none."""
    if (said := _message(text)) is not None:
        return said
    if text.endswith("."):
        return None if (said := _message(text[:-1])) is None else f"{said}。"
    return None if (said := _message(f"{text}.")) is None else said.removesuffix("。")


def _message(text: str) -> str | None:
    whole = translated(text, HELP)
    return whole if whole != text else _said_by(text, MESSAGE)


def _said_by(text: str, context: str) -> str | None:
    """The translation of the message of a context that the text is, with its values; None where it is none."""
    for parts, message, other in _messages(language(), context):
        if all(part in text for part in parts) and (found := _pattern(message).fullmatch(text)):
            pieces = [(literal, name, form or "") for literal, name, form, _ in Formatter().parse(other)]
            if context == MESSAGE and _swallows(found, pieces):
                continue
            values = ["" if name is None else _value(found[name], form) for _, name, form in pieces]
            if None not in values:
                return "".join(f"{literal}{value}" for (literal, *_), value in zip(pieces, values, strict=True))
    return None


_SENTENCES = re.compile(r"\. [A-Z]|\bFound\b|\b(Expected|Do this):")
_PROSE = re.compile(
    r"""(?<!['"\w]) ([a-z]{2,}\ ([a-z]{2,}\ )+[a-z]{2,} | (the|an?|is|are|of|that|which)\ [a-z]{2,})""", re.X
)
_OF_LIBRARIES = {"damaged", "error", "message", "msg", "said", "strerror", "why"}
"""Names of values that are a library's words."""


def _swallows(found: re.Match[str], pieces: list[tuple[str, str | None, str]]) -> bool:
    """Whether a value that would stay as it is holds words of ours: the text is of another message, or of several.

    What a library says, and what stands in quotation marks, may read like an English sentence.
    """
    for name in {name for _, name, form in pieces if name and not form}:
        value, quoted = found[name], found[name][:1] in ("'", '"') and found[name][-1:] == found[name][:1]
        if value.endswith(".") and found.end(name) == len(found.string):  # the full stop is the sentence's
            return True
        if name not in _OF_LIBRARIES and (_SENTENCES.search(value) or (not quoted and _PROSE.search(value))):
            return True
    return False


def _value(value: str, form: str) -> str | None:
    """A value in a translation: as it is; {value:words} as words of the list, one or several joined by "and";
    {value:told} as a message itself, and None where it is none; {value:said} as a message where it is one."""
    if form in ("told", "said"):
        return _told(value) if form == "told" else told(value)
    return "、".join(map(retold, value.split(" and "))) if form == "words" else value


@functools.cache
def _messages(wanted: str, context: str) -> list[tuple[list[str], str, str]]:
    """The texts between the values of messages, these and their translations: those that say most come first."""
    known = _translations(wanted, COMMANDS if context == MESSAGE else PAGES)
    found = [
        ([literal for literal, *_ in Formatter().parse(message)], message, other)
        for (where, message), other in known.items()
        if where == context
    ]
    return sorted(found, key=lambda entry: -sum(map(len, entry[0])))


@functools.cache
def _pattern(message: str) -> re.Pattern[str]:
    """What a message with {values} can be."""
    made = ""
    for literal, name, *_ in Formatter().parse(message):
        made += re.escape(literal) + (f"(?P<{name}>{_OF_NAMES.get(name, '.*?')})" if name else "")
    return re.compile(made, re.S)


_OF_NAMES = {"number": r"[\d,]+"}
"""What a value of a certain name can be."""


def sentences(parts: Iterable[str]) -> str:
    """Sentences one behind another, in whichever language they are; empty ones left out."""
    return re.sub(r"(?<=[。！？；）]) ", "", " ".join(filter(None, parts)))


_MACRO = re.compile(r"(\{%-?\s*macro\s+(\w+)\(.*?\)\s*-?%\})(.*?)(\{%-?\s*endmacro\s*-?%\})", re.S)
_COMMENT = re.compile(r"\{#.*?#\}", re.S)
_HEADING = re.compile(r"#{2,3} +([^{(\n]*[^{(\s])")
_OPENS = re.compile(r"\{%-?\s*(?:if|for|filter|call|set\s+\w+\s*-?%\})")
_CLOSES = re.compile(r"\{%-?\s*end(?:if|for|filter|call|set)\b")


def template_messages(text: str, name: str) -> dict[str, str]:
    """The messages of a Jinja template by context: of NAME.MACRO a macro, of NAME what stands outside of macros before
    the first heading, of NAME § HEADING what stands below one (the statement that it depends on included)."""
    found = {f"{name}.{macro[2]}": macro[3].strip() for macro in _MACRO.finditer(text)}
    found |= {context: part.strip() for context, part in _parts(_outside(text), name)}
    return {context: message for context, message in found.items() if re.search(r"[^\W\d_]", _said(message))}


def _outside(text: str) -> str:
    return _COMMENT.sub("", _MACRO.sub("", text)).strip()


def _parts(outside: str, name: str) -> list[tuple[str, str]]:
    """(context, text) of the parts of what stands outside of macros; a part is whole: its statements end in it."""
    parts, depth = [(name, [])], 0
    lines = outside.splitlines(keepends=True)
    for place, line in enumerate(lines):
        heading = _HEADING.match(line) or (_OPENS.match(line) and _HEADING.match("".join(lines[place + 1 : place + 2])))
        if heading and not depth:
            parts.append((f"{name} § {heading[1]}", []))
        depth += len(_OPENS.findall(line)) - len(_CLOSES.findall(line))
        parts[-1][1].append(line)
    return [(context, "".join(part)) for context, part in parts]


def _said(message: str) -> str:
    """What a template says of itself: without its statements and values, unless these hold words."""
    statements = re.findall(r"\{[{%].*?[}%]\}", message, re.S)
    words = [word for statement in statements for word in re.findall(r"\"([^\"%{]*[A-Za-z]{3,} [^\"]*)\"", statement)]
    return re.sub(r"\{[{%].*?[}%]\}", " ", message, flags=re.S) + " ".join(words)


def translated_template(text: str, name: str) -> str:
    """A Jinja template in the language of this process."""
    if not _translations(language()):
        return text

    def of_macro(macro: re.Match[str]) -> str:
        body = macro[3].strip()
        return f"{macro[1]}{macro[3].replace(body, translated(body, f'{name}.{macro[2]}'), 1)}{macro[4]}"

    outside = _outside(text)
    other = "".join(_translated_part(part, context) for context, part in _parts(outside, name))
    if other == outside:
        return _MACRO.sub(of_macro, text)
    macros = "\n".join(of_macro(macro) for macro in _MACRO.finditer(text))
    return f"{macros}\n{other}\n" if macros else f"{other}\n"


def _translated_part(part: str, context: str) -> str:
    message = part.strip()
    return part.replace(message, translated(message, context), 1) if message else part


_SAYING = re.compile(
    r'"""(?P<doc>.*?)"""|(?:^ *|  )# (?P<comment>[^\n]+)$|\bsaid\(\s*(?P<quote>["\'])(?P<said>[^"\'\n]+)(?P=quote)',
    re.S | re.M,
)


def code_messages(text: str) -> list[str]:
    """What a Python file, or a template of one, says: docstrings and comments to who reads it, and to who runs it the
    messages of its function `said`; each once."""
    return list(dict.fromkeys(map(_said_in_code, _SAYING.finditer(text))))


def _said_in_code(found: re.Match[str]) -> str:
    return (found["doc"] or found["comment"] or found["said"]).strip()


def translated_code(text: str, name: str) -> str:
    """A Python file, or a template of one, with docstrings, comments and messages in the language of this process."""

    def of(found: re.Match[str]) -> str:
        message = _said_in_code(found)
        return found[0].replace(message, translated(message, name), 1)

    return _SAYING.sub(of, text)
