"""How likely a model finds the answers of rows: of every answer word, or of the answers that the rows hold.

Rows with labels are scored by the log-probability of each answer word behind the prompt, conversations by that of every
token that the loss of training counts. Both are scored on the same token ids by every backend.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from lib.errors import refusal
from lib.prompts.conversations import Encoded
from lib.prompts.tasks import Task
from lib.runs.files import read_jsonl, sha256_json, write_jsonl
from lib.scoring.backend import SCORED, Backend, Keep, keeping
from lib.statistics.intervals import Interval
from lib.statistics.losses import limits, weighted_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEAR_TIE = 0.1
"""Margins below this (nats) can change sign by rounding. On SmolLM2-135M other batches move margins by 2e-5 in float32,
and llama.cpp with float16 weights is 0.007 from it; bfloat16 arithmetic needs `NEAR_TIE_LOW`."""

NEAR_TIE_LOW = 0.5
"""The same for arithmetic in bfloat16, whose step at logits of 32 is a quarter of a nat: on SmolLM2-135M margins move
by 0.19 (root mean square of 16 rows) and at most 0.40, other batches alone by up to 0.13."""


class RowScores:
    """What both kinds of scores have in common: one line a row in a file, time, and parts of the rows.

    Attributes:
        ids: the rows' ids, in the rows' order.
        seconds: time of the forward passes together, tokenizing and loading not counted.
        found: what an interrupted run had already scored, in words; not saved.
    """

    ids: list[str]
    log_probs: np.ndarray
    seconds: float
    found: str

    COLUMNS: ClassVar[dict[str, tuple[str, type | None]]]
    """What is saved of every row beside id and seconds: key -> attribute, and its type where it is read back."""

    @property
    def seconds_per_sample(self) -> float:
        """Mean time a row."""
        return self.seconds / max(1, len(self.ids))

    def subset(self, mask: np.ndarray) -> Self:
        """The rows of a boolean mask."""
        ids = list(itertools.compress(self.ids, mask))
        arrays = {name: getattr(self, name)[mask] for name, kind in self.COLUMNS.values() if kind}
        return replace(self, ids=ids, seconds=self.seconds * float(mask.mean()), found="", **arrays)  # type: ignore[type-var]

    def joined(self, others: Sequence[Self]) -> Self:
        """These rows and then those of the others."""
        parts = [self, *others]
        arrays = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name, kind in self.COLUMNS.values()
            if kind
        }
        ids = [name for part in parts for name in part.ids]
        return replace(self, ids=ids, seconds=sum(part.seconds for part in parts), **arrays)  # type: ignore[type-var]

    def save(self, path: Path) -> None:
        """Write one JSON object a row, atomically; floats in full precision."""
        columns = {"id": self.ids, **{key: getattr(self, name).tolist() for key, (name, _) in self.COLUMNS.items()}}
        columns["seconds"] = [self.seconds_per_sample] * len(self.ids)
        write_jsonl(path, [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])

    @staticmethod
    def load(path: Path) -> Any:
        """The reverse of `save`: the scores of a file, of whichever kind they are."""
        lines = read_jsonl(path)
        kind = Scores if lines and "label" in lines[0] else AnswerScores
        read = {key: (name, dtype) for key, (name, dtype) in kind.COLUMNS.items() if dtype}
        arrays = {name: np.array([line[key] for line in lines], dtype=dtype) for key, (name, dtype) in read.items()}
        seconds = float(sum(line["seconds"] for line in lines))
        return kind(ids=[line["id"] for line in lines], seconds=seconds, **arrays)


@dataclass(frozen=True)
class Scores(RowScores):
    """What one model says about n rows with L answer words.

    Attributes:
        labels: true labels, int64, (n,).
        log_probs: log p(answer | prompt), nats, float64, (n, L).
        truncated: whether the text was cut to fit, bool, (n,).
        ids, seconds, found: see `RowScores`.
    """

    ids: list[str]
    labels: np.ndarray
    log_probs: np.ndarray
    truncated: np.ndarray
    seconds: float
    found: str = ""

    COLUMNS: ClassVar = {
        "label": ("labels", np.int64),
        "prediction": ("predictions", None),
        "log_probs": ("log_probs", np.float64),
        "margin": ("margins", None),
        "truncated": ("truncated", np.bool_),
    }

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
    def near_ties(self) -> int:
        """Rows whose margin is smaller than `NEAR_TIE`: their prediction hangs on rounding."""
        return int((np.abs(self.margins) < NEAR_TIE).sum())


@dataclass(frozen=True)
class AnswerScores(RowScores):
    """What one model says about the answers of n rows.

    Attributes:
        log_probs: sum of log p of the answers' tokens, nats, float64, (n,).
        tokens: number of those tokens, int64, (n,).
        ids, seconds, found: see `RowScores`.
    """

    ids: list[str]
    log_probs: np.ndarray
    tokens: np.ndarray
    seconds: float
    found: str = ""

    COLUMNS: ClassVar = {"log_prob": ("log_probs", np.float64), "tokens": ("tokens", np.int64)}

    @property
    def row_losses(self) -> np.ndarray:
        """Mean cross-entropy of each row, nats a token, (n,)."""
        return -self.log_probs / self.tokens

    def figures(self, groups: np.ndarray) -> dict[str, Any]:
        """Loss (nats a token) and perplexity, JSON values: "loss", "loss_interval", "perplexity",
        "perplexity_interval".

        The intervals are Student's over groups of rows, and None where there are too few groups to tell one from
        (`lib.statistics.losses`). No loss is below 0.
        """
        loss = weighted_mean(self.row_losses, self.tokens, groups)
        if limits(loss) is not None:
            loss = Interval(loss.estimate, max(0.0, loss.low), loss.high)
        return {
            "loss": loss.estimate,
            "loss_interval": limits(loss),
            "perplexity": math.exp(loss.estimate),
            "perplexity_interval": exponentials(limits(loss)),
        }


load_scores = RowScores.load


def exponentials(logarithms: list[float] | None) -> list[float] | None:
    """An interval of losses as one of perplexities; a limit beyond all floats is infinite."""
    return logarithms and [
        math.exp(limit) if limit < math.log(sys.float_info.max) else math.inf for limit in logarithms
    ]


@dataclass(frozen=True)
class RowIds:
    """Rows as token ids, in the order in which they are scored: by id, so that the batches (shortest first, then by id)
    hold the same rows whatever the rows' own order.

    Attributes:
        order: places of the rows.
        names: their ids.
        prompts: token ids of the prompts; of whole conversations where there are no answer words.
        spans: (first, behind the last) position of every answer in them, which is never the first token; none where
            there are answer words.
        answers: token ids of the answer words; none where the answers stand in the rows.
        truncated: whether each row was cut, in the rows' own order.
    """

    order: list[int]
    names: list[str]
    prompts: list[list[int]]
    spans: list[list[tuple[int, int]]]
    answers: list[list[int]]
    truncated: list[bool]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], encoded: Sequence[Encoded], words: list[list[int]]) -> Self:
        """Of rows as a task encodes them, and its answer words."""
        order = sorted(range(len(rows)), key=lambda i: rows[i]["id"])
        return cls(
            order=order,
            names=[str(rows[i]["id"]) for i in order],
            prompts=[encoded[i].prompt_ids if words else encoded[i].ids for i in order],
            spans=[] if words else [encoded[i].spans for i in order],
            answers=words,
            truncated=[one.truncated for one in encoded],
        )

    def scores(
        self, rows: Sequence[Mapping[str, Any]], log_probs: np.ndarray, seconds: float, found: str
    ) -> Scores | AnswerScores:
        """What `score_ids` gave, in the rows' own order."""
        back, ids = np.argsort(self.order), [row["id"] for row in rows]
        if self.answers:
            labels = np.array([row["label"] for row in rows], dtype=np.int64)
            truncated = np.array(self.truncated, dtype=bool)
            return Scores(ids, labels, log_probs[back], truncated, seconds, found)
        tokens = np.array([sum(stop - start for start, stop in spans) for spans in self.spans], dtype=np.int64)
        return AnswerScores(ids, log_probs[back, 0], tokens[back], seconds, found)


def score_rows(
    backend: Backend,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Sequence[Mapping[str, Any]],
    what: str,
    keep: Keep | None = None,
    encoded: Sequence[Encoded] | None = None,
) -> Scores | AnswerScores:
    """Score rows of a task with any backend.

    Args:
        what: the work in words for the progress line, as in "scoring test rows with the base model".
        keep: a file that gets every batch as it comes; batches that are in it are not computed again.
        encoded: what the task makes of the rows, where that is known.

    Raises:
        InputError: no rows, or a model whose log-probabilities are not numbers.
    """
    encoded = encoded or [task.encode(tokenizer, row) for row in rows]
    ids = RowIds.of(rows, encoded, task.answer_words(tokenizer))
    values, seconds, found = score_ids(backend, ids, what, keep)
    _refuse_broken(backend, ids.names, values)
    return ids.scores(rows, values, seconds, found)


def _refuse_broken(backend: Backend, names: Sequence[str], values: np.ndarray) -> None:
    """Refuse log-probabilities of rows, (rows, words), that are not numbers."""
    broken = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if broken.size:
        first, row = values[broken[0]].squeeze().tolist(), names[broken[0]]  # a number alone where there is one
        raise refusal("scoring/not-numbers", backend=backend, values=first, row=row, broken=broken, rows=len(names))


def score_ids(backend: Backend, rows: RowIds, what: str, keep: Keep | None = None) -> tuple[np.ndarray, float, str]:
    """Score rows that are token ids already; arguments as of `score_rows`.

    Returns:
        log p of each answer word, (rows, words), or of all answers of a row together, (rows, 1); the seconds of all
        runs together; what was found done, in words.

    Raises:
        InputError: no rows, ids that the model has not, or log-probabilities of answers that are not numbers.
    """
    if not rows.prompts:
        raise refusal("scoring/no-rows")
    asked: dict[str, Any] = {"labels": rows.answers}
    if not rows.answers:
        asked = {"spans": sha256_json([[list(span) for span in row] for row in rows.spans])}
    with keeping(
        keep, what, SCORED, rows.names, rows.prompts, backend.settings, backend.peak_memory_mib, **asked
    ) as work:
        if rows.answers:
            values = backend.label_log_probs(rows.prompts, rows.answers, work)
        else:
            values = np.array([[read.sum()] for read in backend.token_log_probs(rows.prompts, rows.spans, work)])
        seconds = work.seconds
    if not rows.answers:
        _refuse_broken(backend, rows.names, values)
    return values, seconds, work.found
