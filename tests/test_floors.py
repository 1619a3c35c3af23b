"""A module imports only from lower floors, no circle of imports, no stage knows another, and doors open fast."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]

ORDER = (
    *(
        "errors",
        "language",
        "progress",
        "parameter_file",
        "settings",
        "runs",
        "statistics",
        "hub",
        "prompts",
        "models",
        "scoring",
        "select",
    ),
    *("stages", "pipeline", "serve", "report", "cli"),
)
"""Rooms from the ground up. `select` stands below the stages: it only reads what they made, and a training may begin
with the adapter that it chooses."""

HEAVY = ("torch", "transformers", "llama_cpp", "sklearn", "matplotlib", "pandas", "datasets", "peft", "papermill")
DOORS = (
    "cli.__main__",
    "report.display",
    "report.runner",
    "scoring.backend",
    "select.choice",
    "serve.openai",
    "serve.phone",
)


def module_name(path: Path) -> str:
    """``lib/a/b.py`` is ``lib.a.b``; a package is named like its folder."""
    return ".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {module_name(path): path.read_text(encoding="utf-8") for path in sorted((PROJECT / "lib").rglob("*.py"))}
STAGES = sorted({name.split(".")[2] for name in SOURCES if name.startswith("lib.stages.")})


def imported(source: str) -> set[str]:
    """Names of lib that a source imports when it runs, also inside functions; not those for annotations alone."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            names |= {name for alias in node.names for name in (node.module, f"{node.module}.{alias.name}")}
    return {name for name in names if name.startswith("lib.")}


def violations(module: str, names: set[str]) -> list[str]:
    """What a module must not import: higher floors, and other stages."""
    own = module.split(".")
    found = []
    for name in sorted(names & set(SOURCES)):
        other = name.split(".")
        if ORDER.index(other[1]) > ORDER.index(own[1]):
            found.append(f"{module} imports {name} from a higher floor")
        if own[1] == other[1] == "stages" and own[2] != other[2]:
            found.append(f"{module} imports {name} of another stage")
    return found


@pytest.mark.parametrize("module", [name for name in SOURCES if name != "lib"])
def test_imports_only_from_below(module: str) -> None:
    assert module.split(".")[1] in ORDER
    assert violations(module, imported(SOURCES[module])) == []


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of imports; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_circle() -> None:
    assert circle({name: imported(source) & set(SOURCES) - {name} for name, source in SOURCES.items()}) == []


def test_the_checks_themselves_find_what_they_look_for() -> None:
    upward = imported("def f():\n    from lib.stages.finetune.stage import finetune\n")
    assert violations("lib.models.loading", upward) == [
        "lib.models.loading imports lib.stages.finetune.stage from a higher floor"
    ]
    assert violations("lib.stages.merge.stage", imported("import lib.stages.data.stage")) == [
        "lib.stages.merge.stage imports lib.stages.data.stage of another stage"
    ]
    assert violations("lib.stages.merge.stage", imported("from lib.models.loading import load_model")) == []
    assert imported("if TYPE_CHECKING:\n    from lib.runs.run import Run\n") == set()
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) != []


def test_doors_open_fast() -> None:
    """Importing a stage or a command loads no model library, so `workbook --help` and errors are instant."""
    doors = [f"lib.{door}" for door in DOORS] + [f"lib.stages.{stage}.stage" for stage in STAGES]
    code = (
        f"import importlib, sys\nfor door in {doors!r}:\n    importlib.import_module(door)\n"
        f"print(' '.join(m for m in {HEAVY!r} if m in sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert answer.stdout.split() == []
