"""What a number is worth: metrics, intervals, paired tests and the words they allow.

Every function takes plain arrays and returns numbers or a small frozen dataclass; nothing here knows a model.
Accuracies and differences are fractions (0.01 = one accuracy point) unless a name ends in `_points`.
"""

from __future__ import annotations

from lib.statistics.calibration import Calibration, calibration, confidences
from lib.statistics.classification import ClassificationReport, ClassScores, classification_report
from lib.statistics.intervals import Interval, paired_bootstrap, paired_score_interval, wilson
from lib.statistics.paired import McNemar, holm, mcnemar_exact, mde_paired, smallest_significant
from lib.statistics.verdicts import PairedComparison, compare, compare_all, verdict

__all__ = [
    "Calibration",
    "ClassScores",
    "ClassificationReport",
    "Interval",
    "McNemar",
    "PairedComparison",
    "calibration",
    "classification_report",
    "compare",
    "compare_all",
    "confidences",
    "holm",
    "mcnemar_exact",
    "mde_paired",
    "paired_bootstrap",
    "paired_score_interval",
    "smallest_significant",
    "verdict",
    "wilson",
]
