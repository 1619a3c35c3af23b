"""What two recordings of one commit may differ in, by name: times, memory, machines, dates, places, hashes.

Nothing else is left out. A new rule belongs here, with a word on why.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

KEYS = re.compile(
    r"seconds|per_second|^throughput$|_runs$|mib|memory|^estimate$|"  # cost; runs: as many as fit a second
    r"cpu_percent|^samples$|^resources$|"  # what was sampled while a training ran
    r"^finished$|^date$|^versions$|^git$|^commit$|^inputs$|"  # when and of what; inputs are digests of products
    r"^processor$|^machine$|sha256|digest|^hash$"
)
"""Keys of JSON files."""

HEADINGS = re.compile(
    r"^seconds$|(^|, )(s|ms|MiB)$|(tokens|rows)/s( of training)?( ↑)?$|^ms a row$|^(load|prompt|generation) range$|"
    r"memory|tokens a second"
)
"""Headings of table columns, or of the rows of a table of two columns; ceilings are arithmetic, but in tokens/s too."""

CAPTIONS = re.compile(r"^Machine card|^Latency of|free, and the measured peak")
"""Tables that are left out but for their captions and headings."""

AXES = re.compile(r"MiB|minutes|\bs$|seconds|tokens/s|tokens a second|\bcores\b|\btime\b")
"""Axis labels whose data are left out."""

_UNIT = r"(?:tokens/s|(?:non-padding )?tokens a second|rows/s|MiB|GiB|GB/s|ms|min|minutes|seconds|s|h)"
_NUMBER = r"[-+]?\d[\d,]*(?:\.\d+)?"
TEXTS = (
    (re.compile(r"\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d)?(?:\.\d+)?)?(?:Z|[+-]\d\d:\d\d| UTC)?"), "<date>"),
    (re.compile(r"(?<![\w.])(?=[0-9a-f]*[a-f])(?=[a-f]*\d)[0-9a-f]{12,64}\b"), "<hash>"),
    (re.compile(rf"(?<![\w.]){_NUMBER}(?:(?: to |–| – ){_NUMBER})* ?{_UNIT}\b(?! =)"), "<cost>"),
    (re.compile(r"(?<![\w.])[\d.]+ of \d+ cores busy|\b\d+ samples\b"), "<load>"),
    (re.compile(r"\d+(?: to \d+)? loads, .{1,40} generations"), "<runs>"),  # as many as fit a second
    (re.compile(r"0x[0-9a-f]{6,}"), "<address>"),
)
"""Parts of texts, with what stands for them."""

PROGRESS = re.compile(r": ([\d,]+(/[\d,]+ \(| done in )|…$)|^ {4}")
"""Lines of stderr that come as time goes by."""


def text(value: str, places: Mapping[str, str]) -> str:
    """A text without what varies; `places`: folders of this machine and the names that stand for them."""
    for folder, name in places.items():
        value = value.replace(folder, name)
    for pattern, name in TEXTS:
        value = pattern.sub(name, value)
    return value


def columns(output: list[str]) -> list[str]:
    """Lines with tables of plain text, whose cells stand two blanks apart; cells that hold costs become dashes."""
    found, left_out = [], set()
    for line in output:
        cells = re.split(r"  +", line)
        if any(HEADINGS.search(cell) for cell in cells):
            left_out = {i for i, cell in enumerate(cells) if HEADINGS.search(cell)}
        elif left_out and len(cells) > max(left_out):
            line = "  ".join("–" if i in left_out else cell for i, cell in enumerate(cells))
        found.append(line)
    return found


def steady(value: Any, places: Mapping[str, str]) -> Any:
    """Any JSON value without what varies, its numbers to 8 digits."""
    if isinstance(value, dict):
        return {text(k, places): steady(v, places) for k, v in value.items() if not KEYS.search(k)}
    if isinstance(value, list):
        return [steady(item, places) for item in value]
    if isinstance(value, str):
        return text(value, places)
    if isinstance(value, float):
        return float(f"{value:.8g}") if math.isfinite(value) else str(value)
    return value
