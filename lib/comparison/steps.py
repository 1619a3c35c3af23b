"""The error ladder: what each step from the trained adapter to the quantized file changed, from scores that exist.

A step is a model on one backend. Between two neighbours only one thing differs: adapter → merged (the merge), merged →
GGUF (the conversion and the other runtime), GGUF → its quantized weights computed exactly (the rounding of weights),
those → the quantized file in llama.cpp (its arithmetic, which rounds activations too).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lib.scoring import Scores
from lib.statistics import clustered_mean, clustered_score_interval, wilson

MERGED_SCORES, DEQUANTIZED_SCORES = "scores-merged.jsonl", "scores-dequantized.jsonl"
"""Scores of the merged model in transformers, and of one file's weights there, beside those of the files."""


def step_file(files: Sequence[Mapping[str, Any]], recommendation: Mapping[str, Any]) -> str | None:
    """The GGUF file the ladder ends at: the recommended one, else the smallest not judged worse, else the smallest.

    Args:
        files: entries of the quantized GGUF files.
    """
    if recommendation["type"] is not None or not files:
        return recommendation["type"]
    kept = [entry for entry in files if entry["verdict"] != "worse"]
    return min(kept or files, key=lambda entry: entry["bytes"])["type"]


def label_divergence(first: Scores, second: Scores) -> np.ndarray:
    """KL(first ‖ second) of the answer words' probabilities, nats, (n,)."""
    p, q = first.probabilities, second.probabilities
    tiny = np.finfo(float).tiny
    return (p * (np.log(np.maximum(p, tiny)) - np.log(np.maximum(q, tiny)))).sum(axis=1).clip(min=0.0)


def error_ladder(steps: Sequence[tuple[str, Scores]], groups: np.ndarray) -> list[dict[str, Any]]:
    """Every step against the one before and against the first.

    Args:
        steps: name and scores on the same rows, in order.
        groups: (n,) near-duplicate cluster of each row.

    Returns:
        for each: "name", "n", "accuracy", "accuracy_interval" (Wilson), and "before" and "first": None for the first
        step, else "kld" and "kld_interval" (mean KL divergence over the answer words, nats a row; clusters together),
        "agreement" and "agreement_interval" (equal labels, Wilson), "accuracy_difference" and its interval.

    Raises:
        ValueError: scores of different rows.
    """
    entries = []
    for place, (name, scores) in enumerate(steps):
        if scores.ids != steps[0][1].ids:
            raise ValueError(f"{name} has scores of other rows")
        share = wilson(int(scores.correct.sum()), len(scores.ids))
        entries.append(
            {
                "name": name,
                "n": len(scores.ids),
                "accuracy": share.estimate,
                "accuracy_interval": share.to_json(),
                "before": _against(steps[place - 1][1], scores, groups) if place else None,
                "first": _against(steps[0][1], scores, groups) if place else None,
            }
        )
    return entries


def _against(other: Scores, scores: Scores, groups: np.ndarray) -> dict[str, Any]:
    kld = clustered_mean(label_divergence(other, scores), groups)
    same = wilson(int((scores.predictions == other.predictions).sum()), len(scores.ids))
    change = clustered_score_interval(scores.correct.astype(np.int64) - other.correct, groups)
    return {
        "kld": kld.estimate,
        "kld_interval": [max(0.0, kld.low), kld.high],
        "agreement": same.estimate,
        "agreement_interval": same.to_json(),
        "accuracy_difference": change.estimate,
        "accuracy_difference_interval": change.to_json(),
    }
