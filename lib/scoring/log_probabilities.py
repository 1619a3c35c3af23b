"""Scores of a set of rows: the log-probability of every answer word for every row.
How likely a model finds given answers: the log-probability of every token that the loss of training counts.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.errors import InputError
from lib.prompts.classification import Task, encode, label_ids
from lib.runs.files import read_jsonl, sha256_json, write_jsonl
from lib.scoring.backend import Backend, Job, check_ids
from lib.scoring.journal import SCORED, Keep, keeping
from lib.statistics.intervals import Interval
from lib.statistics.losses import limits, weighted_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lib.progress import Progress
    from lib.scoring.journal import Journal


# Scores of a set of rows: the log-probability of every answer word for every row.

NEAR_TIE = 0.1
"""Margins below this (nats) can change sign by rounding. On SmolLM2-135M other batches move margins by 2e-5 in float32,
and llama.cpp with float16 weights is 0.007 from it; bfloat16 arithmetic needs `NEAR_TIE_LOW`."""

NEAR_TIE_LOW = 0.5
"""The same for arithmetic in bfloat16, whose step at logits of 32 is a quarter of a nat: on SmolLM2-135M margins move
by 0.19 (root mean square of 16 rows) and at most 0.40, other batches alone by up to 0.13."""


@dataclass(frozen=True)
class Scores:
    """What one model says about n rows with L answer words.

    Attributes:
        ids: the rows' ids, in the rows' order.
        labels: true labels, int64, (n,).
        log_probs: log p(answer | prompt), nats, float64, (n, L).
        truncated: whether the text was cut to fit, bool, (n,).
        seconds: time of the forward passes together, tokenizing and loading not counted.
        found: what of it an interrupted try had done, in words; not saved.
    """

    ids: list[str]
    labels: np.ndarray
    log_probs: np.ndarray
    truncated: np.ndarray
    seconds: float
    found: str = ""

    @property
    def predictions(self) -> np.ndarray:
        """The likeliest answer of each row (the first of equals), int64, (n,)."""
        return self.log_probs.argmax(axis=1)

    @property
    def margins(self) -> np.ndarray:
        """Log-odds, nats, (n,): log p(label 1) - log p(label 0) of two; best minus second of more."""
        if self.log_probs.shape[1] == 2:
            return self.log_probs[:, 1] - self.log_probs[:, 0]
        ordered = np.sort(self.log_probs, axis=1)
        return ordered[:, -1] - ordered[:, -2]

    @property
    def probabilities(self) -> np.ndarray:
        """Probability of each answer among the answers, (n, L); rows add up to 1."""
        shifted = np.exp(self.log_probs - self.log_probs.max(axis=1, keepdims=True))
        return shifted / shifted.sum(axis=1, keepdims=True)

    @property
    def correct(self) -> np.ndarray:
        """Whether each prediction is the label, bool, (n,)."""
        return self.predictions == self.labels

    @property
    def accuracy(self) -> float:
        """Share of correct rows."""
        return float(self.correct.mean())

    @property
    def near_ties(self) -> int:
        """Rows whose margin is smaller than `NEAR_TIE`: their prediction hangs on rounding."""
        return int((np.abs(self.margins) < NEAR_TIE).sum())

    @property
    def seconds_per_sample(self) -> float:
        """Mean time a row."""
        return self.seconds / max(1, len(self.ids))

    def subset(self, mask: np.ndarray) -> Scores:
        """The rows of a boolean mask."""
        ids = [name for name, keep in zip(self.ids, mask, strict=True) if keep]
        seconds = self.seconds * float(mask.mean())
        return Scores(ids, self.labels[mask], self.log_probs[mask], self.truncated[mask], seconds)

    def save(self, path: Path) -> None:
        """Write one JSON object a row, atomically; floats in full precision."""
        rows = zip(
            *(self.ids, self.labels.tolist(), self.predictions.tolist(), self.log_probs.tolist()),
            *(self.margins.tolist(), self.truncated.tolist()),
            strict=True,
        )
        keys = ("id", "label", "prediction", "log_probs", "margin", "truncated", "seconds")
        write_jsonl(path, [dict(zip(keys, (*row, self.seconds_per_sample), strict=True)) for row in rows])

    @classmethod
    def load(cls, path: Path) -> Scores:
        """The reverse of `save`."""
        rows = read_jsonl(path)
        return cls(
            ids=[row["id"] for row in rows],
            labels=np.array([row["label"] for row in rows], dtype=np.int64),
            log_probs=np.array([row["log_probs"] for row in rows], dtype=np.float64),
            truncated=np.array([row["truncated"] for row in rows], dtype=bool),
            seconds=float(sum(row["seconds"] for row in rows)),
        )


def score_rows(
    backend: Backend,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Sequence[dict[str, Any]],
    what: str,
    keep: Keep | None = None,
) -> Scores:
    """Score rows ({"id", "text", "label"}) with any backend.

    Prompts are made by `lib.prompts.classification`, in the order of the ids, so that the batches (shortest prompts
    first,
    then by id) hold the same rows whatever the rows' order.

    Args:
        what: the work in words for the progress line, as in "scoring test rows with the base model".
        keep: a file that gets every batch as it comes; batches that are in it are not computed again.

    Raises:
        InputError: no rows, or a model whose log-probabilities are not numbers.
    """
    if not rows:
        raise InputError("no rows to score.", "at least one row.", "check the data and max_eval_rows.")
    order = sorted(range(len(rows)), key=lambda i: rows[i]["id"])
    encoded = [encode(tokenizer, task, rows[i]["text"]) for i in order]
    prompts, names = [e.prompt_ids for e in encoded], [rows[i]["id"] for i in order]
    values, seconds, found = kept_log_probs(backend, names, prompts, label_ids(tokenizer, task), what, keep)
    log_probs, truncated = np.empty_like(values), np.empty(len(rows), dtype=bool)
    log_probs[order], truncated[order] = values, [e.truncated for e in encoded]
    broken = np.flatnonzero(~np.isfinite(log_probs).all(axis=1))
    if broken.size:
        raise InputError(
            f"{backend.name} gives {log_probs[broken[0]].tolist()} for row {rows[broken[0]]['id']} "
            f"({broken.size} of {len(rows)} rows are not numbers).",
            "finite log-probabilities.",
            "check the model's weights for NaN or infinity, and do not compute in float16.",
        )
    labels = np.array([row["label"] for row in rows], dtype=np.int64)
    return Scores([row["id"] for row in rows], labels, log_probs, truncated, seconds, found)


def kept_log_probs(
    backend: Backend,
    names: Sequence[str],
    prompts: Sequence[list[int]],
    answers: list[list[int]],
    what: str,
    keep: Keep | None = None,
) -> tuple[np.ndarray, float, str]:
    """log p(answer | prompt), (prompts, answers), the seconds of all tries together, and what was found done."""
    with keeping(keep, what, SCORED, names, prompts, backend.settings, labels=answers) as work:
        values = backend.label_log_probs(prompts, answers, work.progress, work.journal)
        return values, work.seconds, work.found


# How likely a model finds given answers: the log-probability of every token that the loss of training counts.
#
# Rows are whole conversations as token ids with the spans of their answers; the same ids for every backend.

Span = Sequence[int]


@dataclass(frozen=True)
class AnswerScores:
    """What one model says about the answers of n rows.

    Attributes:
        ids: the rows' ids, in the rows' order.
        log_probs: sum of log p of the answers' tokens, nats, float64, (n,).
        tokens: number of those tokens, int64, (n,).
        seconds: time of the forward passes together.
        found: what of it an interrupted try had done, in words; not saved.
    """

    ids: list[str]
    log_probs: np.ndarray
    tokens: np.ndarray
    seconds: float
    found: str = ""

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

    def interval(self, groups: np.ndarray) -> Interval:
        """The loss with Student's interval over groups of rows; no loss is below 0."""
        found = weighted_mean(self.row_losses, self.tokens, groups)
        return found if limits(found) is None else Interval(found.estimate, max(0.0, found.low), found.high)

    def figures(self, groups: np.ndarray) -> dict[str, Any]:
        """Loss and perplexity, JSON values: "loss", "loss_interval", "perplexity", "perplexity_interval".

        The intervals are None where there are too few groups to tell one from (`lib.statistics.losses`).
        """
        loss = self.interval(groups)
        return {
            "loss": loss.estimate,
            "loss_interval": limits(loss),
            "perplexity": math.exp(loss.estimate),
            "perplexity_interval": exponentials(limits(loss)),
        }

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


def exponentials(logarithms: list[float] | None) -> list[float] | None:
    """An interval of losses as one of perplexities; a limit beyond all floats is infinite."""
    return logarithms and [
        math.exp(limit) if limit < math.log(sys.float_info.max) else math.inf for limit in logarithms
    ]


def score_answers(
    backend: Backend,
    names: Sequence[str],
    rows: Sequence[list[int]],
    spans: Sequence[Sequence[Span]],
    what: str,
    keep: Keep | None = None,
) -> AnswerScores:
    """Score the answers of rows with either backend.

    Args:
        names: the rows' ids.
        rows: token ids of the whole conversations.
        spans: (first, behind the last) position of every answer of each row; the first token of a row cannot be in one.
        what: the work in words for the progress line.
        keep: a file that gets every batch as it comes; batches that are in it are not computed again.

    Raises:
        InputError: no rows, ids that the model has not, or log-probabilities that are not numbers.
    """
    if not rows:
        raise InputError("no rows to score.", "at least one row.", "check the data and max_eval_rows.")
    places = sha256_json([[list(span) for span in row] for row in spans])
    with keeping(keep, what, SCORED, names, rows, backend.settings, spans=places) as work:
        values = token_log_probs(backend, rows, spans, work.progress, work.journal)
        seconds = work.seconds
    sums = np.array([value.sum() for value in values])
    broken = np.flatnonzero(~np.isfinite(sums))
    if broken.size:
        raise InputError(
            f"{backend.name} gives log-probabilities that are not numbers ({broken.size} of {len(rows)} rows).",
            "finite log-probabilities.",
            "check the model's weights for NaN or infinity, and do not compute in float16.",
        )
    tokens = np.array([len(value) for value in values], dtype=np.int64)
    return AnswerScores(list(names), sums, tokens, seconds, work.found)


def token_log_probs(
    backend: Backend,
    rows: Sequence[list[int]],
    spans: Sequence[Sequence[Span]],
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> list[np.ndarray]:
    """log p of every token inside the spans, given all tokens before it; one vector a row, float64."""
    jobs = []
    for i, (ids, row_spans) in enumerate(zip(rows, spans, strict=True)):
        places = [place for start, stop in row_spans for place in range(start, stop)]
        reads = tuple((0, place - 1, ids[place]) for place in places)
        jobs.append(Job(i, list(ids[: places[-1]]), places[0] - 1, reads))
    jobs.sort(key=lambda job: len(job.ids))
    check_ids(rows, backend.vocab_size, None, backend.name)
    found: list[np.ndarray] = [np.empty(0)] * len(jobs)
    for job, values in zip(jobs, backend.read_log_probs(jobs, progress, journal), strict=True):
        found[job.prompt] = values
    return found
