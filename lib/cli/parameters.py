"""The keys of a parameter file, from the schema itself."""

from __future__ import annotations

import json
import typing
from typing import Any

from lib.settings import Settings


def _type_words(annotation: Any) -> str:
    """A key's type in words: 'one of …', 'list of text', 'number'."""
    words = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    if typing.get_origin(annotation) is typing.Literal:
        return "one of " + ", ".join(typing.get_args(annotation))
    if typing.get_origin(annotation) is list:
        return f"list of {words.get(typing.get_args(annotation)[0], 'values')}"
    return words.get(annotation, str(annotation))


def keys() -> list[dict[str, Any]]:
    """Name, type, default and meaning of every key, in the order of the stages."""
    return [
        {
            "key": name,
            "type": _type_words(field.annotation),
            "default": field.default,
            "meaning": field.description or "",
        }
        for name, field in Settings.model_fields.items()
    ]


def as_text(found: list[dict[str, Any]]) -> str:
    """One paragraph a key."""
    return "\n".join(
        f"{key['key']}: {json.dumps(key['default'], ensure_ascii=False)}\n    {key['meaning']} ({key['type']})"
        for key in found
    )
