"""Whole comparisons as notebook 07 makes them, with a known truth: `lib.scoring.metric.compare` on made scores.

A row has a latent ease, normal, and so has every file's view of it; a margin is the ease stretched (skewed, with heavy
tails, in nats), and the answer is right where it is positive. Reference and file have the same distribution and differ
by as much as gives the wanted share of discordant rows, so without a shift both endpoints are equal in truth. The files
of a ladder err alike (correlation ½), and so do near-duplicates (0.98).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.stats import multivariate_normal, norm

from lib.progress import Progress
from lib.scoring.log_probabilities import Scores
from lib.scoring.metric import ACCURACY, RowGroups, compare

ROWS = (200, 400, 800, 1200)
LADDER = {"Q8_0": 0.002, "Q6_K": 0.005, "Q5_K_M": 0.0075, "Q4_K_M": 0.01, "Q4_0": 0.02, "Q3_K_M": 0.04, "Q2_K": 0.08}
"""Shares of discordant rows, as measured from 0.2 to 2 % on the offline base, and up to what a real model may lose."""

MARGIN_POINTS = 1.0
RIGHT_SHARE = 0.82
LEAK_FREE = 0.72
FILES_ALIKE, COPIES_ALIKE = 0.5, 0.98


@dataclass(frozen=True)
class Truth:
    """A file's relation to the reference.

    Attributes:
        correlation: of the latent eases. shift: of the file's ease, downwards.
        share: of discordant rows. difference: of the accuracies, a fraction. margin: mean change, nats.
    """

    correlation: float
    shift: float
    share: float
    difference: float
    margin: float


def truth(share: float, loss: float) -> Truth:
    """The file that loses `loss` of the accuracy and has `share` + `loss` discordant rows."""
    middle, accuracy = float(norm.ppf(RIGHT_SHARE)), RIGHT_SHARE - loss
    lower = float(norm.ppf(accuracy))

    def excess(correlation: float) -> float:
        both = multivariate_normal.cdf([middle, lower], cov=[[1, correlation], [correlation, 1]])
        return RIGHT_SHARE + accuracy - 2 * float(both) - share - loss

    correlation = float(brentq(excess, 0.0, 1 - 1e-9, xtol=1e-12))
    # E(x + c)³ = c³ + 3c for a standard normal x
    margin = 2 * (lower - middle) + 0.1 * (lower**3 + 3 * lower - middle**3 - 3 * middle)
    return Truth(correlation, middle - lower, share + loss, -loss, margin)


def groups(n: int, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Group of each row: "near-duplicates" = 15 % of the rows in groups of 2 to 5, "fours" = all in fours."""
    if kind == "fours":
        return np.arange(n) // 4
    sizes = rng.integers(2, 6, n)
    sizes = sizes[: np.searchsorted(np.cumsum(sizes), 0.15 * n)]
    return np.repeat(np.arange(len(sizes) + n - sizes.sum()), [*sizes, *[1] * int(n - sizes.sum())])


def margins(ease: np.ndarray) -> np.ndarray:
    """Nats from latent eases: the sure rows are much surer."""
    return 2 * ease + 0.1 * ease**3


def _draw(group: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A standard normal value of each row; rows of a group are alike."""
    whole = rng.normal(size=group.max() + 1)[group]
    return np.sqrt(COPIES_ALIKE) * whole + np.sqrt(1 - COPIES_ALIKE) * rng.normal(size=len(group))


def _scores(ease: np.ndarray, labels: np.ndarray) -> Scores:
    change, rows = margins(ease), np.arange(len(ease))
    log_probs = np.empty((len(ease), 2))
    log_probs[rows, labels], log_probs[rows, 1 - labels] = -np.logaddexp(0, -change), -np.logaddexp(0, change)
    return Scores([str(row) for row in rows], labels, log_probs, np.zeros(len(ease), bool), 1.0)


def page(
    truths: dict[str, Truth], group: np.ndarray, leak_free: bool, rng: np.random.Generator
) -> dict[str, dict[str, Any]]:
    """One comparison, drawn and judged: the entries of comparison.json by file.

    Args:
        group: (n,) near-duplicate cluster of each row, from 0 on.
        leak_free: whether some groups count as leaked, so that the leak-free rows are judged too.
    """
    labels, common, reference = rng.integers(0, 2, len(group)), _draw(group, rng), _draw(group, rng)
    middle, others = float(norm.ppf(RIGHT_SHARE)), {}
    for name, known in truths.items():
        error = np.sqrt(FILES_ALIKE) * common + np.sqrt(1 - FILES_ALIKE) * _draw(group, rng)
        own = known.correlation * reference + np.sqrt(1 - known.correlation**2) * error
        others[name] = _scores(middle - known.shift + own, labels)
    free = (rng.random(group.max() + 1) < LEAK_FREE)[group] if leak_free else None
    seed = int(rng.integers(1 << 31))
    scores = _scores(middle + reference, labels)
    return compare(ACCURACY, scores, others, RowGroups(group, free), MARGIN_POINTS, seed)


def called(entries: Sequence[dict[str, Any]], *words: str) -> bool:
    """Whether a verdict begins with one of the words."""
    return any(entry["verdict"].startswith(words) for entry in entries)


def observed(entries: dict[str, dict[str, Any]], truths: dict[str, Truth]) -> dict[str, Any]:
    """What one page says, as numbers to add up: verdicts of the page; discordant rows and hits of every file."""
    files = [entries[name] for name in truths]
    free = [entry["leak_free"] for entry in files if entry["leak_free"]]
    wrong = ("worse", "better")
    return {
        "worse": called(files, "worse"),
        "better": called(files, "better"),
        "worse_or_better": called(files, *wrong),
        "by_margin": any(entry["endpoint"] == "margin" for entry in files),
        "leak_free": called(free, *wrong),
        "either": called(files + free, *wrong),
        "equivalent_any": called(files, "equivalent"),
        "equivalent": [entry["verdict"].startswith("equivalent") for entry in files],
        "tost": [entry["equivalence_p"] < 0.05 for entry in files],
        "discordant": [entry["mcnemar_b"] + entry["mcnemar_c"] for entry in files],
        "accuracy": [_holds(entries[n]["accuracy_difference_interval"], t.difference) for n, t in truths.items()],
        "margin": [_holds(entries[n]["margin_change_interval"], t.margin) for n, t in truths.items()],
    }


def _holds(interval: list[float], value: float) -> bool:
    return interval[0] <= value <= interval[1]


def pages(times: int, rng: np.random.Generator) -> dict[str, list[dict[str, Any]]]:
    """Tables over `times` pages a setting: nothing lost, and exactly the equivalence margin lost by every file.

    Returns:
        "pages": shares of pages with a "worse" or "better", of which none is true; "pages_at_the_margin": shares of
        pages and of files with an "equivalent" that is not; "page_coverage": of both endpoints' intervals, by file;
        "coverage_expected" and "coverage_observed": the same by the number of discordant rows that was to be expected,
        and (accuracy, where nothing is lost) by the number that came.
    """
    tables: dict[str, list[dict[str, Any]]] = {"pages": [], "pages_at_the_margin": [], "page_coverage": []}
    changed: list[np.ndarray] = []
    for n, loss in [(n, loss) for loss in (0.0, MARGIN_POINTS / 100) for n in ROWS]:
        truths = {name: truth(share, loss) for name, share in LADDER.items()}
        seen = []
        with Progress(f"{n} rows", times) as progress:
            for entries in _drawn(n, truths, times, rng):
                seen.append(observed(entries, truths))
                progress.advance()
        whole = {name: np.array([one[name] for one in seen]) for name in seen[0]}
        if loss:
            tables["pages_at_the_margin"].append({"rows": n, **_equivalent(whole)})
        else:
            words = ("worse", "better", "worse_or_better", "by_margin", "leak_free", "either")
            tables["pages"].append({"rows": n, **{word: float(whole[word].mean()) for word in words}})
            changed.append(np.stack([whole["discordant"].ravel(), whole["accuracy"].ravel()]))
        for i, (name, known) in enumerate(truths.items()):
            hits = {end: float(whole[end][:, i].mean()) for end in ("accuracy", "margin")}
            setting = {"rows": n, "lost": loss, "file": name, "expected": n * known.share}
            tables["page_coverage"].append({**setting, **hits})
    tables["coverage_expected"] = _by_expected(tables["page_coverage"])
    tables["coverage_observed"] = _by_observed(np.concatenate(changed, axis=1))
    return tables


def _drawn(n: int, truths: dict[str, Truth], times: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Pages; leak-free rows are judged too where nothing is lost."""
    for _ in range(times):
        yield page(truths, groups(n, "near-duplicates", rng), not any(t.difference for t in truths.values()), rng)


def _equivalent(whole: dict[str, np.ndarray]) -> dict[str, float]:
    by_file = whole["equivalent"].mean(axis=0)
    return {
        "page": float(whole["equivalent_any"].mean()),
        "file, mean": float(by_file.mean()),
        "file, most": float(by_file.max()),
        "TOST p < 0.05, most": float(whole["tost"].mean(axis=0).max()),
    }


_LIMITS = (0, 1, 2, 5, 10, 20, 50, 0)
"""Numbers of discordant rows at which the tables are cut; the last 0 stands for no limit."""


def _by_expected(settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for low, high in pairwise(_LIMITS):
        own = [one for one in settings if low <= one["expected"] < (high or math.inf)]
        row: dict[str, Any] = {"from": low, "below": high or "", "settings": len(own)}
        for end in ("accuracy", "margin"):
            values = [one[end] for one in own]
            row |= {end: float(np.mean(values)), f"{end}, least": min(values), f"{end}, most": max(values)}
        rows.append(row)
    return rows


def _by_observed(changed: np.ndarray) -> list[dict[str, Any]]:
    inside = [(low, high, (changed[0] >= low) & (changed[0] < (high or math.inf))) for low, high in pairwise(_LIMITS)]
    return [
        {"from": low, "below": high or "", "files": int(own.sum()), "accuracy": float(changed[1][own].mean())}
        for low, high, own in inside
        if own.any()
    ]
