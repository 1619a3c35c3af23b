"""The error ladder: what each step from the trained adapter to the quantized file changed, from scores that exist.
Do two backends choose the same label, and where not: only on rows that were nearly undecided, or also elsewhere?
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lib.scoring.log_probabilities import NEAR_TIE, AnswerScores, Scores
from lib.stages.compare.advice import worse_on
from lib.stages.compare.judge import label_divergence
from lib.statistics.intervals import paired_bootstrap, wilson
from lib.statistics.paired import clustered_mean, clustered_score_interval, clustered_share

# The error ladder: what each step from the trained adapter to the quantized file changed, from scores that exist.
#
# A step is a model on one backend. What differs between neighbours: adapter → merged (the merge), merged → merged in
# float32 (16-bit → 32-bit arithmetic), that → GGUF (other file and runtime), GGUF → its quantized weights computed
# exactly (the rounding of weights, and the runtime back), those → the quantized file in llama.cpp (the runtime's
# arithmetic, which rounds activations too).

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


# Do two backends choose the same label, and where not: only on rows that were nearly undecided, or also elsewhere?
#
# Rows are sorted by how sure the first of the two is: the absolute margin between the two likeliest answer words.
# Rounding flips labels in the first bin (near ties); flips in the last ones mean that the two compute different things.

EDGES = (0.0, NEAR_TIE, 0.5, 1.0, 2.0)
"""Lower edges of the bins, nats; the last bin has no upper one."""


def by_margin(first: Scores, second: Scores) -> list[dict[str, Any]]:
    """Label agreement of two models on the same rows by the first one's margin.

    Returns:
        one entry a bin and one for all rows (low 0, high None, "all" True): "low" (inclusive) and "high" (exclusive;
        None = no limit) in nats, "n" (rows), "agree", "share" and "interval" (95 % Wilson); the last two are None
        where there are no rows.
    """
    if first.ids != second.ids:
        raise ValueError("scores of different rows")
    sure = np.abs(first.margins)
    same = first.predictions == second.predictions
    bins = []
    for low, high in zip(EDGES, (*EDGES[1:], None), strict=True):
        inside = (sure >= low) & (sure < (np.inf if high is None else high))
        bins.append({"low": low, "high": high, "all": False, **_agreement(same[inside])})
    return [*bins, {"low": 0.0, "high": None, "all": True, **_agreement(same)}]


def _agreement(same: np.ndarray) -> dict[str, Any]:
    n, agree = len(same), int(same.sum())
    interval = wilson(agree, n) if n else None
    return {
        "n": n,
        "agree": agree,
        "share": interval.estimate if interval else None,
        "interval": interval.to_json() if interval else None,
    }


def agreements(scores: Mapping[str, Scores], merged: tuple[str, Scores] | None) -> list[dict[str, Any]]:
    """The pairs that are shown: the merged model in transformers against every file, the reference against the others.

    Args:
        scores: by type, the reference first.
        merged: the merged model in transformers in words, and its scores; None where there is none.

    Returns:
        {"first", "second", "near_ties" (of the first), "bins"} for each pair.
    """
    reference, *others = scores
    firsts = [] if merged is None else [(*merged, [reference, *others])]
    firsts.append((reference, scores[reference], others))
    return [
        {"first": name, "second": other, "near_ties": first.near_ties, "bins": by_margin(first, scores[other])}
        for name, first, against in firsts
        for other in against
    ]
