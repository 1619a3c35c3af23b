"""The numbers that llama-perplexity prints, from one value a scored position.
Perplexity and KL divergence on a text, by the definitions of llama-perplexity (llama.cpp, tools/perplexity).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.errors import InputError
from lib.progress import Progress
from lib.runs.files import require_space
from lib.scoring.backend import Backend

# The numbers that llama-perplexity prints, from one value a scored position.
#
# Where the tool computes in 32 bits, so does this, so that every printed digit can be the same.


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


# Perplexity and KL divergence on a text, by the definitions of llama-perplexity (llama.cpp, tools/perplexity).
#
# The text is cut into windows of n_ctx tokens without overlap; in each window the tokens of the second half are
# predicted (positions n_ctx/2 … n_ctx - 2 give the tokens n_ctx/2 + 1 … n_ctx - 1), so that every prediction has seen
# at least half a window. No begin-of-text token is put before a window (Qwen models have none). The reference's log-
# probabilities are rounded to 65,536 steps between a position's maximum and 16 nats below it, and KL divergence sums
# over tokens whose reference log-probability is above -16, both as llama-perplexity does.

_RANGE = 16.0  # nats below a position's maximum that are kept
_STEPS = 65535


class Reference:
    """The reference's log-probabilities for some windows, kept in a file; the same for every model compared with it.

    Use as a context manager: the file is removed at the end.

    Args:
        path: the file: steps (uint16), then step size and lowest value of each position (float32).
        shape: windows, positions a window, vocabulary.
        write: make the file; else it is read as another process made it.

    Raises:
        InputError: the file is of another shape.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], write: bool = True) -> None:
        self.path, scales = path, (*shape[:2], 2)
        steps = 2 * math.prod(shape)
        if not write and path.stat().st_size != steps + 4 * math.prod(scales):
            raise InputError(
                f"a reference whose file is not one of {shape[2]} tokens and {shape[0]} windows.",
                "files with one vocabulary.",
                "compare files that were made from one model.",
            )
        self._steps = np.memmap(path, np.uint16, "w+" if write else "r", shape=shape)
        self._scale = np.memmap(path, np.float32, "r+" if write else "r", offset=steps, shape=scales)
        self._log_p: list[np.ndarray] = []

    def put(self, window: int, logits: np.ndarray, targets: np.ndarray) -> None:
        """Keep one window's (positions, V) logits as rounded log-probabilities; `targets`: the tokens that came."""
        self._steps[window], self._scale[window] = _round(logits)
        self._log_p.append(_of_tokens(logits, targets))

    def get(self, window: int) -> np.ndarray:
        """One window's log-probabilities, rounded, float32, (positions, V)."""
        return _unround(self._steps[window], self._scale[window])

    @property
    def perplexity(self) -> Perplexity:
        """Of the model whose logits were put, before they were rounded."""
        return perplexity_of(Positions(np.concatenate(self._log_p)), len(self._log_p))

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *_: object) -> None:
        del self._steps, self._scale
        self.path.unlink(missing_ok=True)


def open_reference(path: Path, windows: Sequence[list[int]], vocab_size: int) -> Reference:
    """What `store_reference` kept of the same windows, in another process.

    Raises:
        InputError: it was made of a model with another vocabulary, or of other windows.
    """
    return Reference(path, _shape(windows, vocab_size), write=False)


def _shape(windows: Sequence[list[int]], vocab_size: int) -> tuple[int, int, int]:
    return len(windows), len(windows[0]) - 1 - len(windows[0]) // 2, vocab_size


def text_windows(ids: Sequence[int], n_ctx: int, max_tokens: int) -> list[list[int]]:
    """Windows of `n_ctx` tokens from the beginning of a text, at most `max_tokens` tokens together.

    Raises:
        InputError: the text is shorter than one window.
    """
    count = min(len(ids), max_tokens) // n_ctx
    if count < 1:
        raise InputError(
            f"{min(len(ids), max_tokens)} tokens of held-out text.",
            f"at least one window of n_ctx = {n_ctx} tokens.",
            "lower n_ctx, or raise perplexity_tokens or max_eval_rows.",
        )
    return [list(ids[i * n_ctx : (i + 1) * n_ctx]) for i in range(count)]


def store_reference(backend: Backend, windows: Sequence[list[int]], path: Path, what: str) -> Reference:
    """Compute and keep the reference's log-probabilities.

    Args:
        path: a file to make, 2 bytes a position and vocabulary entry.
        what: the work in words for the progress line.
    """
    shape = _shape(windows, backend.vocab_size)
    require_space(path.parent, 2 * math.prod(shape), "the reference's log-probabilities")
    reference = Reference(path, shape)
    with Progress(what, len(windows)) as progress:
        for i, window in enumerate(windows):
            reference.put(i, _logits(backend, window), _targets(window))
            progress.advance()
    return reference


def perplexity(backend: Backend, windows: Sequence[list[int]], what: str = "perplexity") -> Perplexity:
    """Perplexity of a model on the windows of a text."""
    return perplexity_of(positions(None, backend, windows, what), len(windows))


def kl_table(
    reference: Backend | Reference, other: Backend, windows: Sequence[list[int]], what: str = "KL divergence"
) -> KlTable:
    """Compare a model's next-token distributions with the reference's.

    Args:
        reference: `store_reference` of the same windows, or a second open model.
        other: the model to judge.
    """
    return table_of(positions(reference, other, windows, what))


def positions(
    reference: Backend | Reference | None, other: Backend, windows: Sequence[list[int]], what: str
) -> Positions:
    """One value a scored position, (windows × positions a window,), window after window.

    Args:
        reference, other: as for `kl_table`; None = the model alone.
        what: the work in words for the progress line.

    Raises:
        InputError: the two have different vocabularies, or log-probabilities that are not numbers.
    """
    columns: list[np.ndarray] = []
    with Progress(what, len(windows)) as progress:
        for i, window in enumerate(windows):
            mine, targets = _logits(other, window), _targets(window)
            if reference is None:
                columns.append(_of_tokens(mine, targets)[None])
            else:
                base = _reference_window(reference, i, window)
                _check_vocabulary(base, mine)
                columns.append(_compare(base, mine, targets))
            progress.advance()
    return Positions(*np.concatenate(columns, axis=1))


def _compare(base: np.ndarray, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The four rows of `Positions` for one window, (4, positions), every step in 32 bits as the tool has it."""
    rows = np.arange(len(targets))
    top, total = _normalizer(logits)
    end = top + total.astype(np.float32)
    counted = base > -_RANGE
    with np.errstate(invalid="ignore"):  # what is not counted may be -inf minus -inf
        terms = np.where(counted, _exp(base) * (base - logits + end[:, None]), np.float32(0))
    same = base.argmax(axis=1) == logits.argmax(axis=1)
    return np.stack([logits[rows, targets] - end, base[rows, targets], terms.sum(axis=1, dtype=np.float64), same])


def _check_vocabulary(base: np.ndarray, mine: np.ndarray) -> None:
    if base.shape != mine.shape:
        raise InputError(
            f"a reference of {base.shape[1]} tokens and a model of {mine.shape[1]}.",
            "models with one vocabulary.",
            "compare files made from the same model.",
        )


def _reference_window(reference: Backend | Reference, index: int, window: list[int]) -> np.ndarray:
    """The reference's rounded log-probabilities for one window, float32, (positions, V)."""
    if isinstance(reference, Reference):
        return reference.get(index)
    return _unround(*_round(_logits(reference, window)))


def _targets(window: list[int]) -> np.ndarray:
    """The tokens that the scored positions of a window predict, (positions,)."""
    return np.array(window[len(window) // 2 + 1 :])


def _logits(backend: Backend, window: list[int]) -> np.ndarray:
    """Logits of the scored positions of a window, float32, (positions, V), up to a constant a position.

    Raw ones where the backend has them: subtracting the normalizer first would cost the last digits.
    """
    read = getattr(backend, "window_logits", backend.window_log_probs)
    logits = read(window, len(window) // 2)[:-1]
    if not np.isfinite(logits).all():
        raise InputError(
            f"{backend.name} gives log-probabilities that are not numbers.",
            "finite log-probabilities.",
            "check the model's weights for NaN or infinity.",
        )
    return logits


def _normalizer(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Largest logit of each position, float32, and ln Σ exp(logit - largest), float64; (positions,) each."""
    top = logits.max(axis=1)
    return top, np.log(_exp(logits - top[:, None]).sum(axis=1, dtype=np.float64))


def _exp(values: np.ndarray) -> np.ndarray:
    """exp of each value, rounded correctly to float32: numpy's own of 32 bits is off by up to 2 units in the last."""
    result = np.empty_like(values)
    for row, out in zip(values, result, strict=True):
        out[:] = np.exp(row, dtype=np.float64)
    return result


def _of_tokens(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Log-probability of each position's token, float64, (positions,)."""
    top, total = _normalizer(logits)
    return (logits[np.arange(len(tokens)), tokens] - top) - total


def _round(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps 0 … 65535 between the maximum and 16 nats below it, and each position's (step size, lowest value)."""
    top, total = _normalizer(logits)
    low = np.maximum(logits.min(axis=1), top - np.float32(_RANGE))
    size = (top - low) / np.float32(_STEPS)
    inverse = np.divide(np.float32(1), size, where=size > 0, out=np.zeros_like(size))
    steps = np.rint(inverse[:, None] * np.maximum(logits - low[:, None], 0)).astype(np.uint16)
    return steps, np.stack([size, low - top - total.astype(np.float32)], axis=1)


def _unround(steps: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return scale[:, :1] * steps + scale[:, 1:]
