"""What every folder is looked through for: its size, Git LFS pointers, web pages, pickles, unfinished downloads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def size_on_disk(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def disk_problems(folder: Path) -> tuple[list[str], list[str]]:
    """Notes and problems that the first bytes and the names of a folder's files show."""
    notes, problems = [], []
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        try:
            with path.open("rb") as stream:
                head = stream.read(64)
        except OSError as error:
            problems.append(f"{path.name} cannot be read ({error.strerror})")
            continue
        if head.startswith(b"version https://git-lfs"):
            problems.append(f"{path.name} is a Git LFS pointer, not the file: run `git lfs pull` in its clone")
        elif head.lstrip()[:1] == b"<" and path.suffix in (".json", ".safetensors", ".txt", ".model"):
            problems.append(f"{path.name} is a web page, not the file: download it again")
        elif path.suffix in _PICKLES:
            notes.append(f"{path.name} is a pickle, which can run any code: the workbook never reads it")
        elif path.suffix in (".incomplete", ".part"):
            notes.append(f"{path.name} is an unfinished download")
        elif path.suffix == ".py":
            notes.append(f"{path.name} is code of the repository: the workbook never runs it")
    return notes, problems


def read_object(path: Path, problems: list[str]) -> dict[str, Any]:
    """A JSON object; empty, with a problem noted, when it is damaged. A missing file is empty without one."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name} is damaged ({' '.join(str(error).split())[:80]})")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{path.name} holds no object")
        return {}
    return content


def whole(value: Any) -> int | None:
    """A whole number of a configuration; None for anything else."""
    return value if type(value) is int else None
