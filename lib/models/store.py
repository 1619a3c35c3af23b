"""Folders made once and reused by every run: named by a key of everything that determines them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from lib.run import folders
from lib.run.files import flush_to_disk, read_json, readable_by_group, sha256_json, write_json
from lib.run.manifest import hash_folder


def store() -> Path:
    """The folder of what runs share: runs/_offline/."""
    return folders.runs_folder() / "_offline"


def record_of(folder: Path) -> dict[str, Any]:
    """What was recorded when a stored folder was made: {"determined_by", "facts", "files"}."""
    return read_json(folder.with_name(f"{folder.name}.json"))


def whole(folder: Path) -> bool:
    """Whether a stored folder has its record and every file is as recorded (bytes and SHA-256)."""
    if not folder.is_dir() or not folder.with_name(f"{folder.name}.json").is_file():
        return False
    return hash_folder(folder) == record_of(folder)["files"]


def ensure(
    kind: str,
    determined_by: dict[str, Any],
    build: Callable[[Path], dict[str, Any]],
    place: Path | None = None,
) -> Path:
    """The stored folder for this key, made by `build` if it is absent or damaged.

    Args:
        kind: first part of the folder's name, e.g. "tokenizer".
        determined_by: everything the content depends on (JSON values); its hash is the key.
        build: writes files into an empty folder, returns facts for the record.
        place: folder that holds it; None = `store()`.

    Returns:
        The folder. One process builds, others wait for it; a kill in between leaves nothing under the final name.
    """
    place = folders.writable(place or store())
    final = place / f"{kind}-{sha256_json(determined_by)[:16]}"
    record = final.with_name(f"{final.name}.json")
    with FileLock(final.with_name(f".{final.name}.lock")):
        if whole(final):
            return final
        temporary = final.with_name(f".{final.name}.part")
        for old in (temporary, final):
            shutil.rmtree(old, ignore_errors=True)
        record.unlink(missing_ok=True)
        temporary.mkdir()
        try:
            facts = build(temporary)
            for path in temporary.rglob("*"):
                if path.is_file():
                    readable_by_group(path)
                    flush_to_disk(path)
            temporary.replace(final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        write_json(record, {"determined_by": determined_by, "facts": facts, "files": hash_folder(final)})
    return final
