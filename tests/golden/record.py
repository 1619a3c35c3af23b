"""`python -m tests.golden.record [CASE ...] [--out DIR]`: one JSON file a case, what the workbook gives today."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.golden.cases import CASES
from tests.golden.place import HERE, FailedError, Place, SkippedError
from tests.golden.reduced import written

RESULTS = HERE / "results"


def record(names: Sequence[str], folder: Path) -> dict[str, str]:
    """Record the named cases (all, if none) into `folder`; what became of each: "recorded", "skipped", "failed"."""
    folder.mkdir(parents=True, exist_ok=True)
    ended = {}
    with tempfile.TemporaryDirectory(prefix="golden-") as root:
        place = Place(Path(root))
        for name in names or CASES:
            started, ended[name], why = time.monotonic(), "recorded", ""
            try:
                (folder / f"{name}.json").write_text(written(CASES[name](place)), encoding="utf-8")
            except SkippedError as reason:
                ended[name], why = "skipped", f", {reason}"
            except FailedError as reason:
                ended[name], why = "failed", f", {reason}"
            seconds = time.monotonic() - started
            print(f"{name}: {ended[name]} in {seconds:.0f} s{why}", file=sys.stderr, flush=True)
    return ended


def main() -> None:
    """Read the command line and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all without")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON files")
    given = parser.parse_args()
    if unknown := set(given.cases) - set(CASES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    sys.exit("failed" in record(given.cases, given.out).values())


if __name__ == "__main__":
    main()
