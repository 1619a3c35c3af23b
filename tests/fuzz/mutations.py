"""Broken copies of good files, by a seed: structure for JSON and YAML, bytes for everything."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from typing import Any

ODD: tuple[Any, ...] = (
    *(None, True, False, "", " ", "abc", "8", "\x00", "\ud800", "é" * 300, "nan", "../../x", "<b onmouseover=x>"),
    *(0, -1, 1, 7, 2**31, 2**63, -(2**63), 10**15, 10**300, 0.0, -0.5, 1e308, 1e-320),
    *([], [[]], ["a"], [1, "a", None], {}, {"a": 1}, [{"a": [{}]}], [0] * 300),
)
"""Values of another type, of another size, or empty."""


def structure(value: Any, chance: random.Random) -> Any:
    """A JSON value with one to four places replaced, deleted, doubled or renamed."""
    changed = copy.deepcopy(value)
    for _ in range(chance.randint(1, 4)):
        places = list(_places(changed))
        if not places:
            return chance.choice(ODD)
        holder, key = chance.choice(places)
        act = chance.random()
        if act < 0.7:
            holder[key] = copy.deepcopy(chance.choice(ODD))
        elif act < 0.8:
            del holder[key]
        elif act < 0.9 and isinstance(holder, dict):
            holder[f"{key}{chance.choice(('_', 's', '.default', ' '))}"] = holder.pop(key)
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        else:
            holder[key] = [holder[key]]
    return changed


def _places(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in list(items):
        yield value, key
        yield from _places(part)


def raw(data: bytes, chance: random.Random) -> bytes:
    """Bytes with one to eight flips, holes, insertions, repeats or numbers overwritten; now and then cut off."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        place = chance.randrange(len(changed) + 1)
        act: Callable[[], Any] = chance.choice(
            [
                lambda p=place: changed.__setitem__(slice(p, p + 1), bytes([chance.randrange(256)])),
                lambda p=place: changed.__delitem__(slice(p, p + chance.randint(1, 40))),
                lambda p=place: changed.__setitem__(slice(p, p), bytes(chance.randrange(256) for _ in range(8))),
                lambda p=place: changed.__setitem__(slice(p, p), changed[p : p + chance.randint(1, 200)]),
                lambda p=place: changed.__setitem__(
                    slice(p, p + 8), struct.pack("<Q", chance.choice((0, 1, 2**31, 2**32, 2**63, 2**64 - 1, 10**12)))
                ),
                lambda p=place: changed.__setitem__(
                    slice(p, p + 4), struct.pack("<I", chance.choice((0, 13, 2**32 - 1)))
                ),
            ]
        )
        act()
    return bytes(changed[: chance.randrange(len(changed) + 1)] if chance.random() < 0.05 else changed)


def header(data: bytes, chance: random.Random) -> bytes:
    """`raw` in the first kilobytes, where files say what they hold."""
    size = min(len(data), chance.choice((64, 512, 4096)))
    return raw(data[:size], chance) + data[size:]


def json_text(value: Any, chance: random.Random) -> bytes:
    """A JSON file that is mostly well-formed and odd, sometimes broken, deep or huge."""
    act = chance.random()
    if act < 0.75:
        return json.dumps(structure(value, chance), ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")
    if act < 0.8:
        return b"[" * 20_000 if chance.random() < 0.5 else b'{"a":' * 20_000
    text = json.dumps(value, ensure_ascii=False).encode()
    if act < 0.85:
        return text.replace(b"1", b"9" * 5000, 1)
    return raw(text, chance)
