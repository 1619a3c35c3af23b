"""The metric of rows with labels: the share of right answer words, and what their log-probabilities say beyond it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.scoring.log_probabilities import NEAR_TIE, Scores
from lib.statistics.intervals import Interval, bca_limits, wilson
from lib.statistics.losses import averaged_share, weighted_mean
from lib.statistics.paired import (
    clustered_mean,
    clustered_score_interval,
    clustered_share,
    copies_effect,
    sign_flip_test,
)
from lib.statistics.power import rows_for_inside
from lib.statistics.verdicts import compare_all

if TYPE_CHECKING:
    from lib.prompts.tasks import Task
    from lib.scoring.metric import Entry, Row, RowGroups

_RESAMPLES = 2000


class Accuracy:
    """Share of rows whose likeliest answer word is the label's; beside it the margin of the right answer."""

    name = "accuracy"
    words, best_words = "accuracy", "highest accuracy"
    loss_unit = "accuracy points"
    point = "accuracy"
    shown = in_manifest = ("accuracy", "accuracy_interval", "flips")
    margin_setting, margin_condition = "equivalence_margin", "equivalence_margin_points"
    endpoints, tells_rows = 2, True
    least_move, move_unit = NEAR_TIE, "nats of log-odds"

    def own(self, scores: Scores, groups: np.ndarray, seed: int) -> dict[str, Any]:
        """n, accuracy, accuracy_interval (Wilson), macro_f1, f1_interval (bootstrap by group), near_ties, and
        copies_effect (design effect if near-duplicates were copies)."""
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

    def compare(
        self, reference: Scores, others: Mapping[str, Scores], groups: np.ndarray, margin: float, seed: int
    ) -> dict[str, dict[str, Any]]:
        """Beside `own`: macro_f1_difference and its interval (BCa, paired), label_kld (mean KL divergence of the answer
        words from the reference's, nats a row) and its interval, flips and flip_share (labels that differ from the
        reference's), mcnemar_b (rows only the reference got right), mcnemar_c, mcnemar_p, mcnemar_p_holm (over `others`
        and both endpoints), accuracy_difference and its interval, equivalence_p (TOST within the margin),
        equivalence_p_holm (over `others`), design_effect, margin_change_mean (of the right answer's log-odds, nats),
        margin_change_interval, margin_p, margin_p_holm, margin_mde (nats), mde (fraction), verdict, and endpoint
        ("accuracy" or "margin": which of them decided, None where neither did)."""
        before = right_margins(reference)
        changes = {name: right_margins(scores) - before for name, scores in others.items()}
        correct = {name: scores.correct for name, scores in others.items()}
        tests = compare_all(reference.correct, correct, groups, margin, seed, changes)
        same = {"flips": 0, "flip_share": 0.0, "label_kld": 0.0, "macro_f1_difference": 0.0}
        found = {"": {**self.own(reference, groups, seed), **same, "verdict": "reference"}}
        for name, scores in others.items():
            kld = clustered_mean(label_divergence(reference, scores), groups).to_json()
            f1, f1_limits = f1_difference(scores, reference, groups, seed)
            flips, test = int((scores.predictions != reference.predictions).sum()), tests[name]
            found[name] = {
                **self.own(scores, groups, seed),
                "flips": flips,
                "flip_share": flips / len(scores.ids),
                "label_kld": float(label_divergence(reference, scores).mean()),
                "label_kld_interval": [None if limit is None else max(0.0, limit) for limit in kld],
                "macro_f1_difference": f1,
                "macro_f1_difference_interval": f1_limits,
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
        return found

    def floor(self, tokenizer: Any, task: Task, train: Path | None, rows: Sequence[Row]) -> float:
        """Share of the commonest label among the rows."""
        return float(np.bincount([row["label"] for row in rows]).max() / len(rows))

    def entry_floor(self, floor: float | None) -> dict[str, Any]:
        return {"majority_share": floor}

    def conditions(self, margin: float, floor: float | None) -> dict[str, Any]:
        return {self.margin_condition: margin}

    def learned(self, reference: Entry, floor: float | None) -> bool:
        """Near copies among the rows are counted once."""
        effect = reference["copies_effect"]
        low = wilson(reference["accuracy"] * reference["n"] / effect, reference["n"] / effect).low
        return floor is None or low > floor

    def loss(self, entry: Entry) -> tuple[float, float | None, float | None]:
        """A zero has no sign."""
        low, high = (
            None if limit is None else -100 * limit + 0.0 for limit in entry["accuracy_difference_interval"][::-1]
        )
        return -100 * entry["accuracy_difference"] + 0.0, low, high

    def distance(self, entry: Entry) -> float:
        """Rows on which exactly one of the two is right."""
        return entry["mcnemar_b"] + entry["mcnemar_c"]

    def rows_needed(self, entry: Entry, margin: float, one_sided: bool = False) -> int | None:
        """Rows with which the interval of the accuracy difference would lie inside the margin in 80 % of tests.

        The share of rows on which exactly one of the two is right (none seen is taken as one) and the difference are
        taken as the true ones, the design effect as that of the new rows too. The number is of the interval that is
        used, counted (`lib.statistics.power.rows_for_inside`), and never less than a row more than were tested.

        Args:
            margin: accuracy points.
            one_sided: ask only that it is not worse by more than the margin.

        Returns:
            None when the difference seen is as large as the margin: more rows would then not show it to be inside.
        """
        difference, n = entry["accuracy_difference"], entry["n"]
        if difference <= -margin / 100 or (difference >= margin / 100 and not one_sided):
            return None
        share = max(entry["mcnemar_b"] + entry["mcnemar_c"], 1) / n
        rows = rows_for_inside(max(share, abs(difference)), difference, margin / 100, one_sided)
        return max(math.ceil(rows * entry["design_effect"]), n + 1)

    def row_values(self, scores: Scores) -> tuple[np.ndarray, np.ndarray]:
        """Right (1) or wrong (0)."""
        return scores.correct.astype(np.float64), np.ones(len(scores.ids))

    def best(self, estimates: Sequence[float]) -> int:
        return int(np.argmax(estimates))

    def mean(self, values: np.ndarray, rows: RowGroups, tries: int = 1) -> Interval:
        """Wilson's interval; of several tries on the effective rows."""
        if tries == 1 and rows.enough:
            return wilson(int(values.sum()), len(values))
        return averaged_share(values, rows.groups)

    def difference(self, change: np.ndarray, rows: RowGroups, confidence: float, tries: int = 1) -> Interval:
        """The score interval where rows are right or wrong; means of several tries have Student's."""
        if rows.enough and (tries == 1 or not change.any()):
            return clustered_score_interval(np.rint(change).astype(np.int64), rows.groups, confidence)
        return weighted_mean(change, rows.weights, rows.groups, confidence)

    def p_value(self, change: np.ndarray, rows: RowGroups, seed: int) -> float:
        """Sign flips of whole groups."""
        return sign_flip_test(change, rows.groups, seed)

    def vectors(self, scores: Scores) -> np.ndarray:
        """Log-probabilities of the answer words less their mean: for two labels half the log-odds of one over the
        other, whichever is right."""
        return scores.log_probs - scores.log_probs.mean(axis=1, keepdims=True)

    def movement(self, change: np.ndarray) -> float:
        """From k centred values to the root mean square over pairs of labels."""
        return float(np.mean(np.sum(change**2, axis=1))) ** 0.5 * (2 / (change.shape[1] - 1)) ** 0.5

    def step(self, scores: Scores, groups: np.ndarray, margin: float) -> dict[str, Any]:
        """Accuracy with Wilson's interval."""
        share = wilson(int(scores.correct.sum()), len(scores.ids))
        return {"accuracy": share.estimate, "accuracy_interval": share.to_json()}

    def step_change(
        self, before: Scores, scores: Scores, groups: np.ndarray, margin: float, seed: int
    ) -> dict[str, Any]:
        """KL divergence over the answer words (nats a row, clusters together), equal labels (Wilson, rows divided by
        the design effect) and the difference in accuracy, each with its interval."""
        kld = clustered_mean(label_divergence(before, scores), groups)
        same = clustered_share(scores.predictions == before.predictions, groups)
        change = clustered_score_interval(scores.correct.astype(np.int64) - before.correct, groups)
        return {
            "kld": kld.estimate,
            "kld_interval": [None if limit is None else max(0.0, limit) for limit in kld.to_json()],
            "agreement": same.estimate,
            "agreement_interval": same.to_json(),
            "accuracy_difference": change.estimate,
            "accuracy_difference_interval": change.to_json(),
        }


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
