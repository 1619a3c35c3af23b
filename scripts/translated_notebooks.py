"""Copies of the notebooks in another language, for JupyterLab: python -m scripts.translated_notebooks zh

They are written to notebooks/<language>/, which git ignores, and made anew each time: change the originals.
"""

from __future__ import annotations

import sys

import nbformat

from lib.language import TAGS, speaking, translated
from lib.runs.files import PROJECT, write_text


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) == 2 else ""
    if wanted not in TAGS:
        sys.exit(f"Found: {' '.join(sys.argv[1:]) or 'no language'}. Expected: one of {', '.join(TAGS)}.")
    folder = PROJECT / "notebooks" / wanted
    folder.mkdir(exist_ok=True)
    with speaking(wanted):
        for path in sorted((PROJECT / "notebooks").glob("*.ipynb")):
            notebook = nbformat.read(path, 4)
            for cell in notebook.cells:
                if cell.cell_type == "markdown":
                    text = translated(cell.source.strip(), f"notebooks/{path.stem}")
                    cell.source = text.replace("](../README.md)", "](../../README.md)")
            write_text(folder / path.name, nbformat.writes(notebook) + "\n")
    print(folder)


if __name__ == "__main__":
    main()
