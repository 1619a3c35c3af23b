"""What a number is worth: metrics, intervals, paired tests and the words they allow.

Every function takes plain arrays and returns numbers or a small frozen dataclass; nothing here knows a model.
Accuracies and differences are fractions (0.01 = one accuracy point) unless a name ends in `_points`.
"""

from __future__ import annotations

from lib.statistics.calibration import Calibration, calibration, confidences
from lib.statistics.classification import ClassificationReport, ClassScores, classification_report
from lib.statistics.clustered import (
    clustered_bootstrap_t,
    clustered_mean,
    clustered_score_interval,
    clustered_share,
    copies_effect,
    design_effect,
    sign_flip_test,
)
from lib.statistics.equivalence import Equivalence, equivalence_paired
from lib.statistics.frontier import frontier
from lib.statistics.intervals import Interval, bca_limits, paired_bootstrap, paired_score_interval, wilson
from lib.statistics.margins import MarginTest, margin_test
from lib.statistics.paired import McNemar, holm, mcnemar_exact, mde_paired, smallest_significant
from lib.statistics.power import (
    mde_exact,
    power_curve,
    power_inside,
    power_mcnemar,
    rows_for_inside,
    rows_needed,
)
from lib.statistics.retention import (
    KEEPS_LITTLE,
    keeps_little,
    kept_words,
    retention_warning,
    slope_through_origin,
)
from lib.statistics.verdicts import PairedComparison, compare, compare_all, in_words, verdict

__all__ = [
    "KEEPS_LITTLE",
    "Calibration",
    "ClassScores",
    "ClassificationReport",
    "Equivalence",
    "Interval",
    "MarginTest",
    "McNemar",
    "PairedComparison",
    "bca_limits",
    "calibration",
    "classification_report",
    "clustered_bootstrap_t",
    "clustered_mean",
    "clustered_score_interval",
    "clustered_share",
    "compare",
    "compare_all",
    "confidences",
    "copies_effect",
    "design_effect",
    "equivalence_paired",
    "frontier",
    "holm",
    "in_words",
    "keeps_little",
    "kept_words",
    "margin_test",
    "mcnemar_exact",
    "mde_exact",
    "mde_paired",
    "paired_bootstrap",
    "paired_score_interval",
    "power_curve",
    "power_inside",
    "power_mcnemar",
    "retention_warning",
    "rows_for_inside",
    "rows_needed",
    "sign_flip_test",
    "slope_through_origin",
    "smallest_significant",
    "verdict",
    "wilson",
]
