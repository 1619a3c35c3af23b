"""SHA-256 of large files, computed once for each state of a file.

A base model of several gigabytes is named by its hash in four notebooks. The hash is remembered under
runs/_cache/sha256.json with all that changes when a file is written, replaced or set back: its size, inode, and the
times of its last change and of its last change of status. A file that was written a moment ago is not remembered: a
second change within one tick of the file system's clock would look like none.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from filelock import FileLock

from lib.runs.files import runs_folder, sha256_file, write_json

SETTLED = 2.0
"""Seconds since the last change after which a file's times are trusted (FAT's clock ticks that slowly)."""


def remembered_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes; nothing is read when this state of the file was hashed before.

    Raises:
        OSError: the file cannot be read.
    """
    place = path.resolve()
    before, memory = _state(place), runs_folder() / "_cache" / "sha256.json"
    remembered = _read(memory).get(str(place))
    if isinstance(remembered, dict) and remembered.get("state") == before:
        return str(remembered["sha256"])
    digest = sha256_file(place)
    if _state(place) == before and time.time_ns() - before[1] > SETTLED * 1e9:
        with contextlib.suppress(OSError):  # a hash that is not remembered is only computed again
            _remember(memory, place, {"state": before, "sha256": digest})
    return digest


def _state(path: Path) -> list[int]:
    found: os.stat_result = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _read(memory: Path) -> dict[str, Any]:
    try:
        content = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _remember(memory: Path, place: Path, entry: dict[str, Any]) -> None:
    """Add one entry; several processes may do so at the same time. Files that are gone are forgotten."""
    memory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(memory.with_suffix(".lock")):
        kept = {path: known for path, known in _read(memory).items() if Path(path).is_file()}
        write_json(memory, {**kept, str(place): entry})
