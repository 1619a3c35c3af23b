"""JSON files in the layouts that programs write by default, as a list of objects; other shapes are refused by name.

A list of objects, and one object a line, need nothing. pandas writes five other layouts (`to_json(orient=…)`),
`datasets` columns of lists, exports wrap the list in one more object, and some programs write one indented object
behind another.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lib.errors import InputError, refusal
from lib.runs.files import KeyTwiceError, once
from lib.stages.data.csv_table import INDEX, holds_words

Rows = list[dict[str, Any]]

EXPECTED = "a list of objects, or one object a line, each a row."


def other_layout(
    path: Path, text: str, known: Collection[str] = (), beside: dict[str, Any] | None = None
) -> tuple[Rows, str] | None:
    """The rows of a file that is neither a list of objects nor one object a line, and its layout in words.

    Returns None for those two, for a single object that is a row, and for what is not JSON at all: readers of rows say
    where the fault is.

    Args:
        known: names of columns, in small letters: they tell columns from rows where neither are numbered.
        beside: gets what stands beside a list of rows under a key.

    Raises:
        InputError: JSON, but not rows; with the shape that was found and how to turn it.
    """
    if _is_plain(text):
        return None
    try:
        value = json.loads(text, object_pairs_hook=once)
    except KeyTwiceError:
        raise
    except (ValueError, RecursionError):
        return _one_behind_another(text)
    if isinstance(value, list):
        return _list(path, value)
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a single {_kind(value)}.", EXPECTED, "check the file.")
    _viewer(path, value)
    found = _split(path, value) or _table(value) or _lists(value)
    if not found and len(value) == 1:  # of an index of a single row it is not known better
        _refuse_nested(path, value)
    found = found or _columns_or_index(value, known)
    return found or _wrapped(path, value, {} if beside is None else beside)


def _is_plain(text: str) -> bool:
    """Whether the first object stands on a line of its own with others below, or in a list."""
    start = text.lstrip()
    if start.startswith("["):
        return start[1:].lstrip().startswith("{")
    first, _, rest = start.partition("\n")
    try:
        return isinstance(json.loads(first), dict) and bool(rest.strip())
    except (ValueError, RecursionError):
        return False


_BETWEEN = re.compile(r"[ \t\n\r,]*")


def _one_behind_another(text: str) -> tuple[Rows, str] | None:
    """Indented objects without commas or brackets around them."""
    decoder, rows, place = json.JSONDecoder(object_pairs_hook=once), [], 0
    try:
        while place < len(text):
            value, place = decoder.raw_decode(text, place)
            rows.append(value)
            place = _BETWEEN.match(text, place).end()  # type: ignore[union-attr]
    except KeyTwiceError:
        raise
    except (ValueError, RecursionError):
        return None
    return (rows, "objects over several lines, one behind another") if all(isinstance(r, dict) for r in rows) else None


def _list(path: Path, value: list[Any]) -> None:
    """Refuse a list of anything but objects; an empty one is left to the reader, who says that there are no rows."""
    if odd := next((item for item in value if not isinstance(item, dict)), None):
        example = 'json.dump([dict(zip(["text", "label"], row)) for row in json.load(open(FILE))], open(NEW, "w"))'
        do = f"name the columns, e.g. {example}" if isinstance(odd, list) else "make an object of every row"
        raise InputError(f"{path} holds a list of {_kind(odd)}s.", EXPECTED, f"{do}.")


def _viewer(path: Path, value: dict[str, Any]) -> None:
    """Refuse what the hub's viewer answers: some rows, long cells cut, the names of classes apart."""
    if _objects(value.get("rows")) and isinstance(value["rows"][0].get("row"), dict):
        do = "set dataset to its hub id, or fetch its own files."
        raise InputError(f"{path} is an answer of the hub's viewer, a part of a data set.", EXPECTED, do)


def _split(path: Path, value: dict[str, Any]) -> tuple[Rows, str] | None:
    """pandas' orient="split": names of the columns once, rows as lists."""
    names, rows = value.get("columns"), value.get("data")
    if not isinstance(names, list) or not isinstance(rows, list) or not value.keys() <= {"columns", "data", "index"}:
        return None
    if any(not isinstance(row, list) or len(row) != len(names) for row in rows):
        raise InputError(f"{path} has columns and rows of different lengths.", EXPECTED, "export it again.")
    if len(set(map(str, names))) < len(names):
        have = ", ".join(map(repr, names))[:200]
        raise InputError(f"{path} has the columns {have}.", "names that differ.", "rename or drop one of those alike.")
    made = [dict(zip(map(str, names), row, strict=True)) for row in rows]
    return _indexed(made, value.get("index")), 'pandas\' orient="split"'


def _indexed(rows: Rows, index: Any) -> Rows:
    """Rows with the levels of their index, of which some say more than a number."""
    if not isinstance(index, list) or len(index) != len(rows):
        return rows
    levels = list(zip(*(one if isinstance(one, list) else [one] for one in index), strict=False))
    told = {f"{INDEX} {i}": cells for i, cells in enumerate(levels, 1) if holds_words(cells)}
    return [{**row, **{name: cells[i] for name, cells in told.items()}} for i, row in enumerate(rows)]


def _table(value: dict[str, Any]) -> tuple[Rows, str] | None:
    """pandas' orient="table": a schema, whose index column is no data, and rows as objects."""
    schema, rows = value.get("schema"), value.get("data")
    if not isinstance(schema, dict) or not _objects(rows):
        return None
    index = schema.get("primaryKey") or []
    index = [index] if isinstance(index, str) else index
    index = [name for name in index if not holds_words(row.get(name) for row in rows)]
    return [{k: v for k, v in row.items() if k not in index} for row in rows], 'pandas\' orient="table"'


def _columns_or_index(value: dict[str, Any], known: Collection[str]) -> tuple[Rows, str] | None:
    """pandas' orient="columns" (its default) and "index": objects of objects, the rows' names inside or outside.

    Rows are told by their numbers, else by what the others are called.
    """
    parts = list(value.values())
    if not parts or not all(isinstance(part, dict) and part.keys() == parts[0].keys() for part in parts):
        return None
    for are in (_numbers, lambda names: len(names) > 1 and not any(name.strip().lower() in known for name in names)):
        outside, inside = are(value), are(parts[0])
        if outside and not inside:
            return _indexed(parts, list(value)), 'pandas\' orient="index"'
        if inside and not outside:
            rows = [{name: cells[key] for name, cells in value.items()} for key in parts[0]]
            return _indexed(rows, list(parts[0])), 'pandas\' orient="columns"'
    return None


def _lists(value: dict[str, Any]) -> tuple[Rows, str] | None:
    """Columns as lists of one length, as `datasets` gives them; a row of two lists of turns is a row."""
    cells = list(value.values())
    if len(cells) < 2 or not all(isinstance(c, list) and len(c) == len(cells[0]) for c in cells):
        return None
    if any(isinstance(item, (dict, list)) for column in cells for item in column):
        return None
    return [dict(zip(value, row, strict=True)) for row in zip(*cells, strict=True)], "columns as lists"


def _wrapped(path: Path, value: dict[str, Any], beside: dict[str, Any]) -> tuple[Rows, str] | None:
    """One list of objects under a key, and what tells of them beside it; an object that is a row is none."""
    lists = {key: part for key, part in value.items() if _objects(part)}
    if not lists or _turns(lists):
        if not lists:
            _refuse_nested(path, value)
        return None
    if len(lists) > 1:  # COCO's categories beside its rows
        lists = {key: part for key, part in lists.items() if key.lower() not in _CLASSES}
    told = (key for key, part in value.items() if isinstance(part, dict) and not _numbering(part))
    if len(lists) == 1 and all(key.lower() in _TOLD for key in told):
        key, rows = next(iter(lists.items()))
        beside |= {name: part for name, part in value.items() if name != key}
        return rows, f"rows under the key {key!r}"
    names = ", ".join(f"{key!r} ({len(part):,})" for key, part in lists.items())
    key = next(iter(lists))
    raise refusal("data/several-lists", path=path, names=names, expected=EXPECTED, key=key)


def _refuse_nested(path: Path, value: dict[str, Any]) -> None:
    """Refuse an object in whose objects there is a list of several objects that are no turns."""
    todo: list[tuple[list[str], dict[str, Any]]] = [([], value)]
    for outer, part in todo:
        for key, found in part.items():
            keys = [*outer, key]
            if outer and _objects(found) and len(found) > 1 and not _turns({key: found}):
                inside = "".join(f"[{name!r}]" for name in keys)
                raise refusal("data/nested-rows", path=path, where=".".join(keys), inside=inside, count=len(found))
            if isinstance(found, dict) and len(todo) < _DEEPEST:
                todo.append((keys, found))


_DEEPEST = 100
"""Objects that are looked into."""
_CLASSES = ("categories", "classes", "labels")
_TOLD = ("features", "info", "dataset_info", "meta", "metadata", "schema")
"""Keys of a list of classes, and of objects that tell of the rows: classes are heeded, the rest is named."""


def _turns(lists: Mapping[str, list[Any]]) -> bool:
    """Whether the lists are the turns of one conversation."""
    return any({"role", "content"} <= part[0].keys() or {"from", "value"} <= part[0].keys() for part in lists.values())


def _objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _numbers(keys: Mapping[str, Any]) -> bool:
    return all(key.isascii() and key.isdigit() for key in keys)


def _numbering(part: Mapping[str, Any]) -> bool:
    """Whether an object numbers names: id2label, label2id."""
    return bool(part) and (_numbers(part) or all(type(number) is int for number in part.values()))


def _kind(value: Any) -> str:
    names: dict[type, str] = {list: "list", dict: "object", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "number")
