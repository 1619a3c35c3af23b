"""Whether a page still shows what its notebook would: then a report answers without starting a kernel for it.

Beside a page lies a record of everything that it depends on. It is written last, so a page without one is made again.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lib.language import language
from lib.runs import files
from lib.runs.manifest import NOTEBOOK_OF, versions
from lib.runs.run import Run
from lib.select.choice import BEST_OF
from lib.stages.compare.speed import FOLDER as PHONES

RENDERED = ".rendered.json"
"""Beside the pages: what their links and stamps were made from."""


def record_of(page: Path) -> Path:
    """The file beside a page that says what it was made from."""
    return page.with_name(f".{page.stem}.json")


def page_state(page: Path, notebook: Path, parameters: dict[str, Any], run: Run) -> dict[str, Any]:
    """What a page depends on: its notebook, parameters, the library, packages, products up to its own, local files.

    Files are known by size and time of their last change: reading a model of gigabytes would take longer than the rest.
    """
    products = {
        name: entry.digest for name, entry in run.manifest.entries().items() if NOTEBOOK_OF[name][:2] <= page.stem[:2]
    }
    paths = [run.folder / name for name in products] + [run.folder / PHONES, *_local_files(parameters)]
    return {
        "notebook": files.sha256_file(notebook),
        "parameters": files.sha256_json(parameters),
        "library": library(),
        "language": language(),
        "packages": versions(),
        "products": products,
        "files": files.sha256_json([list(_times(path)) for path in paths]),
        "executed": files.sha256_file(page.with_suffix(".ipynb")),
    }


def unchanged_page(page: Path, notebook: Path, parameters: dict[str, Any], run: Run) -> bool:
    """Whether the page is there and nothing that it depends on has changed since it was made."""
    there = all(path.is_file() for path in (page, page.with_suffix(".ipynb")))
    if parameters.get("force") or not there:
        return False
    return files.object_or_empty(record_of(page)) == page_state(page, notebook, parameters, run)


def remember_page(page: Path, notebook: Path, parameters: dict[str, Any], run: Run) -> None:
    """Write the record of a page that has just been made."""
    files.write_json(record_of(page), page_state(page, notebook, parameters, run))


@functools.cache
def library() -> str:
    """Hash of the sources of lib: code, templates, data."""
    paths = sorted(
        path for path in (files.PROJECT / "lib").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    )
    return files.sha256_json({path.relative_to(files.PROJECT).as_posix(): files.sha256_file(path) for path in paths})


def _local_files(parameters: dict[str, Any]) -> Iterator[Path]:
    """Files and folders of the user's that parameters name; of runs to choose from their manifests."""
    fallbacks = [value for entry in parameters.get("fallbacks", ()) for value in entry.values()]
    for text in filter(lambda value: isinstance(value, str) and value, [*parameters.values(), *fallbacks]):
        if text.startswith(BEST_OF):
            names = text.removeprefix(BEST_OF).split(",")
            yield from (files.runs_folder() / name.strip() / "manifest.json" for name in names)
        elif len(text) < 4096 and "\n" not in text and (path := files.user_path(text)).exists():
            yield path


def _times(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, bytes and time of the last change of a file, or of every file in a folder."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            found = file.stat()
            yield file.name, found.st_size, found.st_mtime_ns
