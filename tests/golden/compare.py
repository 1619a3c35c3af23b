"""`python -m tests.golden.compare [CASE ...]`: record again, and name every difference from the committed results."""

from __future__ import annotations

import argparse
import difflib
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

LIKE = 0.5
"""Least likeness of two items that are compared as old and new of one thing."""

_MISSING = object()


def differences(old: Any, new: Any, path: str, tolerance: float = TOLERANCE) -> Iterator[str]:
    """One line for every place at which two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key, _MISSING), new.get(key, _MISSING), f"{path}/{key}", tolerance)
    elif isinstance(old, list) and isinstance(new, list):
        pairs = _paired(old, new, tolerance) if len(old) != len(new) else zip(old, new, strict=True)
        for i, (one, other) in enumerate(pairs):
            yield from differences(one, other, f"{path}/{i}", tolerance)
    elif not _equal(old, new, tolerance):
        yield f"{path}: {_shown(old)} -> {_shown(new)}"


def _paired(old: list[Any], new: list[Any], tolerance: float) -> list[tuple[Any, Any]]:
    """Items of two lists of different lengths that belong together, so that one more cell of a page is one difference.

    Equal items first, wherever they stand; then each of the old ones that are left with the new one most like it.
    """
    left = list(new)
    without: list[Any] = []
    for one in old:
        same = next((other for other in left if not any(differences(one, other, "", tolerance))), _MISSING)
        if same is _MISSING:
            without.append(one)
        else:
            left.remove(same)
    pairs = []
    for one in without:
        likeness = [(_likeness(one, other), i) for i, other in enumerate(left)]
        best, i = max(likeness, default=(0.0, 0))
        pairs.append((one, left.pop(i) if best > LIKE else _MISSING))
    return pairs + [(_MISSING, other) for other in left]


def _likeness(one: Any, other: Any) -> float:
    """0 to 1: how much of two JSON values is the same text."""
    texts = [json.dumps(value, ensure_ascii=False, sort_keys=True)[:2000] for value in (one, other)]
    return difflib.SequenceMatcher(None, *texts, autojunk=False).ratio()


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


def compare(
    names: list[str], results: Path = RESULTS, tolerance: float = TOLERANCE, recorded: Path | None = None
) -> list[str]:
    """Differences of the named cases (all, if none) from the results.

    Args:
        recorded: folder of new results; made here, and thrown away, without.
    """
    if recorded is not None:
        ended = {p.stem: "recorded" for p in sorted(recorded.glob("*.json")) if not names or p.stem in names}
        return [line for name in ended for line in _compared(name, ended[name], results, recorded, tolerance)]
    with tempfile.TemporaryDirectory(prefix="golden-new-") as folder:
        ended = record(names, Path(folder))
        return [line for name in ended for line in _compared(name, ended[name], results, Path(folder), tolerance)]


def _compared(name: str, ended: str, results: Path, folder: Path, tolerance: float) -> Iterator[str]:
    stored = results / f"{name}.json"
    if ended == "failed" or (ended == "recorded" and not stored.is_file()):
        yield f"{name}: {ended if ended == 'failed' else 'nothing to compare with; record it first'}"
    elif ended == "recorded":
        old, new = (json.loads(p.read_text(encoding="utf-8")) for p in (stored, folder / stored.name))
        yield from differences(old, new, name, tolerance)


def main() -> None:
    """Read the command line, compare, and exit with 1 on differences."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all without")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="relative, of numbers (default: 1e-6)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to compare with")
    parser.add_argument("--recorded", type=Path, help="folder of new results (tests.golden.record --out); else made")
    given = parser.parse_args()
    if unknown := set(given.cases) - set(CASES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    found = compare(given.cases, given.results, given.tolerance, given.recorded)
    print("\n".join(found) or "no difference")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
