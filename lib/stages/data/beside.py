"""What stands beside the data and names the classes: cards, descriptions, lists; what says none is told."""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lib.errors import InputError
from lib.runs.files import read_json, utf8
from lib.stages.data.data_files import (
    LABEL,
    NAMES,
    add_classes,
    class_names,
    classes_of,
    says_classes,
    tells_of_data,
    words_of,
)
from lib.stages.data.labels import Read, is_name, label_reader


def card_of(folder: Path) -> dict[str, Any] | None:
    """The head of a repository's README.md; empty where there is none, None where it cannot be read."""
    card = next(iter(sorted(folder.glob("[Rr][Ee][Aa][Dd][Mm][Ee].[Mm][Dd]"))), None)
    text = card.read_text(encoding="utf-8-sig", errors="replace") if card is not None and card.is_file() else ""
    head = _HEAD.match(text)
    content = _yaml(head[1]) if head else {}
    return None if content == "" else content if isinstance(content, dict) else {}


_HEAD = re.compile(r"---\n(.*?)\n---", re.DOTALL)


def _yaml(text: str) -> Any:
    """What YAML says; an empty text where it cannot be read."""
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            return ""  # aliases of aliases stand for more than any memory holds
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError, LookupError, AttributeError):  # of tags such as !!int ''
        return ""


def classes_beside(
    path: Path, own: Collection[Path] = (), label_names: Sequence[str] = ()
) -> tuple[dict[str, list[str]], Counter[str]]:
    """Names of classes by column, as cards, descriptions and lists beside the data say them; what says none.

    A card may stand one folder above the data.

    Args:
        own: the files of the data.
        label_names: of the run, where it has labels that may be numbers: sentences are read that say which each has.
    """
    folder = path if path.is_dir() else path.parent
    read, found, unread = label_reader(label_names), dict[str, list[str]](), Counter[str]()

    def add(more: Mapping[str, list[str]]) -> None:
        for column, names in more.items():
            known = [number for name in names if (number := read(name)) is not None]
            words = [label_names[number] for number in known] if len(set(known)) == len(names) else names
            for other, others in list(found.items()):
                if LABEL in (column, other) and others != words and sorted(others) == sorted(words):
                    found[other] = []
            add_classes(found, {column: words})

    for place in (folder, folder.parent):
        if not found:
            card = card_of(place)
            unread["not used: the head of README.md, which is no YAML (aliases are not read)"] += card is None
            add(classes_of((card or {}).get("dataset_info")))
            for name in ("dataset_info.json", "dataset_infos.json"):
                with contextlib.suppress(InputError, OSError):
                    add(classes_of(read_json(place / name)))
    for file in sorted(folder.glob("*")):
        lists = says_classes(file.stem) or file.name.lower() in NAMES["class_files"]
        tells = tells_of_data(file) or file.suffix.lower() in (".yaml", ".yml")  # never data
        if file in (path, *own) or not (lists or tells) or not file.is_file():
            continue
        known = file.suffix.lower() in _SUFFIXES
        names, says = _told(file, lists, label_names, read) if known else ([], lists or file.stem.lower() in _METADATA)
        if lists and label_names and set(words_of(file.stem)) & _CLASSES <= _VAGUE:  # lists of anything are called so
            names = [words for words in names if any(read(word) is not None for word in words)]
        for words in names:
            add({LABEL: words})
        if not names and says and (lists or label_names):
            what = "the file {!r} beside the data" if lists else "what the file {!r} says of labels"
            unread[f"not used: {what.format(file.name[:60])}"] += 1
    for file in [] if found else sorted(folder.parent.glob("*")):
        if file.name.lower() in NAMES["class_files"] and says_classes(file.stem):
            unread[f"not used: the file {f'../{file.name}'!r}, in the folder above the data"] += 1
    return found, unread


_SUFFIXES = (".txt", ".names", ".json", ".csv", ".tsv", ".yaml", ".yml", ".md", ".rst", "")
"""Of files that are read."""
_METADATA = ("meta", "metadata", "schema")
_PAIR = re.compile(r"""['"]?(\d+)['"]?[\s,;:=]{1,9}(.{1,99})|(.{1,99}?)[\s,;:=]{1,9}['"]?(\d+)['"]?""")
"""A line with a class and its number."""
_LARGEST = 1 << 20
"""Bytes of a file that is looked through for names of classes."""


def _told(file: Path, lists: bool, label_names: Sequence[str], read: Read) -> tuple[list[list[str]], bool]:
    """The orders of classes that a file says, and whether it says anything of them.

    Args:
        lists: whether it is called so; else it tells of data, and of any other names only those of our labels count.
    """
    try:
        if file.stat().st_size > _LARGEST:
            return [], lists
        text = utf8(file, file.read_bytes()).lstrip("\ufeff").replace("\r\n", "\n")
    except (InputError, OSError):
        return [], True
    if file.suffix.lower() in (".json", ".yaml", ".yml"):
        value = _yaml(text) if file.suffix.lower() != ".json" else _json(text)
        names, says = _named_in(value, read, lists)
        return names, says or lists
    head = _HEAD.match(text)
    names, says = _named_in(_yaml(head[1]) if head else None, read, False)
    if prose := classes_in_text(text[head.end() :] if head else text, label_names, read):
        names.append(prose)
    elif not names and lists and (listed := _listed(text, file.suffix.lower())):
        names.append(listed)
    return names, says or lists or _SPEAKS.search(text) is not None


def _json(text: str) -> Any:
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)


def _named_in(value: Any, read: Read, lists: bool) -> tuple[list[list[str]], bool]:
    """The lists of classes in what a file holds, and whether a key speaks of any."""
    found, says, todo = [], False, [("", value, lists)]
    for key, part, classes in todo:
        sure = classes and (lists or not _CLASSES & set(words_of(key)) <= set(NAMES["other_words"]))
        if classes and (names := class_names(part)) and (sure or all(read(name) is not None for name in names)):
            found.append(names)
        elif len(todo) < 1000 and isinstance(part, dict) and "features" not in part:  # those are of columns
            todo += [(str(name), inner, says_classes(str(name))) for name, inner in part.items()]
        elif len(todo) < 1000 and isinstance(part, list):
            todo += [(key, inner, False) for inner in part]
        says = says or sure or (key == "name" and isinstance(part, str) and says_classes(part))
    return found, says


def _listed(text: str, suffix: str) -> list[str]:
    """The names of classes that a text lists, one a line, with their numbers or in order."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    pairs = [pair for line in lines if (pair := _PAIR.fullmatch(line))]
    pairs = pairs if len({pair[1] or pair[4] for pair in pairs}) == len(pairs) else []  # else rows of a table
    numbered = class_names({pair[1] or pair[4]: (pair[2] or pair[3]).strip("\"' ") for pair in pairs})
    if numbered and len(pairs) in (len(lines), len(lines) - 1):  # a line may be the header
        return numbered
    return (
        class_names(lines) if suffix in (".txt", ".names") and not any(line.isdecimal() for line in lines) else []
    )  # one a row


_BETWEEN = r"(?:[^\w\n,;，；、。%]|{}){{0,24}}?".format("|".join(NAMES["between"]))
"""What may stand between a number and what it means."""
_NUMBER, _CLASS = r"(?<![a-z\d.])[01](?![a-z\d%]|\.\d)", "(?:label|class|标签|类别)"
_SPEAKS = re.compile(f"{_NUMBER}.*{_CLASS}|{_CLASS}.*{_NUMBER}", re.IGNORECASE)
"""A line of a text that seems to say what a number means."""
_CLASSES = frozenset(NAMES["class_words"])
_VAGUE = frozenset((*NAMES["other_words"], "class"))


def classes_in_text(text: str, label_names: Sequence[str], read: Read) -> list[str]:
    """The labels in the order of the numbers that a text gives them: `0: 负面, 1: 正面`, `negative (0)`, a table.

    Nothing where it does not give each label one number of its own.
    """
    known = {word for pair in NAMES["poles"] for side in pair for word in side} | set(label_names)
    known = {word for word in known if read(word) is not None and is_name(word)}
    if not known:
        return []
    words = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
    name = rf"(?<![a-z])({words})(?![a-z])"
    number = r"(?<![\d.a-z])(\d)(?![\d.%a-z])"
    orders = []
    for first, second in ((number, name), (name, number)):
        pairs = {
            pair if first == number else pair[::-1] for pair in re.findall(rf"(?i){first}{_BETWEEN}{second}", text)
        }
        told = {(int(number), read(name)) for number, name in pairs if int(number) < len(label_names)}
        if len(told) == len({n for n, _ in told}) == len({meaning for _, meaning in told}) == len(label_names):
            orders.append([label_names[meaning] for _, meaning in sorted(told)])
    return orders[0] if orders and all(order == orders[0] for order in orders) else []
