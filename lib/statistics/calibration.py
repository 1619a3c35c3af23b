"""Do the probabilities mean what they say: reliability bins and the expected calibration error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


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


def calibration(
    confidence: Sequence[float] | np.ndarray, correct: Sequence[bool] | np.ndarray, bins: int = 10
) -> Calibration:
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
