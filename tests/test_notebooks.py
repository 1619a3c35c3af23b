"""Lint of the committed notebooks: one parameters cell of literals, no outputs, navigation, short cells, prose."""

from __future__ import annotations

import ast
import builtins
import itertools
import re
from pathlib import Path

import nbformat
import pytest
import yaml

from lib import settings
from lib.settings import Settings

PROJECT = Path(__file__).resolve().parents[1]
NAMES = [
    *("01_data", "02_finetune", "03_evaluate", "04_merge", "05_convert_gguf", "06_quantize"),
    "07_compare_quantized",
]
NOTEBOOKS = [PROJECT / "notebooks" / f"{name}.ipynb" for name in NAMES]
OF_THE_REPORT = {"author", "course", "detail", "language"}
"""Keys that say how pages are printed: no notebook has them, so that none is executed anew for another title."""
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def cells(path: Path, kind: str) -> list:
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == kind]


def parameters(path: Path) -> list[tuple[ast.AnnAssign, str]]:
    """Each assignment of the parameters cell with its source line."""
    (cell,) = [c for c in cells(path, "code") if "parameters" in c.metadata.get("tags", [])]
    lines = cell.source.splitlines()
    return [(node, lines[node.lineno - 1]) for node in ast.parse(cell.source).body]


def test_there_are_exactly_the_seven() -> None:
    assert sorted(p.name for p in (PROJECT / "notebooks").glob("*.ipynb")) == [p.name for p in NOTEBOOKS]


@each
def test_committed_clean_and_valid(path: Path) -> None:
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec == {
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "name": "python3",
    }
    assert "papermill" not in notebook.metadata
    for cell in cells(path, "code"):
        assert cell.outputs == [] and cell.execution_count is None


@each
def test_one_parameters_cell_of_documented_literals(path: Path) -> None:
    for node, line in parameters(path):
        assert isinstance(node, ast.AnnAssign), f"{path.stem}: {line}"
        name = node.target.id
        assert name in Settings.model_fields, f"{path.stem} declares {name}, which no parameter file may hold"
        assert ast.literal_eval(node.value) == getattr(Settings(), name), f"{name}: default differs from quick.yaml"
        assert ast.unparse(node.annotation) == {str: "str", int: "int", float: "float", bool: "bool"}.get(
            Settings.model_fields[name].annotation, ast.unparse(node.annotation)
        )
        help_text = line.rpartition("  # ")[2]
        assert help_text != line, f"{path.stem}: {name} has no help text"
        assert "=" not in help_text, f"{path.stem}: papermill does not see {name} when its help text has a ="


@each
@pytest.mark.parametrize("file", sorted((PROJECT / "params").glob("*.yaml")), ids=lambda p: p.stem)
def test_papermill_with_a_short_file_is_the_same_run(path: Path, file: Path) -> None:
    """papermill injects what the file holds behind the notebook's own defaults, which are those of the schema."""
    given = yaml.safe_load(file.read_text(encoding="utf-8"))
    defaults = {node.target.id: ast.literal_eval(node.value) for node, _ in parameters(path)}
    injected = "\n".join(["# Parameters", *(f"{key} = {value!r}" for key, value in given.items())])
    found = settings.from_notebook({**defaults, **given, "In": ["", injected]})
    assert found == settings.load(file)


@each
@pytest.mark.parametrize("file", sorted((PROJECT / "params").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_report_gives_each_notebook_its_own_keys(path: Path, file: Path) -> None:
    """03 and 07 have `terms`, which conversations alone use, and not `task`: no contradiction."""
    asked = settings.load(file).model_dump()
    given = {node.target.id: asked[node.target.id] for node, _ in parameters(path)}
    assert settings.from_notebook(given).pick(*given) == given


def test_every_key_is_used_by_some_notebook() -> None:
    declared = {node.target.id for path in NOTEBOOKS for node, _ in parameters(path)}
    assert declared == set(Settings.model_fields) - OF_THE_REPORT


@each
def test_cells_are_short_and_tell_the_story(path: Path) -> None:
    for cell in cells(path, "code"):
        most = 35 if "parameters" in cell.metadata.get("tags", []) else 15  # 02 has as many keys as that
        assert len(cell.source.splitlines()) <= most, f"{path.stem}: a code cell over {most} lines:\n{cell.source}"
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                assert node.end_lineno - node.lineno < 5, f"{path.stem}: {node.name} belongs into lib"
        for banned in ("!pip", "%cd", "input(", "sys.exit", "os.chdir", "print("):
            assert banned not in cell.source, f"{path.stem}: {banned}"
    assert 3 * len(cells(path, "markdown")) >= 2 * len(cells(path, "code")), "a claim before, a reading after"


@each
def test_no_cell_asks_which_kind_of_rows_it_shows(path: Path) -> None:
    """Every cell runs for every run: results and pages know their metric."""
    for cell in cells(path, "code"):
        assert not {"labels", "answers", "untrained"} & set(cell.metadata.get("tags", []))
        assert "labelled" not in cell.source and "has_labels" not in cell.source


@each
def test_every_page_says_what_its_numbers_are_not_about(path: Path) -> None:
    """Sample data, offline base, fallbacks, an adopted adapter: the stamps stand on every page."""
    assert sum(cell.source.endswith("display.stamps(run)") for cell in cells(path, "code")) == 1


@each
def test_title_subtitle_navigation_and_headings(path: Path) -> None:
    title, needs = cells(path, "markdown")[:2]
    number = path.stem[:2]
    assert title.source.startswith(f"# {number} · ") and "\n> " in title.source
    assert needs.metadata["tags"] == ["setup"], "what the page needs stands at its end"
    index = NAMES.index(path.stem)
    for neighbour in NAMES[max(0, index - 1) : index] + NAMES[index + 1 : index + 2]:
        assert f"({neighbour}.ipynb)" in needs.source, f"{path.stem} does not link to {neighbour}"
    for row in ("| Needs |", "| Makes |"):
        assert row in needs.source
    text = "\n".join(cell.source for cell in cells(path, "markdown"))
    headings = re.findall(r"^(#+) ", re.sub(r"```.*?```", "", text, flags=re.S), flags=re.M)
    assert headings.count("#") == 1
    depths = [len(h) for h in headings]
    assert all(b - a <= 1 for a, b in itertools.pairwise(depths))


@each
def test_prose_holds_no_measured_numbers(path: Path) -> None:
    """Accuracies and percentages in prose must come from a variable; a literal one cannot be true for every run."""
    for cell in cells(path, "markdown"):
        assert not re.search(r"accuracy (of|is) 0\.\d+", cell.source)
        assert not re.search(r"\d+(\.\d+)? ?% (accuracy|loss|smaller|faster)", cell.source)


@each
def test_every_name_is_defined(path: Path) -> None:
    """ruff cannot tell: names of the parameters cell and of cells above count as defined, others do not."""
    tree = ast.parse("\n".join(cell.source for cell in cells(path, "code")))
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    known = {node.id for node in names if isinstance(node.ctx, ast.Store)} | set(dir(builtins)) | {"display"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            known |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.Lambda):
            known |= {argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)}
            known |= {node.name} if isinstance(node, ast.FunctionDef) else set()
        elif isinstance(node, ast.ExceptHandler) and node.name:
            known.add(node.name)
    assert {node.id for node in names} - known == set()
