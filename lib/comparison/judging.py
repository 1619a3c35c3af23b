"""From the scores of a reference and some files to one comparable entry a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lib.scoring import Scores
from lib.statistics import PairedComparison, compare_all, wilson

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


def macro_f1(counts: np.ndarray) -> np.ndarray:
    """Unweighted mean of the classes' F1 from confusion counts (…, true, predicted); an empty class counts as 0."""
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    total = counts.sum(axis=-1) + counts.sum(axis=-2)
    return np.divide(2 * hits, total, out=np.zeros(hits.shape), where=total > 0).mean(axis=-1)


def f1_interval(scores: Scores, groups: np.ndarray, seed: int) -> tuple[float, list[float]]:
    """Macro-F1 and its 95 % percentile bootstrap interval; whole groups are drawn."""
    n_labels = scores.log_probs.shape[1]
    cells = scores.labels * n_labels + scores.predictions
    _, group = np.unique(groups, return_inverse=True)
    by_group = np.zeros((group.max() + 1, n_labels * n_labels))
    np.add.at(by_group, (group, cells), 1)
    kinds, times = np.unique(by_group, axis=0, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(by_group), times / len(by_group), size=_RESAMPLES) @ kinds
    values = macro_f1(draws.reshape(-1, n_labels, n_labels))
    low, high = np.quantile(values, [0.025, 0.975])
    return float(macro_f1(by_group.sum(axis=0).reshape(n_labels, n_labels))), [float(low), float(high)]


def judge(
    reference: Scores, others: Mapping[str, Scores], rows: Rows, margin_points: float, seed: int
) -> dict[str, dict[str, Any]]:
    """Quality of every file on all rows and on the leak-free rows.

    Args:
        others: scores by name, the reference not among them.
        margin_points: accuracy points that count as equivalent.

    Returns:
        for every name, and for "" (the reference itself): n, accuracy, accuracy_interval (Wilson), macro_f1,
        f1_interval (bootstrap by group), flips, flip_share (labels that differ from the reference's), mcnemar_b
        (rows only the reference got right), mcnemar_c, mcnemar_p, mcnemar_p_holm (over `others` and both endpoints),
        accuracy_difference, accuracy_difference_interval, equivalence_p (TOST within the margin), design_effect,
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
        flips = int((scores.predictions != reference.predictions).sum())
        result[name] = {
            **_own(scores, groups, seed),
            "flips": flips,
            "flip_share": flips / len(scores.ids),
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
        "design_effect": test.design_effect,
        "margin_change_mean": test.margin.change.estimate,
        "margin_change_interval": test.margin.change.to_json(),
        "margin_p": test.margin.p,
        "margin_p_holm": test.margin.p_adjusted,
        "margin_mde": test.margin.mde,
        "mde": test.mde,
        "verdict": test.verdict,
        "endpoint": test.endpoint,
    }


def _itself() -> dict[str, Any]:
    """The reference against itself: nothing to test."""
    nothing = ("mcnemar_b", "mcnemar_c", "mcnemar_p", "mcnemar_p_holm", "accuracy_difference", "endpoint")
    nothing += ("accuracy_difference_interval", "equivalence_p", "design_effect", "mde")
    nothing += ("margin_change_mean", "margin_change_interval", "margin_p", "margin_p_holm", "margin_mde")
    return {"flips": 0, "flip_share": 0.0, **dict.fromkeys(nothing), "verdict": REFERENCE_VERDICT}
