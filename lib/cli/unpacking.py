"""What `workbook unpack` prints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.cli.output import show


def unpack(file: Path, folder: Path, dtype: str, off_grid: bool, as_json: bool) -> None:
    """Unpack a GGUF file and print what was done."""
    from lib.models.unpacking import unpack as write_folder
    from lib.run.folders import user_path

    record = write_folder(user_path(str(file)), folder, dtype, off_grid)
    show({"folder": str(folder), **record}, as_json, f"{folder}\n{as_text(record)}")


def as_text(record: Mapping[str, Any]) -> str:
    """A record of `lib.models.unpacking` as lines."""
    from lib.models.unpacking import notes_of
    from lib.plots.base_rows import unpacked

    lines = [f"{key}: {value}" for key, value in unpacked({"unpacked": record}).items()]
    return "\n".join([*notes_of(record), *lines])
