"""How much of what fine-tuning changed a file keeps: the slope of one change on another, through the origin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lib.statistics.intervals import Interval
from lib.statistics.ratios import weighted_mean

KEEPS_LITTLE = 0.9
"""Retention below which a file is named in warnings: losing a tenth of the training is more than rounding noise."""


def slope_through_origin(
    whole: np.ndarray, kept: np.ndarray, groups: Sequence[Any] | np.ndarray, confidence: float = 0.95
) -> Interval:
    """The b that fits kept = b · whole best, Σ⟨whole, kept⟩ / Σ⟨whole, whole⟩ over rows, with an interval.

    It is a ratio of two sums over rows, a mean of the rows' own slopes weighted by ⟨whole, whole⟩, so its standard
    error is the linearized one of `clustered_mean` (Cochran 1977, §6.4), which for this slope is the sandwich of
    Liang & Zeger (1986) with whole groups and the factor groups / (groups - 1); Student's t with groups - 1 degrees.

    `whole` is taken as exact. Noise in `kept` alone does not move the slope; noise in `whole` of share s of Σ whole²
    would draw it to 1 / (1 + s) of itself, noise that both share (they are changes from the same base) to
    (slope + s) / (1 + s): both by less than s. The caller measures s and refuses where it is not small.

    Args:
        whole, kept: (n,) or (n, d) changes from the same start, the same unit.
        groups: (n,) near-duplicate cluster of each row.

    Returns:
        The slope; infinite limits where fewer than three groups moved, or where all agree.

    Raises:
        ValueError: shapes that differ, or nothing moved.
    """
    x, y = (np.asarray(values, dtype=np.float64) for values in (whole, kept))
    if x.shape != y.shape or len(x) != len(groups):
        raise ValueError(f"changes of shape {x.shape} and {y.shape} for {len(groups)} rows")
    x, y = x.reshape(len(x), -1), y.reshape(len(y), -1)
    size = np.sum(x * x, axis=1)
    moved = size > 0
    if not moved.any():
        raise ValueError("nothing moved: no slope")
    own = np.sum(x * y, axis=1)[moved] / size[moved]
    return weighted_mean(own, size[moved], np.asarray(groups)[moved], confidence)


def kept_words(entry: Mapping[str, Any]) -> str | None:
    """Retention of an entry of comparison.json as "0.28 [0.25, 0.31]"; None where it is unknown."""
    value, limits = entry.get("retention"), entry.get("retention_interval")
    if value is None:
        return None
    return f"{value:.2f}" + (f" [{limits[0]:.2f},\u00a0{limits[1]:.2f}]" if limits else "")


def keeps_little(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of comparison.json keeps less than `KEEPS_LITTLE` by estimate, and surely not all: its interval,
    which may hold `KEEPS_LITTLE`, is below 1. Where there is none, the estimate alone decides."""
    value, limits = entry.get("retention"), entry.get("retention_interval")
    return value is not None and value < KEEPS_LITTLE and (not limits or limits[1] < 1)


def retention_warning(*entries: Mapping[str, Any]) -> str:
    """One warning on those of the files that keep little; empty where none does."""
    poor = [f"{entry['type']} keeps only {kept_words(entry)}" for entry in entries if keeps_little(entry)]
    if not poor:
        return ""
    said = poor[0] if len(poor) == 1 else ", ".join(poor[:-1]) + f" and {poor[-1]}"
    return f"Warning: {said} of what fine-tuning changed on these rows (1 = all of it, 0 = the base again)."
