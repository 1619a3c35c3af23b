"""The catalogues of Chinese messages: collect what is to be translated, say what is not.

python -m scripts.messages            bring lib/locale/zh_CN/*.po up to date with the English of today
python -m scripts.messages --missing  only say what is missing or fuzzy; exit code 1 if anything is
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import yaml
from babel.messages import Catalog
from babel.messages.pofile import write_po

from lib.language import (
    CHINESE,
    COMMANDS,
    HELP,
    LABEL,
    MESSAGE,
    PAGES,
    PHONE,
    STORED,
    WORD,
    catalogue,
    catalogue_file,
    code_messages,
    template_messages,
)
from lib.runs.files import PROJECT, atomic_path
from lib.runs.render import message_name
from scripts import command_messages

LIB = PROJECT / "lib"
WORDS = LIB / "locale" / "words.yaml"
"""Words of tables and figures that stand in Python code or come out of products, and messages that products keep."""

_PAPERS = (
    "stages/package/templates/*.j2",
    "pipeline/templates/*.md.j2",
    "stages/export/*.md.j2",
    "stages/finetune/*.md.j2",
    "stages/merge/*.md.j2",
)
_TEMPLATES = ("report/templates/sentences/*.j2", "stages/compare/templates/*.j2", *_PAPERS)
"""Templates of which every macro, and every part of what stands outside of macros, is a message."""
_CODE = ("stages/package/scripts/*.py", "pipeline/templates/*.py.j2")
"""Files of which docstrings and comments are messages."""
_PHONE_PAGE = LIB / "stages" / "package" / "web"
_PAGES = "report/templates/pages/*.j2"
_LABELS = {"xlabel", "ylabel", "label", "title", "set_xlabel", "set_ylabel", "set_title"}


def messages(part: str = PAGES) -> Iterator[tuple[str, str]]:
    """(context, English) of everything that is to be translated, in the order of the sources."""
    yield from command_messages.messages() if part == COMMANDS else _of_pages()


def _of_pages() -> Iterator[tuple[str, str]]:
    for pattern in _TEMPLATES:
        for path in sorted(LIB.glob(pattern)):
            yield from template_messages(path.read_text(encoding="utf-8"), message_name(path)).items()
    for pattern in _CODE:
        for path in sorted(LIB.glob(pattern)):
            yield from ((message_name(path), text) for text in code_messages(path.read_text(encoding="utf-8")))
    yield from ((PHONE, text) for text in _of_phone_page())
    for path in sorted(LIB.glob(_PAGES)):
        for word in re.findall(r"_\('((?:[^'\\]|\\.)+)'\)", path.read_text(encoding="utf-8")):
            yield WORD, word
    for path in sorted((PROJECT / "notebooks").glob("*.ipynb")):
        yield from _of_notebook(path)
    for text in _words():
        yield WORD, text
    for text in yaml.safe_load(WORDS.read_text(encoding="utf-8"))["stored"]:
        yield STORED, text


def _of_phone_page() -> Iterator[str]:
    """Elements that bear `data-t`, and the texts of t('…')."""
    yield from re.findall(r"<[^>]* data-t>([^<]+)<", (_PHONE_PAGE / "index.html").read_text(encoding="utf-8"))
    for path in sorted(_PHONE_PAGE.glob("*.js")):
        yield from re.findall(r"\bt\('([^']+)'", path.read_text(encoding="utf-8"))


def _of_notebook(path: Path) -> Iterator[tuple[str, str]]:
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "markdown":
            for text in (cell.source, cell.metadata.get("untrained", ""), cell.metadata.get("full", "")):
                if text.strip():
                    yield f"notebooks/{path.stem}", text.strip()
        elif not {"parameters", "remove_cell"} & set(cell.metadata.get("tags", [])):
            for text in (cell.source, cell.metadata.get("untrained", ""), cell.metadata.get("full", "")):
                if text.startswith("# "):
                    yield "code", text.splitlines()[0].removeprefix("# ").strip()


def _words() -> Iterator[str]:
    columns = yaml.safe_load((LIB / "report" / "columns.yaml").read_text(encoding="utf-8"))
    for entry in columns.values():
        yield from filter(None, entry["en"])
    for table in yaml.safe_load((LIB / "report" / "tables.yaml").read_text(encoding="utf-8")).values():
        yield from (key for key in table if key not in columns and "{" not in key and " " in key)
    for path in sorted((LIB / "report").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            values = [keyword.value for keyword in node.keywords if keyword.arg in _LABELS]
            values += node.args if getattr(node.func, "attr", "") in _LABELS else []
            for value in values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str) and value.value.strip():
                    yield value.value
    yield from yaml.safe_load(WORDS.read_text(encoding="utf-8"))["words"]


_WITHOUT_PLACE = (WORD, "code", HELP, LABEL, MESSAGE)
"""Contexts that do not say where a message stands."""


def updated(part: str = PAGES) -> Catalog:
    """Today's messages with the translations that there are; a translation of a changed message is fuzzy."""
    fresh = Catalog()
    for context, text in messages(part):
        fresh.add(text, context=context)
    there = catalogue_file(CHINESE, part).is_file()
    found = catalogue(CHINESE, part) if there else Catalog(locale="zh_CN", project="workbook")
    found.update(fresh, no_fuzzy_matching=True, update_creation_date=False)
    former = {}
    for message in found.obsolete.values():
        former.setdefault(message.context, []).append(message)
    for message in found:  # a sentence keeps its place: its former translation is a beginning
        if message.id and not message.string and message.context not in _WITHOUT_PLACE and former.get(message.context):
            message.string = former[message.context].pop(0).string
            message.flags.add("fuzzy")
    found.obsolete.clear()
    return found


def unfinished(found: Catalog) -> list[str]:
    """What has no translation, or one of another English, as "context: English"."""
    return [f"{m.context}: {m.id}" for m in found if m.id and (not m.string or m.fuzzy)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--missing", action="store_true", help="change nothing")
    arguments = parser.parse_args()
    incomplete = False
    for part in (PAGES, COMMANDS):
        found = updated(part)
        left = unfinished(found)
        if not arguments.missing:
            with atomic_path(catalogue_file(CHINESE, part)) as path, path.open("wb") as file:
                write_po(file, found, width=120, omit_header=False)
        for line in left:
            print(line.replace("\n", " ")[:160])
        print(f"{part}: {len(left)} of {len(found)} messages are missing or fuzzy", file=sys.stderr)
        incomplete |= bool(left)
    sys.exit(1 if incomplete and arguments.missing else 0)


if __name__ == "__main__":
    main()
