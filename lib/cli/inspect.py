"""What `workbook unpack` prints.
What `workbook inspect` prints.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.cli.console import cell, show

# What `workbook unpack` prints.


def unpack(file: Path, folder: Path, dtype: str, off_grid: bool, as_json: bool) -> None:
    """Unpack a GGUF file and print what was done."""
    from lib.models.unpack import unpack as write_folder
    from lib.runs.files import user_path

    record = write_folder(user_path(str(file)), folder, dtype, off_grid)
    show({"folder": str(folder), **record}, as_json, f"{folder}\n{unpack_text(record)}")


def unpack_text(record: Mapping[str, Any]) -> str:
    """A record of `lib.models.unpack` as lines."""
    from lib.models.unpack import notes_of
    from lib.report.rows import unpacked

    lines = [f"{key}: {value}" for key, value in unpacked({"unpacked": record}).items()]
    return "\n".join([*notes_of(record), *lines])


# What `workbook inspect` prints.

_LAST = ("notes", "problems")


def as_text(report: dict[str, Any]) -> str:
    """A report as lines `key: value`, then notes and problems."""
    lines = [f"{_words(key)}: {_value(key, value)}" for key, value in report.items() if key not in _LAST]
    lines += [f"note: {note}" for note in report["notes"]]
    lines += [f"PROBLEM: {problem}" for problem in report["problems"]] or ["no problem found"]
    return "\n".join(lines)


def _words(key: str) -> str:
    return key.replace("_", " ")


def _value(key: str, value: Any) -> str:
    if key == "bytes":
        return f"{value:,} ({value / 1e6:,.1f} MB)"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{_words(str(k))} {v[:12] if k == 'sha256' else _value('', v)}" for k, v in value.items())
    return cell(value)


def inspect(path: str, as_json: bool) -> bool:
    """Print what is at `path`; whether it can be used."""
    from lib.models.inspect_folder import inspect as look
    from lib.runs.files import user_path

    report = look(user_path(path))
    show(report, as_json, as_text(report))
    return not report["problems"]
