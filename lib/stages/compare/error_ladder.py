"""From scores that exist: what each step from the adapter to the quantized file changed (the error ladder), and whether
two backends choose the same labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.scoring.log_probabilities import NEAR_TIE, Scores, load_scores
from lib.scoring.metric import AnyScores, Metric, RowGroups
from lib.stages.compare.child import DEQUANTIZED, MERGED, MERGED_FLOAT32
from lib.stages.compare.recommend import worse_on
from lib.stages.compare.retention import TUNED_SCORES, other_model
from lib.statistics.intervals import wilson

if TYPE_CHECKING:
    from lib.runs.run import Run

# The error ladder: what each step from the trained adapter to the quantized file changed, from scores that exist.
#
# A step is a model on one backend. What differs between neighbours: adapter → merged (the merge), merged → merged in
# float32 (16-bit → 32-bit arithmetic), that → GGUF (other file and runtime), GGUF → its quantized weights computed
# exactly (the rounding of weights, and the runtime back), those → the quantized file in llama.cpp (the runtime's
# arithmetic, which rounds activations too).

STEP_SCORES = {way: f"scores-{way.replace('_', '-')}.jsonl" for way in (MERGED, MERGED_FLOAT32, DEQUANTIZED)}
"""Scores of the models that transformers computes, beside those of the files."""


def step_file(files: Sequence[Mapping[str, Any]], recommendation: Mapping[str, Any]) -> str | None:
    """The GGUF file the ladder ends at: the recommended one, else the smallest not judged worse, else the smallest.

    Args:
        files: entries of the quantized GGUF files.
    """
    if recommendation["type"] is not None or not files:
        return recommendation["type"]
    kept = [entry for entry in files if not worse_on(entry)]
    return min(kept or files, key=lambda entry: entry["bytes"])["type"]


def steps_of(
    run: Run, folder: Path, content: Mapping[str, Any], metric: Metric, rows: RowGroups
) -> tuple[list[dict[str, Any]], str]:
    """The error ladder from the scores of 03 and of a comparison, and why a step of 03 is left out.

    Args:
        folder, content: of the comparison; without "steps" there is no ladder.
    """
    if "steps" not in content:
        return [], ""
    asked, reference = content["steps"], content["reference"]
    name = asked["file"]
    files = [(asked["merged"], STEP_SCORES[MERGED])]
    files += [(asked["merged_float32"], STEP_SCORES[MERGED_FLOAT32])] if asked["merged_float32"] else []
    files += [
        (f"GGUF {reference}, llama.cpp", f"scores-{reference}.jsonl"),
        (f"weights of {name}, transformers (float32)", STEP_SCORES[DEQUANTIZED]),
        (f"{name}, llama.cpp", f"scores-{name}.jsonl"),
    ]
    steps = [(words, load_scores(folder / file)) for words, file in files]
    note = other_model(run)
    if not note:
        adapter = load_scores(run.folder / "evaluation" / TUNED_SCORES)
        if adapter.ids == steps[0][1].ids:
            method = run.manifest.entries()["adapter"].facts.get("method", "LoRA")
            steps.insert(0, (f"adapter ({method}), transformers", adapter))
        else:
            note = "03 scored other rows, so the adapter is left out."
    conditions = content["conditions"]
    margin = conditions[metric.margin_condition]
    return error_ladder(metric, steps, rows.groups, margin, conditions["seed"]), note


def error_ladder(
    metric: Metric, steps: Sequence[tuple[str, AnyScores]], groups: np.ndarray, margin: float = 1.0, seed: int = 0
) -> list[dict[str, Any]]:
    """Every step against the one before and against the first.

    Args:
        steps: name and scores on the same rows, in order.
        groups: (n,) near-duplicate cluster of each row.
        margin: what counts as equivalent, in `metric.loss_unit`.
        seed: of the bootstrap.

    Returns:
        for each "name", "n", what `metric.step` says, and "before" and "first": what `metric.step_change` says, None
        for the first step.

    Raises:
        ValueError: scores of different rows.
    """
    entries = []
    for place, (name, scores) in enumerate(steps):
        if scores.ids != steps[0][1].ids:
            raise ValueError(f"{name} has scores of other rows")
        entry = {"name": name, "n": len(scores.ids), **metric.step(scores, groups, margin)}
        for key, earlier in (("before", place - 1), ("first", 0)):
            entry[key] = metric.step_change(steps[earlier][1], scores, groups, margin, seed) if place else None
        entries.append(entry)
    return entries


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
    parts = [
        (low, high, False, (sure >= low) & (sure < (np.inf if high is None else high)))
        for low, high in zip(EDGES, (*EDGES[1:], None), strict=True)
    ]
    found = []
    for low, high, whole, mask in [*parts, (0.0, None, True, np.ones(len(same), dtype=bool))]:
        n, agree = int(mask.sum()), int(same[mask].sum())
        entry = {"low": low, "high": high, "all": whole, "n": n, "agree": agree, "share": None, "interval": None}
        if n:
            interval = wilson(agree, n)
            entry |= {"share": interval.estimate, "interval": interval.to_json()}
        found.append(entry)
    return found


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
