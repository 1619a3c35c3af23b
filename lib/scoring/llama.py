"""Scoring GGUF files with llama.cpp, several prompts a batch and their common beginning computed once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.scoring.backend import Job, add_up, check_ids, common_prefix, make_jobs, run_batches
from lib.scoring.llama_context import OUTPUTS, SEQUENCES, LlamaContext

if TYPE_CHECKING:
    from lib.progress import Progress
    from lib.scoring.journal import Journal

_TOKENS_ON_CPU = 256
"""Tokens of several sequences that a CPU takes at once. The keys of all of them are looked at for every token, and the
products of matrices gain nothing from more: 8 sequences of 100 tokens cost 8 % more than 256 tokens at a time."""


class LlamaCppBackend(LlamaContext):
    """Scores with a GGUF file; opened like a `LlamaContext`, scores as `lib.scoring.backend.Backend` says."""

    note = ""
    """What was done otherwise than usual: nothing."""

    @property
    def _most_tokens(self) -> int:
        return self.n_batch if self.n_gpu_layers else _TOKENS_ON_CPU

    @property
    def settings(self) -> dict[str, Any]:
        """See `lib.scoring.backend.Backend`."""
        keys = ("n_ctx", "n_batch", "n_threads", "device", "cache_type", "flash_attention")
        version = metadata.version("llama_cpp_python")
        more = {"sequences": SEQUENCES, "tokens": self._most_tokens, "llama_cpp_python": version}
        return {**{key: getattr(self, key) for key in keys}, **more}

    def label_log_probs(
        self,
        prompts: Sequence[list[int]],
        answers: list[list[int]],
        progress: Progress | None = None,
        journal: Journal | None = None,
    ) -> np.ndarray:
        """See `lib.scoring.backend.Backend`."""
        jobs = make_jobs(prompts, answers)
        check_ids([job.ids for job in jobs], self.vocab_size, self.n_ctx, self.name)
        check_ids(answers, self.vocab_size, OUTPUTS, self.name)
        prefix, shared = common_prefix(jobs), False

        def run(group: Sequence[Job]) -> list[np.ndarray]:
            nonlocal shared
            if not shared:  # not before a batch needs it: all of them may stand in the journal
                self._share(prefix)
                shared = True
            return self._run(group, len(prefix))

        groups = self._groups(jobs, len(prefix))
        values = run_batches(groups, run, len(prompts) / len(jobs), progress, journal)
        return add_up(jobs, values, (len(prompts), len(answers)))

    def _groups(self, jobs: list[Job], shared: int) -> Iterator[list[Job]]:
        """Jobs in order, cut into batches that respect every limit of the context; a long job is a batch alone."""
        group: list[Job] = []
        tokens, outputs, most = 0, 0, min(self._most_tokens, self.n_batch - shared)
        for job in jobs:
            more, wanted = len(job.ids) - shared, len(job.ids) - job.start
            full = len(group) == SEQUENCES or tokens + more > most or outputs + wanted > OUTPUTS
            if group and full:
                yield group
                group, tokens, outputs = [], 0, 0
            group.append(job)
            tokens, outputs = tokens + more, outputs + wanted
        if group:
            yield group

    def _share(self, prefix: list[int]) -> None:
        """Compute the common beginning once, for all sequences."""
        self.clear()
        everyone = range(SEQUENCES)
        self.decode([(token, position, everyone, False) for position, token in enumerate(prefix)])

    def _run(self, group: Sequence[Job], shared: int) -> list[np.ndarray]:
        """The read log-probabilities of one batch; the cache holds only the shared beginning afterwards."""
        tokens = [
            (token, position, (s,), position >= job.start)
            for s, job in enumerate(group)
            for position, token in enumerate(job.ids[shared:], start=shared)
        ]
        self.decode(tokens)
        row, values = -shared, []
        for job in group:
            logits = {p: self.logits(row + p) for p in range(job.start, len(job.ids))}
            totals = {p: _log_sum_exp(row_logits) for p, row_logits in logits.items()}
            values.append(np.array([logits[p][token] - totals[p] for _, p, token in job.reads]))
            row += len(job.ids) - shared
        for s in range(len(group)):
            self.forget(s, shared)
        return values

    def read_log_probs(
        self, jobs: Sequence[Job], progress: Progress | None = None, journal: Journal | None = None
    ) -> list[np.ndarray]:
        """See `lib.scoring.backend.Backend`; one sequence after another."""
        check_ids([job.ids for job in jobs], self.vocab_size, self.n_ctx, self.name)
        return run_batches(([job] for job in jobs), self._run_alone, 1.0, progress, journal)

    def _run_alone(self, batch: Sequence[Job]) -> list[np.ndarray]:
        """One sequence: first what needs no logits, then pieces of as many positions as llama.cpp keeps."""
        (job,) = batch
        wanted: dict[int, list[int]] = {}
        for number, (_, place, _) in enumerate(job.reads):
            wanted.setdefault(place, []).append(number)
        self.clear()
        self.decode([(token, place, (0,), False) for place, token in enumerate(job.ids[: job.start])])
        values = np.empty(len(job.reads))
        for start in range(job.start, len(job.ids), OUTPUTS):
            part = list(enumerate(job.ids[start : start + OUTPUTS], start))
            self.decode([(token, place, (0,), place in wanted) for place, token in part])
            for i, (place, _) in enumerate(part):
                if place in wanted:
                    logits = self.logits(i)
                    tokens = [job.reads[number][2] for number in wanted[place]]
                    values[wanted[place]] = logits[tokens] - _log_sum_exp(logits)
        return [values]

    def read_logits(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, np.ndarray]]:
        """Raw logits at the positions that every job reads, float32, (reads, V), in the jobs' order.

        Several jobs a batch; their common beginning is computed once. A job may read at most `n_outputs` positions.
        """
        check_ids([job.ids for job in jobs], self.vocab_size, self.n_ctx, self.name)
        prefix = common_prefix(jobs)
        self._share(prefix)
        for group in self._groups(list(jobs), len(prefix)):
            read = [{place for _, place, _ in job.reads} for job in group]
            tokens = [
                (token, position, (s,), position in read[s])
                for s, job in enumerate(group)
                for position, token in enumerate(job.ids[len(prefix) :], start=len(prefix))
            ]
            self.decode(tokens)
            first = -len(prefix)
            for job in group:
                logits = np.empty((len(job.reads), self.vocab_size), dtype=np.float32)
                for read, (_, place, _) in enumerate(job.reads):
                    logits[read] = self.logits(first + place)
                yield job, logits
                first += len(job.ids) - len(prefix)
            for s in range(len(group)):
                self.forget(s, len(prefix))

    def window_logits(self, ids: list[int], first: int = 0) -> np.ndarray:
        """Raw logits of the next token after each position of `ids` from `first` on, float32, (T - first, V).

        In one batch where `n_outputs` allows it, as llama-perplexity has it: the size of a batch changes the rounding.
        """
        check_ids([ids], self.vocab_size, self.n_ctx, self.name)
        self.clear()
        result = np.empty((len(ids) - first, self.vocab_size), dtype=np.float32)
        edges = [0, len(ids)]
        if len(ids) - first > self.n_outputs:
            edges = [*range(first, len(ids), self.n_outputs), len(ids)]
            edges = edges if first == 0 else [0, *edges]
        for start, end in itertools.pairwise(edges):
            self.decode([(ids[p], p, (0,), p >= first) for p in range(start, end)])
            for position in range(max(start, first), end):
                result[position - first] = self.logits(position - start)
        return result

    def window_log_probs(self, ids: list[int], first: int = 0) -> np.ndarray:
        """See `lib.scoring.backend.Backend`."""
        result = self.window_logits(ids, first)
        for row in result:
            row -= _log_sum_exp(row.astype(np.float64))
        return result


def _log_sum_exp(logits: np.ndarray) -> float:
    """ln Σ exp(logits), without overflow."""
    top = logits.max()
    return float(top + np.log(np.exp(logits - top).sum()))
