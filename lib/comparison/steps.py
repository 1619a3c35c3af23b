"""The error ladder: what each step from the trained adapter to the quantized file changed, from scores that exist.

A step is a model on one backend. What differs between neighbours: adapter → merged (the merge), merged → merged in
float32 (16-bit → 32-bit arithmetic), that → GGUF (other file and runtime), GGUF → its quantized weights computed
exactly (the rounding of weights, and the runtime back), those → the quantized file in llama.cpp (the runtime's
arithmetic, which rounds activations too).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lib.comparison.advice import worse_on
from lib.comparison.judging import label_divergence
from lib.scoring import Scores
from lib.scoring.answers import AnswerScores
from lib.statistics import clustered_mean, clustered_score_interval, clustered_share, paired_bootstrap, wilson

MERGED_SCORES, DEQUANTIZED_SCORES = "scores-merged.jsonl", "scores-dequantized.jsonl"
"""Scores of the merged model in transformers, and of one file's weights there, beside those of the files."""
MERGED32_SCORES = "scores-merged-float32.jsonl"
"""The merged model's in float32, where it was scored in another dtype first."""


def step_file(files: Sequence[Mapping[str, Any]], recommendation: Mapping[str, Any]) -> str | None:
    """The GGUF file the ladder ends at: the recommended one, else the smallest not judged worse, else the smallest.

    Args:
        files: entries of the quantized GGUF files.
    """
    if recommendation["type"] is not None or not files:
        return recommendation["type"]
    kept = [entry for entry in files if not worse_on(entry)]
    return min(kept or files, key=lambda entry: entry["bytes"])["type"]


def error_ladder(
    steps: Sequence[tuple[str, Scores]] | Sequence[tuple[str, AnswerScores]],
    groups: np.ndarray,
    margin_percent: float = 1.0,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Every step against the one before and against the first.

    Args:
        steps: name and scores on the same rows, in order; all with labels, or all without.
        groups: (n,) near-duplicate cluster of each row.
        margin_percent: without labels: change of a row's perplexity that is not noticeable.
        seed: of the bootstrap, without labels.

    Returns:
        for each "name" and "n", and "before" and "first": None for the first step. With labels "accuracy" and
        "accuracy_interval" (Wilson); "before" and "first" hold "kld" and "kld_interval" (mean KL divergence over the
        answer words, nats a row; clusters together), "agreement" and "agreement_interval" (equal labels; Wilson, rows
        divided by the design effect),
        "accuracy_difference" and its interval. Without labels "tokens", "margin_percent" and what
        `AnswerScores.figures` gives; "before" and "first" hold "loss_difference" and its interval (nats a token,
        paired bootstrap over clusters), "moved" and "moved_interval" (mean absolute change of a row's loss, nats a
        token: what cancels in the difference does not cancel here), "agreement" and "agreement_interval" (rows whose
        perplexity changed by less than `margin_percent`; the same).

    Raises:
        ValueError: scores of different rows.
    """
    labelled = isinstance(steps[0][1], Scores)
    entries = []
    for place, (name, scores) in enumerate(steps):
        if scores.ids != steps[0][1].ids:
            raise ValueError(f"{name} has scores of other rows")
        own = _accuracy(scores) if labelled else {"margin_percent": margin_percent, **_losses(scores, groups)}
        entry = {"name": name, "n": len(scores.ids), **own, "before": None, "first": None}
        for key, other in (("before", steps[max(0, place - 1)][1]), ("first", steps[0][1])):
            if place and labelled:
                entry[key] = _labels_against(other, scores, groups)
            elif place:
                entry[key] = _losses_against(other, scores, groups, margin_percent, seed)
        entries.append(entry)
    return entries


def _accuracy(scores: Scores) -> dict[str, Any]:
    share = wilson(int(scores.correct.sum()), len(scores.ids))
    return {"accuracy": share.estimate, "accuracy_interval": share.to_json()}


def _losses(scores: AnswerScores, groups: np.ndarray) -> dict[str, Any]:
    return {"tokens": int(scores.tokens.sum()), **scores.figures(groups)}


def _labels_against(other: Scores, scores: Scores, groups: np.ndarray) -> dict[str, Any]:
    kld = clustered_mean(label_divergence(other, scores), groups)
    same = clustered_share(scores.predictions == other.predictions, groups)
    change = clustered_score_interval(scores.correct.astype(np.int64) - other.correct, groups)
    return {
        "kld": kld.estimate,
        "kld_interval": [None if limit is None else max(0.0, limit) for limit in kld.to_json()],
        "agreement": same.estimate,
        "agreement_interval": same.to_json(),
        "accuracy_difference": change.estimate,
        "accuracy_difference_interval": change.to_json(),
    }


def _losses_against(
    other: AnswerScores, scores: AnswerScores, groups: np.ndarray, margin_percent: float, seed: int
) -> dict[str, Any]:
    change = scores.row_losses - other.row_losses
    difference = paired_bootstrap(change, groups, seed, weights=scores.tokens)
    moved = paired_bootstrap(np.abs(change), groups, seed, weights=scores.tokens)
    same = clustered_share(np.abs(change) < math.log1p(margin_percent / 100), groups)
    return {
        "loss_difference": difference.estimate,
        "loss_difference_interval": difference.to_json(),
        "moved": moved.estimate,
        "moved_interval": moved.to_json(),
        "agreement": same.estimate,
        "agreement_interval": same.to_json(),
    }
