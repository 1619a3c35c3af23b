"""`python -m tests.fuzz [--minutes 20] [--seed N] [TARGET …]`: broken files until the time is up.

Every find is printed with its seed; `--only TARGET SEED` repeats it here, with its traceback. Each try runs in a child
process that is ended after `PATIENCE` seconds.
"""

from __future__ import annotations

import argparse
import collections
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.targets import TARGETS
from tests.fuzz.worker import Worker


def fuzz(targets: list[str], seconds: float, first: int) -> collections.Counter[str]:
    """Tries of every target in turn; prints each new find. Returns the number of tries and of finds a target."""
    worker, seen, counts = Worker(), set(), collections.Counter[str]()
    end, seed = time.monotonic() + seconds, first
    while time.monotonic() < end:
        for target in targets:
            counts[f"{target}: tries"] += 1
            if wrong := worker.ask(target, seed):
                counts[f"{target}: finds"] += 1
                if (key := (target, wrong[:120])) not in seen:
                    seen.add(key)
                    print(f"{target} {seed}: {wrong}", flush=True)
        seed += 1
    return counts


def main() -> None:
    """Read the command line and fuzz; exit code 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; all without")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0, help="the first one; printed with every find")
    parser.add_argument("--only", nargs=2, metavar=("TARGET", "SEED"), help="one try, here, with its traceback")
    given = parser.parse_args()
    if given.only:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            TARGETS[given.only[0]](Path(folder), random.Random(f"{given.only[0]} {int(given.only[1])}"))
        return
    counts = fuzz(given.targets or list(TARGETS), given.minutes * 60, given.seed)
    print("\n".join(f"{name}: {count:,}" for name, count in sorted(counts.items())))
    sys.exit(any(name.endswith("finds") for name in counts))


if __name__ == "__main__":
    main()
