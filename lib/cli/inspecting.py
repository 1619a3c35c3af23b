"""What `workbook inspect` prints."""

from __future__ import annotations

from typing import Any

from lib.cli.output import cell, show

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
    from lib.models.inspecting import inspect as look
    from lib.run.folders import user_path

    report = look(user_path(path))
    show(report, as_json, as_text(report))
    return not report["problems"]
