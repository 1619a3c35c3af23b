"""The metric of rows with labels: the share of right answer words, and what their log-probabilities say beyond it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.scoring.log_probabilities import NEAR_TIE, Scores
from lib.statistics.classification import classification_report
from lib.statistics.intervals import Interval, bca_limits, drawn_sums, wilson
from lib.statistics.losses import averaged_share, weighted_mean
from lib.statistics.noninferiority import (
    FEWEST_GROUPS,
    balanced_weights,
    fewest_groups,
    label_weights,
    loss_in_json,
    rows_for,
    share_loss,
)
from lib.statistics.paired import (
    clustered_mean,
    clustered_score_interval,
    clustered_share,
    compare_pairs,
    copies_effect,
    sign_flip_test,
)

if TYPE_CHECKING:
    from lib.prompts.tasks import Task
    from lib.scoring.metric import Entry, Row, RowGroups

_RESAMPLES = 2000

ODDS_LIMIT = 0.05
"""Nats: the least loss of log-odds that is worth a warning; the odds of the right answers fall by a twentieth."""


class Accuracy:
    """Share of rows whose likeliest answer word is the label's; beside it the margin of the right answer.

    What is said here of each attribute and method of a metric holds for `lib.scoring.metric.AnswerPerplexity` too.

    Attributes:
        name: in JSON files.
        words: of the point estimate, as in "… 0.9 on 200 rows".
        best_words: what the best of several estimates is called.
        loss_unit: of `loss` and of the margin.
        point: key of the point estimate in an entry; its interval has the key with "_interval" behind it.
        shown: keys of an entry that a short table shows, beside size, KL divergence and verdict.
        in_manifest: the same in the manifest.
        margin_setting: the setting with the margin. margin_condition: the same in comparison.json.
        least_move: root mean square of a row's change by fine-tuning below which no share of it is told, nats: what
            rounding alone moves. move_unit: the unit in words.
    """

    name = "accuracy"
    words, best_words = "accuracy", "highest accuracy"
    loss_unit = "accuracy points"
    point = "accuracy"
    shown = in_manifest = ("accuracy", "accuracy_interval", "flips")
    margin_setting, margin_condition = "equivalence_margin", "equivalence_margin_points"
    least_move, move_unit = NEAR_TIE, "nats of log-odds"

    def own(self, scores: Scores, groups: np.ndarray, seed: int, whole: Entry | None = None) -> dict[str, Any]:
        """The point estimate with its interval, and what stands beside it.

        n, accuracy, accuracy_interval (Wilson), macro_f1, f1_interval (bootstrap by group), near_ties, groups,
        copies_effect (design effect if near-duplicates were copies), balanced (whether the labels are so imbalanced
        that the balanced accuracy is judged), balanced_accuracy (mean recall of the labels), chance (what one label for
        all rows reaches of it), and labels_given (how many different labels are answered).
        """
        n, weights = len(scores.ids), balanced_weights(scores.labels, whole and whole["balanced"])
        share = wilson(int(scores.correct.sum()), n)
        f1, interval = f1_interval(scores, groups, seed)
        return {
            "n": n,
            **share.named("accuracy"),
            "macro_f1": f1,
            "f1_interval": interval,
            "near_ties": scores.near_ties,
            "groups": len(np.unique(groups)),
            "copies_effect": copies_effect(groups, n, weights),
            "balanced": weights is not None,
            "balanced_accuracy": float(np.average(scores.correct, weights=label_weights(scores.labels))),
            "chance": 1 / len(np.unique(scores.labels)),
            "labels_given": len(np.unique(scores.predictions)),
        }

    def classes(self, scores: Scores, label_names: Sequence[str]) -> dict[str, Any]:
        """Precision, recall, F1 and rows of every label, and confusion[true][answered]."""
        report = classification_report(scores.labels, scores.predictions, label_names).to_json()
        return {key: report[key] for key in ("per_class", "confusion")}

    def compare(
        self,
        reference: Scores,
        others: Mapping[str, Scores],
        rows: RowGroups,
        seed: int,
        whole: Entry | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Several models with a reference on one set of rows, Holm-corrected over the models.

        Args:
            others: scores by name, the reference not among them.
            rows: with groups, and folds where rows were cross-validated.
            whole: what was said of the reference on all rows, of which these are a part: the same kind of accuracy is
                judged on them. None = these are all.

        Returns:
            by name, and for "" (the reference itself): what `own` gives, and of all but the reference the metric's
            tests: macro_f1_difference and its interval (BCa, paired), label_kld (mean KL divergence of the answer words
            from the reference's, nats a row) and its interval, flips and flip_share (labels that differ from the
            reference's), mcnemar_b (rows only the reference got right), mcnemar_c, mcnemar_p, accuracy_difference (of
            the balanced accuracy where labels are imbalanced) and its interval, design_effect, loss (points, positive =
            worse), loss_interval and loss_limit (`share_loss`), p and p_holm (over `others`), odds_change (mean
            change of the right answer's log-odds, nats, every label counting alike) and its interval, and odds_warning
            (whether it surely lost more than `ODDS_LIMIT`).
        """
        weights = balanced_weights(reference.labels, whole and whole["balanced"])
        groups, folds = rows.groups, rows.folds
        before, alike = right_log_odds(reference), label_weights(reference.labels)
        tests = compare_pairs(
            {name: (reference.correct, scores.correct) for name, scores in others.items()}, groups, seed, weights, folds
        )
        same = {"flips": 0, "flip_share": 0.0, "label_kld": 0.0, "macro_f1_difference": 0.0}
        found = {"": {**self.own(reference, groups, seed, whole), **same}}
        for name, scores in others.items():
            divergence = label_divergence(reference, scores)
            f1, f1_limits = f1_difference(scores, reference, groups, seed)
            flips, test = int((scores.predictions != reference.predictions).sum()), tests[name]
            odds = weighted_mean(right_log_odds(scores) - before, alike, groups, folds=folds)
            change = scores.correct.astype(np.int64) - reference.correct
            found[name] = {
                **self.own(scores, groups, seed, whole),
                "flips": flips,
                "flip_share": flips / len(scores.ids),
                "label_kld": float(divergence.mean()),
                "label_kld_interval": _above_zero(clustered_mean(divergence, groups, folds)),
                "macro_f1_difference": f1,
                "macro_f1_difference_interval": f1_limits,
                "mcnemar_b": test.losses,
                "mcnemar_c": test.gains,
                "mcnemar_p": test.mcnemar_p,
                **test.difference.named("accuracy_difference"),
                "design_effect": test.design_effect,
                **loss_in_json(share_loss(change, groups, weights, folds)),
                "p": test.p,
                "p_holm": test.p_holm,
                **odds.named("odds_change"),
                "odds_warning": odds.high < -ODDS_LIMIT,
            }
        return found

    def loss(self, reference: Scores, other: Scores) -> float:
        """What `compare` calls the loss of one model, alone."""
        change = other.correct.astype(np.float64) - reference.correct
        return -100 * float(np.average(change, weights=balanced_weights(reference.labels)))

    def floor(self, tokenizer: Any, task: Task, train: Path | None, rows: Sequence[Row]) -> float:
        """What a model that has learned nothing but frequencies reaches on the rows; None where it is not known.

        Here the share of the commonest label among the rows.

        Args:
            train: file of the training rows.
        """
        return float(np.bincount([row["label"] for row in rows]).max() / len(rows))

    def entry_floor(self, floor: float | None) -> dict[str, Any]:
        """What every entry says of the floor."""
        return {"majority_share": floor}

    def conditions(self, margin: float, floor: float | None) -> dict[str, Any]:
        """What the conditions of a comparison say of margin and floor."""
        return {self.margin_condition: margin, "floor": floor}

    def problem(self, reference: Entry, floor: float | None) -> str | None:
        """Why a comparison with this reference means nothing; None where it means something.

        Returns:
            "few" (groups of rows, all or leak-free), "constant" (one label for all rows), "unlearned" (not clearly
            better than the floor, near copies counted once; of imbalanced labels, than one label for all rows).
        """
        if fewest_groups(reference) < FEWEST_GROUPS:
            return "few"
        if reference["labels_given"] == 1:
            return "constant"
        rows = reference["n"] / reference["copies_effect"]
        share, least = (
            (reference["balanced_accuracy"], reference["chance"])
            if reference["balanced"]
            else (reference["accuracy"], floor or 0.0)
        )
        return None if wilson(share * rows, rows).low > least else "unlearned"

    def rows_needed(self, entry: Entry, margin: float) -> int | None:
        """Rows that would show a file to be good enough in 80 % of tests, if what was seen of it is the truth.

        The share of rows on which exactly one of the two is right (none seen is taken as one) and the loss are taken as
        the true ones, the design effect as that of the new rows too; never less than a row more than were tested.

        Args:
            margin: accuracy points.

        Returns:
            None when the loss seen is as large as the margin: more rows would then not show it to be less.
        """
        loss, n = entry["loss"] / 100, entry["n"]
        if loss >= margin / 100:
            return None
        changed = max(entry["mcnemar_b"] + entry["mcnemar_c"], 1) / n
        rows = rows_for(max(changed, abs(loss)), margin / 100, loss)
        return max(math.ceil(rows * entry["design_effect"]), n + 1)

    def row_values(self, scores: Scores) -> tuple[np.ndarray, np.ndarray]:
        """(n,) value of each row, whose weighted mean is the estimate (of perplexity: its logarithm), and weights.

        Here right (1) or wrong (0).
        """
        return scores.correct.astype(np.float64), np.ones(len(scores.ids))

    def best(self, estimates: Sequence[float]) -> int:
        """Place of the best of several estimates of `row_values`; the first of equals."""
        return int(np.argmax(estimates))

    def mean(self, values: np.ndarray, rows: RowGroups, tries: int = 1) -> Interval:
        """The mean of `row_values`, each the mean of several tries, with its 95 % interval (infinite: none).

        Here Wilson's; of several tries on the effective rows.
        """
        if tries == 1 and rows.enough:
            return wilson(int(values.sum()), len(values))
        return averaged_share(values, rows.groups)

    def difference(self, change: np.ndarray, rows: RowGroups, confidence: float, tries: int = 1) -> Interval:
        """The mean of a paired difference of `row_values`; `tries`: the larger number behind either of the two.

        It has the score interval where rows are right or wrong; means of several tries have Student's.
        """
        if rows.enough and (tries == 1 or not change.any()):
            return clustered_score_interval(np.rint(change).astype(np.int64), rows.groups, confidence)
        return weighted_mean(change, rows.weights, rows.groups, confidence)

    def p_value(self, change: np.ndarray, rows: RowGroups, seed: int) -> float:
        """Two-sided p of "no difference" of two models' `row_values`: sign flips of whole groups."""
        return sign_flip_test(change, rows.groups, seed)

    def vectors(self, scores: Scores) -> np.ndarray:
        """What a model says of each row, nats, (n, d): the coordinates in which fine-tuning moves a row.

        Here log-probabilities of the answer words less their mean: for two labels half the log-odds of one over the
        other, whichever is right.
        """
        return scores.log_probs - scores.log_probs.mean(axis=1, keepdims=True)

    def movement(self, change: np.ndarray) -> float:
        """Root mean square of a change of `vectors`, in `move_unit`; here over pairs of labels."""
        return float(np.mean(np.sum(change**2, axis=1))) ** 0.5 * (2 / (change.shape[1] - 1)) ** 0.5

    def step(self, scores: Scores, groups: np.ndarray, margin: float) -> dict[str, Any]:
        """A step of the error ladder on its own: accuracy with Wilson's interval."""
        return wilson(int(scores.correct.sum()), len(scores.ids)).named("accuracy")

    def step_change(
        self, before: Scores, scores: Scores, groups: np.ndarray, margin: float, seed: int
    ) -> dict[str, Any]:
        """A step of the error ladder against an earlier one.

        KL divergence over the answer words (nats a row, clusters together), equal labels (Wilson, rows divided by
        the design effect) and the difference in accuracy, each with its interval.
        """
        kld = clustered_mean(label_divergence(before, scores), groups)
        change = clustered_score_interval(scores.correct.astype(np.int64) - before.correct, groups)
        return {
            "kld": kld.estimate,
            "kld_interval": _above_zero(kld),
            **clustered_share(scores.predictions == before.predictions, groups).named("agreement"),
            **change.named("accuracy_difference"),
        }


def _above_zero(divergence: Interval) -> list[float | None]:
    """Limits of a divergence, which cannot be negative."""
    return [None if limit is None else max(0.0, limit) for limit in divergence.to_json()]


def right_log_odds(scores: Scores) -> np.ndarray:
    """log p(right answer) minus the mean log p of the other answers, nats, (n,).

    Averaged with every label counting alike it does not move when a model only shifts towards one of the labels.
    """
    k = scores.log_probs.shape[1]
    right = scores.log_probs[np.arange(len(scores.labels)), scores.labels]
    return (k * right - scores.log_probs.sum(axis=1)) / (k - 1)


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
    by_group = _confusion(scores, groups)
    low, high = np.quantile(macro_f1(_drawn(by_group, seed)), [0.025, 0.975])
    return float(macro_f1(by_group.sum(axis=0))), [float(low), float(high)]


def f1_difference(scores: Scores, reference: Scores, groups: np.ndarray, seed: int) -> tuple[float, list[float] | None]:
    """Macro-F1 minus the reference's, and its 95 % bootstrap interval (BCa; both drawn together, whole groups).

    Bias-corrected and accelerated: macro-F1 is no mean, and percentiles of its difference lie off centre. None where no
    draw differs (no changed label), which leaves nothing to see a spread in.
    """

    def change(counts: np.ndarray) -> np.ndarray:
        return macro_f1(counts[..., 0, :, :]) - macro_f1(counts[..., 1, :, :])

    by_group = np.stack([_confusion(scores, groups), _confusion(reference, groups)], axis=1)
    total, values = by_group.sum(axis=0), change(_drawn(by_group, seed))
    estimate = float(change(total))
    if np.ptp(values) == 0:
        return estimate, None
    return estimate, list(bca_limits(values, estimate, change(total - by_group)))


def _confusion(scores: Scores, groups: np.ndarray) -> np.ndarray:
    """Confusion counts of each group, (groups, true, predicted)."""
    n_labels = scores.log_probs.shape[1]
    _, group = np.unique(groups, return_inverse=True)
    by_group = np.zeros((group.max() + 1, n_labels, n_labels))
    np.add.at(by_group, (group, scores.labels, scores.predictions), 1)
    return by_group


def _drawn(by_group: np.ndarray, seed: int) -> np.ndarray:
    """Summed counts of resampled groups, (resamples, …)."""
    drawn = drawn_sums(by_group.reshape(len(by_group), -1), _RESAMPLES, seed)
    return drawn.reshape(_RESAMPLES, *by_group.shape[1:])
