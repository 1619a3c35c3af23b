"""How well predicted labels fit the true ones, and whether their probabilities mean what they say."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from lib.statistics.intervals import Interval, wilson

if TYPE_CHECKING:
    import evaluate


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

    def to_json(self) -> dict[str, Any]:
        """The keys of the command line's result: n, accuracy, accuracy_interval, macro_f1, per_class, confusion."""
        per_class = {scores["name"]: scores for scores in map(asdict, self.classes)}
        for scores in per_class.values():
            del scores["name"]
        return {
            "n": self.n,
            "accuracy": self.accuracy.estimate,
            "accuracy_interval": self.accuracy.to_json(),
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
    metric = metric_class()(keep_in_memory=True)  # no cache file, no lock
    values = metric.compute(predictions=predicted.tolist(), references=true.tolist(), n_classes=len(label_names))
    columns = zip(label_names, *(values[key] for key in ("precision", "recall", "f1", "support")), strict=True)
    return ClassificationReport(
        n=len(true),
        accuracy=wilson(int((true == predicted).sum()), len(true)),
        macro_f1=values["macro_f1"],
        classes=tuple(ClassScores(*row) for row in columns),
        confusion=tuple(tuple(row) for row in values["confusion"]),
    )


@functools.cache
def metric_class() -> type[evaluate.Metric]:
    """A local `evaluate` module on top of scikit-learn (`evaluate.load` needs the network): accuracy, macro-F1,
    confusion matrix, and precision, recall, F1 and support of each class. Defined late: `evaluate` imports slowly."""
    import datasets
    import evaluate
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    class ClassificationMetric(evaluate.Metric):
        def _info(self) -> evaluate.MetricInfo:
            numbers = datasets.Value("int64")
            return evaluate.MetricInfo(
                description="Accuracy, macro-F1, per-class precision, recall and F1, confusion matrix.",
                citation="",
                inputs_description="predictions and references: class numbers; n_classes: how many classes there are.",
                features=datasets.Features({"predictions": numbers, "references": numbers}),
            )

        def _compute(self, predictions: list[int], references: list[int], n_classes: int) -> dict[str, Any]:
            labels = list(range(n_classes))
            matrix = confusion_matrix(references, predictions, labels=labels)
            scores = precision_recall_fscore_support(references, predictions, labels=labels, zero_division=0.0)
            return {
                "accuracy": float(matrix.trace() / matrix.sum()),
                "macro_f1": float(scores[2].mean()),
                "confusion": matrix.tolist(),
                **{
                    key: part.tolist()
                    for key, part in zip(("precision", "recall", "f1", "support"), scores, strict=True)
                },
            }

    return ClassificationMetric


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


def confidences(log_probs: np.ndarray) -> np.ndarray:
    """Probability of the predicted label among the labels: (n, labels) log-probabilities -> (n,)."""
    values = np.asarray(log_probs, dtype=np.float64)
    shifted = np.exp(values - values.max(axis=1, keepdims=True))
    return 1.0 / shifted.sum(axis=1)


def calibration(confidence: ArrayLike, correct: ArrayLike, bins: int = 10) -> Calibration:
    """Reliability of the predicted label's probability, in equally wide bins over 0..1; 1.0 belongs to the last.

    Args:
        confidence: (n,) probability given to the predicted label.
        correct: (n,) whether that label was right.
    """
    p, right = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if p.shape != right.shape or p.ndim != 1 or not len(p) or p.min() < 0 or p.max() > 1:
        raise ValueError("calibration needs two equally long vectors, the first of probabilities")
    index = np.minimum((p * bins).astype(int), bins - 1)
    counts = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean_p = np.bincount(index, p, bins) / counts
        mean_right = np.bincount(index, right, bins) / counts
    gap = np.where(counts > 0, np.abs(mean_right - mean_p), 0.0)
    columns = zip(counts.tolist(), mean_p.tolist(), mean_right.tolist(), strict=True)
    made = tuple(Bin(i / bins, (i + 1) / bins, *row) for i, row in enumerate(columns))
    return Calibration(len(p), float(np.sum(gap * counts) / len(p)), made)
