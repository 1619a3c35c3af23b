"""What the scores of one or several models on the same rows say, with intervals, paired tests and examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from lib import statistics
from lib.errors import InputError
from lib.scoring import Scores

ALL, LEAK_FREE, SEEN, UNSEEN = "all", "leak_free", "seen_pattern", "unseen_pattern"
MISTAKES_SHOWN = 10


@dataclass(frozen=True)
class Mistake:
    """A wrong answer: the row, what was said, and the probability given to it among the answer words."""

    id: str
    text: str
    label: int
    prediction: int
    probability: float
    leaked: bool


@dataclass(frozen=True)
class ModelEvaluation:
    """One model on the rows.

    Attributes:
        scores: per row.
        reports: accuracy with Wilson interval, per-class scores and confusion matrix, for each subset of the rows.
        calibration: reliability bins and expected calibration error on all rows.
        mistakes: the most confident wrong answers, most confident first.
    """

    scores: Scores
    reports: dict[str, statistics.ClassificationReport]
    calibration: statistics.Calibration
    mistakes: tuple[Mistake, ...]

    def to_json(self) -> dict[str, Any]:
        """The reports by subset, calibration, mistakes, cost."""
        bins = [{k: None if v != v else v for k, v in asdict(b).items()} for b in self.calibration.bins]
        return {
            **{subset: report.to_json() for subset, report in self.reports.items()},
            "calibration": {"ece": self.calibration.ece, "bins": bins},
            "mistakes": [asdict(mistake) for mistake in self.mistakes],
            "near_ties": self.scores.near_ties,
            "truncated": int(self.scores.truncated.sum()),
            "seconds_per_sample": self.scores.seconds_per_sample,
        }


def subsets(rows: Sequence[Mapping[str, Any]], train_patterns: set[str] | None = None) -> dict[str, np.ndarray]:
    """Boolean masks of the parts of the rows that are reported apart; empty parts and unknown ones are left out.

    Args:
        rows: with "leaked" where the leak audit was made, and "pattern" in the sample corpus.
        train_patterns: patterns of the training rows.
    """
    masks = {ALL: np.ones(len(rows), dtype=bool)}
    if all("leaked" in row for row in rows):
        masks[LEAK_FREE] = np.array([not row["leaked"] for row in rows])
    if train_patterns and all("pattern" in row for row in rows):
        masks[SEEN] = np.array([row["pattern"] in train_patterns for row in rows])
        masks[UNSEEN] = ~masks[SEEN]
    return {name: mask for name, mask in masks.items() if mask.any()}


def evaluate_scores(
    scores: Scores,
    rows: Sequence[Mapping[str, Any]],
    label_names: Sequence[str],
    masks: Mapping[str, np.ndarray],
) -> ModelEvaluation:
    """Everything that is said of one model.

    Raises:
        InputError: the scores belong to other rows.
    """
    if scores.ids != [row["id"] for row in rows]:
        raise InputError(
            "scores of other rows.", "one score a row, in order.", "run 03_evaluate again with force: true."
        )
    reports = {
        name: statistics.classification_report(scores.labels[mask], scores.predictions[mask], label_names)
        for name, mask in masks.items()
    }
    confidence = statistics.confidences(scores.log_probs)
    wrong = np.flatnonzero(~scores.correct)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:MISTAKES_SHOWN]
    mistakes = tuple(
        Mistake(
            id=rows[i]["id"],
            text=rows[i]["text"],
            label=int(scores.labels[i]),
            prediction=int(scores.predictions[i]),
            probability=float(confidence[i]),
            leaked=bool(rows[i].get("leaked", False)),
        )
        for i in worst
    )
    return ModelEvaluation(scores, reports, statistics.calibration(confidence, scores.correct), mistakes)


def compare_with(
    candidate: np.ndarray,
    references: Mapping[str, np.ndarray],
    groups: np.ndarray,
    margin_points: float,
    seed: int,
) -> dict[str, statistics.PairedComparison]:
    """One candidate against several references on the same rows; p-values Holm-corrected over the references.

    Args:
        candidate: (n,) right or wrong.
        references: name -> (n,) right or wrong.
        groups: (n,) near-duplicate cluster of each row.
    """
    alone = {
        name: statistics.compare(reference, candidate, groups, margin_points, seed, len(references))
        for name, reference in references.items()
    }
    adjusted = statistics.holm([comparison.p for comparison in alone.values()])
    return {
        name: replace(
            comparison,
            p_adjusted=p,
            verdict=statistics.verdict(comparison.difference, p, margin_points, comparison.mde),
        )
        for (name, comparison), p in zip(alone.items(), adjusted, strict=True)
    }
