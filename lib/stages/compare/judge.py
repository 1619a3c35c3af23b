"""How many rows would decide about a file, if what was seen of it is the truth.
From the scores of a reference and some files to one comparable entry a file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lib.scoring.log_probabilities import Scores
from lib.statistics.intervals import bca_limits, wilson
from lib.statistics.paired import clustered_mean, copies_effect
from lib.statistics.power import rows_for_inside
from lib.statistics.verdicts import PairedComparison, compare_all

# How many rows would decide about a file, if what was seen of it is the truth.


def rows_needed(entry: Mapping[str, Any], margin_points: float, one_sided: bool = False) -> int | None:
    """Rows with which the interval of the accuracy difference would lie inside the margin in 80 % of tests.

    The share of rows on which exactly one of the two is right (none seen is taken as one) and the difference are taken
    as the true ones, the design effect as that of the new rows too. The number is of the interval that is used, counted
    (`lib.statistics.power.rows_for_inside`), and never less than a row more than were tested.

    Args:
        entry: an undecided file's, of comparison.json.
        one_sided: ask only that it is not worse by more than the margin.

    Returns:
        None when the difference seen is as large as the margin: more rows would then not show it to be inside.
    """
    difference, n = entry["accuracy_difference"], entry["n"]
    if difference <= -margin_points / 100 or (difference >= margin_points / 100 and not one_sided):
        return None
    share = max(entry["mcnemar_b"] + entry["mcnemar_c"], 1) / n
    rows = rows_for_inside(max(share, abs(difference)), difference, margin_points / 100, one_sided)
    return max(math.ceil(rows * entry["design_effect"]), n + 1)


def rows_needed_losses(entry: Mapping[str, Any], limit_percent: float) -> int | None:
    """Rows without labels with which the interval of the perplexity ratio would reach no further than the limit.

    Its half-width on the log scale shrinks with the square root of the rows: n · (half-width / room)², room being what
    is left between the ratio that was seen and the limit. With that many rows it does so in one test of two.

    Args:
        entry: of comparison.json, with "loss_difference" and its interval.

    Returns:
        None when the ratio seen is as large as the limit, or there is no interval.
    """
    seen, high = entry["loss_difference"], entry["loss_difference_interval"][1]
    room = math.log1p(limit_percent / 100) - seen
    if high is None or room <= 0:
        return None
    return max(math.ceil(entry["n"] * ((high - seen) / room) ** 2), entry["n"] + 1)


# From the scores of a reference and some files to one comparable entry a file.

REFERENCE_VERDICT = "reference"
_RESAMPLES = 2000


@dataclass(frozen=True)
class Rows:
    """What the statistics must know of the rows.

    Attributes:
        groups: (n,) near-duplicate cluster of each row.
        leak_free: (n,) True where the row is no copy of a training row; None where no audit was made.
    """

    groups: np.ndarray
    leak_free: np.ndarray | None

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> Rows:
        """From rows with "group" and "leaked", where they have them; without, every row is its own group."""
        groups = np.array([row.get("group", i) for i, row in enumerate(rows)])
        audited = all("leaked" in row for row in rows)
        return cls(groups, np.array([not row["leaked"] for row in rows]) if audited else None)


def right_margins(scores: Scores) -> np.ndarray:
    """log p(right answer) minus the largest log p of another answer, nats, (n,): positive where the row is right."""
    rows = np.arange(len(scores.labels))
    others = scores.log_probs.copy()
    others[rows, scores.labels] = -np.inf
    return scores.log_probs[rows, scores.labels] - others.max(axis=1)


def label_divergence(first: Scores, second: Scores) -> np.ndarray:
    """KL(first ‖ second) of the answer words' probabilities, nats, (n,)."""
    p, q = first.probabilities, second.probabilities
    tiny = np.finfo(float).tiny
    return (p * (np.log(np.maximum(p, tiny)) - np.log(np.maximum(q, tiny)))).sum(axis=1).clip(min=0.0)


def macro_f1(counts: np.ndarray) -> np.ndarray:
    """Unweighted mean of the classes' F1 from confusion counts (…, true, predicted); an empty class counts as 0."""
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    total = counts.sum(axis=-1) + counts.sum(axis=-2)
    return np.divide(2 * hits, total, out=np.zeros(hits.shape), where=total > 0).mean(axis=-1)


def f1_interval(scores: Scores, groups: np.ndarray, seed: int) -> tuple[float, list[float]]:
    """Macro-F1 and its 95 % percentile bootstrap interval; whole groups are drawn."""
    by_group = _cells(scores, groups)
    values = _macro_f1s(_drawn(by_group, seed), scores)
    low, high = np.quantile(values, [0.025, 0.975])
    return float(_macro_f1s(by_group.sum(axis=0), scores)), [float(low), float(high)]


def f1_difference(scores: Scores, reference: Scores, groups: np.ndarray, seed: int) -> tuple[float, list[float] | None]:
    """Macro-F1 minus the reference's, and its 95 % bootstrap interval (BCa; both drawn together, whole groups).

    Bias-corrected and accelerated: macro-F1 is no mean, and percentiles of its difference lie off centre. None where no
    draw differs (no changed label), which leaves nothing to see a spread in.
    """

    def change(counts: np.ndarray) -> np.ndarray:
        own, before = np.split(counts, 2, axis=-1)
        return _macro_f1s(own, scores) - _macro_f1s(before, scores)

    by_group = np.concatenate([_cells(scores, groups), _cells(reference, groups)], axis=1)
    total, values = by_group.sum(axis=0), change(_drawn(by_group, seed))
    estimate = float(change(total))
    if np.ptp(values) == 0:
        return estimate, None
    return estimate, list(bca_limits(values, estimate, change(total - by_group)))


def _cells(scores: Scores, groups: np.ndarray) -> np.ndarray:
    """Confusion counts of each group, (groups, labels · labels)."""
    n_labels = scores.log_probs.shape[1]
    _, group = np.unique(groups, return_inverse=True)
    by_group = np.zeros((group.max() + 1, n_labels * n_labels))
    np.add.at(by_group, (group, scores.labels * n_labels + scores.predictions), 1)
    return by_group


def _drawn(by_group: np.ndarray, seed: int) -> np.ndarray:
    """Summed counts of resampled groups, (resamples, counts)."""
    kinds, times = np.unique(by_group, axis=0, return_counts=True)
    return np.random.default_rng(seed).multinomial(len(by_group), times / len(by_group), size=_RESAMPLES) @ kinds


def _macro_f1s(counts: np.ndarray, scores: Scores) -> np.ndarray:
    n_labels = scores.log_probs.shape[1]
    return macro_f1(counts.reshape(*counts.shape[:-1], n_labels, n_labels))


def judge(
    reference: Scores, others: Mapping[str, Scores], rows: Rows, margin_points: float, seed: int
) -> dict[str, dict[str, Any]]:
    """Quality of every file on all rows and on the leak-free rows.

    Args:
        others: scores by name, the reference not among them.
        margin_points: accuracy points that count as equivalent.

    Returns:
        for every name, and for "" (the reference itself): n, accuracy, accuracy_interval (Wilson), macro_f1,
        f1_interval (bootstrap by group), macro_f1_difference, macro_f1_difference_interval (BCa, paired), copies_effect
        (design effect if near-duplicates were copies), label_kld (mean KL divergence of the answer words from the
        reference's, nats a row) and label_kld_interval, flips, flip_share (labels that differ from the reference's),
        mcnemar_b (rows only the reference got right), mcnemar_c, mcnemar_p, mcnemar_p_holm (over `others` and both
        endpoints), accuracy_difference, accuracy_difference_interval, equivalence_p (TOST within the margin),
        equivalence_p_holm (over `others`), design_effect,
        margin_change_mean (of the right answer's log-odds, nats), margin_change_interval, margin_p, margin_p_holm,
        margin_mde (nats), mde (fraction), verdict, endpoint ("accuracy" or "margin": which of them decided, None where
        neither did); and "leak_free": the same on those rows, or None.
    """
    result = _judge(reference, others, rows.groups, margin_points, seed)
    free: dict[str, dict[str, Any]] = {}
    if rows.leak_free is not None and rows.leak_free.any():
        mask = rows.leak_free
        kept = {name: _subset(scores, mask) for name, scores in others.items()}
        free = _judge(_subset(reference, mask), kept, rows.groups[mask], margin_points, seed)
    return {name: {**entry, "leak_free": free.get(name)} for name, entry in result.items()}


def _subset(scores: Scores, mask: np.ndarray) -> Scores:
    ids = [name for name, keep in zip(scores.ids, mask, strict=True) if keep]
    return Scores(ids, scores.labels[mask], scores.log_probs[mask], scores.truncated[mask], scores.seconds)


def _judge(
    reference: Scores, others: Mapping[str, Scores], groups: np.ndarray, margin_points: float, seed: int
) -> dict[str, dict[str, Any]]:
    correct = {name: scores.correct for name, scores in others.items()}
    before = right_margins(reference)
    changes = {name: right_margins(scores) - before for name, scores in others.items()}
    tests = compare_all(reference.correct, correct, groups, margin_points, seed, changes)
    result = {"": {**_own(reference, groups, seed), **_itself()}}
    for name, scores in others.items():
        kld = clustered_mean(label_divergence(reference, scores), groups).to_json()
        f1, f1_limits = f1_difference(scores, reference, groups, seed)
        flips = int((scores.predictions != reference.predictions).sum())
        result[name] = {
            **_own(scores, groups, seed),
            "flips": flips,
            "flip_share": flips / len(scores.ids),
            "label_kld": float(label_divergence(reference, scores).mean()),
            "label_kld_interval": [None if limit is None else max(0.0, limit) for limit in kld],
            "macro_f1_difference": f1,
            "macro_f1_difference_interval": f1_limits,
            **_tested(tests[name]),
        }
    return result


def _own(scores: Scores, groups: np.ndarray, seed: int) -> dict[str, Any]:
    n = len(scores.ids)
    share = wilson(int(scores.correct.sum()), n)
    f1, interval = f1_interval(scores, groups, seed)
    return {
        "n": n,
        "accuracy": share.estimate,
        "accuracy_interval": share.to_json(),
        "macro_f1": f1,
        "f1_interval": interval,
        "near_ties": scores.near_ties,
        "copies_effect": copies_effect(groups, n),
    }


def _tested(test: PairedComparison) -> dict[str, Any]:
    return {
        "mcnemar_b": test.losses,
        "mcnemar_c": test.gains,
        "mcnemar_p": test.p,
        "mcnemar_p_holm": test.p_adjusted,
        "accuracy_difference": test.difference.estimate,
        "accuracy_difference_interval": test.difference.to_json(),
        "equivalence_p": test.equivalence_p,
        "equivalence_p_holm": test.equivalence_p_adjusted,
        "design_effect": test.design_effect,
        "margin_change_mean": test.margin.change.estimate,
        "margin_change_interval": test.margin.change.to_json(),
        "margin_p": test.margin.p,
        "margin_p_holm": test.margin.p_adjusted,
        "margin_mde": test.margin.to_json()["mde"],
        "mde": test.mde,
        "verdict": test.verdict,
        "endpoint": test.endpoint,
    }


def _itself() -> dict[str, Any]:
    """The reference against itself: nothing to test."""
    nothing = ("mcnemar_b", "mcnemar_c", "mcnemar_p", "mcnemar_p_holm", "accuracy_difference", "endpoint")
    nothing += ("accuracy_difference_interval", "equivalence_p", "equivalence_p_holm", "design_effect", "mde")
    nothing += ("label_kld_interval", "macro_f1_difference_interval")
    nothing += ("margin_change_mean", "margin_change_interval", "margin_p", "margin_p_holm", "margin_mde")
    return {
        "flips": 0,
        "flip_share": 0.0,
        "label_kld": 0.0,
        "macro_f1_difference": 0.0,
        **dict.fromkeys(nothing),
        "verdict": REFERENCE_VERDICT,
    }
