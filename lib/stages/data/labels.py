"""What a label means (by its name, by its number, by the columns beside it), and the options of a question: where a
table keeps them, and how they are asked. No question is asked without them."""

from __future__ import annotations

import ast
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lib.errors import refusal
from lib.settings import folded
from lib.stages.data.data_files import NAMES, DamagedError, Rows, alone, class_names

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
    known = (*NAMES["class_name_columns"], *NAMES["label_columns"], *_SURE, f"{label}_text".lower())
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
            and (pairs or label.strip().lower() not in _SURE or column.strip().lower() in _SURE)
            and (one_each or any(read(value) != read(cell) for value, cell in cells))
        ):
            raise refusal("data/columns-contradict", where=where, columns=", ".join(map(repr, [label, *used, column])))
    return (meant if any(read(number) != meaning for number, meaning in meant.items()) else {}), used


def said_by_name(label: str, labels: int, read: Read) -> dict[str, int]:
    """What the name of a column of labels says that its numbers mean: is_negative (1 is negative), 0正面 1负面.

    Args:
        labels: how many there are. A column that is called by one of two says what 1 and true are; a single letter, as
            the y of any target, says nothing.
    """
    word = re.sub(r"^(is[ _-]*|是否)", "", label.strip(), flags=re.IGNORECASE)
    parts = re.findall(r"[0-9]+|[A-Z]?[^\W\d_A-Z]+|[A-Z]+", word)
    told = [part for part in (parts if read(word) is None else [word]) if part.isdecimal() or read(part) is not None]
    told = [part for part in told if not re.fullmatch("[A-Za-z]", part)]
    said: dict[str, int] = {}
    if labels == 2 and len(told) == 1 and is_name(told[0]):
        denied = not _DENIALS.isdisjoint(map(str.lower, set(parts) - set(told)))
        said["1"] = abs(read(told[0]) - denied)  # type: ignore[operator]
    for pair in itertools.pairwise(told):
        number, name = pair if told[0].isdecimal() else pair[::-1]
        if number.isdecimal() and is_name(name):
            said[number] = read(name)  # type: ignore[assignment]
    if labels == 2 and said.keys() and said.keys() <= {"0", "1"}:  # of two, one tells the other
        said = {str(1 - int(number)): 1 - meaning for number, meaning in said.items()} | said
        said |= {"false": said["0"], "true": said["1"]}
    return said


_DENIALS = frozenset(("not", "non", "no"))


def class_lists(table: Rows, columns: Sequence[str], read: Read, labels: int) -> list[str]:
    """The columns in which every row lists the classes: its number counts places there."""

    def lists(cell: Any) -> bool:
        return sorted((read(name) for name in class_names(_read(cell))), key=str) == list(range(labels))

    return [name for name in columns if table and all(lists(row.get(name)) for row in table)]


def told_by_lists(cells: Mapping[str, Any], lists: Sequence[str], value: Any, where: str) -> Any:
    """The name of a class in place of its number, as the row's own lists have it.

    Raises:
        InputError: the lists have different orders.
    """
    place = folded(value)
    if not lists or is_name(value) or not place.isdecimal():
        return value
    named = [_read(cells[name]) for name in lists]
    if any(names != named[0] for names in named):
        raise refusal("data/columns-contradict", where=where, columns=", ".join(map(repr, lists)))
    return named[0][int(place)] if int(place) < len(named[0]) else value


_SURE = (*NAMES["label_columns"][:3], "gold_label", "true_label")
"""Columns called so are of labels, numbers or not."""

# Options of a question.

_COLUMN = re.compile(
    r"(|op|opt|options?|choices?|sol|选项)[ _./-]?([a-z]|(?<=[a-z _./项-])[0-9])[)）.]?(?:[ _-]?(?:option|选项))?"
)
"""A column for one option: A, opa (MedMCQA), option_a, options.A, choice1, sol2, 选项A, A选项."""
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
        if (read := _COLUMN.fullmatch(folded(name))) and (read[2].isdigit() or read[2].upper() in letters):
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
    read = [found[2].upper() for name in named if (found := _COLUMN.fullmatch(folded(name)))]
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
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
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
