"""`python -m tests.golden.compare [CASE ...]`: record again, and name every difference from the committed results."""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.golden.cases import CASES
from tests.golden.record import RESULTS, record

TOLERANCE = 1e-6
"""Relative; how a float is printed is not the point."""

SMALLEST = 1e-9
"""Numbers nearer than this are equal whatever their size: differences of equal things are rounding."""

_MISSING = object()


def differences(old: Any, new: Any, path: str, tolerance: float = TOLERANCE) -> Iterator[str]:
    """One line for every place at which two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key, _MISSING), new.get(key, _MISSING), f"{path}/{key}", tolerance)
    elif isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            yield f"{path}: {len(old)} items -> {len(new)}"
        for i, (one, other) in enumerate(zip(old, new, strict=False)):
            yield from differences(one, other, f"{path}/{i}", tolerance)
    elif not _equal(old, new, tolerance):
        yield f"{path}: {_shown(old)} -> {_shown(new)}"


def _equal(old: Any, new: Any, tolerance: float) -> bool:
    numbers = [type(value) in (int, float) for value in (old, new)]
    if all(numbers):
        return math.isclose(old, new, rel_tol=tolerance, abs_tol=SMALLEST)
    return type(old) is type(new) and old == new


def _shown(value: Any) -> str:
    if value is _MISSING:
        return "nothing"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 300 else f"{text[:300]} …"


def compare(names: list[str], results: Path = RESULTS, tolerance: float = TOLERANCE) -> list[str]:
    """Differences of the named cases (all, if none) from the results."""
    found = []
    with tempfile.TemporaryDirectory(prefix="golden-new-") as folder:
        for name, ended in record(names, Path(folder)).items():
            stored = results / f"{name}.json"
            if ended == "failed" or (ended == "recorded" and not stored.is_file()):
                found.append(f"{name}: {ended if ended == 'failed' else 'nothing to compare with; record it first'}")
            elif ended == "recorded":
                old, new = (json.loads(p.read_text(encoding="utf-8")) for p in (stored, Path(folder) / stored.name))
                found += differences(old, new, name, tolerance)
    return found


def main() -> None:
    """Read the command line, compare, and exit with 1 on differences."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all without")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="relative, of numbers (default: 1e-6)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to compare with")
    given = parser.parse_args()
    if unknown := set(given.cases) - set(CASES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    found = compare(given.cases, given.results, given.tolerance)
    print("\n".join(found) or "no difference")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
