"""Perplexity and KL divergence on a text, by the definitions of llama-perplexity (llama.cpp, tools/perplexity).

The text is cut into windows of n_ctx tokens without overlap; in each window the tokens of the second half are
predicted (positions n_ctx/2 … n_ctx - 2 give the tokens n_ctx/2 + 1 … n_ctx - 1), so that every prediction has seen at
least half a window. No begin-of-text token is put before a window (Qwen models have none). The reference's
log-probabilities are rounded to 65,536 steps between a position's maximum and 16 nats below it, and KL divergence sums
over tokens whose reference log-probability is above -16, both as llama-perplexity does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lib.errors import InputError
from lib.progress import Progress
from lib.run.files import require_space
from lib.scoring.backend import Backend
from lib.scoring.divergence import KlTable, Perplexity, Positions, perplexity_of, table_of

__all__ = [
    "KlTable",
    "Perplexity",
    "Reference",
    "kl_table",
    "open_reference",
    "perplexity",
    "positions",
    "store_reference",
    "text_windows",
]

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
