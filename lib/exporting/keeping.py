"""Formats that need not be made again: those of the former product, and those of an interrupted try."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from lib.exporting.formats import FORMATS
from lib.run import Run, Work
from lib.run.files import read_json
from lib.run.manifest import hash_folder

SUMMARY = "exports.json"

Kept = dict[str, tuple[Path, dict[str, Any]]]


def finished(run: Run, work: Work, inputs: dict[str, str]) -> Kept:
    """{format: (folder, record)} of what was made from the same products by the same package and still verifies.

    Args:
        inputs: digests of the products that are exported now.
    """
    folders = [work.folder] if work.resumed else []
    former = run.manifest.entries().get("exports")
    if former is not None and former.inputs == inputs:
        folders.append(run.folder / "exports")
    found: Kept = {}
    for folder in folders:
        for record in read_json(folder / SUMMARY)["made"] if (folder / SUMMARY).is_file() else []:
            name, path = record["format"], folder / record["folder"]
            same = name in FORMATS and record["made_by"] == FORMATS[name].maker()
            if same and name not in found and path.is_dir() and hash_folder(path) == record["files"]:
                found[name] = path, record
    return found


def take_over(old: Path, new: Path) -> None:
    """The folder under its new name: hard links, or copies where the disk has no hard links."""
    if old != new:
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(old, new, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
