"""Whether a page still shows what its notebook would: then a report answers without starting a kernel for it.

Beside a page lies a record of everything that it depends on. It is written last, so a page without one is made again.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.report.index import Stage, Summary
from lib.runs.files import PROJECT, read_json, runs_folder, sha256_file, sha256_json, user_path, write_json
from lib.runs.manifest import NOTEBOOK_OF, versions
from lib.runs.phone_results import FOLDER as PHONES
from lib.runs.run import Run
from lib.select.choice import BEST_OF

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
    files = [run.folder / name for name in products] + [run.folder / PHONES, *_local_files(parameters)]
    return {
        "notebook": sha256_file(notebook),
        "parameters": sha256_json(parameters),
        "library": _library(),
        "packages": versions(),
        "products": products,
        "files": sha256_json([list(_times(path)) for path in files]),
        "executed": sha256_file(page.with_suffix(".ipynb")),
    }


def unchanged_page(page: Path, notebook: Path, parameters: dict[str, Any], run: Run) -> bool:
    """Whether the page is there and nothing that it depends on has changed since it was made."""
    record = record_of(page)
    if parameters.get("force") or not all(path.is_file() for path in (page, page.with_suffix(".ipynb"), record)):
        return False
    return _read(record) == page_state(page, notebook, parameters, run)


def remember_page(page: Path, notebook: Path, parameters: dict[str, Any], run: Run) -> None:
    """Write the record of a page that has just been made."""
    write_json(record_of(page), page_state(page, notebook, parameters, run))


def rendered_state(summary: Summary, stages: list[Stage]) -> dict[str, Any]:
    """What links and stamps of all pages depend on."""
    return {"library": _library(), "run": sha256_json([repr(summary), repr(stages)])}


def is_rendered(folder: Path, state: dict[str, Any]) -> bool:
    """Whether the pages of the folder were rendered from this state."""
    return _read(folder / RENDERED) == state


def _read(record: Path) -> Any:
    try:
        return read_json(record)
    except (InputError, OSError):
        return None


@functools.cache
def _library() -> str:
    """Hash of the sources of lib: code, templates, data."""
    files = sorted(path for path in (PROJECT / "lib").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return sha256_json({path.relative_to(PROJECT).as_posix(): sha256_file(path) for path in files})


def _local_files(parameters: dict[str, Any]) -> Iterator[Path]:
    """Files and folders of the user's that parameters name; of runs to choose from their manifests."""
    fallbacks = [value for entry in parameters.get("fallbacks", ()) for value in entry.values()]
    for text in filter(lambda value: isinstance(value, str) and value, [*parameters.values(), *fallbacks]):
        if text.startswith(BEST_OF):
            names = text.removeprefix(BEST_OF).split(",")
            yield from (runs_folder() / name.strip() / "manifest.json" for name in names)
        elif len(text) < 4096 and "\n" not in text and (path := user_path(text)).exists():
            yield path


def _times(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, bytes and time of the last change of a file, or of every file in a folder."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            found = file.stat()
            yield file.name, found.st_size, found.st_mtime_ns
