"""`python -m tests.golden.record [CASE ...] [--out DIR]`: one JSON file a case, what the workbook gives today."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.golden.cases import CASES
from tests.golden.place import HERE, Place, SkippedError
from tests.golden.reduced import written

RESULTS = HERE / "results"


def record(names: Sequence[str], folder: Path) -> list[str]:
    """Record the named cases (all, if none) into `folder`; the names of those that could run here."""
    folder.mkdir(parents=True, exist_ok=True)
    done = []
    with tempfile.TemporaryDirectory(prefix="golden-") as root:
        place = Place(Path(root))
        for name in names or CASES:
            started = time.monotonic()
            try:
                content = CASES[name](place)
            except SkippedError as reason:
                print(f"{name}: skipped, {reason}", file=sys.stderr, flush=True)
                continue
            (folder / f"{name}.json").write_text(written(content), encoding="utf-8")
            print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
            done.append(name)
    return done


def main() -> None:
    """Read the command line and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all without")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON files")
    given = parser.parse_args()
    if unknown := set(given.cases) - set(CASES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    record(given.cases, given.out)


if __name__ == "__main__":
    main()
