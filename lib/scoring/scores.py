"""Scores of a set of rows: the log-probability of every answer word for every row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.errors import InputError
from lib.models.prompting import Task, encode, label_ids
from lib.run.files import read_jsonl, write_jsonl
from lib.scoring.backend import Backend
from lib.scoring.journal import SCORED, Keep, keeping

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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

    Prompts are made by `lib.models.prompting`, in the order of the ids, so that the batches (shortest prompts first,
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
