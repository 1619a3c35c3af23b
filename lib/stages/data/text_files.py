"""From the bytes of a data file to text that every parser reads alike, with everything changed on the way counted."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.runs.files import atomic_path, sha256_file, sha256_json, utf8

# Data sets that are easily taken for another one, and are therefore named by their content.


@dataclass(frozen=True)
class Known:
    """A data set known by its content.

    Attributes:
        name: its own name. rows, columns: of the table as published. sha256: of the file as published.
        stamp: what every page of a run on it must say.
    """

    name: str
    rows: int
    columns: frozenset[str]
    sha256: str
    stamp: str


HOTELS = Known(
    "ChnSentiCorp_htl_all",
    7766,
    frozenset(("label", "review")),
    "1d414b9c65caf3a836abdb4efded621968502ad3338e1a9d885ae131c86083f0",
    "the rows are ChnSentiCorp_htl_all (7,766 hotel reviews), not ChnSentiCorp: not comparable with results on it",
)
"""Shares its name with ChnSentiCorp (9,600 / 1,200 / 1,200 reviews of hotels, laptops and books) and 3,094 texts."""


def recognize(rows: int, columns: Collection[str], hashes: Collection[str]) -> Known | None:
    """The known data set that a table is, by a file's hash or by its rows and columns."""
    same = rows == HOTELS.rows and {name.strip().lower() for name in columns} == HOTELS.columns
    return HOTELS if same or HOTELS.sha256 in hashes else None


# From the bytes of a data file to text that every parser reads alike, with everything changed on the way counted.

FORMATS = {".csv": "csv", ".tsv": "tsv", ".txt": "tsv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
"""Suffix of a data file -> how it is read. TSV is unquoted."""

SURROGATE = re.compile("[\ud800-\udfff]")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def file_fingerprint(path: Path) -> str:
    """SHA-256 of a file; of a folder, over the names and SHA-256 of the data files in it (hidden files left out)."""
    if path.is_dir():
        return sha256_json({file.name: sha256_file(file) for file in data_files(path)})
    return sha256_file(path)


def data_files(folder: Path) -> list[Path]:
    """The files of a folder that the workbook can read, by name."""
    files = (p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    return sorted(p for p in files if p.suffix.lower() in FORMATS)


def check_content(path: Path, head: bytes) -> None:
    """Refuse what is not data: an empty file, a Git LFS pointer, an HTML page, another encoding of Unicode."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start:
        raise InputError(f"{path} is empty.", "a file with rows.", "fetch or export it again.")
    if head.startswith(b"version https://git-lfs"):
        raise InputError(
            f"{path} is a Git LFS pointer, not the data.", "the file itself.", "run `git lfs pull` where it came from."
        )
    if start.startswith((b"<!doctype html", b"<html", b"<?xml")):
        raise InputError(
            f"{path} is a web page, not data.", "the file itself.", "download it again with the site's raw-file link."
        )
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{path} is UTF-16.", "UTF-8.", "save it again as UTF-8.")


def _line_ends(text: str, kind: str, changes: Counter[str]) -> str:
    """LF only. A CR alone ends a line only where the file has no LF; else it is a space."""
    if "\r" not in text:
        return text
    changes["CRLF line ends"] += text.count("\r\n")
    text = text.replace("\r\n", "\n")
    if "\n" not in text and kind != "json":
        changes["CR line ends"] += text.count("\r")
        return text.replace("\r", "\n")
    changes["stray CR characters"] += text.count("\r")
    return text.replace("\r", " ")


def strip_surrogates(value: Any, changes: Counter[str]) -> Any:
    """A JSON value without lone surrogates, which no UTF-8 file and no tokenizer can hold."""
    if isinstance(value, str):
        text, count = SURROGATE.subn("", value)
        changes["lone surrogates"] += count
        return text
    if isinstance(value, list):
        return [strip_surrogates(item, changes) for item in value]
    if isinstance(value, dict):
        return {strip_surrogates(key, changes): strip_surrogates(item, changes) for key, item in value.items()}
    return value


def _json_without_surrogates(path: Path, text: str, changes: Counter[str]) -> str:
    try:
        value = json.loads(text)
        return json.dumps(strip_surrogates(value, changes), ensure_ascii=False)
    except json.JSONDecodeError:
        pass
    lines = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            lines.append(json.dumps(strip_surrogates(json.loads(line), changes), ensure_ascii=False))
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}, line {number} is not JSON ({error.msg}).",
                "a list of objects, or one object a line.",
                "correct that line.",
            ) from None
    return "\n".join(lines) + "\n"


def json_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON file: a list, or one a line."""
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if text.lstrip().startswith("[") else [json.loads(t) for t in text.split("\n") if t.strip()]


def bad_json_line(path: Path) -> tuple[int, str] | None:
    """Number of the first line that is not JSON, and why; None where all are, or the file is one JSON value."""
    text = path.read_text(encoding="utf-8")
    try:
        json.loads(text)
        return None
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("["):
            return error.lineno, error.msg
    for number, line in enumerate(text.split("\n"), 1):
        try:
            json.loads(line or "{}")
        except json.JSONDecodeError as error:
            return number, error.msg
    return None


def readable_copy(path: Path, cache: Path) -> tuple[Path, Counter[str]]:
    """The file itself when it is plain UTF-8 with LF, else a cleaned copy of it in `cache`.

    Removed and counted: a byte-order mark, NUL characters, CR, lone surrogates (JSON escapes).

    Returns:
        The path to parse, and how often each change was made.

    Raises:
        InputError: empty, a Git LFS pointer, a web page, not UTF-8.
    """
    kind, changes = FORMATS[path.suffix.lower()], Counter[str]()
    raw = path.read_bytes()
    check_content(path, raw[:4096])
    if kind == "parquet":
        if raw[:4] != b"PAR1" or raw[-4:] != b"PAR1":
            raise InputError(
                f"{path} does not start and end as Parquet does.", "a whole Parquet file.", "fetch it again."
            )
        return path, changes
    text = original = utf8(path, raw)
    if text.startswith("\ufeff"):
        changes["byte-order mark"] += 1
        text = text[1:]
    if "\0" in text:
        changes["NUL characters"] += text.count("\0")
        text = text.replace("\0", "")
    text = _line_ends(text, kind, changes)
    if kind == "json" and _SURROGATE_ESCAPE.search(text):
        text = _json_without_surrogates(path, text, changes)
    if not text.strip():
        raise InputError(f"{path} is empty.", "a file with rows.", "fetch or export it again.")
    if text == original:
        return path, changes
    copy = cache / f"{hashlib.sha256(raw).hexdigest()[:16]}{path.suffix.lower()}"
    with atomic_path(copy) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return copy, +changes
