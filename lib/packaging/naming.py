"""The file's name by the naming convention of GGUF: Base-Size-FineTune-v1.0-Encoding.gguf."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

VERSION = "v1.0"

_SIZE = re.compile(r"(?:^|[-_ ])(\d+(?:[._]\d+)?[KMBTQ])(?=$|[-_ ])", re.IGNORECASE)


def gguf_name(base: str, metadata: Mapping[str, Any], run_name: str, encoding: str) -> str:
    """The name of a packaged file.

    Args:
        base: hub id, folder or name of the base model, as the run has it.
        metadata: of the GGUF file; its size label is taken where the base's name holds none.
        run_name: the fine-tune; behind what the base's own name says of its tuning (Instruct, Chat).
        encoding: quantization type.
    """
    name = re.split(r"[/\\:]", base.rstrip("/\\"))[-1] or "model"
    name = "Offline-base" if name == "offline" else name
    found = _SIZE.search(name)
    size = found[1].replace("_", ".").upper() if found else str(metadata.get("general.size_label") or "")
    family, tuning = (name[: found.start()], name[found.end() :]) if found else (name, "")
    parts = [_part(family, "."), _part(size, "."), _part(f"{tuning}-{run_name}"), VERSION, encoding]
    return "-".join(part for part in parts if part) + ".gguf"


def _part(text: str, keep: str = "") -> str:
    """Letters, digits and hyphens, as the convention has them (a base's name and a size keep their dot)."""
    return re.sub(rf"[^A-Za-z0-9{re.escape(keep)}]+", "-", text).strip("-.")
