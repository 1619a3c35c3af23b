"""Small notebooks in place of the seven: the runner must not care what they do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import nbformat
import pytest

PARAMETERS = 'run_name: str = "quick"  # name\nseed: int = 42  # seed'


@pytest.fixture
def write_notebook(tmp_path: Path) -> Callable[..., Path]:
    """Write notebooks/NN_name.ipynb: heading, a parameters cell, then the given code cells."""
    folder = tmp_path / "notebooks"
    folder.mkdir()

    def write(name: str, *sources: str, parameters: str = PARAMETERS, prose: Sequence[str] = ()) -> Path:
        v4 = nbformat.v4
        links = "[next](02_second.ipynb) [readme](../README.md)"
        title = f"# {name[:2]} · {name[3:].title()}\n\n> What does {name} do?\n\n{links}"
        cells = [v4.new_markdown_cell(title), v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
        cells += [v4.new_markdown_cell(text) for text in prose] + [v4.new_code_cell(source) for source in sources]
        notebook = v4.new_notebook(cells=cells)
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3 (ipykernel)"}
        notebook.metadata["language_info"] = {"name": "python"}
        path = folder / f"{name}.ipynb"
        nbformat.write(notebook, path)
        return path

    return write


@pytest.fixture
def params(tmp_path: Path) -> Path:
    """A parameter file for a run of its own."""
    path = tmp_path / "test.yaml"
    path.write_text("run_name: test\nseed: 7\n", encoding="utf-8")
    return path
