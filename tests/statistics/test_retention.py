"""The slope of what a file keeps: against numpy's least squares and a cluster-robust sandwich; its coverage; words."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import t

from lib.statistics.losses import (
    KEEPS_LITTLE,
    keeps_little,
    kept_words,
    retention_warning,
    slope_through_origin,
    warns_of,
)


def sandwich(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """Slope and cluster-robust standard error (X'X)⁻¹ Σ X_g'e_g e_g'X_g (X'X)⁻¹ · G / (G - 1), written out."""
    slope = float(np.linalg.lstsq(x.reshape(-1, 1), y.reshape(-1), rcond=None)[0][0])
    residual, meat = y - slope * x, 0.0
    names = list(dict.fromkeys(groups.tolist()))
    for name in names:
        own = groups == name
        meat += float((x[own] * residual[own]).sum()) ** 2
    return slope, math.sqrt(meat * len(names) / (len(names) - 1)) / float((x * x).sum())


@pytest.mark.parametrize("shape", [(60,), (60, 3)])
def test_least_squares_and_the_clustered_sandwich(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal(shape)
    y = 0.4 * x + 0.3 * rng.standard_normal(shape)
    x[:2] = 0  # rows that did not move say nothing
    groups = rng.integers(0, 20, 60)
    groups[:2] = 99
    found = slope_through_origin(x, y, groups)
    slope, error = sandwich(x[2:], y[2:], groups[2:])
    assert found.estimate == pytest.approx(slope, rel=1e-12)
    half = t.ppf(0.975, len(set(groups[2:].tolist())) - 1) * error
    assert (found.low, found.high) == pytest.approx((slope - half, slope + half), rel=1e-9)


def test_ends_and_refusals() -> None:
    x = np.random.default_rng(0).standard_normal(40)
    rows = np.arange(40)
    assert slope_through_origin(x, x, rows).estimate == pytest.approx(1.0)
    assert slope_through_origin(x, 0 * x, rows).estimate == 0.0
    assert math.isinf(slope_through_origin(x, 0.5 * x + 0.1 * x**2, rows % 2).high)  # two groups: no interval
    with pytest.raises(ValueError, match="nothing moved"):
        slope_through_origin(0 * x, x, rows)
    with pytest.raises(ValueError, match="shape"):
        slope_through_origin(x, x[:-1], rows)


@pytest.mark.parametrize(("sizes", "least"), [(1, 0.93), (4, 0.91)])
def test_coverage_where_rows_come_in_groups(sizes: int, least: float) -> None:
    """95 % intervals hold the slope that many rows give, with errors that grow with the change, as rounding makes."""
    rng, hits, tries, groups = np.random.default_rng(7), 0, 500, 60
    for _ in range(tries):
        common = np.repeat(rng.standard_normal(groups), sizes)
        n = groups * sizes
        x = 3 * np.sign(common) + common + 0.3 * rng.standard_normal(n)
        wrong = np.repeat(rng.standard_normal(groups), sizes)  # near copies err together
        y = 0.3 * x + (0.3 + 0.2 * np.abs(x)) * wrong
        found = slope_through_origin(x, y, np.repeat(np.arange(groups), sizes))
        hits += found.low <= 0.3 <= found.high
    assert least <= hits / tries <= 0.985


def test_noise_moves_a_slope_by_less_than_its_share() -> None:
    """What the docstring says of noise in the change itself, and of noise that both changes share."""
    rng = np.random.default_rng(1)
    x, noise, rows = 3 * rng.standard_normal(200_000), 0.6 * rng.standard_normal(200_000), np.arange(200_000) % 999
    share, slope = 0.04, 0.3
    alone = slope_through_origin(x + noise, slope * x, rows).estimate
    both = slope_through_origin(x + noise, slope * x + noise, rows).estimate
    assert alone == pytest.approx(slope / (1 + share), abs=0.003)
    assert both == pytest.approx((slope + share) / (1 + share), abs=0.003)
    assert abs(alone - slope) < share and abs(both - slope) < share


def test_words() -> None:
    entry = {"type": "Q5_K_M", "retention": 0.281, "retention_interval": [0.25, 0.312]}
    assert kept_words(entry) == "0.28 [0.25,\u00a00.31]"
    kept = {**entry, "type": "Q8_0", "retention": 0.95}
    both = retention_warning(entry, {**entry, "type": "Q2_K"}, kept)
    assert "Q5_K_M keeps only 0.28 [0.25,\u00a00.31] of what" in both and both.endswith("too, in Q2_K (0.28).")
    assert warns_of(both, entry) and warns_of(both, {"type": "Q2_K"}) and not warns_of(both, {"type": "K_M"})
    assert not warns_of(both, kept) and both.count("Warning") == 1
    assert keeps_little(entry) and "Q5_K_M keeps only 0.28 [0.25,\u00a00.31] of what" in retention_warning(entry)
    assert kept_words({"retention": 1.0, "retention_interval": None}) == "1.00"
    assert kept_words({}) is None and kept_words({"retention": None}) is None and retention_warning({}) == ""
    assert retention_warning({**entry, "retention": KEEPS_LITTLE, "retention_interval": [0.8, 0.95]}) == ""
    assert not keeps_little({**entry, "retention_interval": [-0.4, 1.1]})  # these rows do not show a loss
