"""What a folder or file on the disk is, and what it lacks: models, adapters, GGUF files. Nothing is loaded or run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.models import kinds
from lib.models.inspecting import adapter, gguf_file, model
from lib.models.inspecting.disk import disk_problems, size_on_disk

__all__ = ["inspect"]


def inspect(path: Path | str, render: bool = True) -> dict[str, Any]:
    """Describe a model folder, an adapter folder or a GGUF file.

    Args:
        render: also try the chat template out, in a process of its own with little memory and time.

    Returns:
        {"path", "kind" ("model", "adapter", "gguf" or "unknown"), "bytes", facts by kind, "notes", "problems"}; with
        a problem it cannot be used, a note is only worth knowing.

    Raises:
        InputError: nothing there.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return {"path": str(path), "kind": "gguf", "bytes": path.stat().st_size, **gguf_file.describe(path, render)}
    if not path.is_dir():
        raise InputError(f"no file or folder {path}.", "a model folder, an adapter folder or a GGUF file.", "check it.")
    head: dict[str, Any] = {"path": str(path), "bytes": size_on_disk(path)}
    notes, problems = disk_problems(path)
    kind = _kind(path)
    facts: dict[str, Any] = {}
    if kind == "unknown":
        have = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        problems.insert(0, f"neither a model nor an adapter: the folder holds {have}")
    else:
        describe = adapter.describe if kind == "adapter" else model.describe
        facts = describe(path, render)
    return {
        **head,
        "kind": kind,
        **{key: value for key, value in facts.items() if key not in ("notes", "problems")},
        "notes": [*notes, *facts.get("notes", [])],
        "problems": list(dict.fromkeys([*problems, *facts.get("problems", [])])),
    }


def _kind(folder: Path) -> str:
    """By content; where the weights cannot be read, by the configurations."""
    found, config = kinds.contents(folder), kinds.adapter_config(folder)
    if "model" in found:
        return "model"
    if "adapter" in found or config.get("peft_type"):
        return "adapter"
    return "model" if (folder / "config.json").is_file() or any(folder.glob("*.safetensors")) else "unknown"
