"""A module imports only from floors below its own; stages never import one another; imports stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]

FLOORS = {
    **dict.fromkeys(("errors", "formats"), 0),
    **dict.fromkeys(("settings", "run", "progress", "statistics", "device", "textmetrics"), 1),
    **dict.fromkeys(("models", "scoring", "plots", "selecting"), 2),
    **dict.fromkeys(
        ("data", "training", "evaluation", "merging", "gguf_export", "quantizing", "exporting", "comparison"), 3
    ),
    **dict.fromkeys(("packaging", "serving"), 3),
    **dict.fromkeys(("cli", "reporting"), 4),
}
WITHIN = {("scoring", "models"), ("selecting", "models"), ("selecting", "scoring"), ("cli", "reporting")}
"""Pairs of one floor that may import (from, to): the scorer knows how prompts are made, the CLI runs reports."""

HEAVY = ("torch", "transformers", "llama_cpp", "sklearn", "matplotlib", "pandas", "datasets", "peft", "papermill")


def room_of(path: Path) -> str:
    return path.relative_to(PROJECT / "lib").parts[0].removesuffix(".py")


def imported_rooms(source: str) -> set[str]:
    """Rooms of lib that a source imports anywhere, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError("relative import")
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("lib.")}


def violations(room: str, imported: set[str]) -> list[str]:
    """The imports a room must not make."""
    own = FLOORS[room]
    return [
        f"{room} (floor {own}) imports {other} (floor {FLOORS[other]})"
        for other in sorted(imported - {room})
        if FLOORS[other] > own or (FLOORS[other] == own and own > 1 and (room, other) not in WITHIN)
    ]


SOURCES = sorted(p for p in (PROJECT / "lib").rglob("*.py") if p != PROJECT / "lib" / "__init__.py")


def test_every_room_has_a_floor() -> None:
    assert {room_of(path) for path in SOURCES} <= set(FLOORS)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(PROJECT / "lib").as_posix())
def test_imports_only_from_below(path: Path) -> None:
    assert violations(room_of(path), imported_rooms(path.read_text(encoding="utf-8"))) == []


def test_the_check_itself_finds_violations() -> None:
    upward = imported_rooms("def f():\n    from lib.training import train\n")
    assert violations("models", upward) == ["models (floor 2) imports training (floor 3)"]
    assert violations("merging", imported_rooms("import lib.data.stage")) == [
        "merging (floor 3) imports data (floor 3)"
    ]
    assert violations("training", imported_rooms("from lib import settings\nfrom lib.models.loading import x")) == []


def test_importing_every_package_is_light() -> None:
    """`import lib.<room>` loads no model library, so `workbook --help` and errors are instant."""
    rooms = sorted({room_of(path) for path in SOURCES})
    code = (
        "import importlib, sys\n"
        f"for room in {rooms!r}:\n    importlib.import_module('lib.' + room)\n"
        f"print(' '.join(m for m in {HEAVY!r} if m in sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert answer.stdout.split() == []
