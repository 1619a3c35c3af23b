"""Classification metrics as a local `evaluate` module on top of scikit-learn (`evaluate.load` needs the network)."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support


class ClassificationMetric(evaluate.Metric):
    """Accuracy, macro-F1, confusion matrix, and precision, recall, F1 and support of each class."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy, macro-F1, per-class precision, recall and F1, confusion matrix.",
            citation="",
            inputs_description="predictions and references: class numbers; n_classes: how many classes there are.",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: list[int], references: list[int], n_classes: int) -> dict[str, Any]:
        labels = list(range(n_classes))
        matrix = confusion_matrix(references, predictions, labels=labels)
        precision, recall, f1, support = precision_recall_fscore_support(
            references, predictions, labels=labels, zero_division=0.0
        )
        return {
            "accuracy": float(matrix.trace() / matrix.sum()),
            "macro_f1": float(f1.mean()),
            "confusion": matrix.tolist(),
            "precision": precision.tolist(),
            "recall": recall.tolist(),
            "f1": f1.tolist(),
            "support": support.tolist(),
        }


def compute(references: list[int], predictions: list[int], n_classes: int) -> dict[str, Any]:
    """Run the metric in memory: no cache file, no lock, no network."""
    metric = ClassificationMetric(keep_in_memory=True)
    return metric.compute(predictions=predictions, references=references, n_classes=n_classes)
