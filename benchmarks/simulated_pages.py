"""Whole comparisons as notebook 07 judges them, with a known truth: how often the rule errs, and what it finds.

Right and wrong answers are drawn: the reference is right on `RIGHT_SHARE` of the rows of each label; a file loses some
of these and wins some of the others. The files of a ladder err alike (half of their changes are the same rows), and so
do near-duplicates (0.9). Rows are judged by `lib.statistics` as page 07 judges them, once on all rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lib.progress import track
from lib.statistics import noninferiority
from lib.statistics.noninferiority import GOOD_ENOUGH, NO_VERDICT, WORSE, balanced_weights, good_enough, share_loss
from lib.statistics.paired import clustered_score_interval, compare_pairs

ROWS = (20, 60, 200, 600, 1200, 5000)
BALANCES = {2: ((1, 1), (2, 1), (9, 1)), 4: ((1, 1, 1, 1), (2, 1, 1, 1), (9, 1, 1, 1))}
FILES = (3, 7, 13)
MARGIN_POINTS = 1.0
RIGHT_SHARE = 0.82
LEAST_CHANGED, MOST_CHANGED = 0.002, 0.08
"""Shares of rows that change between right and wrong without a loss, of the largest and the smallest file: as measured
from 0.2 to 2 % on the offline base, and up to what a real model may lose."""


@dataclass(frozen=True)
class Truth:
    """A file's relation to the reference, by label.

    Attributes:
        lost, won: (labels,) share of a label's rows that only the reference, only the file gets right.
    """

    lost: np.ndarray
    won: np.ndarray

    def loss(self, labels: np.ndarray) -> float:
        """True loss of the accuracy that is judged on rows with these labels, points."""
        weights = balanced_weights(labels)
        return 100 * float(np.average((self.lost - self.won)[labels], weights=weights))


def truth(changed: float, loss: Sequence[float]) -> Truth:
    """The file that changes so many rows of each label without a loss, and loses so much of each besides."""
    more = np.asarray(loss, dtype=np.float64)
    return Truth(changed / 2 + np.maximum(more, 0), changed / 2 + np.maximum(-more, 0))


def ladder(files: int, labels: int, kind: str) -> list[Truth]:
    """The files of a ladder, the largest first.

    Args:
        kind: "nothing lost"; "the margin lost" by every file; "a step": by the smaller half; "rising": from 0 to 10
            points; "a bias": what the first label wins every other one loses, so that the balanced accuracy stays.
    """
    changed, margin = np.geomspace(LEAST_CHANGED, MOST_CHANGED, files), MARGIN_POINTS / 100
    if kind == "a bias":
        shift = np.array([-1.0, *[1 / (labels - 1)] * (labels - 1)])
        return [truth(share, min(share, 0.05) * shift) for share in changed]
    losses = {
        "nothing lost": np.zeros(files),
        "the margin lost": np.full(files, margin),
        "a step": np.where(np.arange(files) < files / 2, 0.0, margin),
        "rising": np.linspace(0, 0.1, files),
    }[kind]
    return [truth(share, [loss] * labels) for share, loss in zip(changed, losses, strict=True)]


KINDS = ("nothing lost", "the margin lost", "a step", "rising", "a bias")


def groups(n: int, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Group of each row: "near-duplicates" = 15 % of the rows in groups of 2 to 5, "fours" = all in fours."""
    if kind == "fours":
        return np.arange(n) // 4
    sizes = rng.integers(2, 6, n)
    sizes = sizes[: np.searchsorted(np.cumsum(sizes), 0.15 * n)]
    return np.repeat(np.arange(len(sizes) + n - sizes.sum()), [*sizes, *[1] * int(n - sizes.sum())])


def _alike(n: int, group: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """A uniform number of each row; nine in ten rows of a group have that of the group."""
    own = rng.random(n)
    return own if group is None else np.where(rng.random(n) < 0.9, rng.random(group.max() + 1)[group], own)


def draw(
    n: int, balance: Sequence[int], truths: Sequence[Truth], copies: bool, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, list[np.ndarray]]:
    """Labels, groups (None: every row its own), whether the reference is right, and the same of every file."""
    group = groups(n, "near-duplicates", rng) if copies else None
    shares = np.asarray(balance) / np.sum(balance)
    by_group = rng.choice(len(balance), n if group is None else group.max() + 1, p=shares)
    labels = by_group if group is None else by_group[group]
    reference = _alike(n, group, rng) < RIGHT_SHARE
    common, found = _alike(n, group, rng), []
    for one in truths:
        chance = np.where(rng.random(n) < 0.5, common, _alike(n, group, rng))
        change = np.where(reference, one.lost[labels] / RIGHT_SHARE, one.won[labels] / (1 - RIGHT_SHARE))
        found.append(reference ^ (chance < change))
    return labels, group, reference, found


def page(
    labels: np.ndarray, group: np.ndarray | None, reference: np.ndarray, files: Sequence[np.ndarray], tested: bool
) -> list[dict[str, Any]]:
    """One entry a file, as far as verdicts need it.

    Args:
        tested: whether the two-sided tests behind "worse" are made too (slow with copies and weights).
    """
    weights = balanced_weights(labels)
    entries = []
    for place, right in enumerate(files):
        change = right.astype(int) - reference
        loss, old = share_loss(change, group, weights), clustered_score_interval(change, group)
        entry = {"type": f"q{place:02}", "bytes": 100 - place, "loss": loss.estimate, "leak_free": None, "p_holm": 1.0}
        entries.append({**entry, "loss_limit": loss.high, "equivalent": old.low > -0.01 and old.high < 0.01})
    if tested:
        tests = compare_pairs(
            {e["type"]: (reference, f) for e, f in zip(entries, files, strict=True)}, group, 0, weights
        )
        entries = [{**entry, "p_holm": tests[entry["type"]].p_holm} for entry in entries]
    count = len(labels) if group is None else group.max() + 1
    few = count < noninferiority.FEWEST_GROUPS
    words = {} if few else noninferiority.verdicts(entries, [], MARGIN_POINTS)
    return [{**entry, "verdict": words.get(entry["type"], NO_VERDICT)} for entry in entries]


def setting(
    n: int, balance: Sequence[int], files: int, kind: str, copies: bool, times: int, rng: np.random.Generator
) -> dict[str, Any]:
    """Shares of `times` pages.

    Returns:
        "false": a file is recommended whose true loss is the margin or more; "worse": a file is called worse that
        loses nothing, in truth (none: no such file); "coverage" of the limits, mean over the files;
        "recommended": any file; "size": mean place of the recommended file among the sizes (1 = the smallest, 0 =
        none); "old", "old false", "old size": the same of the rule before (two-sided 95 % interval inside the margin,
        each file by itself, the smallest of them).
    """
    truths = ladder(files, len(balance), kind)
    found: dict[str, list[float]] = {}
    for _ in range(times):
        labels, group, reference, right = draw(n, balance, truths, copies, rng)
        true = [one.loss(labels) for one in truths]
        entries = page(labels, group, reference, right, kind in ("nothing lost", "a bias"))
        for key, value in _observed(entries, true).items():
            found.setdefault(key, []).append(value)
    where = {"rows": n, "labels": len(balance), "balance": balance[0], "files": files, "copies": copies, "truth": kind}
    return where | {key: float(np.mean(values)) for key, values in found.items()}


def _observed(entries: Sequence[Mapping[str, Any]], true: Sequence[float]) -> dict[str, float]:
    passed = sum(entry["verdict"] == GOOD_ENOUGH for entry in entries)
    old = max((place + 1 for place, entry in enumerate(entries) if entry["equivalent"]), default=0)
    bad = [loss >= MARGIN_POINTS - 1e-9 for loss in true]
    inside = [loss <= e["loss_limit"] for e, loss in zip(entries, true, strict=True)]
    worse = [e["verdict"] == WORSE for e, loss in zip(entries, true, strict=True) if loss <= 1e-9]
    assert [e["type"] for e in entries[:passed]] == good_enough(entries, MARGIN_POINTS) or not passed
    return {
        "false": float(passed > 0 and bad[passed - 1]),
        "worse": float(any(worse)),
        "coverage": float(np.mean(inside)),
        "recommended": float(passed > 0),
        "size": passed / len(entries),
        "old": float(old > 0),
        "old false": float(old > 0 and bad[old - 1]),
        "old size": old / len(entries),
    }


def settings() -> Iterator[tuple[int, tuple[int, ...], int, str, bool]]:
    """Every combination: rows, balance of the labels, files, truth, copies."""
    balances = [balance for own in BALANCES.values() for balance in own]
    yield from itertools.product(ROWS, balances, FILES, KINDS, (False, True))


def pages(times: int, rng: np.random.Generator) -> dict[str, list[dict[str, Any]]]:
    """Tables over `times` / 5 pages a setting: "pages", and "pages_by_rows", their means and extremes."""
    rows = [setting(*one, max(1, times // 5), rng) for one in track(list(settings()), "whole pages")]
    summary = []
    for n, kind in itertools.product(ROWS, KINDS):
        own = [row for row in rows if (row["rows"], row["truth"]) == (n, kind)]
        mean = {key: float(np.mean([row[key] for row in own])) for key in ("recommended", "size", "old", "old size")}
        most = {f"{key}, most": max(row[key] for row in own) for key in ("false", "worse", "old false")}
        coverage = {"coverage, least": min(row["coverage"] for row in own)}
        summary.append({"rows": n, "truth": kind, **mean, **most, **coverage})
    return {"pages": rows, "pages_by_rows": summary}
