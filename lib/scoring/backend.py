"""What every backend does, and the part of the work that is the same for all: which positions answer the question.

An answer of m tokens needs the next-token distribution at m positions: after the prompt, and after each of its tokens
but the last. Answers that share those inputs share the forward pass, so single-token answers cost one pass a prompt.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lib.errors import InputError

if TYPE_CHECKING:
    from lib.progress import Progress
    from lib.scoring.journal import Journal


class Backend(Protocol):
    """A loaded model that gives log-probabilities. Batches that stand in a journal are taken from it.

    Attributes:
        name: what is being run, in words.
        device: where, in words.
        vocab_size: number of logits a position.
        settings: what beside the model changes the rounding of the numbers, JSON values.
    """

    name: str
    device: str
    vocab_size: int
    settings: dict[str, Any]

    def label_log_probs(
        self,
        prompts: Sequence[list[int]],
        answers: list[list[int]],
        progress: Progress | None = None,
        journal: Journal | None = None,
    ) -> np.ndarray:
        """log p(answer | prompt), nats, float64, shape (prompts, answers)."""
        ...

    def read_log_probs(
        self, jobs: Sequence[Job], progress: Progress | None = None, journal: Journal | None = None
    ) -> list[np.ndarray]:
        """What every job reads, nats, float64, one vector a job; each is run whole, so shortest first is cheapest."""
        ...

    def window_log_probs(self, ids: list[int], first: int = 0) -> np.ndarray:
        """Log-softmax of the next token after each position of `ids` from `first` on, float32, (T - first, V)."""
        ...

    def close(self) -> None:
        """Free the model's memory; the backend cannot be used afterwards."""
        ...


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


def run_batches(
    batches: Iterable[Sequence[Job]],
    run: Callable[[Sequence[Job]], list[np.ndarray]],
    share: float,
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> list[np.ndarray]:
    """The read log-probabilities of every job, batch by batch; those in the journal are not computed again.

    Args:
        run: computes one batch.
        share: prompts a job, for the progress: less than 1 where a prompt takes several sequences.
    """
    values: list[np.ndarray] = []
    for batch in batches:
        if journal is None:
            values += run(batch)
        else:
            lists = functools.partial(_as_lists, run, batch)
            found = journal.take(len(values), [job.prompt for job in batch], lists)
            values += [np.array(value, dtype=np.float64) for value in found]
        if progress is not None and (more := round(share * len(values)) - progress.done) > 0:
            progress.advance(more)
    return values


def _as_lists(run: Callable[[Sequence[Job]], list[np.ndarray]], batch: Sequence[Job]) -> list[list[float]]:
    return [value.tolist() for value in run(batch)]


def add_up(jobs: Sequence[Job], values: Sequence[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Sum of the read log-probabilities for each prompt and answer; `values` holds one number for each read."""
    total = np.zeros(shape, dtype=np.float64)
    for job, read in zip(jobs, values, strict=True):
        for (answer, _, _), value in zip(job.reads, read, strict=True):
            total[job.prompt, answer] += float(value)
    return total


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
