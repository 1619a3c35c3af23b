"""Do the statistics keep their word? False verdicts, coverage and power of `lib.statistics`, counted and simulated.

    python benchmarks/simulate_statistics.py --json OUT.json [--runs 5] [--only pages]

Comparisons of two models row by row, at 200 to 1,200 rows and 0.5 to 10 % discordant rows (rows on which exactly one of
the two is right). Independent rows are not simulated: the probability of every possible table is added up, so those
figures are exact. Rows in groups of near-duplicates, margins, documents, answers without labels and whole comparisons
as 07 makes them (`simulated_pages`) are simulated, `--runs` × 200 times a setting, seed 1; the standard error of a
share of 0.95 is then 0.7 points at the default, 0.5 with `--runs 10`. The tables are printed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binom, binomtest, norm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.simulated_pages import MARGIN_POINTS, groups, pages
from lib.progress import track
from lib.runs.files import write_json
from lib.statistics import intervals as statistics_intervals
from lib.statistics import noninferiority, paired
from lib.statistics.intervals import ADJUSTMENT, Interval, tango_statistic
from lib.statistics.losses import compare_losses

ROWS = (200, 400, 865, 1200)
SHARES = (0.005, 0.01, 0.02, 0.05, 0.1)
EXPECTED = (0.5, 1, 2, 3, *np.arange(3.5, 10.5, 0.5).tolist(), 12, 15, 20, 30, 50)


@cache
def _table(losses: int, gains: int, n: int) -> tuple[Interval, float, str]:
    """95 % interval, exact p and verdict of one possible outcome."""
    interval = statistics_intervals.paired_score_interval(losses, gains, n)
    p = binomtest(losses, losses + gains, 0.5).pvalue if losses + gains else 1.0
    limit = -statistics_intervals.paired_score_interval(losses, gains, n, noninferiority.ONE_SIDED).low
    if 100 * limit < MARGIN_POINTS:
        return interval, float(p), "good enough"
    certain = "worse" if losses > gains else "better"
    return interval, float(p), certain if p < 0.05 else "not shown"


def exact(n: int, share: float, difference: float) -> dict[str, Any]:
    """What happens with independent rows, over all outcomes that have a chance above one in a million.

    Returns:
        coverage of the 95 % interval, and the shares of the outcomes "good enough", else "worse" or "better" (exact
        McNemar below 0.05), else "not shown".
    """
    p_loss, p_gain = (share - difference) / 2, (share + difference) / 2
    found = {"coverage": 0.0, "good enough": 0.0, "worse": 0.0, "better": 0.0, "not shown": 0.0}
    limits = [binom.ppf([1e-7, 1 - 1e-7], n, p).astype(int) for p in (p_loss, p_gain)]
    for losses in range(limits[0][0], limits[0][1] + 1):
        gains = np.arange(limits[1][0], min(limits[1][1], n - losses) + 1)
        chances = binom.pmf(losses, n, p_loss) * binom.pmf(gains, n - losses, p_gain / (1 - p_loss))
        for gain, chance in zip(gains[chances > 1e-6].tolist(), chances[chances > 1e-6], strict=True):
            interval, _, words = _table(losses, gain, n)
            found["coverage"] += chance * (interval.low <= difference <= interval.high)
            found[words] += chance
    return {"rows": n, "share": share, "difference": difference, **found}


def lattice(n: int, expected: float, lost: float) -> tuple[float, float]:
    """Coverage of the interval and of Tango's own (without the adjustment) for few discordant rows, exact.

    Args:
        expected: discordant rows. lost: share of them that the difference is, 0 to 1.
    """
    share, z = expected / n, float(norm.ppf(0.975))
    difference, top = -lost * share, int(expected + 8 * expected**0.5 + 10)
    losses, gains = np.meshgrid(np.arange(top), np.arange(top if lost < 1 else 1), indexing="ij")
    p_loss, p_gain = (share - difference) / 2, (share + difference) / 2
    chances = binom.pmf(losses, n, p_loss) * binom.pmf(gains, n - losses, p_gain / (1 - p_loss))
    likely = chances > 1e-9
    found = [0.0, 0.0]
    for chance, b, c in zip(chances[likely], losses[likely].tolist(), gains[likely].tolist(), strict=True):
        for i, adjustment in enumerate((ADJUSTMENT, 0.0)):
            found[i] += chance * (abs(tango_statistic(difference, b, c, n, adjustment)) <= z)
    return found[0], found[1]


def few_discordant(expected: float) -> dict[str, Any]:
    """The least, mean and largest coverage over numbers of rows and differences; see `lattice`."""
    found = np.array([lattice(n, expected, lost) for n in (200, 400, 1200) for lost in np.linspace(0, 1, 11)])
    row: dict[str, Any] = {"expected discordant rows": expected}
    for name, values in zip(("coverage", "Tango's own"), found.T, strict=True):
        row |= {name: float(values.mean()), f"{name}, least": values.min(), f"{name}, most": values.max()}
    return row


def clustered(n: int, share: float, difference: float, kind: str, times: int, rng: np.random.Generator) -> dict:
    """Rows of a group change together nine times out of ten ("fours": every second time)."""
    hits = worse = naive = 0
    edges = np.array([(share - difference) / 2, share])
    for i in range(times):
        group = groups(n, kind, rng)
        own, whole = (np.searchsorted(edges, rng.random(size), side="right") for size in (n, group[-1] + 1))
        together = rng.random(n) < (0.9 if kind == "near-duplicates" else 0.5)
        change = np.array([-1, 1, 0])[np.where(together, whole[group], own)]
        interval = paired.clustered_score_interval(change, group)
        plain = paired.clustered_score_interval(change)
        hits += interval.low <= difference <= interval.high
        naive += plain.low <= difference <= plain.high
        worse += paired.compare_pairs({"q": (change < 1, change > -1)}, group, i)["q"].verdict == "worse"
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
    """Student's interval of log-odds where nothing changed on average; for 200 rows bootstraps beside it."""
    found = dict.fromkeys(("student", *(("percentile", "bca") if n == ROWS[0] else ())), 0)
    for i in range(times):
        change = MARGINS[kind](rng, n)
        intervals = {"student": paired.clustered_mean(change)}
        if n == ROWS[0]:
            means = statistics_intervals.drawn_sums(change[:, None], 500, i)[:, 0] / n
            left_out = (change.sum() - change) / (n - 1)
            ends = statistics_intervals.bca_limits(means, change.mean(), left_out)
            intervals["percentile"] = statistics_intervals.paired_bootstrap(change, None, i, 500)
            intervals["bca"] = statistics_intervals.Interval(change.mean(), *ends)
        for name, interval in intervals.items():
            found[name] += interval.low <= 0 <= interval.high
    return {"rows": n, "log-odds": kind, **{name: count / times for name, count in found.items()}}


def documents(count: int, uneven: bool, times: int, rng: np.random.Generator) -> dict[str, Any]:
    """Intervals of a mean over tokens, documents with a skewed mean of their own; uneven = log-normal lengths."""
    found = dict.fromkeys(("studentized", "student", "percentile"), 0)
    for i in range(times):
        sizes = np.maximum(5, rng.lognormal(3.5, 0.8, count) if uneven else np.full(count, 40.0)).astype(int)
        group = np.repeat(np.arange(count), sizes)
        values = (rng.gamma(4, 0.5, count) - 2)[group] + rng.normal(0, 3, len(group))
        intervals = {
            "studentized": paired.clustered_bootstrap_t(values, group, i, 500),
            "student": paired.clustered_mean(values, group),
            "percentile": statistics_intervals.paired_bootstrap(values, group, i, 500),
        }
        for name, interval in intervals.items():
            found[name] += interval.low <= 0 <= interval.high
    return {"documents": count, "uneven": uneven, **{name: hits / times for name, hits in found.items()}}


LOSSES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda rng, n: rng.normal(size=n),
    "heavy tails": lambda rng, n: rng.standard_t(3, n),
    "few rows lose much": lambda rng, n: (np.exp(rng.normal(0, 1.2, n)) - np.exp(0.72)) / 2,
}
"""Changes of rows' losses around their mean, in percent of perplexity."""


def losses(count: int, kind: str, times: int, rng: np.random.Generator) -> dict[str, Any]:
    """Answers without labels, exactly 1 % lost, the margin: "good enough" is false; beside it how percentiles cover."""
    lost, found = np.log(1.01), dict.fromkeys(("good enough", "coverage", "percentile"), 0)
    for i in range(times):
        tokens, group = rng.integers(10, 90, count), np.arange(count)
        change = lost + 0.01 * LOSSES[kind](rng, count)
        reference = rng.uniform(1, 3, count)
        one = compare_losses(reference, {"q": reference + change}, tokens, group)["q"]
        drawn = statistics_intervals.paired_bootstrap(change, group, i, 500, weights=tokens)
        found["good enough"] += one["loss_limit"] is not None and one["loss_limit"] < MARGIN_POINTS
        low, high = (-np.inf if end is None else end for end in one["loss_difference_interval"])
        found["coverage"] += low <= lost <= high
        found["percentile"] += drawn.low <= lost <= drawn.high
    return {"groups": count, "losses": kind, **{name: hits / times for name, hits in found.items()}}


def unlabelled(times: int, rng: np.random.Generator) -> dict[str, list[dict[str, Any]]]:
    """Table of answers without labels."""
    settings = [(count, kind) for count in (3, 5, 10, 20, 40, 200) for kind in LOSSES]
    return {"losses": [losses(count, kind, times, rng) for count, kind in track(settings, "answers without labels")]}


def cross_validated(
    n: int, k: int, share: float, spread: float, times: int, rng: np.random.Generator
) -> dict[str, Any]:
    """Rows of k folds whose models lose differently, by `spread` (a fraction, standard deviation) around the true loss.

    Any two models share training rows, so that 1 / k of the spread's variance is common to all (Nadeau & Bengio 2003).

    Returns:
        shares of the runs that find a file good enough, true loss at the margin ("false") and none ("power"), by rows
        alone and with the folds' correction.
    """
    folds, margin = np.arange(n) % k, MARGIN_POINTS / 100
    found: dict[str, float] = dict.fromkeys(("false, rows alone", "false", "power, rows alone", "power"), 0.0)
    for name, loss in (("false", margin), ("power", 0.0)):
        for _ in range(times):
            own = spread * (k**-0.5 * rng.normal() + (1 - 1 / k) ** 0.5 * rng.normal(size=k))
            lost, drawn = (share + np.clip(loss + own, -share, share)[folds]) / 2, rng.random(n)
            change = np.where(drawn < lost, -1, np.where(drawn < share, 1, 0))
            for key, given in ((f"{name}, rows alone", None), (name, folds)):
                found[key] += (noninferiority.share_loss(change, folds=given).high < MARGIN_POINTS) / times
    return {"rows": n, "folds": k, "changed": share, "spread": spread, **found}


def folded(times: int, rng: np.random.Generator) -> dict[str, list[dict[str, Any]]]:
    """Table of cross-validated rows."""
    settings = [
        (n, k, share, spread)
        for n in (200, 600, 2000)
        for k in (5, 10)
        for share in (0.03, 0.06)
        for spread in (0.0, 0.005, 0.01)
    ]
    return {"folds": [cross_validated(*one, times, rng) for one in track(settings, "cross-validated rows")]}


def power(share: float) -> dict[str, Any]:
    """Rows that show a file without loss to be good enough, exact and by the usual approximation, with its power."""
    margin = MARGIN_POINTS / 100
    usual = int(((norm.ppf(1 - noninferiority.LEVEL) + norm.ppf(noninferiority.POWER)) / margin) ** 2 * share)
    reached = noninferiority.power(usual, share, margin)
    needed = noninferiority.rows_for(share, margin)
    return {"share": share, "rows": needed, "rows_approximate": usual, "power_of_approximate": reached}


def independent(times: int, rng: np.random.Generator) -> dict[str, list[dict[str, Any]]]:
    """Tables of independent rows, all exact."""
    settings = [(n, share) for n in ROWS for share in SHARES]
    return {
        "no_difference": [exact(n, s, 0.0) for n, s in track(settings, "independent rows, no difference")],
        "half_lost": [exact(n, s, -s / 2) for n, s in track(settings, "independent rows, half of the share lost")],
        "at_the_margin": [exact(n, s, -MARGIN_POINTS / 100) for n, s in settings if s >= MARGIN_POINTS / 100],
        "few_discordant": [few_discordant(float(expected)) for expected in track(EXPECTED, "few discordant rows")],
        "power": [power(share) for share in SHARES],
    }


def dependent(times: int, rng: np.random.Generator) -> dict[str, list[dict[str, Any]]]:
    """Tables of rows in groups, of margins and of documents."""
    pairs = [
        (n, s, f, k) for k in ("near-duplicates", "fours") for n, s in ((200, 0.05), (865, 0.02)) for f in (0, 0.5)
    ]
    kinds = [(n, kind) for n in (200, 865) for kind in MARGINS]
    texts = [(count, uneven) for count in (10, 20, 30, 60) for uneven in (False, True)]
    return {
        "groups": [clustered(n, s, -f * s, k, times, rng) for n, s, f, k in track(pairs, "rows in groups")],
        "margins": [margins(n, kind, times, rng) for n, kind in track(kinds, "margins")],
        "documents": [documents(count, uneven, times, rng) for count, uneven in track(texts, "documents")],
    }


PARTS = {"independent": independent, "dependent": dependent, "unlabelled": unlabelled, "folds": folded, "pages": pages}


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
    parser.add_argument("--only", choices=PARTS, help="one part instead of all")
    chosen = parser.parse_args()
    tables: dict[str, list[dict[str, Any]]] = {}
    for name in [chosen.only] if chosen.only else PARTS:
        tables |= PARTS[name](200 * chosen.runs, np.random.default_rng(1))
    write_json(chosen.json, {"name": "simulate_statistics", "times": 200 * chosen.runs, "seed": 1, **tables})
    print(markdown(tables))


if __name__ == "__main__":
    main()
