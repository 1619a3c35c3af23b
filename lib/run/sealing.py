"""What a kill between the end of a stage and its manifest entry must not cost: the finished work is found again.

Two files lie beside the work and are no part of the product: what was asked for, from the beginning, and, once every
file has been flushed, what the entry will say. They are removed after the entry has been added.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.run.files import flush_to_disk, read_json, readable_by_group, write_json
from lib.run.manifest import files_of, hash_folder

REQUEST, FINISHED = ".request.json", ".finished.json"


def begin(folder: Path, wanted: dict[str, Any]) -> None:
    """Note what the work in `folder` is for (parameters and input digests)."""
    (folder / FINISHED).unlink(missing_ok=True)
    write_json(folder / REQUEST, wanted)


def asked(folder: Path, wanted: dict[str, Any]) -> bool:
    """Whether the work in `folder` was for exactly that."""
    return _read(folder / REQUEST) == wanted


def finish(folder: Path, facts: dict[str, Any]) -> None:
    """Flush every file, then note that all is done.

    Args:
        facts: what the manifest entry will say beside the hashes of the files.

    Raises:
        InputError: a symbolic link among the files.
        RuntimeError: there are none.
    """
    sizes = _sizes(folder)
    if not sizes:
        raise RuntimeError(f"the stage wrote nothing into {folder}")
    for name in sizes:
        readable_by_group(folder / name)
        flush_to_disk(folder / name)
    write_json(folder / FINISHED, {"sizes": sizes, "facts": facts})


def finished(folder: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The facts of work that was finished for exactly that, with its files as they were; else None."""
    found = _read(folder / FINISHED) if asked(folder, wanted) else None
    return found["facts"] if found is not None and found["sizes"] == _sizes(folder) else None


def outputs(folder: Path) -> dict[str, dict[str, Any]]:
    """Bytes and SHA-256 of the product's files."""
    return {name: output for name, output in hash_folder(folder).items() if name not in (REQUEST, FINISHED)}


def take_back(final: Path, temporary: Path) -> None:
    """A folder that was renamed, and whose entry was never added, becomes work in progress again."""
    if (final / REQUEST).is_file():
        shutil.rmtree(temporary, ignore_errors=True)
        final.rename(temporary)


def forget(folder: Path) -> None:
    """Remove both notes: the entry is there."""
    for name in (REQUEST, FINISHED):
        (folder / name).unlink(missing_ok=True)


def _sizes(folder: Path) -> dict[str, int]:
    found = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files_of(folder)}
    return {name: size for name, size in found.items() if name not in (REQUEST, FINISHED)}


def _read(path: Path) -> Any:
    try:
        return read_json(path) if path.is_file() else None
    except InputError:
        return None
