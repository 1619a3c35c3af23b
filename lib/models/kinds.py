"""A full model or a LoRA adapter? Told apart by what the files hold, never by their names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.models.weights import read_file

_LORA_MARKS = (".lora_A.", ".lora_B.", ".lora_embedding_", ".lora_magnitude_vector")


def has_lora(names: Any) -> bool:
    """Whether tensor names are those of an adapter (peft's prefix, or a low-rank pair)."""
    return any(name.startswith("base_model.model.") or any(m in f"{name}." for m in _LORA_MARKS) for name in names)


def contents(folder: Path) -> set[str]:
    """What the weights of a folder are: "model", "adapter", both, or nothing. Damaged files count as nothing."""
    found = set()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            tensors, _ = read_file(path)
        except InputError:
            continue
        if tensors:
            found.add("adapter" if has_lora(tensors) else "model")
    return found


def adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a folder; empty when there is none, or none that can be read."""
    try:
        content = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def refuse_adapter(folder: Path) -> None:
    """Refuse a LoRA adapter where a full model is needed.

    Raises:
        InputError: says for which base model it is, and how both are given.
    """
    config = adapter_config(folder)
    if contents(folder) == {"adapter"} or (config.get("peft_type") and "model" not in contents(folder)):
        base = config.get("base_model_name_or_path") or "the model it was trained on"
        raise InputError(
            f"{folder} is a LoRA adapter (rank {config.get('r', 'unknown')}, for {base}), not a full model.",
            "a full model: config.json, all weights as safetensors, tokenizer.",
            f"set base_model to {base} and adapter to this folder.",
        )


def require_adapter(folder: Path) -> None:
    """Refuse what is not a LoRA adapter in safetensors.

    Raises:
        InputError: a full model, a pickle, or a folder without adapter.
    """
    config = adapter_config(folder)
    found = contents(folder)
    if "adapter" in found and config:
        return
    if "model" in found and "adapter" not in found:
        raise InputError(
            f"{folder} is a full model, not a LoRA adapter.",
            "adapter_config.json and adapter_model.safetensors.",
            "set base_model to this folder and adapter to an adapter (or leave it empty to train one).",
        )
    if not found and sorted(folder.glob("adapter_model*.bin")):
        raise InputError(
            f"{folder} holds a pickled adapter (.bin).",
            "adapter_model.safetensors (a pickle can run any code).",
            "save it again with save_pretrained(safe_serialization=True).",
        )
    lacks = "no readable adapter_config.json" if not config else "no readable adapter_model.safetensors"
    raise InputError(f"{folder} holds {lacks}.", "a peft adapter folder.", "check the path, or copy it again.")
