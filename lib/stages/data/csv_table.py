"""A CSV or TSV file as rows of texts, without guessing: every record is checked against the header.

What spreadsheets, pandas and R write is read: index columns with or without a name, a comma at the end of every
line, semicolons or tabs between cells, cells over several lines, spaces in front of a quotation mark, tab-separated
cells with marks or without. Each of them is counted. What a reader could only
guess at is refused with its line: records of another length, a quotation mark that is never closed (the records behind
it would become one text), marks escaped by a backslash.
"""

from __future__ import annotations

import contextlib
import csv
import io
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lib.errors import InputError, refusal

SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar", "，": "full-width comma"}
"""What may stand between the cells of a .csv file. The last one is refused: it stands in texts, too."""

FEW_VALUES = 50
"""A column of at most so many values is one of labels, names or scores: a line inside a text seldom holds one."""

Record = tuple[int, list[str]]
"""Number of the line on which a record begins, and its cells."""


def read_csv(path: Path, text: str, notes: Counter[str], tabs: bool = False) -> list[dict[str, str]]:
    """The rows of a file; every value stays text ("null" and "007" are reviews, not numbers).

    Args:
        path: for messages. text: its content, lines ended by LF. tabs: cells between tabs; marks are plain characters
            unless the file shows that it means them (`_quoted_tabs`).
        notes: gets what the file had beside plain records, counted.

    Raises:
        InputError: no header, records that do not have its cells, quotation marks that do not close; with the line.
    """
    if told := re.match(r'"?sep=(.)"?[,;]*\n', text):  # a line for Excel; the others keep their numbers
        text = "\n" + text[told.end() :]
    separator = told[1] if told else "\t" if tabs else _separator(path, text.partition("\n")[0], notes)
    quoted = not tabs or _quoted_tabs(path, text)
    records = list(_records(path, text, separator, quoted))
    if quoted and (spaced := _without_spaces(path, text, separator, records)):
        records = spaced
        notes["spaces between a separator and a quotation mark left out"] += 1
    notes["tab-separated cells in quotation marks read without them"] += tabs and quoted
    header, rows = records[0][1] if records else [], records[1:]
    places = _positions(path, header, rows, notes)
    if quoted:
        _refuse_swallowed(path, text, rows, separator, notes)
    return [{name: cells[i] for name, i in places.items()} for _, cells in rows]


_SPACED = re.compile(r'\s+".*"', re.S)
_MARKED = re.compile(r'"(?:[^"]|"")*"', re.S)


def _without_spaces(path: Path, text: str, separator: str, records: list[Record]) -> list[Record] | None:
    """The records of a file that has spaces in front of its marks (`0, "a, b"`); None for any other."""
    columns = zip(*(cells for _, cells in records[1:]), strict=False)
    if separator + " " not in text or not (_uneven(records) or any(all(map(_SPACED.fullmatch, c)) for c in columns)):
        return None
    with contextlib.suppress(InputError):
        spaced = list(_records(path, text, separator, quoted=True, spaced=True))
        return None if _uneven(spaced) else spaced
    return None


def _uneven(records: Sequence[Record]) -> bool:
    return len({len(cells) for _, cells in records}) > 1


def _quoted_tabs(path: Path, text: str) -> bool:
    """Whether the cells of a tab-separated file that begin with a mark are quoted, as pandas writes them.

    They are when only that makes records of one length, or when it makes the same records and names stand in marks,
    marks inside a cell are doubled, or the cells in marks are those with a comma (Excel).
    """
    plain = list(_records(path, text, "\t", quoted=False))
    try:
        marked = list(_records(path, text, "\t", quoted=True))
    except InputError:
        return False
    if _uneven(plain):
        return not _uneven(marked)
    cells = {cell for _, record in plain for cell in record}
    held = {cell for cell in cells if _MARKED.fullmatch(cell)}
    shown = any('""' in cell[1:-1] for cell in held) or (held and held == {cell for cell in cells if "," in cell})
    return len(plain) == len(marked) and (bool(shown) or all(map(_MARKED.fullmatch, plain[0][1])))


def _separator(path: Path, first: str, notes: Counter[str]) -> str:
    """What stands between the names of the header."""
    if "," in first:
        return ","
    found = next((mark for mark in SEPARATORS if mark in first), ",")
    if found == "，":
        raise refusal("data/full-width-commas", path=path, begin=first[:80])
    if found != ",":
        notes[f"cells separated by a {SEPARATORS[found]}"] += 1
    return found


def _records(path: Path, text: str, separator: str, quoted: bool, spaced: bool = False) -> Iterator[Record]:
    """Records with the line on which each begins; blank lines are none."""
    form = {"strict": True, "skipinitialspace": spaced} if quoted else {"quoting": csv.QUOTE_NONE}
    limit = csv.field_size_limit(max(len(text) + 1, 1 << 17))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, **form)
    begin = 1
    try:
        for cells in reader:
            if cells:
                yield begin, cells
            begin = reader.line_num + 1
    except csv.Error as error:
        if "unexpected end of data" in str(error):
            line, mark = begin, "opens here that is never closed"
        else:
            line, mark = reader.line_num, "that neither ends its cell nor is doubled"
            mark += f" (the cell began with one in line {begin})" if begin < line else ""
        raise refusal("data/quotation-mark", path=path, line=line, mark=mark) from None
    finally:
        csv.field_size_limit(limit)


def _positions(path: Path, header: list[str], rows: Sequence[Record], notes: Counter[str]) -> dict[str, int]:
    """Where the cells of each name stand; records of another length are refused.

    Columns without a name are left out where they are empty, or stand in front with the numbers of rows. Words in front
    are an index that says something of the rows, such as their split: they stay under a name of their own.
    """
    count = len(header)
    more = min((len(cells) - count for _, cells in rows), default=0)
    if more > 0 and not any(any(cells[count:]) for _, cells in rows):
        header = header + [""] * more
    elif more == 1 and _numbered(rows):
        header = ["", *header]
    if odd := next(((line, len(cells)) for line, cells in rows if len(cells) != len(header)), None):
        cells = "1 cell" if odd[1] == 1 else f"{odd[1]} cells"
        raise refusal("data/other-number-of-cells", path=path, line=odd[0], cells=cells, count=count)
    begin = next((i for i, name in enumerate(header) if name.strip()), len(header))
    places: dict[str, int] = {}
    for i, name in enumerate(header):
        values = () if name.strip() else {cells[i] for _, cells in rows}
        if not name.strip() and not any(values):
            notes["empty cells at the ends of lines left out" if i > begin else "empty columns left out"] += len(rows)
        elif i < begin and not holds_words(values):
            notes["index columns without a name left out"] += 1
        else:
            places[f"{INDEX} {i + 1}" if i < begin else name] = i
            if i > begin and not name.strip():
                begin = len(header)  # cells that nothing names
    if begin == len(header) or len(places) < sum(map(bool, map(str.strip, header))):
        raise refusal("data/no-header", path=path, begin=", ".join(map(repr, header))[:200])
    return places


INDEX = "(index)"
"""Name of a column that has none and says something of its rows: the index of a table of pandas."""


def holds_words(cells: Iterable[Any]) -> bool:
    """Whether an index says more of rows than their number or a date."""
    return any(isinstance(cell, str) and not re.fullmatch(r"[\d\s.:TZ+-]*", cell) for cell in cells)


def _numbered(rows: Sequence[Record]) -> bool:
    """Whether records begin with the numbers that R gives to rows under a header without a name for them."""
    numbers = {cells[0] for _, cells in rows}
    return len(numbers) == len(rows) and all(n.isascii() and n.isdigit() for n in numbers)


def _refuse_swallowed(path: Path, text: str, rows: Sequence[Record], separator: str, notes: Counter[str]) -> None:
    """Count records over several lines; refuse one that holds whole records, as an unclosed mark makes it.

    A line inside a record is taken for a record when it has as many cells and, in every column of few values, one of
    the values that other records have there. The line in which the mark opens counts where such a column stands
    behind the text, the one in which it closes where it stands before: elsewhere they are what a text of two lines is.
    Most of its lines are records, or one in as many as most records of the file have.
    """
    several = [(line, cells) for line, cells in rows if any("\n" in cell for cell in cells)]
    if not several:
        return
    values = [{cells[i] for _, cells in rows} for i in range(len(rows[0][1]))]
    few = [i for i, seen in enumerate(values) if len(seen) <= min(FEW_VALUES, len(rows) // 2)]
    usual = statistics.mode(1 + sum(cell.count("\n") for cell in cells) for _, cells in rows)
    lines = text.split("\n")
    for line, cells in several if few else []:
        end = line + sum(cell.count("\n") for cell in cells)
        texts = [i for i, cell in enumerate(cells) if "\n" in cell]
        looked_at = range(line + (few[-1] <= texts[0]), end + (few[0] < texts[-1]))
        alike = []
        for number in looked_at:
            inner = next(csv.reader([lines[number - 1].removeprefix('"')], delimiter=separator), [])
            if len(inner) == len(values) and all(inner[i] in values[i] for i in few):
                alike.append(number)
        if 2 * usual * len(alike) > len(looked_at):
            other = next((n for n in alike if n > line), end)
            raise refusal("data/unclosed-text", path=path, line=line, end=end, other=other)
    longest, cells = max(several, key=lambda record: sum(cell.count("\n") for cell in record[1]))
    last = longest + sum(cell.count("\n") for cell in cells)
    notes[f"records over several lines (the longest: lines {longest} to {last})"] += len(several)
