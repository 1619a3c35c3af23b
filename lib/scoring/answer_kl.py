"""KL divergence of a GGUF file from a reference where a row's answer is predicted: whole vocabulary, one value a token.

The distributions are compared as `lib.scoring.perplexity` does for windows of text (the reference rounded to 65,536
steps between a position's maximum and 16 nats below it), so that both divergences can stand side by side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lib.progress import Progress
from lib.runs.files import require_space
from lib.scoring.backend import Job
from lib.scoring.llama_backend import LlamaCppBackend
from lib.scoring.perplexity import Reference, _check_vocabulary, _compare

_TOGETHER = 128
"""Reads whose distributions are compared together: a long answer's whole vocabularies would fill gigabytes."""


def answer_jobs(rows: Sequence[Mapping[str, Any]]) -> list[Job]:
    """What to run and read of rows with "ids", "positions" (that predict an answer's tokens) and "targets" (these)."""
    return [
        Job(
            number,
            row["ids"],
            row["positions"][0],
            tuple((0, *read) for read in zip(row["positions"], row["targets"], strict=True)),
        )
        for number, row in enumerate(rows)
    ]


def store_answers(backend: LlamaCppBackend, jobs: Sequence[Job], path: Path, what: str) -> Reference:
    """Compute and keep the reference's log-probabilities at all reads, one after another.

    Args:
        path: a file to make, 2 bytes a read and vocabulary entry.
        what: the work in words for the progress line.
    """
    shape = (sum(len(job.reads) for job in jobs), 1, backend.vocab_size)
    require_space(path.parent, 2 * math.prod(shape), "the reference's log-probabilities at answers")
    kept, place = Reference(path, shape), 0
    with Progress(what, len(jobs)) as progress:
        for job, logits in backend.read_logits(jobs):
            for row, (_, _, token) in zip(logits, job.reads, strict=True):
                kept.put(place, row[None], np.array([token]))
                place += 1
            progress.advance()
    return kept


def answer_divergences(kept: Reference, backend: LlamaCppBackend, jobs: Sequence[Job], what: str) -> np.ndarray:
    """KL(reference ‖ model) at all reads, nats, float64, (reads,).

    Raises:
        InputError: another vocabulary than the reference's.
    """
    found: list[float] = []
    with Progress(what, len(jobs)) as progress:
        for job, logits in backend.read_logits(jobs):
            targets = np.array([token for _, _, token in job.reads])
            for start in range(0, len(targets), _TOGETHER):
                part = slice(start, start + _TOGETHER)
                base = np.concatenate([kept.get(len(found) + i) for i in range(len(targets[part]))])
                _check_vocabulary(base, logits[part])
                found += _compare(base, logits[part], targets[part])[2].tolist()
            progress.advance()
    return np.array(found)
