"""A tokenizer folder described from its JSON files, without the tokenizer library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lib.models.inspecting.disk import read_object
from lib.models.inspecting.templates import describe_template

_SHOWN = 30


def describe_tokenizer(folder: Path, problems: list[str], render: bool) -> dict[str, Any]:
    """{"vocabulary", "added_tokens", "largest_id", "template"}; what is wrong is added to `problems`."""
    config = read_object(folder / "tokenizer_config.json", problems)
    vocabulary, added = _vocabulary(folder, config, problems)
    template = _template(folder, config, problems)
    described = describe_template(template, render) if template else None
    if described and described["problem"]:
        problems.append(described["problem"])
    ids = [*vocabulary.values(), *added.values()]
    return {
        "vocabulary": len({*vocabulary, *added}) if vocabulary else None,
        "added_tokens": [name for name, _ in sorted(added.items(), key=lambda item: item[1])][:_SHOWN],
        "added_token_count": len(added),
        "largest_id": max(ids, default=None),
        "template": {key: value for key, value in described.items() if key != "problem"} if described else None,
    }


def _vocabulary(folder: Path, config: dict[str, Any], problems: list[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Ordinary and added tokens with their ids."""
    tokenizer = read_object(folder / "tokenizer.json", problems)
    model = tokenizer.get("model")
    plain = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(plain, list):  # a unigram model lists (token, score)
        plain = {str(entry[0]): i for i, entry in enumerate(plain) if isinstance(entry, list) and entry}
    listed = tokenizer.get("added_tokens")
    if not isinstance(plain, dict):
        plain = read_object(folder / "vocab.json", problems)
        decoder = config.get("added_tokens_decoder")
        entries = decoder.items() if isinstance(decoder, dict) else ()
        listed = [{"id": int(i), **e} for i, e in entries if isinstance(e, dict) and str(i).isdigit()]
    vocabulary = {name: i for name, i in plain.items() if type(i) is int}
    added = {
        entry["content"]: entry["id"]
        for entry in (listed if isinstance(listed, list) else [])
        if isinstance(entry, dict) and isinstance(entry.get("content"), str) and type(entry.get("id")) is int
    }
    return vocabulary, added


def _template(folder: Path, config: dict[str, Any], problems: list[str]) -> str:
    """The chat template: its own file, or in tokenizer_config.json (of several the one called default)."""
    own = folder / "chat_template.jinja"
    if own.is_file():
        try:
            return own.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            problems.append("chat_template.jinja is not UTF-8")
            return ""
    value = config.get("chat_template")
    if isinstance(value, list):
        named = {e.get("name"): e.get("template") for e in value if isinstance(e, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else ""
