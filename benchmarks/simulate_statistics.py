"""Do the statistics keep their word? False verdicts, coverage and power of `lib.statistics`, counted and simulated.

    python benchmarks/simulate_statistics.py --json OUT.json [--runs 5]

Comparisons of two models row by row, at 200 to 1,200 rows and 0.5 to 10 % discordant rows (rows on which exactly one of
the two is right). Independent rows are not simulated: the probability of every possible table is added up, so those
figures are exact. Rows in groups of near-duplicates, margins and documents are simulated, `--runs` × 200 times a
setting, seed 1; the standard error of a share of 0.95 is then 0.7 points at the default. The tables are printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binom, binomtest

from lib import statistics
from lib.progress import track
from lib.run.files import write_json
from lib.statistics import Interval

ROWS = (200, 400, 865, 1200)
SHARES = (0.005, 0.01, 0.02, 0.05, 0.1)
MARGIN_POINTS = 1.0
_FLIPS = 999


@cache
def _table(losses: int, gains: int, n: int) -> tuple[Interval, float, str]:
    """Interval, exact p and verdict of one possible outcome."""
    interval = statistics.paired_score_interval(losses, gains, n)
    p = binomtest(losses, losses + gains, 0.5).pvalue if losses + gains else 1.0
    return interval, float(p), statistics.verdict(interval, float(p), MARGIN_POINTS, 0.0)


def exact(n: int, share: float, difference: float) -> dict[str, Any]:
    """What happens with independent rows, over all outcomes that have a chance above one in a million.

    Returns:
        coverage of the interval, and the shares of the verdicts "worse", "better" and "equivalent".
    """
    p_loss, p_gain = (share - difference) / 2, (share + difference) / 2
    found = {"coverage": 0.0, "worse": 0.0, "better": 0.0, "equivalent": 0.0, "cannot tell": 0.0}
    limits = [binom.ppf([1e-7, 1 - 1e-7], n, p).astype(int) for p in (p_loss, p_gain)]
    for losses in range(limits[0][0], limits[0][1] + 1):
        gains = np.arange(limits[1][0], min(limits[1][1], n - losses) + 1)
        chances = binom.pmf(losses, n, p_loss) * binom.pmf(gains, n - losses, p_gain / (1 - p_loss))
        for gain, chance in zip(gains[chances > 1e-6].tolist(), chances[chances > 1e-6], strict=True):
            interval, _, words = _table(losses, gain, n)
            found["coverage"] += chance * (interval.low <= difference <= interval.high)
            found["cannot tell" if words.startswith("cannot") else words.split()[0]] += chance
    return {"rows": n, "share": share, "difference": difference, **found}


def groups(n: int, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Group of each row: "near-duplicates" = 15 % of the rows in groups of 2 to 5, "fours" = all in fours."""
    if kind == "fours":
        return np.arange(n) // 4
    sizes = rng.integers(2, 6, n)
    sizes = sizes[: np.searchsorted(np.cumsum(sizes), 0.15 * n)]
    return np.repeat(np.arange(len(sizes) + n - sizes.sum()), [*sizes, *[1] * int(n - sizes.sum())])


def clustered(n: int, share: float, difference: float, kind: str, times: int, rng: np.random.Generator) -> dict:
    """Rows of a group change together nine times out of ten ("fours": every second time)."""
    hits = worse = naive = 0
    edges = np.array([(share - difference) / 2, share])
    for i in range(times):
        group = groups(n, kind, rng)
        own, whole = (np.searchsorted(edges, rng.random(size), side="right") for size in (n, group[-1] + 1))
        together = rng.random(n) < (0.9 if kind == "near-duplicates" else 0.5)
        change = np.array([-1, 1, 0])[np.where(together, whole[group], own)]
        interval = statistics.clustered_score_interval(change, group)
        plain = statistics.clustered_score_interval(change)
        hits += interval.low <= difference <= interval.high
        naive += plain.low <= difference <= plain.high
        if interval.high < 0:
            worse += statistics.sign_flip_test(change, group, i, _FLIPS) < 0.05
    figures = {"coverage": hits / times, "coverage_without_groups": naive / times, "worse": worse / times}
    return {"rows": n, "share": share, "difference": difference, "groups": kind, **figures}


MARGINS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda rng, n: rng.normal(size=n),
    "heavy tails": lambda rng, n: rng.standard_t(3, n),
    "one in ten large": lambda rng, n: rng.normal(size=n) * np.where(rng.random(n) < 0.1, 5.0, 0.3),
    "skewed": lambda rng, n: 1 - rng.exponential(size=n),
}
"""Changes of margins with mean 0."""


def margins(n: int, kind: str, times: int, rng: np.random.Generator) -> dict[str, Any]:
    """The test of margins and their interval where nothing changed on average; for 200 rows bootstraps beside it."""
    found = dict.fromkeys(("false_alarm", "student", *(("percentile", "bca") if n == ROWS[0] else ())), 0)
    for i in range(times):
        change = MARGINS[kind](rng, n)
        intervals = {"student": statistics.clustered_mean(change)}
        for method in list(found)[2:]:
            intervals[method] = statistics.paired_bootstrap(change, None, i, 500, method=method)
        found["false_alarm"] += statistics.sign_flip_test(change, None, i, _FLIPS) < 0.05
        for name, interval in intervals.items():
            found[name] += interval.low <= 0 <= interval.high
    return {"rows": n, "margins": kind, **{name: count / times for name, count in found.items()}}


def documents(count: int, uneven: bool, times: int, rng: np.random.Generator) -> dict[str, Any]:
    """Intervals of a mean over tokens, documents with a skewed mean of their own; uneven = log-normal lengths."""
    found = dict.fromkeys(("studentized", "student", "percentile"), 0)
    for i in range(times):
        sizes = np.maximum(5, rng.lognormal(3.5, 0.8, count) if uneven else np.full(count, 40.0)).astype(int)
        group = np.repeat(np.arange(count), sizes)
        values = (rng.gamma(4, 0.5, count) - 2)[group] + rng.normal(0, 3, len(group))
        intervals = {
            "studentized": statistics.clustered_bootstrap_t(values, group, i, 500),
            "student": statistics.clustered_mean(values, group),
            "percentile": statistics.paired_bootstrap(values, group, i, 500),
        }
        for name, interval in intervals.items():
            found[name] += interval.low <= 0 <= interval.high
    return {"documents": count, "uneven": uneven, **{name: hits / times for name, hits in found.items()}}


def power(n: int, share: float) -> dict[str, Any]:
    """The minimum detectable effect, exact and by the usual approximation, with the exact power of the latter."""
    usual, true = statistics.mde_paired(n, share), statistics.mde_exact(n, share)
    reached = statistics.power_mcnemar(n, max(share, usual), usual)
    return {"rows": n, "share": share, "mde": true, "mde_approximate": usual, "power_of_approximate": reached}


def simulate(times: int) -> dict[str, list[dict[str, Any]]]:
    """All tables.

    Args:
        times: simulated comparisons a setting.
    """
    rng = np.random.default_rng(1)
    settings = [(n, share) for n in ROWS for share in SHARES]
    nothing = [exact(n, s, 0.0) for n, s in track(settings, "independent rows, no difference")]
    half = [exact(n, s, -s / 2) for n, s in track(settings, "independent rows, half of the share lost")]
    edge = [exact(n, s, -MARGIN_POINTS / 100) for n, s in settings if s >= MARGIN_POINTS / 100]
    pairs = [
        (n, s, f, k) for k in ("near-duplicates", "fours") for n, s in ((200, 0.05), (865, 0.02)) for f in (0, 0.5)
    ]
    in_groups = [clustered(n, s, -f * s, k, times, rng) for n, s, f, k in track(pairs, "rows in groups")]
    kinds = [(n, kind) for n in (200, 865) for kind in MARGINS]
    of_margins = [margins(n, kind, times, rng) for n, kind in track(kinds, "margins")]
    texts = [(count, uneven) for count in (10, 20, 30, 60) for uneven in (False, True)]
    of_documents = [documents(count, uneven, times, rng) for count, uneven in track(texts, "documents")]
    return {
        "no_difference": nothing,
        "half_lost": half,
        "at_the_margin": edge,
        "groups": in_groups,
        "margins": of_margins,
        "documents": of_documents,
        "power": [power(n, share) for n, share in settings],
    }


def markdown(tables: dict[str, list[dict[str, Any]]]) -> str:
    """The tables as text."""
    lines: list[str] = []
    for name, rows in tables.items():
        columns = max(rows, key=len)
        lines += ["", f"## {name}", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        cells = [[row.get(column, "") for column in columns] for row in rows]
        lines += [
            "| " + " | ".join(f"{v:.4f}" if isinstance(v, float) else f"{v}" for v in row) + " |" for row in cells
        ]
    return "\n".join(lines[1:])


def main() -> None:
    """Simulate, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="OUT.json", help="where the tables go")
    parser.add_argument("--runs", type=int, default=5, help="200 simulated comparisons a setting for each")
    chosen = parser.parse_args()
    tables = simulate(200 * chosen.runs)
    write_json(chosen.json, {"name": "simulate_statistics", "times": 200 * chosen.runs, "seed": 1, **tables})
    print(markdown(tables))


if __name__ == "__main__":
    main()
