"""Perplexity and KL divergence on a text, by the definitions of llama-perplexity (llama.cpp, tools/perplexity).

The text is cut into windows of n_ctx tokens without overlap; in each window the tokens of the second half are
predicted (positions n_ctx/2 … n_ctx - 2 give the tokens n_ctx/2 + 1 … n_ctx - 1), so that every prediction has seen at
least half a window. No begin-of-text token is put before a window (Qwen models have none). The reference's
log-probabilities are rounded to 65,536 steps between a position's maximum and 16 nats below it, and KL divergence sums
over tokens whose reference log-probability is above -16, both as llama-perplexity does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.errors import InputError
from lib.progress import Progress
from lib.run.files import require_space
from lib.scoring.backend import Backend

_RANGE = 16.0  # nats below a position's maximum that are kept
_STEPS = 65535


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
        mean, uncertainty, median, p90, p95, p99, p999, max: KL(reference ‖ model) a position, nats.
        mean_dp, rms_dp: mean and root mean square of p_model - p_reference of the true token, fractions.
        same_top: share of positions where both have the same likeliest token.
        ppl, ppl_reference: perplexities.
        ppl_ratio, ln_ppl_ratio: model over reference, and its logarithm; the standard errors count their covariance.
    """

    n_tokens: int
    mean: float
    uncertainty: float
    median: float
    p90: float
    p95: float
    p99: float
    p999: float
    max: float
    mean_dp: float
    mean_dp_uncertainty: float
    rms_dp: float
    rms_dp_uncertainty: float
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


class Reference:
    """The reference's log-probabilities for some windows, kept in a file; the same for every model compared with it.

    Use as a context manager: the file is removed at the end.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.path = path
        self._steps = np.memmap(path, dtype=np.uint16, mode="w+", shape=shape)
        self._scale = np.zeros((*shape[:2], 2), dtype=np.float32)

    def put(self, window: int, log_probs: np.ndarray) -> None:
        """Keep one window's (positions, V) log-probabilities."""
        self._steps[window], self._scale[window] = _round(log_probs)

    def get(self, window: int) -> np.ndarray:
        """One window's log-probabilities, rounded, float32, (positions, V)."""
        return _unround(self._steps[window], self._scale[window])

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *_: object) -> None:
        del self._steps
        self.path.unlink(missing_ok=True)


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
    positions = len(windows[0]) - 1 - len(windows[0]) // 2
    shape = (len(windows), positions, backend.vocab_size)
    require_space(path.parent, 2 * int(np.prod(shape)), "the reference's log-probabilities")
    reference = Reference(path, shape)
    with Progress(what, len(windows)) as progress:
        for i, window in enumerate(windows):
            reference.put(i, _log_probs(backend, window))
            progress.advance()
    return reference


def perplexity(backend: Backend, windows: Sequence[list[int]], what: str = "perplexity") -> Perplexity:
    """Perplexity of a model on the windows of a text."""
    losses = []
    with Progress(what, len(windows)) as progress:
        for window in windows:
            losses.append(-_of_tokens(_log_probs(backend, window), _targets(window)))
            progress.advance()
    values = np.concatenate(losses)
    mean, error = _mean(values)
    return Perplexity(float(np.exp(mean)), float(np.exp(mean) * error), len(values), len(windows))


def kl_table(
    reference: Backend | Reference, other: Backend, windows: Sequence[list[int]], what: str = "KL divergence"
) -> KlTable:
    """Compare a model's next-token distributions with the reference's.

    Args:
        reference: `store_reference` of the same windows, or a second open model.
        other: the model to judge.
    """
    columns: list[np.ndarray] = []
    with Progress(what, len(windows)) as progress:
        for window, base in zip(windows, _reference_windows(reference, windows), strict=True):
            mine, targets = _log_probs(other, window), _targets(window)
            if base.shape != mine.shape:
                raise InputError(
                    f"a reference of {base.shape[1]} tokens and a model of {mine.shape[1]}.",
                    "models with one vocabulary.",
                    "compare files made from the same model.",
                )
            same = base.argmax(axis=1) == mine.argmax(axis=1)
            columns.append(np.stack([_kl(base, mine), _of_tokens(base, targets), _of_tokens(mine, targets), same]))
            progress.advance()
    return _table(*np.concatenate(columns, axis=1))


def _table(kl: np.ndarray, base: np.ndarray, mine: np.ndarray, same: np.ndarray) -> KlTable:
    """The table from one value a position: KL divergence, the true token's log-probabilities, same top token."""
    (loss, loss_error), (base_loss, base_error) = _mean(-mine), _mean(-base)
    n = len(kl)
    covariance = (np.mean(mine * base) - mine.mean() * base.mean()) / (n - 1) if n >= 10 else 0.0
    ratio_error = float(np.sqrt(max(0.0, loss_error**2 + base_error**2 - 2 * covariance)))
    ratio = float(np.exp(loss - base_loss))
    dp = np.exp(mine) - np.exp(base)
    mean, error = _mean(kl)
    mean_dp, dp_error = _mean(dp)
    square, square_error = _mean(dp**2)
    rms, top = float(np.sqrt(square)), float(same.mean())
    p90, p95, p99, p999 = (float(q) for q in np.quantile(kl, [0.9, 0.95, 0.99, 0.999]))
    return KlTable(
        n_tokens=n,
        mean=mean,
        uncertainty=error,
        median=float(np.median(kl)),
        p90=p90,
        p95=p95,
        p99=p99,
        p999=p999,
        max=float(kl.max()),
        mean_dp=mean_dp,
        mean_dp_uncertainty=dp_error,
        rms_dp=rms,
        rms_dp_uncertainty=0.5 / rms * square_error if rms else 0.0,
        same_top=top,
        same_top_uncertainty=float(np.sqrt(top * (1 - top) / max(1, n - 1))),
        ppl=float(np.exp(loss)),
        ppl_uncertainty=float(np.exp(loss) * loss_error),
        ppl_reference=float(np.exp(base_loss)),
        ppl_reference_uncertainty=float(np.exp(base_loss) * base_error),
        ppl_ratio=ratio,
        ppl_ratio_uncertainty=ratio * ratio_error,
        ln_ppl_ratio=loss - base_loss,
        ln_ppl_ratio_uncertainty=ratio_error,
    )


def _reference_windows(reference: Backend | Reference, windows: Sequence[list[int]]) -> Iterator[np.ndarray]:
    for i, window in enumerate(windows):
        if isinstance(reference, Reference):
            yield reference.get(i)
        else:
            yield _unround(*_round(_log_probs(reference, window)))


def _log_probs(backend: Backend, window: list[int]) -> np.ndarray:
    """Log-probabilities of the scored positions of a window, float32, (positions, V)."""
    log_probs = backend.window_log_probs(window, len(window) // 2)[:-1]
    if not np.isfinite(log_probs).all():
        raise InputError(
            f"{backend.name} gives log-probabilities that are not numbers.",
            "finite log-probabilities.",
            "check the model's weights for NaN or infinity.",
        )
    return log_probs


def _targets(window: list[int]) -> np.ndarray:
    return np.array(window[len(window) // 2 + 1 :])


def _of_tokens(log_probs: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return log_probs[np.arange(len(tokens)), tokens].astype(np.float64)


def _kl(base: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(base ‖ other) of each position, nats, over tokens whose base log-probability is above -16."""
    counted = base > -_RANGE
    return np.sum(np.where(counted, np.exp(base) * (base - other), 0.0), axis=1, dtype=np.float64)


def _round(log_probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps 0 … 65535 between the maximum and 16 nats below it, and each position's (step size, lowest value)."""
    top = log_probs.max(axis=1, keepdims=True)
    low = np.maximum(log_probs.min(axis=1, keepdims=True), top - np.float32(_RANGE))
    size = (top - low) / np.float32(_STEPS)
    inverse = np.divide(1, size, where=size > 0, out=np.zeros_like(size))
    steps = np.rint(np.maximum(log_probs - low, 0) * inverse).astype(np.uint16)
    return steps, np.concatenate([size, low], axis=1)


def _unround(steps: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return steps * scale[:, :1] + scale[:, 1:]


def _mean(values: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error, √((E[x²] - E[x]²) / (n - 1)); the error of ten values or fewer is given as 0."""
    mean = float(np.mean(values, dtype=np.float64))
    variance = float(np.mean(np.square(values, dtype=np.float64))) - mean * mean
    n = len(values)
    return mean, float(np.sqrt(variance / (n - 1))) if variance > 0 and n > 10 else 0.0
