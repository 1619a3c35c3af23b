"""What a training computes in: number format, 4 bits or not, kind of device; and checkpoints made in something else.

The product's record names one of each, so a training does not go on in another: it begins afresh, and says so.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lib import device
from lib.errors import InputError
from lib.run.files import read_json, write_json

if TYPE_CHECKING:
    from lib.settings import Settings

RECORD = "arithmetic.json"
"""Beside the checkpoints."""


def same_or_afresh(folder: Path, settings: Settings, in_4bit: bool) -> list[str]:
    """Remove what an interrupted training left if it computed in another way, and record how this one computes.

    Args:
        folder: of the work; hidden files are not the training's.

    Returns:
        For the reader: what was different, in a sentence; nothing where all is as it was.
    """
    asked = {"dtype": device.compute_dtype(settings.dtype)[0], "in_4bit": in_4bit, "device": device.torch_device()}
    before, messages = _before(folder), []
    there = any(folder.glob("checkpoints/checkpoint-*"))
    if before != asked and (before or there):
        words = f"the checkpoints were made in {_words(before)}, and now it is {_words(asked)}: trained afresh"
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif not path.name.startswith("."):
                path.unlink()
        stamp = time.strftime("%Y-%m-%d %H:%M:%S%z")
        (folder / "training.log").write_text(f"{stamp} {words}\n", encoding="utf-8")
        messages = [words] if there else []
    if before != asked:
        write_json(folder / "checkpoints" / RECORD, asked)
    return messages


def _before(folder: Path) -> dict[str, object] | None:
    path = folder / "checkpoints" / RECORD
    try:
        found = read_json(path) if path.is_file() else None
    except InputError:
        return None
    return found if isinstance(found, dict) and found.keys() == {"dtype", "in_4bit", "device"} else None


def _words(what: dict[str, object] | None) -> str:
    if what is None:
        return "an unknown number format"
    return f"{what['dtype']} on {what['device']}{' over a base in 4 bits' if what['in_4bit'] else ''}"
