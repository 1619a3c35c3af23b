"""How well predicted labels fit the true ones, and whether their probabilities mean what they say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lib.statistics.intervals import Interval, wilson


@dataclass(frozen=True)
class ClassScores:
    """One class: precision and recall are 0 where their denominator is 0."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class ClassificationReport:
    """Everything counted on one set of rows.

    Attributes:
        n: rows.
        accuracy: share of right answers with its Wilson interval.
        macro_f1: unweighted mean of the classes' F1.
        classes: one entry a label, in label order.
        confusion: confusion[true][predicted], rows counted.
    """

    n: int
    accuracy: Interval
    macro_f1: float
    classes: tuple[ClassScores, ...]
    confusion: tuple[tuple[int, ...], ...]

    @property
    def balanced_accuracy(self) -> float:
        """Mean recall of the labels that occur: every one of them counts alike."""
        recalls = [scores.recall for scores in self.classes if scores.support]
        return sum(recalls) / len(recalls)

    @property
    def commonest(self) -> float:
        """Share of the commonest label: what naming it for every row reaches."""
        return max(scores.support for scores in self.classes) / self.n

    @property
    def labels_given(self) -> int:
        """How many different labels are answered."""
        return int((np.sum(self.confusion, axis=0) > 0).sum())

    def to_json(self) -> dict[str, Any]:
        """The keys of the command line's result: n, accuracy, accuracy_interval, balanced_accuracy, macro_f1,
        per_class, confusion."""
        per_class = {scores.pop("name"): scores for scores in map(asdict, self.classes)}
        return {
            "n": self.n,
            **self.accuracy.named("accuracy"),
            "balanced_accuracy": self.balanced_accuracy,
            "macro_f1": self.macro_f1,
            "per_class": per_class,
            "confusion": [list(row) for row in self.confusion],
        }


def classification_report(
    labels: ArrayLike, predictions: ArrayLike, label_names: Sequence[str]
) -> ClassificationReport:
    """Accuracy, per-class scores and confusion matrix of predicted against true label numbers.

    Raises:
        ValueError: no rows, unequal lengths, or a number that is no index into `label_names`.
    """
    true, predicted = np.asarray(labels, dtype=np.int64), np.asarray(predictions, dtype=np.int64)
    if true.shape != predicted.shape or true.ndim != 1 or not len(true):
        raise ValueError(f"need two equally long, non-empty vectors, not {true.shape} and {predicted.shape}")
    if min(true.min(), predicted.min()) < 0 or max(true.max(), predicted.max()) >= len(label_names):
        raise ValueError(f"label numbers must lie in 0..{len(label_names) - 1}")
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    numbers = range(len(label_names))
    scores = precision_recall_fscore_support(true, predicted, labels=numbers, zero_division=0.0)
    return ClassificationReport(
        n=len(true),
        accuracy=wilson(int((true == predicted).sum()), len(true)),
        macro_f1=float(scores[2].mean()),
        classes=tuple(map(ClassScores, label_names, *(values.tolist() for values in scores))),
        confusion=tuple(map(tuple, confusion_matrix(true, predicted, labels=numbers).tolist())),
    )


@dataclass(frozen=True)
class Bin:
    """One bin of confidence [low, high): rows, their mean confidence and their accuracy (NaN when empty)."""

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """Reliability bins and the expected calibration error (Naeini 2015): Σ n_bin/n · |accuracy - confidence|."""

    n: int
    ece: float
    bins: tuple[Bin, ...]


_BINS = 10


def calibration(confidence: ArrayLike, correct: ArrayLike) -> Calibration:
    """Reliability of the predicted label's probability, in ten equally wide bins over 0..1; 1.0 belongs to the last.

    Args:
        confidence: (n,) probability given to the predicted label.
        correct: (n,) whether that label was right.
    """
    p, right = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if p.shape != right.shape or p.ndim != 1 or not len(p) or p.min() < 0 or p.max() > 1:
        raise ValueError("calibration needs two equally long vectors, the first of probabilities")
    index = np.minimum((p * _BINS).astype(int), _BINS - 1)
    counts = np.bincount(index, minlength=_BINS)
    with np.errstate(invalid="ignore"):
        mean_p = np.bincount(index, p, _BINS) / counts
        mean_right = np.bincount(index, right, _BINS) / counts
    gap = np.where(counts > 0, np.abs(mean_right - mean_p), 0.0)
    columns = zip(counts.tolist(), mean_p.tolist(), mean_right.tolist(), strict=True)
    made = tuple(Bin(i / _BINS, (i + 1) / _BINS, *row) for i, row in enumerate(columns))
    return Calibration(len(p), float(np.sum(gap * counts) / len(p)), made)
