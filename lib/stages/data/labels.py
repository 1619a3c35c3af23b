"""What a label means (by its name, by its number, by the columns beside it), and the options of a question: where a
table keeps them, and how they are asked. No question is asked without them."""

from __future__ import annotations

import ast
import contextlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lib.errors import InputError, refusal
from lib.runs.files import read_json, utf8
from lib.settings import folded
from lib.stages.data.data_files import (
    LABEL,
    NAMES,
    DamagedError,
    Rows,
    add_classes,
    alone,
    class_names,
    classes_of,
    says_classes,
    tells_of_data,
    words_of,
)

Read = Callable[[Any], int | None]


def label_reader(label_names: Sequence[str]) -> Read:
    """A function from a raw label to its number; None when it is not understood.

    A value is a label's name first (`folded`: true and 1.0 are names, too), then, unless a name is a number, one of
    0..k-1. Of two labels true is 1; where both names are words of a pair (names.yaml: poles) its other words tell,
    and where one alone is, none of them is understood.
    """
    own = {folded(name): number for number, name in enumerate(label_names)}
    pairs = NAMES["poles"] if len(own) == 2 else []
    known = any(name in side for name in own for pair in pairs for side in pair)
    words = {"false": 0, "true": 1} if pairs and not known else {}
    for pair in pairs:
        sides = [side for name in own for side in pair if name in side]  # of the first name, of the second
        if sides in (pair, pair[::-1]):
            words |= {word: number for number, side in enumerate(sides) for word in side}
    if not any(name.isdecimal() for name in own):
        words |= {str(number): number for number in range(len(own))}
    words |= own
    return lambda value: words.get(folded(value))


def is_name(value: Any) -> bool:
    """Whether a label is a word, not the number of one."""
    return isinstance(value, str) and not re.fullmatch(r"[+-]?[0-9.]*", folded(value))


def meanings(
    table: Rows, label: str, others: Sequence[str], read: Read, chosen: bool, where: str
) -> tuple[dict[str, int], list[str]]:
    """What columns of words beside the numbers of labels say that these mean, and which columns those are.

    A column does that whose every word is a label, one for each number; nothing is returned for numbers that mean what
    they mean without it.

    Args:
        chosen: whether the user chose the column of labels: then others that contradict it are only not used.

    Raises:
        InputError: such columns contradict one another, or two columns of labels do.
    """
    meant: dict[str, int] = {}
    used: list[str] = []
    known = (*NAMES["class_name_columns"], *NAMES["label_columns"], f"{label}_text".lower())
    for column in others:
        cells = [(alone(row.get(label)), alone(row.get(column))) for row in table]
        cells = [pair for pair in cells if not any(cell is None or cell == "" for cell in pair)]
        if not cells or any(read(cell) is None for _, cell in cells):
            continue
        words = all(is_name(cell) for _, cell in cells)
        pairs = {(folded(value), read(cell)) for value, cell in cells if not is_name(value)} if words else set()
        one_each = 0 < len(pairs) == len(dict(pairs)) == len({meaning for _, meaning in pairs})
        if one_each and all(meant.get(number, meaning) == meaning for number, meaning in pairs):
            meant |= dict(pairs)
            used.append(column)
        elif (
            not chosen
            and (one_each or column.strip().lower() in known)
            and (pairs or label.strip().lower() not in NAMES["label_columns"][:3])
            and (one_each or any(read(value) != read(cell) for value, cell in cells))
        ):
            raise refusal("data/columns-contradict", where=where, columns=", ".join(map(repr, [label, *used, column])))
    return (meant if any(read(number) != meaning for number, meaning in meant.items()) else {}), used


# Options of a question.

_COLUMN = re.compile(r"(|op|opt|option|choice|选项)[ _-]?([a-z]|(?<=[a-z _项-])[0-9])")
"""A column for one option: A, opa (MedMCQA), option_a, optionA, choice1, 选项A."""
_LETTERED = re.compile(r"\s*[(（]?([A-Za-z])\s*[.．、:：)）]\s*(.*)", re.DOTALL)
"""An option with its letter."""
_KEYS, _TEXTS = ("label", "labels", "key", "letter", "id"), ("text", "texts", "value", "content")
"""What names an option, and what holds it, in ARC's two lists and in lists of objects."""


def option_letters(label_names: Sequence[str]) -> dict[str, str]:
    """The letters A, B, … of options -> the label names under which they are asked; empty where those are words."""
    marks = "".join(label_names)
    if len(marks) != len(label_names):
        return {}
    if marks.isascii() and marks.isalpha() and marks.isupper():
        return dict(zip(marks, marks, strict=True))  # in any order
    known = any(row.startswith(marks) for row in NAMES["option_marks"])
    return {chr(ord("A") + i): mark for i, mark in enumerate(marks)} if known else {}


def option_columns(names: Sequence[str], letters: Mapping[str, str]) -> dict[str, str]:
    """The columns of a question's options by letter or number; the key is empty where one column has all."""
    if not letters:
        return {}
    if whole := [name for name in names if name.strip().lower() in NAMES["option_columns"]]:
        return {"": whole[0]}
    found: dict[str, dict[str, str]] = {}
    for name in names:
        if (read := _COLUMN.fullmatch(name.strip().lower())) and (read[2].isdigit() or read[2].upper() in letters):
            found.setdefault(read[1], {})[read[2]] = name
    most = max(found.values(), key=len, default={})
    return {key.upper(): most[key] for key in sorted(most)} if len(most) > 1 else {}


Options = dict[str, tuple[str, Any]]
"""Of a question, as its file names each -> the name of its letter and its text, in the file's order; some are empty."""


def options_of(cells: Mapping[str, Any], columns: Mapping[str, str], names: Mapping[str, str]) -> Options:
    """The options of a row.

    Raises:
        DamagedError: fewer than two, or of a shape that is not known.
    """
    if "" in columns:
        pairs = _pairs(_read(cells[columns[""]]))
    else:
        pairs = [(letter, cells[name]) for letter, name in columns.items()]
    if sum(not _is_empty(said) for _, said in pairs) < 2:
        raise DamagedError("fewer than two options, or options that are neither a list nor named by letters")
    named = [str(key).strip() for key, _ in pairs]
    return {k: (names.get(letter, letter), t) for k, letter, (_, t) in zip(named, _letters(named), pairs, strict=False)}


def _is_empty(said: Any) -> bool:
    return said is None or said != said or not str(said).strip()


def _letters(named: Sequence[str]) -> list[str]:
    """The letter of each option: that in its name, else by the order of the numbers in them, else by its place."""
    read = [found[2].upper() for name in named if (found := _COLUMN.fullmatch(name.lower()))]
    read = read if len(read) == len(named) else [name for name in named if name.isdecimal()]
    if len(set(read)) == len(named) and all(map(str.isalpha, read)):
        return read
    if len(set(read)) == len(named) and all(map(str.isdecimal, read)):
        return [chr(ord("A") + sorted(map(int, read)).index(int(number))) for number in read]
    return [chr(ord("A") + place) for place in range(min(26, len(named)))]


def asked_options(options: Options, names: Mapping[str, str]) -> dict[str, Any]:
    """The options that a question has, under their names in the order of their letters."""
    order = {mark: letter for letter, mark in names.items()}
    found = {mark: said for mark, said in options.values() if not _is_empty(said)}
    return {mark: found[mark] for mark in sorted(found, key=lambda mark: order.get(mark, mark))}


Answer = Callable[[Options, Any], str]
"""From a question's options and the answer that its file has to the name of that option; empty where it is none."""

_READ = 0.95
"""Share of the answers that a way of reading them has to read."""


def answer_reader(
    questions: Sequence[tuple[Options, Any]], label_names: Sequence[str], listed: bool, where: str
) -> Answer | None:
    """How the answers of a table name an option: all in one way, by its name, label, number, place or text.

    None where no way reads them: whatever each of them says as a label counts.

    Args:
        listed: whether the options stand in one column, whose names for them are then meant by the answers.

    Raises:
        InputError: two ways read them, differently; or none does, and they are numbers.
    """
    read, marks = label_reader(label_names), set(label_names)
    by_number = not any(name.isdecimal() for name in label_names)

    def by_name(options: Options, value: Any) -> str:
        return options.get(str(value).strip(), ("",))[0]

    def by_label(options: Options, value: Any) -> str:
        return "" if (label := read(value)) is None else label_names[label]

    def by_place(options: Options, value: Any) -> str:
        place = folded(value)
        return list(options.values())[int(place)][0] if place.isdecimal() and int(place) < len(options) else ""

    def by_text(options: Options, value: Any) -> str:
        found = [mark for mark, said in options.values() if folded(said) == folded(value)]
        return found[0] if len(found) == 1 else ""

    def reads(way: Answer) -> bool:
        """Whether nearly all answers are options in this way."""
        good = sum(way(options, value) in asked_options(options, {}).keys() & marks for options, value in questions)
        return bool(questions) and good >= _READ * len(questions)

    first = [by_name] if listed and reads(by_name) else [by_label, by_name, *([by_place] if by_number else [])]
    ways = [way for way in (*first, by_text) if reads(way)]
    for options, value in questions:
        if len(meant := {mark for way in ways if (mark := way(options, value))}) > 1:
            raise refusal(
                "data/answer-of-two-options",
                where=where,
                value=str(value)[:40],
                meant=" or ".join(f"option {m}" for m in sorted(meant)),
                options=", ".join(str(said)[:20] for _, said in options.values()),
                letters=", ".join(label_names),
            )
    if ways:
        return ways[0]
    wrong: Counter[str] = Counter()
    for options, value in questions:
        said = by_name(options, value) or by_label(options, value)
        wrong[str(value)] += not is_name(value) and said not in asked_options(options, {})
    if wrong.total() > max(1, (1 - _READ) * len(questions)):
        answers = ", ".join(f"{value!r} ({rows} rows)" for value, rows in (+wrong).most_common(6))
        raise refusal("data/answers-not-understood", where=where, answers=answers, letters=", ".join(label_names))
    return None


def _read(given: Any) -> Any:
    """A cell that should hold several options; as text it may be JSON, a list of Python, or one option a line."""
    if not isinstance(given, str):
        return given
    for read in (json.loads, ast.literal_eval):
        try:
            return read(given)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return [line for line in given.splitlines() if line.strip()]


def _pairs(given: Any) -> list[tuple[Any, Any]]:
    """Names and texts of options; none for a shape that is not known."""
    if isinstance(given, Mapping):
        keys, texts = (next((given[name] for name in names if name in given), None) for names in (_KEYS, _TEXTS))
        if isinstance(texts, list):
            keys = keys if isinstance(keys, list) else range(len(texts))
            return list(zip(keys, texts, strict=True)) if len(keys) == len(texts) else []
        return list(given.items())
    if not isinstance(given, list | tuple):
        return []
    lettered = [_LETTERED.fullmatch(one) if isinstance(one, str) else None for one in given]
    if sorted(found[1].upper() for found in lettered if found) == [chr(65 + i) for i in range(len(given))]:
        return [(found[1], found[2]) for found in lettered if found]
    if any(isinstance(one, Mapping) for one in given):
        found = [[next((one[n] for n in names if n in one), None) for names in (_KEYS, _TEXTS)] for one in given]
        named = [(number if key is None else key, said) for number, (key, said) in enumerate(found)]
        return [] if any(said is None for _, said in named) else named
    return [(f"#{i}", said) for i, said in enumerate(given)]


# What stands beside the data and names the classes.


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
    except (yaml.YAMLError, ValueError, RecursionError):
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
        lists, tells = says_classes(file.stem) or file.name.lower() in NAMES["class_files"], tells_of_data(file)
        if file.suffix.lower() not in _SUFFIXES or file in (path, *own) or not (lists or tells) or not file.is_file():
            continue
        names, says = _told(file, lists, label_names, read)
        for words in names:
            add({LABEL: words})
        if not names and says and (lists or label_names):
            what = "the file {!r} beside the data" if lists else "what the file {!r} says of labels"
            unread[f"not used: {what.format(file.name[:60])}"] += 1
    return found, unread


_SUFFIXES = (".txt", ".json", ".csv", ".tsv", ".yaml", ".yml", ".md", "")
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
        says = says or sure
    return found, says


def _listed(text: str, suffix: str) -> list[str]:
    """The names of classes that a text lists, one a line, with their numbers or in order."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    pairs = [pair for line in lines if (pair := _PAIR.fullmatch(line))]
    numbered = class_names({pair[1] or pair[4]: (pair[2] or pair[3]).strip("\"' ") for pair in pairs})
    if numbered and len(pairs) in (len(lines), len(lines) - 1):  # a line may be the header
        return numbered
    return class_names(lines) if suffix == ".txt" and not any(line.isdecimal() for line in lines) else []  # one a row


_BETWEEN = r"(?:[^\w\n,;，；、。%]|{}){{0,24}}?".format("|".join(NAMES["between"]))
"""What may stand between a number and what it means."""
_NUMBER, _CLASS = r"(?<![a-z\d.])[01](?![a-z\d%]|\.\d)", "(?:label|class|标签|类别)"
_SPEAKS = re.compile(f"{_NUMBER}.*{_CLASS}|{_CLASS}.*{_NUMBER}", re.IGNORECASE)
"""A line of a text that seems to say what a number means."""
_CLASSES = frozenset(NAMES["class_words"])


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
