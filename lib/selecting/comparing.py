"""Runs on the rows that all of them can be judged on, and the paired difference of every two recipes there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lib.errors import InputError
from lib.selecting.candidates import ACCURACY, Candidate
from lib.statistics import (
    Interval,
    clustered_score_interval,
    holm,
    sign_flip_test,
    wilson,
)
from lib.statistics.losses import cluster_test
from lib.statistics.ratios import FEWEST, averaged_share, limits, weighted_mean

ALPHA = 0.05


@dataclass(frozen=True)
class Ground:
    """The test rows that every run holds and that no run has trained on.

    Attributes:
        keys: their hashes, in the first run's order.
        places: run -> position of each of them among its own test rows.
        groups, weights: of each row, from the first run.
        leak_free: True when the rows that a leak audit flagged are left out as well.
        left_out: rows of the union that are not used, by reason.
    """

    keys: list[str]
    places: dict[str, np.ndarray]
    groups: np.ndarray
    weights: np.ndarray
    leak_free: bool
    left_out: dict[str, int]

    @property
    def enough(self) -> bool:
        """Whether there are groups enough for an interval."""
        return len(np.unique(self.groups)) >= FEWEST

    def values(self, run: Candidate) -> np.ndarray:
        """A run's values on these rows."""
        return run.values[self.places[run.name]]


def shared_ground(runs: Sequence[Candidate]) -> Ground:
    """The rows to compare on, by hash.

    Raises:
        InputError: no such row; or answers that have other numbers of tokens in different runs.
    """
    first = runs[0]
    common = set(first.keys).intersection(*(run.keys for run in runs[1:]))
    seen = frozenset().union(*(run.seen for run in runs))
    flagged = {key for run in runs for key, bad in zip(run.keys, run.leaked, strict=True) if bad}
    unseen = {key for key, text in zip(first.keys, first.texts, strict=True) if key in common and text not in seen}
    if not unseen:
        raise InputError(
            f"runs {', '.join(run.name for run in runs)} share {len(common)} test rows"
            f"{', and a run has trained on each of them' if common else ''}.",
            "test rows that all runs hold and none has trained on.",
            "compare runs with the same dataset, split and seed.",
        )
    free = unseen - flagged
    wanted = free or unseen
    keys = [key for key in first.keys if key in wanted]
    places = {run.name: _places(run, keys) for run in runs}
    for run in runs[1:]:
        if not np.array_equal(run.weights[places[run.name]], first.weights[places[first.name]]):
            raise InputError(
                f"the answers of runs {first.name!r} and {run.name!r} have different numbers of tokens.",
                "the same tokenizer and max_seq_length: a loss is a mean over tokens.",
                "compare runs on the same base model and max_seq_length.",
            )
    left_out = {
        "not in every run": len(set().union(*(run.keys for run in runs))) - len(common),
        "used by a training": len(common) - len(unseen),
        "flagged by a leak audit": len(unseen) - len(wanted),
    }
    at = places[first.name]
    return Ground(keys, places, first.groups[at], first.weights[at], bool(free), left_out)


def _places(run: Candidate, keys: Sequence[str]) -> np.ndarray:
    where = {key: place for place, key in enumerate(run.keys)}
    return np.array([where[key] for key in keys], dtype=np.int64)


@dataclass(frozen=True)
class Unit:
    """What is compared: a run, or runs that differ only in the seed of training, by their mean on every row.

    Attributes:
        names: the runs. scores: each run's metric on the rows.
        interval: the metric (mean over the runs) with its 95 % interval over rows; infinite limits where fewer than
            three groups of rows, or losses that all agree, leave nothing to tell one from.
    """

    names: tuple[str, ...]
    values: np.ndarray
    scores: tuple[float, ...]
    interval: Interval

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None of a single run."""
        return float(np.std(self.scores, ddof=1)) if len(self.scores) > 1 else None

    def to_json(self) -> dict[str, Any]:
        """Runs, seeds, mean, standard deviation and range over the seeds, interval over rows."""
        return {
            "runs": list(self.names),
            "n_seeds": len(self.names),
            "mean": self.interval.estimate,
            "interval": limits(self.interval),
            "seed_sd": self.spread,
            "seed_range": [min(self.scores), max(self.scores)],
        }


def make_unit(runs: Sequence[Candidate], ground: Ground) -> Unit:
    """The mean of runs on the shared rows."""
    table = np.stack([ground.values(run) for run in runs])
    values = table.mean(axis=0)
    scores = tuple(float(np.average(row, weights=ground.weights)) for row in table)
    if runs[0].metric != ACCURACY:
        interval = weighted_mean(values, ground.weights, ground.groups)
    elif len(runs) == 1 and ground.enough:
        interval = wilson(int(values.sum()), len(values))  # as 03 shows it
    else:
        interval = averaged_share(values, ground.groups)
    return Unit(tuple(run.name for run in runs), values, scores, interval)


@dataclass(frozen=True)
class Difference:
    """A unit against the leader.

    Attributes:
        interval: of the metric's difference (unit minus leader), simultaneous over all pairs, with the seeds' spread.
        p, p_holm: two-sided p-value; after Holm over all pairs.
        behind: True when the rows show that it is not as good as the leader.
    """

    interval: Interval
    p: float
    p_holm: float
    behind: bool

    def to_json(self) -> dict[str, Any]:
        """As plain values; no interval (too few groups) is None."""
        return {
            "difference": self.interval.estimate,
            "difference_interval": limits(self.interval),
            "confidence": self.interval.confidence,
            "p": self.p,
            "p_holm": self.p_holm,
            "verdict": "worse" if self.behind else "cannot tell",
        }


def leader_of(units: Sequence[Unit], metric: str) -> int:
    """Place of the best estimate: highest accuracy, lowest loss; the first of equals."""
    estimates = [unit.interval.estimate for unit in units]
    return estimates.index(max(estimates) if metric == ACCURACY else min(estimates))


def against(units: Sequence[Unit], leader: int, ground: Ground, metric: str, seed: int) -> Mapping[int, Difference]:
    """Every other unit against the leader; place -> difference.

    Which unit leads is read from the same rows, so all pairs count in the correction, not those with the leader alone.
    """
    pairs = list(itertools.combinations(range(len(units)), 2))
    p_values = [_p(units[i].values - units[j].values, ground, metric, seed) for i, j in pairs]
    adjusted = dict(zip(pairs, zip(p_values, holm(p_values), strict=True), strict=True))
    found = {}
    for place, unit in enumerate(units):
        if place == leader:
            continue
        p, p_holm = adjusted[min(place, leader), max(place, leader)]
        interval = _interval(unit, units[leader], ground, metric, 1 - ALPHA / len(pairs))
        found[place] = Difference(interval, p, p_holm, p_holm < ALPHA and interval.excludes_zero())
    return found


def _p(change: np.ndarray, ground: Ground, metric: str, seed: int) -> float:
    if metric == ACCURACY:
        return sign_flip_test(change, ground.groups, seed)
    if limits(weighted_mean(change, ground.weights, ground.groups)) is None:
        return 1.0  # no spread, nothing to test against
    return cluster_test(change, ground.weights, ground.groups)[0]


def _interval(unit: Unit, leader: Unit, ground: Ground, metric: str, confidence: float) -> Interval:
    change = unit.values - leader.values
    if metric != ACCURACY or not ground.enough:
        rows = weighted_mean(change, ground.weights, ground.groups, confidence)
    elif len(unit.names) == len(leader.names) == 1 or not change.any():
        rows = clustered_score_interval(np.rint(change).astype(np.int64), ground.groups, confidence)
    else:
        rows = weighted_mean(change, ground.weights, ground.groups, confidence)
    return _widened(rows, unit, leader)


def _widened(rows: Interval, *units: Unit) -> Interval:
    """The interval with what another draw of seeds would change: squared half-widths add up."""
    spreads = [(unit.spread, len(unit.names)) for unit in units if unit.spread is not None]
    if not spreads:
        return rows
    from scipy.stats import t

    error = math.sqrt(sum(spread**2 / count for spread, count in spreads))
    extra = float(t.ppf(0.5 + rows.confidence / 2, min(count for _, count in spreads) - 1)) * error
    low, high = (math.hypot(rows.estimate - limit, extra) for limit in (rows.low, rows.high))
    return Interval(rows.estimate, rows.estimate - low, rows.estimate + high, rows.confidence)
