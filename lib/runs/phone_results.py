"""What a phone's page sends back: checked key by key, because anybody with the address can send it, then saved."""

from __future__ import annotations

import datetime as dt
import json
import re
import secrets
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.runs.files import write_json

FOLDER = "devices"
"""Of a run: what phones measured."""

MOST_BYTES = 256 << 10
MOST_FILES = 500
MOST_TEXT = 2000
LARGEST = 10**9
"""Largest value of any number: seconds, tokens, tokens a second, nats."""
_LIST = 5000
_HASH = re.compile(r"[0-9a-f]{64}")
_ODD = ("Cc", "Cs", "Zl", "Zp")
"""Unicode categories that no device name contains: control characters, lone surrogates, line separators."""
_TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that change the direction of the text after them, in a table even that of other cells."""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= LARGEST


def _is_text(value: Any) -> bool:
    return (
        isinstance(value, str)
        and len(value) <= MOST_TEXT
        and not any(character in _TURNING or unicodedata.category(character) in _ODD for character in value)
    )


_COUNT, _MAYBE = f"a whole number from 0 to {LARGEST}", f"a number from 0 to {LARGEST}, or null"
_NUMBERS, _FLAG = f"a list of numbers from 0 to {LARGEST}", "true or false"
_TEXT = f"a text of at most {MOST_TEXT} characters, none of them for control"
_FITS: dict[str, Callable[[Any], bool]] = {
    _COUNT: lambda value: isinstance(value, int) and _is_number(value),
    _MAYBE: lambda value: value is None or _is_number(value),  # null where a browser may not tell
    _NUMBERS: lambda value: isinstance(value, list) and 0 < len(value) <= _LIST and all(map(_is_number, value)),
    _FLAG: lambda value: isinstance(value, bool),
    _TEXT: _is_text,
}
"""Kinds of values, in words, and what is of that kind."""

SCHEMA: dict[str, dict[str, str]] = {
    "device": {"name": _TEXT, "browser": _TEXT, "user_agent": _TEXT, "cores": _MAYBE, "memory_gb": _MAYBE},
    "runtime": {"wllama": _TEXT, "threads": _COUNT, "isolated": _FLAG, "compat": _FLAG},
    "load": {"seconds": _NUMBERS},
    "prompt": {"tokens": _COUNT, "tokens_per_second": _NUMBERS},
    "generation": {"tokens": _COUNT, "tokens_per_second": _NUMBERS},
    "checks": dict.fromkeys(("n", "exact", "tokens", "same_tokens", "prompts_as_stored"), _COUNT),
    "rows": {"n": _COUNT, "agree": _COUNT, "largest_gap_nats": _MAYBE, "source": _TEXT},
}
"""{section: {key: kind}} of a result, beside "format", "file", "sha256", "run" and "measured"."""

_PARTS = (
    ("checks", "exact", "n"),
    ("checks", "prompts_as_stored", "n"),
    ("checks", "same_tokens", "tokens"),
    ("rows", "agree", "n"),
)
"""(section, part, whole): counts of which the first is one part of the second."""


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
    for section, part, whole in _PARTS:
        if result[section][part] > result[section][whole]:
            raise _wrong(f"{section}.{part}", f"at most {section}.{whole}")
    return result


def read_result(path: Path) -> dict[str, Any]:
    """A saved or downloaded result, checked.

    Raises:
        InputError: no such file, not JSON, or not a result.
    """
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        raise InputError(f"no result {path}.", "a JSON file from the phone page.", "check the path.")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # of UTF-8, of JSON, of a number with thousands of digits, of nesting
        raise InputError(
            f"{path} is damaged ({error}).", "a JSON file from the phone page.", "measure again, or remove the file."
        ) from None
    return check_result(content)


def save_result(folder: Path, result: Mapping[str, Any]) -> Path:
    """Write a checked result as <time>-<device>-<random>.json: results that arrive together are all kept.

    Raises:
        InputError: the folder is full, so that nobody can fill the disk with results.
        OSError: the disk does not take it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if sum(1 for _ in folder.iterdir()) >= MOST_FILES:
        raise InputError(f"{MOST_FILES} results are kept already.", "fewer.", "remove some from the run's devices/.")
    slug = re.sub(r"[^a-z0-9]+", "-", result["device"]["name"].lower()).strip("-")[:40] or "device"
    path = folder / f"{dt.datetime.now():%Y%m%d-%H%M%S}-{slug}-{secrets.token_hex(4)}.json"
    write_json(path, result)
    return path


def _checked(value: Any, kind: str, key: str) -> Any:
    if not _FITS[kind](value):
        raise _wrong(key, kind)
    return value


def _wrong(key: str, expected: str) -> InputError:
    return InputError(f"the result's {key!r} is something else.", f"{expected}.", "measure again on the phone page.")
