"""A folder with a LoRA adapter: what it changes, for which base model, and what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.models.fitting import read_shape
from lib.models.inspecting.disk import read_object
from lib.models.inspecting.tokenizer import describe_tokenizer

_VARIANTS = {
    "modules_to_save": "fully trained copies of",
    "rank_pattern": "other ranks for",
    "alpha_pattern": "other alphas for",
}


def describe(folder: Path, render: bool) -> dict[str, Any]:
    """Facts, notes and problems of an adapter folder."""
    notes: list[str] = []
    problems: list[str] = []
    config = read_object(folder / "adapter_config.json", problems)
    if not (folder / "adapter_config.json").is_file():
        problems.append("no adapter_config.json: rank, alpha and base model are not known")
    facts: dict[str, Any] = {
        "peft_type": config.get("peft_type"),
        "base_model": config.get("base_model_name_or_path") or None,
        "base_revision": config.get("revision"),
        "target_modules": config.get("target_modules"),
    }
    facts |= _shape(folder, config, problems)
    if not facts["base_model"]:
        notes.append("it does not name its base model")
    for key, words in _VARIANTS.items():
        if config.get(key):
            value = config[key]
            notes.append(f"{words} {', '.join(map(str, value)) if isinstance(value, (list, dict)) else value} ({key})")
    has_tokenizer = (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file()
    tokenizer = describe_tokenizer(folder, problems, render) if has_tokenizer else {}
    return {**facts, **tokenizer, "notes": notes, "problems": problems}


def _shape(folder: Path, config: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    empty = {"variant": None, "rank": config.get("r"), "alpha": config.get("lora_alpha"), "parameters": None}
    if not config:
        return empty
    try:
        shape = read_shape(folder)
    except InputError as error:
        problems.append(error.found.rstrip("."))
        return empty
    if set(shape.ranks) != {shape.rank} and not config.get("rank_pattern"):
        problems.append(f"adapter_config.json says rank {shape.rank}, the tensors have {sorted(shape.ranks)}")
    return {
        "variant": shape.variant,
        "rank": shape.rank,
        "alpha": shape.alpha,
        "changed_modules": shape.modules,
        "targets": shape.targets,
        "parameters": shape.parameters,
        "dtype": shape.dtype,
    }
