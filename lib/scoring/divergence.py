"""The numbers that llama-perplexity prints, from one value a scored position.

Where the tool computes in 32 bits, so does this, so that every printed digit can be the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Positions:
    """What is known of every scored position of a text; vectors of equal length, in the text's order.

    Attributes:
        log_p: log-probability of the true token, nats.
        log_p_reference: the reference's; None without one.
        kl: KL(reference ‖ model), nats; None without a reference.
        same: whether both have the same likeliest token; None without a reference.
    """

    log_p: np.ndarray
    log_p_reference: np.ndarray | None = None
    kl: np.ndarray | None = None
    same: np.ndarray | None = None


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood; uncertainty: one standard error of it, by the delta method."""

    ppl: float
    uncertainty: float
    n_tokens: int
    n_windows: int


@dataclass(frozen=True)
class KlTable:
    """A model against the reference on the same tokens; every `…_uncertainty` is one standard error.

    Attributes:
        n_tokens: positions compared.
        mean, uncertainty, median, min, p001, p01, p05, p10, p90, p95, p99, p999, max: KL(reference ‖ model) a
            position, nats; p001 and p999 are the 0.1 % and 99.9 % percentiles.
        mean_dp, rms_dp: mean and root mean square of p_model - p_reference of the true token, fractions.
        dp: percentiles of the same, fractions: min, p001, p01, p05, p10, p25, median, p75, p90, p95, p99, p999, max.
        same_top: share of positions where both have the same likeliest token.
        ppl, ppl_reference: perplexities.
        ppl_ratio, ln_ppl_ratio, ppl_difference: model over reference, its logarithm, model minus reference; the
            standard errors count their covariance.
        correlation: of the two log-perplexities; 0 where one of them has no variance.
    """

    n_tokens: int
    mean: float
    uncertainty: float
    median: float
    min: float
    p001: float
    p01: float
    p05: float
    p10: float
    p90: float
    p95: float
    p99: float
    p999: float
    max: float
    mean_dp: float
    mean_dp_uncertainty: float
    rms_dp: float
    rms_dp_uncertainty: float
    dp: dict[str, float]
    same_top: float
    same_top_uncertainty: float
    ppl: float
    ppl_uncertainty: float
    ppl_reference: float
    ppl_reference_uncertainty: float
    ppl_ratio: float
    ppl_ratio_uncertainty: float
    ln_ppl_ratio: float
    ln_ppl_ratio_uncertainty: float
    ppl_difference: float
    ppl_difference_uncertainty: float
    correlation: float


def kl_divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p ‖ q) of each row of two arrays of log-probabilities (…, vocabulary), nats, summed in float64."""
    wide = p.astype(np.float64)
    return np.maximum(np.sum(np.exp(wide) * (wide - q), axis=-1), 0.0)


def normalised(log_probs: np.ndarray) -> np.ndarray:
    """Log-probabilities (…, vocabulary) in float64 whose probabilities add up to 1.

    A log-softmax in float32 leaves an error of about 1e-5 in every sum of a large vocabulary, the same for all tokens;
    it would stand in a KL divergence as such.
    """
    wide = log_probs.astype(np.float64)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def perplexity_of(positions: Positions, n_windows: int) -> Perplexity:
    """Perplexity of the positions' true tokens."""
    mean, error = mean_and_error(-positions.log_p)
    return Perplexity(float(np.exp(mean)), float(np.exp(mean) * error), len(positions.log_p), n_windows)


def table_of(positions: Positions) -> KlTable:
    """The whole table; the positions must have a reference."""
    n = len(positions.log_p)
    mine, base = positions.log_p.astype(np.float32), positions.log_p_reference.astype(np.float32)
    dp = np.exp(positions.log_p).astype(np.float32) - np.exp(positions.log_p_reference).astype(np.float32)
    mean, error = mean_and_error(positions.kl)
    mean_dp, dp_error = mean_and_error(dp)
    square, square_error = mean_and_error(np.square(dp).astype(np.float64))
    rms, top = float(np.sqrt(square)), float(positions.same.mean())
    return KlTable(
        n_tokens=n,
        mean=mean,
        uncertainty=error,
        **percentiles(positions.kl, (0.001, 0.01, 0.05, 0.1, 0.9, 0.95, 0.99, 0.999)),
        mean_dp=mean_dp,
        mean_dp_uncertainty=dp_error,
        rms_dp=rms,
        rms_dp_uncertainty=0.5 / rms * square_error if rms else 0.0,
        dp=percentiles(dp, (0.001, 0.01, 0.05, 0.1, 0.25, 0.75, 0.9, 0.95, 0.99, 0.999)),
        same_top=top,
        same_top_uncertainty=float(np.sqrt(top * (1 - top) / max(1, n - 1))),
        **_perplexities(mine, base),
    )


def _perplexities(mine: np.ndarray, base: np.ndarray) -> dict[str, float]:
    """Both perplexities, their ratio and difference, with standard errors; products in 32 bits, sums in 64."""
    (loss, error), (base_loss, base_error) = mean_and_error(-mine), mean_and_error(-base)
    n = len(mine)
    together = float(np.mean(mine * base, dtype=np.float64)) - loss * base_loss
    covariance = together / (n - 1) if n >= 10 else 0.0
    ratio_error = float(np.sqrt(max(0.0, error**2 + base_error**2 - 2 * covariance)))
    ppl, base_ppl, ratio = (float(np.exp(x)) for x in (loss, base_loss, loss - base_loss))
    spread = (ppl * error) ** 2 + (base_ppl * base_error) ** 2 - 2 * ppl * base_ppl * covariance
    return {
        "ppl": ppl,
        "ppl_uncertainty": ppl * error,
        "ppl_reference": base_ppl,
        "ppl_reference_uncertainty": base_ppl * base_error,
        "ppl_ratio": ratio,
        "ppl_ratio_uncertainty": ratio * ratio_error,
        "ln_ppl_ratio": loss - base_loss,
        "ln_ppl_ratio_uncertainty": ratio_error,
        "ppl_difference": ppl - base_ppl,
        "ppl_difference_uncertainty": float(np.sqrt(max(0.0, spread))),
        "correlation": covariance / (error * base_error) if error and base_error else 0.0,
    }


def percentiles(values: np.ndarray, fractions: tuple[float, ...]) -> dict[str, float]:
    """min, the fractions' percentiles (p999 is 0.999), median and max, in 32-bit arithmetic as the tool has them."""
    ordered = np.sort(values.astype(np.float32))
    last, result = len(ordered) - 1, {"min": float(ordered[0]), "max": float(ordered[-1])}
    result["median"] = float((ordered[last // 2] + ordered[(last + 1) // 2]) * np.float32(0.5))
    for fraction in fractions:
        place = np.float32(fraction) * np.float32(last)
        below = int(place)
        part = place - np.float32(below)
        value = (np.float32(1) - part) * ordered[below] + part * ordered[min(below + 1, last)]
        result[_name(fraction)] = float(value)
    return result


def _name(fraction: float) -> str:
    """0.9 → p90, 0.999 → p999, 0.001 → p001."""
    digits = f"{fraction:.3f}"[2:]
    return "p" + (digits[:2] if digits.endswith("0") else digits)


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error, √((E[x²] - E[x]²) / (n - 1)); the error of ten values or fewer is given as 0."""
    mean = float(np.mean(values, dtype=np.float64))
    variance = float(np.mean(np.square(values), dtype=np.float64)) - mean * mean
    n = len(values)
    return mean, float(np.sqrt(variance / (n - 1))) if variance > 0 and n > 10 else 0.0
