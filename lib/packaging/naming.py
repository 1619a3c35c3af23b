"""The file's name by the naming convention of GGUF: Base-Size-FineTune-v1.0-Encoding.gguf."""

from __future__ import annotations

import hashlib
import re

from lib.models.unpacking import plain_name

VERSION = "v1.0"

_SIZE = re.compile(r"(?:^|[-_ ])(\d+(?:[._]\d+)?[KMBTQ])(?=$|[-_ ])", re.IGNORECASE)
_REVISION = re.compile(r"^((?:\w+:)?[\w.-]+(?:/[\w.-]+)?)@.*$", re.S)
"""A hub id with its revision; a folder's path may hold an @ of its own."""


def gguf_name(base: str, size: str, run_name: str, encoding: str) -> str:
    """The name of a packaged file.

    Args:
        base: hub id, folder or name of the base model, as the run has it; a revision behind @ is left out.
        size: label of the size ("494M"), for a base whose name holds none.
        run_name: the fine-tune; behind what the base's own name says of its tuning (Instruct, Chat).
            Where the convention cannot hold all its characters, a short hash tells it from its like.
        encoding: quantization type.
    """
    name = re.split(r"[/\\:]", _REVISION.sub(r"\1", base).rstrip("/\\"))[-1] or "model"
    name = plain_name(name)
    name = "Offline-base" if name == "offline" else name
    found = _SIZE.search(name)
    size = found[1].replace("_", ".").upper() if found else size
    family, tuning = (name[: found.start()], name[found.end() :]) if found else (name, "")
    parts = [_part(family, "."), _part(size, "."), _part(f"{tuning}-{_tune(run_name)}"), VERSION, encoding]
    return "-".join(part for part in parts if part) + ".gguf"


def _tune(run_name: str) -> str:
    """The run's name as it can stand there: 情感甲 and 情感乙, a.b and a-b stay apart."""
    text = _part(run_name)
    return text if text == run_name else f"{text}-{hashlib.sha256(run_name.encode('utf-8')).hexdigest()[:6]}"


def size_label(weights: int) -> str:
    """The size of a model in its unit: 2.0M, 494M, 7.6B."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if weights >= scale:
            return f"{weights / scale:.{1 if weights < 10 * scale else 0}f}{unit}"
    return f"{max(1, round(weights / 1e3))}K"


def _part(text: str, keep: str = "") -> str:
    """Letters, digits and hyphens, as the convention has them (a base's name and a size keep their dot)."""
    return re.sub(rf"[^A-Za-z0-9{re.escape(keep)}]+", "-", text).strip("-.")
