"""What a label means: by its name, by its number, by the columns beside it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from lib.errors import InputError
from lib.settings import folded
from lib.stages.data.data_files import NAMES, Rows, alone

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


def refuse_labels(unknown: Counter[str], rows: int, label_names: Sequence[str], where: str) -> None:
    """A value that is a label of its own, not a slip, stops the run."""
    total = sum(unknown.values())
    numbers = [value for value in unknown if value.lstrip("+-").replace(".", "", 1).isdigit()]
    if numbers or total > max(1, rows // 100):
        values = ", ".join(f"{value!r} ({count} rows)" for value, count in unknown.most_common(6))
        k = len(label_names)
        by_number = "" if any(folded(name).isdecimal() for name in label_names) else f"0 to {k - 1}, or "
        raise InputError(
            f"{where}: labels {values} besides those understood.",
            f"{k} labels: {by_number}{', '.join(label_names)}.",
            "name every label in label_names (in the order 0, 1, …), or correct the file, or the list of class names "
            "beside it.",
        )


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
            raise InputError(
                f"{where}: the columns {', '.join(map(repr, [label, *used, column]))} contradict one another about the "
                "labels of rows.",
                "one column of labels, or numbers with one name each.",
                "set label_column to the column that is right, and remove names that are wrong.",
            )
    return (meant if any(read(number) != meaning for number, meaning in meant.items()) else {}), used
