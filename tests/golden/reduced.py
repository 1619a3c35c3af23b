"""Long lists made short: their totals notice every change of any weight, and a result file stays readable."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from typing import Any

LONGEST = 200
"""Items that a list or mapping keeps."""

ROWS = 20
"""Rows that a file of JSON lines keeps: scores and texts of single rows."""


def reduced(value: Any, longest: int = LONGEST) -> Any:
    """The value with every list and mapping of more than `longest` items in the form of `totals`."""
    if not isinstance(value, (dict, list)):
        return value
    if len(value) > longest:
        return totals(value)
    if isinstance(value, dict):
        return {key: reduced(item, longest) for key, item in value.items()}
    return [reduced(item, longest) for item in value]


def totals(value: dict | list) -> dict[str, Any]:
    """Number of items; for each key below them the number and sum of its numbers; a digest of all texts."""
    sums: dict[str, list[float]] = {}
    texts = hashlib.sha256()
    for key, leaf in _leaves(value, ""):
        if isinstance(leaf, (int, float)) and not isinstance(leaf, bool) and math.isfinite(leaf):
            sums.setdefault(key, []).append(leaf)
        else:
            texts.update(json.dumps([key, leaf], ensure_ascii=False).encode())
    return {
        "items": len(value),
        "sums": {key: [len(own), float(f"{math.fsum(own):.8g}")] for key, own in sums.items()},
        "texts": texts.hexdigest()[:10],
    }


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Every leaf with the last name above it (of a mapping as long as a list its names are texts, not keys)."""
    if isinstance(value, dict):
        for name, item in value.items():
            if len(value) > LONGEST:
                yield "", name
            yield from _leaves(item, key if len(value) > LONGEST else name)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, key)
    else:
        yield key, value


def written(value: Any) -> str:
    """JSON with sorted keys, a line an item, but lists of numbers on one line."""
    long = json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True)
    return re.sub(r'\[\n[^\[\]{}"]*\]', lambda match: re.sub(r"\s+", " ", match[0]), long) + "\n"
