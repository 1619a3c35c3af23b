"""What `workbook select` does: compare runs, write model_analysis.json, print the table and the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lib.cli.output import cell, show, table


def choose(names: list[str], output: Path | None) -> dict[str, Any]:
    """Compare runs and write the analysis into a folder (default: reports/, whose index then shows it)."""
    from lib.reporting.index import write_all_index
    from lib.run.folders import reports_folder, writable
    from lib.selecting import select

    analysis = select(names)
    folder = writable(output or reports_folder())
    path = analysis.write(folder)
    if output is None:
        write_all_index(folder)
    return {**analysis.content, "file": str(path)}


def select(names: list[str], output: Path | None, as_json: bool) -> None:
    """Compare runs, write the analysis and print it."""
    found = choose(names, output)
    show(found, as_json, "\n\n".join([_runs(found), _recipes(found), found["text"], found["rule"], found["file"]]))


def _runs(content: dict[str, Any]) -> str:
    from lib.reporting.choosing import run_rows

    columns, rows = run_rows(content)
    return table([dict(zip(columns, row, strict=True)) for row in rows], columns)


def _recipes(content: dict[str, Any]) -> str:
    from lib.reporting.choosing import recipe_rows

    columns, rows = recipe_rows(content)
    return table([dict(zip(columns, map(cell, row), strict=True)) for row in rows], columns)
