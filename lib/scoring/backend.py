"""What every backend does, and the part of the work that is the same for all: which positions answer the question.

An answer of m tokens needs the next-token distribution at m positions: after the prompt, and after each of its tokens
but the last. Answers that share those inputs share the forward pass, so single-token answers cost one pass a prompt.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.errors import InputError

if TYPE_CHECKING:
    from lib.scoring.journal import Work


@dataclass(frozen=True)
class Job:
    """One sequence to run and what to read from it.

    Attributes:
        prompt: index of the prompt.
        ids: prompt and the shared inputs of the answers.
        start: first position whose distribution is read.
        reads: (answer, position in `ids`, token) of every log-probability wanted.
    """

    prompt: int
    ids: list[int]
    start: int
    reads: tuple[tuple[int, int, int], ...]


Run = Callable[[Sequence[Job]], list[np.ndarray]]
"""Computes one batch: the read log-probabilities of each job."""


class Backend(ABC):
    """A loaded model that gives log-probabilities. Batches that stand in a journal are taken from it.

    Attributes:
        name: what is being run, in words.
        device: where, in words.
        vocab_size: number of logits a position.
        n_ctx: most tokens of a sequence; None = any.
        most_answer: most tokens of an answer; None = any.
        note: what was done otherwise than usual, in words; empty when nothing was.
        settings: what beside the model changes the rounding of the numbers, JSON values.
    """

    name: str
    device: str
    vocab_size: int
    n_ctx: int | None = None
    most_answer: int | None = None
    note = ""
    settings: dict[str, Any]

    @abstractmethod
    def window_logits(self, ids: list[int], first: int = 0) -> np.ndarray:
        """Raw logits of the next token after each position of `ids` from `first` on, float32, (T - first, V)."""

    @abstractmethod
    def window_log_probs(self, ids: list[int], first: int = 0) -> np.ndarray:
        """The same as log-softmax."""

    @abstractmethod
    def close(self) -> None:
        """Free the model's memory; the backend cannot be used afterwards."""

    @abstractmethod
    def _plan(self, jobs: Sequence[Job], alike: bool) -> tuple[Iterable[Sequence[Job]], Run]:
        """Jobs in order (shortest first) cut into batches, and what gives the reads of each job of a batch.

        Args:
            alike: prompts that begin alike, so that their beginning is computed once; else whole conversations.
        """

    def label_log_probs(
        self, prompts: Sequence[list[int]], answers: list[list[int]], work: Work | None = None
    ) -> np.ndarray:
        """log p(answer | prompt), nats, float64, shape (prompts, answers)."""
        jobs = make_jobs(prompts, answers)
        self.check_ids([job.ids for job in jobs])
        check_ids(answers, self.vocab_size, self.most_answer, self.name)
        values = _run_batches(*self._plan(jobs, alike=True), len(prompts) / len(jobs), work)
        total = np.zeros((len(prompts), len(answers)), dtype=np.float64)
        for job, read in zip(jobs, values, strict=True):
            for (answer, _, _), value in zip(job.reads, read, strict=True):
                total[job.prompt, answer] += float(value)
        return total

    def token_log_probs(
        self, rows: Sequence[list[int]], spans: Sequence[Sequence[Sequence[int]]], work: Work | None = None
    ) -> list[np.ndarray]:
        """log p of every token inside the spans, given all tokens before it; one vector a row, nats, float64."""
        check_ids(rows, self.vocab_size, None, self.name)
        jobs = []
        for i, (ids, row_spans) in enumerate(zip(rows, spans, strict=True)):
            places = [place for start, stop in row_spans for place in range(start, stop)]
            reads = tuple((0, place - 1, ids[place]) for place in places)
            jobs.append(Job(i, list(ids[: places[-1]]), places[0] - 1, reads))
        jobs.sort(key=lambda job: len(job.ids))  # each is run whole, so shortest first is cheapest
        self.check_ids([job.ids for job in jobs])
        values = _run_batches(*self._plan(jobs, alike=False), 1.0, work)
        by_row = {job.prompt: value for job, value in zip(jobs, values, strict=True)}
        return [by_row[i] for i in range(len(jobs))]

    def check_ids(self, sequences: Sequence[Sequence[int]]) -> None:
        """Refuse what the model cannot read."""
        check_ids(sequences, self.vocab_size, self.n_ctx, self.name)


def make_jobs(prompts: Sequence[list[int]], answers: list[list[int]]) -> list[Job]:
    """The fewest sequences that give all answers of all prompts, shortest first, then in the prompts' order."""
    inputs = {tuple(answer[:-1]) for answer in answers}
    tails = sorted(t for t in inputs if not any(len(o) > len(t) and o[: len(t)] == t for o in inputs))
    owners = [next(i for i, t in enumerate(tails) if t[: len(a) - 1] == tuple(a[:-1])) for a in answers]
    jobs = []
    for p, prompt in enumerate(prompts):
        start = len(prompt) - 1
        for i, tail in enumerate(tails):
            mine = [a for a, owner in enumerate(owners) if owner == i]
            reads = tuple((a, start + k, token) for a in mine for k, token in enumerate(answers[a]))
            jobs.append(Job(p, [*prompt, *tail], start, reads))
    return sorted(jobs, key=lambda job: len(job.ids))


def common_prefix(jobs: Sequence[Job]) -> list[int]:
    """The ids that all sequences begin with, none of them one whose distribution is read."""
    first, last = min(job.ids for job in jobs), max(job.ids for job in jobs)
    most = min(job.start for job in jobs)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: min(same, most)]


def grouped(jobs: Sequence[Job], full: Callable[[list[Job], Job], bool]) -> Iterator[list[Job]]:
    """Jobs in order, cut into batches.

    Args:
        full: whether a batch has no room for the next job; a batch always takes its first.
    """
    batch: list[Job] = []
    for job in jobs:
        if batch and full(batch, job):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


def cut(widths: Sequence[int], most: int, overhead: float) -> list[int]:
    """Sizes of the batches of least cost when sequences, shortest first, are padded to the longest of their batch.

    Args:
        widths: tokens of each sequence, ascending.
        most: largest batch.
        overhead: cost of a batch beside its padded tokens, in tokens.
    """
    cost, start = [0.0], [0]
    for end in range(1, len(widths) + 1):
        choices = range(max(0, end - most), end)
        best = min(choices, key=lambda first: cost[first] + (end - first) * widths[end - 1])
        start.append(best)
        cost.append(cost[best] + overhead + (end - best) * widths[end - 1])
    sizes, end = [], len(widths)
    while end:
        sizes.append(end - start[end])
        end = start[end]
    return sizes[::-1]


def _run_batches(batches: Iterable[Sequence[Job]], run: Run, share: float, work: Work | None) -> list[np.ndarray]:
    """The read log-probabilities of every job, batch by batch; those in the journal are not computed again.

    Args:
        share: prompts a job, for the progress: less than 1 where a prompt takes several sequences.
    """
    values: list[np.ndarray] = []
    for batch in batches:
        if work is None:
            values += run(batch)
            continue
        found = work.take([job.prompt for job in batch], lambda batch=batch: [value.tolist() for value in run(batch)])
        values += [np.array(value, dtype=np.float64) for value in found]
        if (more := round(share * len(values)) - work.progress.done) > 0:
            work.progress.advance(more)
    return values


def check_ids(sequences: Sequence[Sequence[int]], vocab_size: int, longest: int | None, name: str) -> None:
    """Refuse what a model cannot read: an empty sequence, an id outside the vocabulary, more tokens than `longest`."""
    for ids in sequences:
        if len(ids) == 0:
            raise InputError("a prompt without tokens.", "at least one token.", "check user_prompt and the text.")
        low, high = min(ids), max(ids)
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            raise InputError(
                f"token id {bad} for {name}, which has {vocab_size} tokens.",
                "ids of this model's own tokenizer.",
                "use the tokenizer that belongs to the model.",
            )
        if longest is not None and len(ids) > longest:
            raise InputError(
                f"a prompt of {len(ids)} tokens for {name}, opened with a context of {longest}.",
                f"at most {longest} tokens.",
                f"raise the context to {len(ids)}, or lower max_seq_length.",
            )
