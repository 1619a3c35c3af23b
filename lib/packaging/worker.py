"""What the packaged file answers here: greedy tokens, their log-probabilities, label scores. For child processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lib.scoring.generation import llama_feed, write
from lib.scoring.llama import LlamaCppBackend


def answer(argument: dict[str, Any]) -> dict[str, Any]:
    """Open a GGUF file and answer prompts.

    Args:
        argument: "path"; "prompts": token ids; "labels": token ids of the answer words, or []; "most": tokens of an
            answer; "ends": ids that end it; "n_threads".

    Returns:
        "answers": for every prompt {"ids" (without the ending token), "log_probs" (of each id, nats), "labels"
        (log-probability of each label)}.
    """
    prompts, labels = argument["prompts"], argument["labels"]
    longest = max(map(len, prompts)) + max([argument["most"], *map(len, labels)]) + 1
    options = {"n_ctx": longest, "n_threads": argument["n_threads"], "flash_attention": True}
    with LlamaCppBackend(Path(argument["path"]), **options) as backend:
        scores = [[_score(backend, ids, label) for label in labels] for ids in prompts]
        answers = [_greedy(backend, ids, argument["most"], argument["ends"]) for ids in prompts]
    return {"answers": [{**written, "labels": own} for written, own in zip(answers, scores, strict=True)]}


def _score(backend: LlamaCppBackend, prompt: Sequence[int], label: Sequence[int]) -> float:
    """Log-probability of a label, one sequence at a time as programs do: batches of many round otherwise."""
    feed, given, total = llama_feed(backend), list(prompt), 0.0
    for token in label:
        logits = feed(given)
        top = logits.max()
        total += float(logits[token] - top - np.log(np.exp(logits - top).sum()))
        given = [token]
    return total


def _greedy(backend: LlamaCppBackend, prompt: Sequence[int], most: int, ends: Sequence[int]) -> dict[str, Any]:
    feed, found = llama_feed(backend), []

    def remember(ids: Sequence[int]) -> np.ndarray:
        logits = feed(ids)
        top = logits.max()
        found.append(float(-np.log(np.exp(logits - top).sum())))  # of the likeliest token, which greedy takes
        return logits

    written = write(remember, prompt, most, set(ends))
    return {"ids": written.ids, "log_probs": found[: len(written.ids)]}
