"""What a phone's page sends back: checked key by key, because anybody with the address can send it, and saved."""

from __future__ import annotations

import datetime as dt
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.run.files import read_json, write_json

FOLDER = "devices"
"""Of a run: what phones measured."""

MOST_BYTES = 256 << 10
MOST_FILES = 500
MOST_TEXT = 2000
_LIST = 5000
_HASH = re.compile(r"[0-9a-f]{64}")

_NUMBER, _TEXT, _FLAG, _NUMBERS = "a number", "a text", "true or false", "a list of numbers"
SCHEMA: dict[str, dict[str, str]] = {
    "device": {"name": _TEXT, "browser": _TEXT, "user_agent": _TEXT, "cores": _NUMBER, "memory_gb": _NUMBER},
    "runtime": {"wllama": _TEXT, "threads": _NUMBER, "isolated": _FLAG, "compat": _FLAG},
    "load": {"seconds": _NUMBERS},
    "prompt": {"tokens": _NUMBER, "tokens_per_second": _NUMBERS},
    "generation": {"tokens": _NUMBER, "tokens_per_second": _NUMBERS},
    "checks": dict.fromkeys(("n", "exact", "tokens", "same_tokens", "prompts_as_stored"), _NUMBER),
    "rows": {"n": _NUMBER, "agree": _NUMBER, "largest_gap_nats": _NUMBER, "source": _TEXT},
}
"""{section: {key: kind}} of a result, beside "format", "file", "sha256", "run" and "measured"."""


def check_result(content: Any) -> dict[str, Any]:
    """The known keys of a result, each of its kind; others are dropped.

    Raises:
        InputError: something is missing or of another kind.
    """
    if not isinstance(content, Mapping) or content.get("format") != 1:
        raise _wrong("format", "1")
    if not isinstance(content.get("sha256"), str) or not _HASH.fullmatch(content["sha256"]):
        raise _wrong("sha256", "64 hexadecimal digits")
    result: dict[str, Any] = {"format": 1}
    for key in ("run", "file", "sha256", "measured"):
        result[key] = _checked(content.get(key), _TEXT, key)
    for section, kinds in SCHEMA.items():
        found = content.get(section)
        if not isinstance(found, Mapping):
            raise _wrong(section, "an object")
        result[section] = {key: _checked(found.get(key), kind, f"{section}.{key}") for key, kind in kinds.items()}
    return result


def read_result(path: Path) -> dict[str, Any]:
    """A saved or downloaded result, checked.

    Raises:
        InputError: no such file, not JSON, or not a result.
    """
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        raise InputError(f"no result {path}.", "a JSON file from the phone page.", "check the path.")
    return check_result(read_json(path))


def save_result(folder: Path, result: Mapping[str, Any]) -> Path:
    """Write a checked result as <time>-<device>.json, never over another one.

    Raises:
        InputError: the folder is full: nobody shall fill the disk with results.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if sum(1 for _ in folder.iterdir()) >= MOST_FILES:
        raise InputError(f"{MOST_FILES} results are kept already.", "fewer.", "remove some from the run's devices/.")
    slug = re.sub(r"[^a-z0-9]+", "-", result["device"]["name"].lower()).strip("-")[:40] or "device"
    stem = f"{dt.datetime.now():%Y%m%d-%H%M%S}-{slug}"
    path, number = folder / f"{stem}.json", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.json"
    write_json(path, result)
    return path


def _checked(value: Any, kind: str, key: str) -> Any:
    """The value, if it is of its kind; a number or text that the browser does not tell may be null."""
    if kind == _NUMBERS:
        good = isinstance(value, list) and 0 < len(value) <= _LIST and all(_is_number(each) for each in value)
    elif kind == _FLAG:
        good = isinstance(value, bool)
    elif kind == _TEXT:
        good = isinstance(value, str) and len(value) <= MOST_TEXT
    else:
        good = value is None or _is_number(value)
    if not good:
        raise _wrong(key, kind)
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _wrong(key: str, expected: str) -> InputError:
    return InputError(f"the result's {key!r} is something else.", f"{expected}.", "measure again on the phone page.")
