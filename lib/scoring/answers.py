"""How likely a model finds given answers: the log-probability of every token that the loss of training counts.

Rows are whole conversations as token ids with the spans of their answers; the same ids for every backend.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.errors import InputError
from lib.progress import Progress
from lib.run.files import read_jsonl, write_jsonl
from lib.scoring.backend import Job, check_ids
from lib.statistics import Interval, paired_bootstrap

if TYPE_CHECKING:
    from lib.scoring.llama import LlamaCppBackend
    from lib.scoring.torch_backend import TransformersBackend

Span = Sequence[int]
_OUTPUTS = 128
"""Most positions whose logits llama.cpp keeps at once (see `lib.scoring.llama`)."""

_TOKENS = 8192
"""Most tokens of a forward pass with transformers, padding included."""


@dataclass(frozen=True)
class AnswerScores:
    """What one model says about the answers of n rows.

    Attributes:
        ids: the rows' ids, in the rows' order.
        log_probs: sum of log p of the answers' tokens, nats, float64, (n,).
        tokens: number of those tokens, int64, (n,).
        seconds: time of the forward passes together.
    """

    ids: list[str]
    log_probs: np.ndarray
    tokens: np.ndarray
    seconds: float

    @property
    def loss(self) -> float:
        """Mean cross-entropy, nats a token of the answers."""
        return float(-self.log_probs.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return float(np.exp(self.loss))

    @property
    def row_losses(self) -> np.ndarray:
        """Mean cross-entropy of each row, nats a token, (n,)."""
        return -self.log_probs / self.tokens

    @property
    def seconds_per_sample(self) -> float:
        """Mean time a row."""
        return self.seconds / max(1, len(self.ids))

    def interval(self, groups: np.ndarray, seed: int) -> Interval:
        """The loss with a bootstrap interval over groups of rows."""
        return paired_bootstrap(self.row_losses, groups, seed, weights=self.tokens)

    def subset(self, mask: np.ndarray) -> AnswerScores:
        """The rows of a boolean mask."""
        ids = [name for name, keep in zip(self.ids, mask, strict=True) if keep]
        return AnswerScores(ids, self.log_probs[mask], self.tokens[mask], self.seconds * float(mask.mean()))

    def save(self, path: Path) -> None:
        """Write one JSON object a row, atomically; floats in full precision."""
        columns = (self.ids, self.log_probs.tolist(), self.tokens.tolist())
        rows = [
            {"id": name, "log_prob": value, "tokens": count, "seconds": self.seconds_per_sample}
            for name, value, count in zip(*columns, strict=True)
        ]
        write_jsonl(path, rows)

    @classmethod
    def load(cls, path: Path) -> AnswerScores:
        """The reverse of `save`."""
        rows = read_jsonl(path)
        return cls(
            ids=[row["id"] for row in rows],
            log_probs=np.array([row["log_prob"] for row in rows], dtype=np.float64),
            tokens=np.array([row["tokens"] for row in rows], dtype=np.int64),
            seconds=float(sum(row["seconds"] for row in rows)),
        )


def score_answers(
    backend: Any, names: Sequence[str], rows: Sequence[list[int]], spans: Sequence[Sequence[Span]], what: str
) -> AnswerScores:
    """Score the answers of rows with either backend.

    Args:
        names: the rows' ids.
        rows: token ids of the whole conversations.
        spans: (first, behind the last) position of every answer of each row; the first token of a row cannot be in one.
        what: the work in words for the progress line.

    Raises:
        InputError: no rows, ids that the model has not, or log-probabilities that are not numbers.
    """
    if not rows:
        raise InputError("no rows to score.", "at least one row.", "check the data and max_eval_rows.")
    started = time.perf_counter()
    with Progress(what, len(rows)) as progress:
        values = token_log_probs(backend, rows, spans, progress)
    seconds = time.perf_counter() - started
    sums = np.array([value.sum() for value in values])
    broken = np.flatnonzero(~np.isfinite(sums))
    if broken.size:
        raise InputError(
            f"{backend.name} gives log-probabilities that are not numbers ({broken.size} of {len(rows)} rows).",
            "finite log-probabilities.",
            "check the model's weights for NaN or infinity, and do not compute in float16.",
        )
    return AnswerScores(list(names), sums, np.array([len(value) for value in values], dtype=np.int64), seconds)


def token_log_probs(
    backend: Any, rows: Sequence[list[int]], spans: Sequence[Sequence[Span]], progress: Progress | None = None
) -> list[np.ndarray]:
    """log p of every token inside the spans, given all tokens before it; one vector a row, float64."""
    jobs = []
    for i, (ids, row_spans) in enumerate(zip(rows, spans, strict=True)):
        places = [place for start, stop in row_spans for place in range(start, stop)]
        reads = tuple((0, place - 1, ids[place]) for place in places)
        jobs.append(Job(i, list(ids[: places[-1]]), places[0] - 1, reads))
    jobs.sort(key=lambda job: len(job.ids))
    check_ids(rows, backend.vocab_size, None, backend.name)
    run = _with_torch if hasattr(backend, "model") else _with_llama
    found: list[np.ndarray] = [np.empty(0)] * len(jobs)
    for job, values in run(backend, jobs):
        found[job.prompt] = values
        if progress is not None:
            progress.advance()
    return found


def _with_torch(backend: TransformersBackend, jobs: Sequence[Job]) -> Iterator[tuple[Job, np.ndarray]]:
    """Batches of like length; long rows make small batches."""
    batch: list[Job] = []
    for job in [*jobs, None]:
        full = len(batch) == backend.batch_size
        if batch and (job is None or full or (len(batch) + 1) * len(job.ids) > _TOKENS):
            yield from zip(batch, backend._run(batch), strict=True)
            batch = []
        if job is not None:
            batch.append(job)


def _with_llama(backend: LlamaCppBackend, jobs: Sequence[Job]) -> Iterator[tuple[Job, np.ndarray]]:
    """One row after another: first what needs no logits, then pieces of as many positions as llama.cpp keeps."""
    check_ids([job.ids for job in jobs], backend.vocab_size, backend.n_ctx, backend.name)
    for job in jobs:
        backend._api.llama_memory_clear(backend._memory, True)
        backend._decode([(token, place, (0,), False) for place, token in enumerate(job.ids[: job.start])])
        wanted = {place: token for _, place, token in job.reads}
        values = []
        for start in range(job.start, len(job.ids), _OUTPUTS):
            part = list(enumerate(job.ids[start : start + _OUTPUTS], start))
            backend._decode([(token, place, (0,), place in wanted) for place, token in part])
            for i, (place, _) in enumerate(part):
                if place in wanted:
                    logits = backend._logits(i)
                    top = logits.max()
                    values.append(logits[wanted[place]] - top - np.log(np.exp(logits - top).sum()))
        yield job, np.array(values, dtype=np.float64)
