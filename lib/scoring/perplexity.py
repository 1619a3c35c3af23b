"""Perplexity and KL divergence by the definitions of llama-perplexity (llama.cpp, tools/perplexity), on a text and at
answers: one value a scored position, and the numbers that the tool prints of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lib.errors import refusal
from lib.progress import Progress
from lib.runs.files import require_space
from lib.scoring.backend import Backend, Job

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
        log_p_exact: the reference's log-probability of the true token before it was rounded; None where not known.
    """

    log_p: np.ndarray
    log_p_reference: np.ndarray | None = None
    kl: np.ndarray | None = None
    same: np.ndarray | None = None
    log_p_exact: np.ndarray | None = None


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


def table_of(positions: Positions) -> dict[str, float]:
    """What the tool prints, under the names of `workbook perplexity`; every `…_uncertainty` is one standard error.

    Returns:
        n_tokens, ppl and ppl_uncertainty (exp of the mean negative log-likelihood; its error by the delta method). With
        a reference also kld_mean, kld_uncertainty and kld_min to kld_max: KL(reference ‖ model) a position, nats, and
        its percentiles (p001 and p999 are 0.1 % and 99.9 %); mean_dp, rms_dp and dp_min to dp_max: mean, root mean
        square and percentiles of p_model - p_reference of the true token, fractions; same_top: share of positions where
        both have the same likeliest token; ppl_reference, ppl_ratio, ln_ppl_ratio, ppl_difference (model over
        reference, its logarithm, model minus reference; the errors count their covariance); ppl_correlation of the two
        log-perplexities (0 where one of them has no variance). These are the tool's own: what it stores of a reference
        ends 16 nats below the likeliest token, so that its perplexity is too low where rarer tokens came. Where the
        reference's own values are known, ppl_reference_exact and ppl_ratio_exact are free of that.
    """
    n = len(positions.log_p)
    if positions.kl is None:
        loss, error = mean_and_error(-positions.log_p)
        return {"n_tokens": n, "ppl": float(np.exp(loss)), "ppl_uncertainty": float(np.exp(loss) * error)}
    # The tool sums in 32 bits when it compares and in 64 when it does not; so is the perplexity here.
    mine, base = positions.log_p.astype(np.float32), positions.log_p_reference.astype(np.float32)
    dp = np.exp(positions.log_p).astype(np.float32) - np.exp(positions.log_p_reference).astype(np.float32)
    mean, error = mean_and_error(positions.kl)
    mean_dp, dp_error = mean_and_error(dp)
    square, square_error = mean_and_error(np.square(dp).astype(np.float64))
    rms, top = float(np.sqrt(square)), float(positions.same.mean())
    exact = {}
    if positions.log_p_exact is not None:
        true = float(np.mean(positions.log_p_exact))
        ratio = math.exp(true - float(np.mean(positions.log_p)))
        exact = {"ppl_reference_exact": math.exp(-true), "ppl_ratio_exact": ratio}
    fractions = (0.001, 0.01, 0.05, 0.1, 0.9, 0.95, 0.99, 0.999)
    kld, changes = percentiles(positions.kl, fractions), percentiles(dp, (*fractions, 0.25, 0.75))
    return {
        "n_tokens": n,
        "kld_mean": mean,
        "kld_uncertainty": error,
        **{f"kld_{name}": value for name, value in kld.items()},
        "mean_dp": mean_dp,
        "mean_dp_uncertainty": dp_error,
        "rms_dp": rms,
        "rms_dp_uncertainty": 0.5 / rms * square_error if rms else 0.0,
        **{f"dp_{name}": value for name, value in changes.items()},
        "same_top": top,
        "same_top_uncertainty": float(np.sqrt(top * (1 - top) / max(1, n - 1))),
        **_perplexities(mine, base),
        **exact,
    }


def _perplexities(mine: np.ndarray, base: np.ndarray) -> dict[str, float]:
    """Both perplexities, their ratio and difference, with standard errors; products in 32 bits, sums in 64."""
    (loss, error), (base_loss, base_error) = mean_and_error(-mine), mean_and_error(-base)
    n = len(mine)
    together = float(np.mean(mine * base, dtype=np.float64)) - loss * base_loss
    covariance = together / (n - 1) if n >= 10 else 0.0
    ratio_error = float(np.sqrt(max(0.0, error**2 + base_error**2 - 2 * covariance)))
    ppl, base_ppl, ratio = (float(np.exp(x)) for x in (loss, base_loss, loss - base_loss))
    spread = (ppl * error) ** 2 + (base_ppl * base_error) ** 2 - 2 * ppl * base_ppl * covariance
    numbers = {
        "ppl": (ppl, ppl * error),
        "ppl_reference": (base_ppl, base_ppl * base_error),
        "ppl_ratio": (ratio, ratio * ratio_error),
        "ln_ppl_ratio": (loss - base_loss, ratio_error),
        "ppl_difference": (ppl - base_ppl, float(np.sqrt(max(0.0, spread)))),
    }
    found = {f"{name}{end}": pair[i] for name, pair in numbers.items() for i, end in enumerate(("", "_uncertainty"))}
    return {**found, "ppl_correlation": covariance / (error * base_error) if error and base_error else 0.0}


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
        digits = f"{fraction:.3f}"[2:]
        result["p" + (digits[:2] if digits.endswith("0") else digits)] = float(value)
    return result


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

Asked = Sequence[list[int]] | Sequence[Job]
"""What is scored: windows of a text; or jobs, at their reads, where answers of rows are predicted, so that divergences
on text and at answers can stand side by side (llama.cpp only)."""

_RANGE = 16.0  # nats below a position's maximum that are kept
_STEPS = 65535

_TOGETHER = 128
"""Positions whose distributions are compared together: a long answer's whole vocabularies would fill gigabytes."""


class Reference:
    """The reference's log-probabilities at some positions, kept in a file; the same for every model compared with it.

    Use as a context manager: the file is removed at the end.

    Args:
        path: the file: steps (uint16) of each position, then step size and lowest value of each (float32).
        write: make the file; else it is read as another process made it.
    """

    def __init__(self, path: Path, n_positions: int, vocab_size: int, write: bool = True) -> None:
        self.path, steps = path, 2 * n_positions * vocab_size
        self._steps = np.memmap(path, np.uint16, "w+" if write else "r", shape=(n_positions, vocab_size))
        self._scale = np.memmap(path, np.float32, "r+" if write else "r", offset=steps, shape=(n_positions, 2))
        self._log_p = np.empty(0)

    def put(self, logits: np.ndarray, targets: np.ndarray) -> None:
        """Keep the logits of further positions, (positions, V), rounded; `targets`: the tokens that came."""
        place = slice(len(self._log_p), len(self._log_p) + len(targets))
        self._steps[place], self._scale[place] = _round(logits)
        self._log_p = np.append(self._log_p, _of_tokens(logits, targets))

    def compare(self, first: int, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """`_compare` of a model's logits with what is kept of the positions from `first` on.

        Raises:
            InputError: the model has another vocabulary.
        """
        parts = []
        for start in range(0, len(targets), _TOGETHER):
            part = slice(start, start + _TOGETHER)
            place = slice(first + start, first + min(start + _TOGETHER, len(targets)))
            base = _unround(self._steps[place], self._scale[place])
            parts.append(_compare(base, logits[part], targets[part]))
        return np.concatenate(parts, axis=1)

    @property
    def perplexity(self) -> dict[str, float]:
        """`table_of` the model whose logits were put, before they were rounded."""
        return table_of(Positions(self._log_p))

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
    n_positions = sum(len(_targets(window)) for window in windows)
    if path.stat().st_size != 2 * n_positions * (vocab_size + 4):
        raise refusal("scoring/other-reference", vocab_size=vocab_size, count=len(windows))
    return Reference(path, n_positions, vocab_size, write=False)


def text_windows(ids: Sequence[int], n_ctx: int, max_tokens: int) -> list[list[int]]:
    """Windows of `n_ctx` tokens from the beginning of a text, at most `max_tokens` tokens together.

    Raises:
        InputError: the text is shorter than one window.
    """
    count = min(len(ids), max_tokens) // n_ctx
    if count < 1:
        raise refusal("scoring/short-held-out-text", count=min(len(ids), max_tokens), n_ctx=n_ctx)
    return [list(ids[i * n_ctx : (i + 1) * n_ctx]) for i in range(count)]


def scored_tokens(values: np.ndarray, windows: Sequence[list[int]]) -> np.ndarray:
    """Of one value a token of the text those of the scored positions' tokens, in the order of `positions`."""
    size = len(windows[0])
    return values[: size * len(windows)].reshape(len(windows), size)[:, size // 2 + 1 :].ravel()


def answer_jobs(rows: Sequence[Mapping[str, Any]]) -> list[Job]:
    """What to run and read of rows with "ids", "positions" (that predict an answer's tokens) and "targets" (these)."""
    jobs = []
    for number, row in enumerate(rows):
        reads = [(0, *read) for read in zip(row["positions"], row["targets"], strict=True)]
        jobs.append(Job(number, row["ids"], row["positions"][0], tuple(reads)))
    return jobs


def store_reference(backend: Backend, asked: Asked, path: Path, what: str) -> Reference:
    """Compute and keep the reference's log-probabilities.

    Args:
        path: a file to make, 2 bytes a position and vocabulary entry.
        what: the work in words for the progress line.
    """
    n_positions = sum(len(_targets(one)) for one in asked)
    where = " at answers" if isinstance(asked[0], Job) else ""
    require_space(path.parent, 2 * n_positions * backend.vocab_size, f"the reference's log-probabilities{where}")
    reference = Reference(path, n_positions, backend.vocab_size)
    for logits, targets in _scored(backend, asked, what):
        reference.put(logits, targets)
    return reference


def positions(reference: Backend | Reference | None, other: Backend, asked: Asked, what: str) -> Positions:
    """One value a scored position, window after window or job after job.

    Args:
        reference: `store_reference` of the same, or (for windows) a second open model; None = `other` alone.
        other: the model to judge.
        what: the work in words for the progress line.

    Raises:
        InputError: the two have different vocabularies, or log-probabilities that are not numbers.
    """
    columns: list[np.ndarray] = []
    first = 0
    for one, (mine, targets) in zip(asked, _scored(other, asked, what), strict=True):
        if reference is None:
            columns.append(_of_tokens(mine, targets)[None])
        elif isinstance(reference, Reference):
            columns.append(reference.compare(first, mine, targets))
        else:
            own = _logits(reference, one)
            columns.append(np.vstack([_compare(_unround(*_round(own)), mine, targets), _of_tokens(own, targets)]))
        first += len(targets)
    return Positions(*np.concatenate(columns, axis=1))


def _scored(backend: Backend, asked: Asked, what: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Logits of the scored positions, and the tokens that came, window after window or job after job."""
    jobs = isinstance(asked[0], Job)
    found = (read[1] for read in backend.read_logits(asked)) if jobs else (_logits(backend, one) for one in asked)
    with Progress(what, len(asked)) as progress:
        for one, logits in zip(asked, found, strict=True):
            yield logits, _targets(one)
            progress.advance()


# How distributions are compared, every step in the tool's own precision.


def _compare(base: np.ndarray, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The four rows of `Positions` for some positions, (4, positions), every step in 32 bits as the tool has it.

    Args:
        base: the reference's log-probabilities, rounded; logits: the model's; targets: the tokens that came.
    """
    if base.shape != logits.shape:
        raise refusal("scoring/two-vocabularies", base=base, logits=logits)
    rows = np.arange(len(targets))
    top, total = _normalizer(logits)
    end = top + total.astype(np.float32)
    counted = base > -_RANGE
    with np.errstate(invalid="ignore"):  # what is not counted may be -inf minus -inf
        terms = np.where(counted, _exp(base) * (base - logits + end[:, None]), np.float32(0))
    same = base.argmax(axis=1) == logits.argmax(axis=1)
    return np.stack([logits[rows, targets] - end, base[rows, targets], terms.sum(axis=1, dtype=np.float64), same])


def _targets(one: list[int] | Job) -> np.ndarray:
    """The tokens that the scored positions of a window or job predict, (positions,)."""
    return np.array([token for _, _, token in one.reads] if isinstance(one, Job) else one[len(one) // 2 + 1 :])


def _logits(backend: Backend, window: list[int]) -> np.ndarray:
    """Logits of the scored positions of a window, float32, (positions, V), up to a constant a position.

    Raw ones: subtracting the normalizer first would cost the last digits.
    """
    logits = backend.window_logits(window, len(window) // 2)[:-1]
    if not np.isfinite(logits).all():
        raise refusal("scoring/window-not-numbers", backend=backend)
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
