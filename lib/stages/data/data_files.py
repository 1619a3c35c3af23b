"""The rows of one data file: from its bytes to text that every parser reads alike, what changed counted."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lib.errors import InputError, refusal, refusing
from lib.runs.files import once, refuse_device, sha256_file, sha256_json, utf8
from lib.stages.data.csv_table import holds_words, read_csv
from lib.stages.data.json_layouts import other_layout

Rows = list[dict[str, Any]]
"""Cells by column; every row has all columns."""

FORMATS = {".csv": "csv", ".tsv": "tsv", ".txt": "tsv", ".json": "json", ".jsonl": "json"}
FORMATS |= {".parquet": "parquet", ".xlsx": "xlsx"}
"""Suffix of a data file -> how it is read. TSV is unquoted; XLSX needs openpyxl."""

NAMES: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("names.yaml").read_text(encoding="utf-8"))
"""What is understood, by kind: see names.yaml."""

_KNOWN = frozenset(
    (*NAMES["text_columns"], *NAMES["label_columns"], *(n for names in NAMES["forms"].values() for n in names))
)


def tells_of_data(path: Path) -> bool:
    """Whether a file is called like those beside data that tell of it: README_zh.md, meta.json, 标签说明.txt."""
    name, stem = path.name.lower(), path.stem.lower()
    if name in NAMES["class_files"] or stem.endswith("说明"):
        return True
    return any(re.fullmatch(rf"{word}[\W_\d]*([a-z]{{2}})?([\W_][a-z]+)?", stem) for word in NAMES["about_files"])


SURROGATE = re.compile("[\ud800-\udfff]")
_HALF = r"\\u[dD][%s][0-9a-fA-F]{2}"
_ESCAPE = re.compile(rf"\\\\|{_HALF % '89abAB'}{_HALF % 'c-fC-F'}|({_HALF % '89a-fA-F'})")
"""In JSON: a backslash, a surrogate pair, or (group 1) half of one, which no UTF-8 file and no tokenizer can hold."""


class DamagedError(ValueError):
    """Why a row cannot be used; rows are left out and counted by it."""


def file_fingerprint(path: Path) -> str:
    """SHA-256 of a file; of a folder, over the names and SHA-256 of the data files in it (hidden files left out)."""
    if path.is_dir():
        return sha256_json({file.name: sha256_file(file) for file in data_files(path)})
    refuse_device(path)
    return sha256_file(path)


def data_files(folder: Path) -> list[Path]:
    """The files of a folder that the workbook can read, by name."""
    files = (p for p in folder.iterdir() if p.is_file() and not p.name.startswith((".", "~$")))  # ~$: Excel's lock
    return sorted(p for p in files if p.suffix.lower() in FORMATS and not tells_of_data(p))


def read_file(path: Path, changes: Counter[str]) -> Rows:
    """The rows of one file; values stay as they are, only the bytes are made readable.

    Removed and counted: a byte-order mark, NUL characters, CR, lone surrogates (JSON escapes).

    Raises:
        InputError: another format, empty, a Git LFS pointer, a web page, not UTF-8, or not well-formed.
    """
    kind, raw = FORMATS.get(path.suffix.lower()), path.read_bytes()
    if kind is None:
        raise InputError(f"{path} ends in {path.suffix!r}.", f"one of {', '.join(FORMATS)}.", "convert or rename it.")
    _check_content(path, raw[:4096], kind)
    form = "TSV (a header line, tabs, no quoting)" if kind == "tsv" else kind.upper()
    kinds = (ValueError, OSError, NotImplementedError, RecursionError)  # those of json, pandas and pyarrow
    with refusing(kinds, "data/unreadable", path=path, form=form):
        if kind in ("parquet", "xlsx"):
            rows = (_parquet_rows if kind == "parquet" else _sheet_rows)(path, raw, changes)
        else:
            text = _readable(path, raw, kind, changes)
            rows = _json_rows(path, text, changes) if kind == "json" else read_csv(path, text, changes, kind == "tsv")
    if not rows:
        raise InputError(f"{path} holds no rows.", "a file with rows.", "fetch or export it again.")
    return rows


def _empty(path: Path) -> InputError:
    return InputError(f"{path} is empty.", "a file with rows.", "fetch or export it again.")


def _check_content(path: Path, head: bytes, kind: str) -> None:
    """Refuse what is not data of its suffix: an empty file, a Git LFS pointer, an HTML page, another encoding, …"""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start:
        raise _empty(path)
    if start.startswith((b"<!doctype html", b"<html", b"<?xml")):
        raise refusal("data/web-page", path=path)
    zeros = bytes(byte and 1 for byte in head[:4]).hex()  # UTF-16 and UTF-32 without a byte-order mark have some
    for begin, what, do in NAMES["contents"]:
        if (head.hex().startswith(begin) or zeros == begin) and what.split()[0] != kind:
            raise InputError(f"{path} is {what}.", f"what its suffix {path.suffix} says, in UTF-8.", f"{do}.")


def _readable(path: Path, raw: bytes, kind: str, changes: Counter[str]) -> str:
    """The text of a file with LF alone. A CR ends a line only where it ends the first one; else it is a space."""
    text = utf8(path, raw)
    replacements = [("byte-order mark", "\ufeff", "", 1), ("NUL characters", "\0", "", -1)]
    replacements += [("CRLF line ends", "\r\n", "\n", -1)]
    ends_lines = kind != "json" and re.match(r"[^\r\n]*\r(?!\r*\n)", text)
    replacements += [("CR line ends", "\r", "\n", -1) if ends_lines else ("stray CR characters", "\r", " ", -1)]
    for what, old, new, most in replacements:
        found = text.count(old) if most < 0 else int(text.startswith(old))
        changes[what] += found
        text = text.replace(old, new, most) if found else text
    if not text.strip():
        raise _empty(path)
    return text


def _json_rows(path: Path, text: str, changes: Counter[str]) -> Rows:
    """The objects of a JSON file: a list, or one a line; every one with all keys."""

    def without_halves(escape: re.Match[str]) -> str:
        changes["lone surrogates"] += escape[1] is not None
        return "" if escape[1] else escape[0]

    text = _ESCAPE.sub(without_halves, text)
    rows: Rows = []
    beside: dict[str, Any] = {}
    if found := other_layout(path, text, _KNOWN, beside):
        rows, words = found
        changes[f"rows read from another layout: {words}"] += len(rows)
    else:
        whole = text.lstrip().startswith("[")
        for number, part in enumerate([text] if whole else text.split("\n"), 1):
            try:
                value = json.loads(part, object_pairs_hook=once) if part.strip() else []
                rows += value if whole or not part.strip() else [value]
            except json.JSONDecodeError as error:
                raise refusal("data/not-json", path=path, line=number + error.lineno - 1, error=error) from None
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("not every row is an object")
    if len(rows) > 1 and rows[0].keys().isdisjoint(rows[1]) and any(map(says_classes, rows[0])):
        beside |= rows.pop(0)  # a head, which is no row
    columns = dict.fromkeys(name for row in rows for name in row)
    rows, classes = [columns | row for row in rows], dict[str, list[str]]()
    for key, said in beside.items():
        inside = said.items() if isinstance(said, dict) else ()
        told = [names for name, part in ((key, said), *inside) if says_classes(name) and (names := class_names(part))]
        if told or (found := classes_of({key: said})):
            add_classes(classes, {LABEL: told[0]} if told else found)
        else:
            changes[f"not used: the key {key[:60]!r} beside the rows"] += 1
    return named_classes(rows, classes, changes)


def _parquet_rows(path: Path, raw: bytes, changes: Counter[str]) -> Rows:
    if raw[:4] != b"PAR1" or raw[-4:] != b"PAR1":
        raise InputError(f"{path} does not start and end as Parquet does.", "a whole Parquet file.", "fetch it again.")
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(pyarrow.BufferReader(raw))
    metadata = table.schema.metadata or {}
    index = [name for name in table.column_names if re.fullmatch(r"__index_level_\d+__", name)]  # of pandas
    index = [name for name in index if not holds_words(table.column(name).to_pylist())]
    changes["index columns without a name left out"] += len(index)
    table = table.drop_columns(index)
    for place, field in enumerate(table.schema):
        with contextlib.suppress(pyarrow.ArrowInvalid):  # Spark writes texts as bytes
            if pyarrow.types.is_binary(field.type) or pyarrow.types.is_large_binary(field.type):
                table = table.set_column(place, field.name, table.column(place).cast(pyarrow.large_string()))
                changes[f"bytes of {field.name} read as UTF-8"] += table.num_rows
    try:
        info = json.loads(metadata.get(b"huggingface", b"null"))
    except (ValueError, RecursionError):
        info = None  # of another program
    columns = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        try:
            columns[name] = column.to_pylist()
        except (ValueError, OverflowError, NotImplementedError) as error:  # a year beyond 9999, an unknown time zone
            if name.strip().lower() in _KNOWN or isinstance(error, UnicodeError):
                raise ValueError(f"column {name}: {error}") from None
            changes[f"not used: the column {name[:60]!r}, which cannot be read"] += table.num_rows
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    return named_classes(rows, classes_of(info), changes)


_MOST_BYTES, _MOST_TIMES = 256 << 20, 100
"""An XLSX file that unpacks to more bytes than this, and to so many times its own, is made to fill the memory."""


def _sheet_rows(path: Path, raw: bytes, changes: Counter[str]) -> Rows:
    """The rows of the first sheet that is not hidden: values in place of formulas, names in its first row."""
    with refusing(ModuleNotFoundError, "data/no-openpyxl", path=path):
        import openpyxl
    try:
        packed = zipfile.ZipFile(io.BytesIO(raw))
        unpacked = sum(part.file_size for part in packed.infolist())
        if unpacked <= max(_MOST_BYTES, _MOST_TIMES * len(raw)):
            book = openpyxl.load_workbook(io.BytesIO(raw), data_only=True)
            formulas = any(b"<f" in packed.read(name) for name in packed.namelist() if "/worksheets/" in name)
            written = openpyxl.load_workbook(io.BytesIO(raw)) if formulas else book
    except Exception as error:  # openpyxl has no error of its own for what is no workbook
        raise ValueError(f"no XLSX workbook: {error}") from None
    if unpacked > max(_MOST_BYTES, _MOST_TIMES * len(raw)):
        raise refusal("data/zip-bomb", path=path, unpacked=unpacked, times=unpacked // len(raw))
    seen = [sheet for sheet in book.worksheets if sheet.sheet_state == "visible"] or book.worksheets
    if not seen:
        raise _empty(path)
    sheet = seen[0]
    grid: dict[int, dict[int, str]] = {}
    for (row, column), cell in sorted(sheet._cells.items()):
        if cell.value is not None:
            failed = cell.data_type == "e"
            changes["cells with an error such as #N/A read as empty"] += failed
            grid.setdefault(row, {})[column] = "" if failed else openpyxl.utils.escape.unescape(str(cell.value))
    unsaved = [place for place, cell in written[sheet.title]._cells.items() if cell.data_type == "f"]
    unsaved = [place for place in unsaved if place not in sheet._cells or sheet._cells[place].value is None]
    changes["cells with a formula whose value the file does not hold, read as empty"] += len(unsaved)
    if len(grid) < 2:
        raise _empty(path)
    header = next(iter(grid.values()))
    hides = [row for row in grid if row in sheet.row_dimensions and sheet.row_dimensions[row].hidden]
    changes["rows that the sheet hides, read like the others"] += len(hides)
    changes["merged cells: only the first has the value"] += len(sheet.merged_cells.ranges)
    changes["not used: cells of columns without a name"] += sum(
        len(row.keys() - header.keys()) for row in grid.values()
    )
    for other in book.worksheets:
        if other is not sheet and (other not in seen or other.max_row > 1):
            hidden = "" if other in seen else " (hidden)"
            changes[f"not used: the sheet {other.title!r}{hidden}; {sheet.title!r} is read"] += 1
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([[row.get(i, "") for i in header] for row in grid.values()])
    content = text.getvalue().encode("utf-8", "replace")
    return read_csv(path, _readable(path, content, "json", changes), changes)


def by_name(kind: str) -> dict[str, str]:
    """Every name of a kind of NAMES -> what it stands for."""
    return {name: meaning for meaning, names in NAMES[kind].items() for name in names}


def alone(value: Any) -> Any:
    """The one item of a list of one; anything else as it is."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def class_names(said: Any) -> list[str]:
    """Names of classes in the order of their numbers; else none.

    Of a list of names or of objects with a number and a name, number -> name or name -> number.
    """
    if isinstance(said, list) and said and all(isinstance(one, dict) and len(one) == 2 for one in said):
        said = dict(tuple(one.values()) for one in said if all(isinstance(v, str | int) for v in one.values()))
    if isinstance(said, dict):
        pairs = [(key, name) if str(key).isdecimal() else (name, key) for key, name in said.items()]
        numbered = {str(number): name for number, name in pairs}
        said = [numbered.get(str(number)) for number in range(len(pairs))]
    if not isinstance(said, list) or not all(isinstance(name, str | bool) for name in said):
        return []
    return [] if len(set(said)) < max(2, len(said)) or all(map(_NO_NAME, map(str, said))) else list(map(str, said))


_NO_NAME = re.compile(r"LABEL_\d+").fullmatch
"""What transformers calls classes that nobody named."""
LABEL = ""
"""In place of a column: whichever holds the labels."""


def says_classes(name: str) -> bool:
    """Whether a key, or the name of a file, is one of a list of classes (id2label, class_names, labels-zh)."""
    return not set(NAMES["class_words"]).isdisjoint(words_of(name))


def words_of(name: str) -> list[str]:
    """The words of a name: those between other characters, and Chinese ones that it holds."""
    inside = [word for word in NAMES["class_words"] if not word.isascii() and word in name]
    return [*re.split(r"[\W_\d]+", name.lower()), *inside]


def add_classes(found: dict[str, list[str]], more: Mapping[str, list[str]]) -> None:
    """Add names of classes by column; none remain of a column that is told two orders."""
    for column, names in more.items():
        found[column] = names if found.get(column, names) == names else []


def classes_of(info: Any) -> dict[str, list[str]]:
    """Names of classes by column, out of what `datasets` writes into a schema, a card or dataset_infos.json."""
    found: dict[str, list[str]] = {}
    todo = [info]
    for part in todo:
        features = part.get("features") if isinstance(part, dict) else None
        if isinstance(features, list):
            features = {str(one.get("name")): one for one in features if isinstance(one, dict)}
        if isinstance(features, dict):
            add_classes(found, {name: names for name, kind in features.items() if (names := _of_feature(kind))})
        elif len(todo) < 1000:
            todo += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return found


def _of_feature(kind: Any) -> list[str]:
    """The names of a feature of classes, also inside a list of them."""
    todo = [kind]
    for part in todo:
        if isinstance(part, list):
            todo += part[:1]
        elif isinstance(part, dict):
            if names := class_names(part.get("names")):
                return names
            todo += [part.get(key) for key in ("class_label", "dtype", "feature", "sequence", "list")]
    return []


def named_classes(rows: Rows, names: Mapping[str, list[str]], changes: Counter[str], label_column: str = "") -> Rows:
    """Rows with the names of classes in place of their numbers: what 0 means is said by the file, not by us.

    Args:
        names: of the classes, by column (capitals do not matter) or for LABEL, in the order of their numbers.

    Raises:
        InputError: numbers in a column that is told two orders of names.
    """
    told = {name.lower(): words for name, words in names.items()}
    if LABEL in told:
        told = dict.fromkeys((label_column.strip().lower(), *NAMES["label_columns"]), told[LABEL]) | told
    for column in rows[0] if rows else ():
        if (words := told.get(column.strip().lower())) is None:
            continue
        for row in rows:
            number = re.fullmatch(r"([0-9]{1,6})(\.0+)?", str(alone(row[column])).strip())
            if number and not words:
                raise refusal("data/names-in-two-orders", column=column)
            if number and int(number[1]) < len(words):
                row[column] = words[int(number[1])]
                changes[f"numbers of {column} read by the names that the file gives them"] += 1
    return rows
