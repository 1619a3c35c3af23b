"""Rows that a phone answers for comparison: of the user's own file, or of the sample corpus."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from lib.errors import InputError
from lib.run import Run
from lib.run.files import read_jsonl, utf8

MOST = 50
"""Rows that a phone answers."""

_LINE = re.compile(r"\r\n|\r|\n")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Rows:
    """The rows of a phone page.

    Attributes:
        texts: at most MOST.
        source: where they come from, in words.
        places: of each text, for messages ("rows.txt, line 3"); empty where nobody could correct a row.
    """

    texts: tuple[str, ...]
    source: str
    places: tuple[str, ...] = ()


def find_rows(run: Run, path: Path | None) -> Rows:
    """The rows of a file; None = of the sample corpus where the run is made from it, else none.

    Raises:
        InputError: a file that cannot be read as rows, by name and line.
    """
    data = run.require("data")
    if path is not None:
        return read_rows(path)
    if data.entry.facts.get("sample_data"):
        rows = [row for row in read_jsonl(data.path / "test.jsonl") if row.get("text") and not row.get("leaked")]
        return Rows(tuple(row["text"] for row in rows[:MOST]), "test rows of the workbook's own sample corpus")
    return Rows((), "the package's own sentences")  # whether other rows may be passed on is not known here


def read_rows(path: Path) -> Rows:
    """One text a line, or JSONL with "text"; empty lines are no rows.

    Raises:
        InputError: no file, not UTF-8, a line that is no row, or no row at all.
    """
    if not path.is_file():
        raise InputError(f"no file {path}.", "--rows with one text a line, or JSONL.", "check the path.")
    lines = [
        (number, line)
        for number, line in enumerate(_LINE.split(utf8(path, path.read_bytes()).removeprefix("\ufeff")), 1)
        if line.strip()
    ]
    if not lines:
        raise InputError(f"{path} holds no text.", 'one text a line, or JSONL with "text".', "check the file.")
    json_lines = path.suffix.lower() == ".jsonl"
    texts = [_text(path, number, line) if json_lines else line.strip() for number, line in lines]
    source = f"rows of {path.name}, which the user named"
    if len(texts) > MOST:
        source += f" (the first {MOST} of {len(texts):,})"
    places = tuple(f"{path}, line {number}" for number, _ in lines[:MOST])
    return Rows(tuple(texts[:MOST]), source, places)


def _text(path: Path, number: int, line: str) -> str:
    """The text of one line of JSONL."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _no_row(path, number, f"is not JSON ({error})") from None
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise _no_row(path, number, "holds no text")
    if _SURROGATE.search(text):
        raise _no_row(path, number, "holds half of a surrogate pair, which is no character")
    return text.strip()


def _no_row(path: Path, number: int, what: str) -> InputError:
    return InputError(f"{path}, line {number} {what}.", 'an object with "text" in every line.', "correct that line.")


def fitting(rows: Rows, lengths: list[int], n_ctx: int) -> tuple[list[int], str]:
    """The rows whose prompt and answer fit into the context, and the source with what is left out.

    Args:
        lengths: tokens of each row's prompt and answer.

    Raises:
        InputError: there are rows, and none fits.
    """
    kept = [i for i, length in enumerate(lengths) if length < n_ctx]
    if lengths and not kept:
        place = rows.places[0] if rows.places else "the first row"
        raise InputError(
            f"{place} has {lengths[0]:,} tokens with the prompt, and no other row is shorter than the context.",
            f"rows of less than {n_ctx:,} tokens with the prompt.",
            "name shorter rows with --rows.",
        )
    dropped = len(lengths) - len(kept)
    words = f" ({dropped} of {len(lengths)} left out, longer than the context)" if dropped else ""
    return kept, rows.source + words
