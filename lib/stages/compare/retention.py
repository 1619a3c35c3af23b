"""How much of what fine-tuning taught is left in each file, row by row: from scores of base, tuned model and files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lib.errors import InputError
from lib.runs.run import Run
from lib.scoring.log_probabilities import load_scores
from lib.scoring.metric import AnyScores, Metric
from lib.statistics.intervals import Interval
from lib.statistics.losses import limits, retention_warning, slope_through_origin

BASE_SCORES, TUNED_SCORES = "scores-base.jsonl", "scores-finetuned.jsonl"
"""Files of the product `evaluation`."""
MOST_NOISE = 0.1
"""Largest share of that change's square which may be noise of the two programs."""
GGUF, FOLDER = "gguf", "folder"
"""Kinds of entries: a file that llama.cpp runs, a folder that transformers loads."""
WITHOUT_RUN = "Only files of a run can be told apart from their base, and only with the scores of 03."


@dataclass(frozen=True)
class BaseScores:
    """What 03 knows about the start.

    Attributes:
        base: the base model's scores; None where there are none.
        tuned: the fine-tuned model's in the same program, to measure its noise; None where those of 03 are of another
            model than the run's GGUF.
        note: why there are none.
    """

    base: AnyScores | None = None
    tuned: AnyScores | None = None
    note: str = WITHOUT_RUN


@dataclass(frozen=True)
class Retentions:
    """Retention of the compared files.

    Attributes:
        by_name: slopes, without the reference, which keeps all by definition; empty where it is unknown.
        note: what they rest on, or why there are none.
    """

    by_name: dict[str, Interval] = field(default_factory=dict)
    note: str = WITHOUT_RUN


def base_scores(run: Run) -> BaseScores:
    """The scores of 03, where they are of this run's rows."""
    entries = run.manifest.entries()
    if "evaluation" not in entries:
        return BaseScores(note="03 was not run, so the base's scores are not known.")
    if entries["evaluation"].inputs.get("data") != entries["data"].digest:
        return BaseScores(note="03 was not run again after the data changed.")
    try:
        folder = run.require("evaluation").path
    except InputError as error:
        return BaseScores(note=f"The base's scores are not known: {error.found}")
    same = not other_model(run) and not _merged_into_other_weights(run)
    return BaseScores(load_scores(folder / BASE_SCORES), load_scores(folder / TUNED_SCORES) if same else None, "")


_STALE = (
    ("evaluation", "adapter", "03 was not run again after the training"),
    ("merged", "adapter", "04 was not run again after the training"),
    ("gguf", "merged", "05 was not run again after 04"),
)
"""Product, what it was made from, and in words that it was made from another one."""


def other_model(run: Run) -> str:
    """Why the fine-tuned model's scores of 03 are not those of the adapter in the run's GGUF; empty where they are."""
    entries = run.manifest.entries()
    if "evaluation" not in entries or "adapter" not in entries:
        return "03 was not run, so the adapter is left out."
    for product, source, words in _STALE:
        if {product, source} <= set(entries) and entries[product].inputs.get(source) != entries[source].digest:
            return f"{words}, so the adapter is left out."
    try:
        run.require("evaluation")
    except InputError as error:
        return f"The adapter is left out: {error.found}"
    return ""


def _merged_into_other_weights(run: Run) -> bool:
    """Whether the adapter was merged into other weights than those 03 scored it on: it scores one of an NF4 base on
    that base. In the error ladder that is what the merge changed; as noise between two programs it would be wrong."""
    entries = run.manifest.entries()
    if "merged" not in entries or entries["adapter"].facts.get("method") != "QLoRA":
        return False
    return entries["merged"].facts.get("merge_base") != "dequantized"


def with_retention(content: Mapping[str, Any], kept: Retentions, grid: Mapping[str, float]) -> dict[str, Any]:
    """The content of comparison.json with what is known now of the base: "retention", "retention_interval" and
    "source_grid" of every entry, "retention_note", and the warnings below the recommendation's own text ("advice").

    Nothing of it needs a file to be scored again, so it is filled in anew whenever a comparison is read.

    Args:
        grid: by file name, share of its weights in types on the grid of the base's weights.
    """
    files = [
        {**entry, **_kept(entry["type"], content["reference"], kept), "source_grid": grid.get(entry["file"])}
        for entry in content["files"]
    ]
    advice = content["recommendation"]
    own = advice.get("advice", advice["text"])
    named = [entry for entry in files if entry["kind"] == GGUF and advice["type"] in (None, entry["type"])]
    warning = retention_warning(*named)
    advice = {**advice, "advice": own, "text": f"{own}\n\n{warning}" if warning else own}
    return {**content, "files": files, "recommendation": advice, "retention_note": kept.note}


def _kept(name: str, reference: str, kept: Retentions) -> dict[str, Any]:
    """The share of what fine-tuning changed that is left; all of the reference, by definition, where it is known."""
    if name == reference or name not in kept.by_name:
        return {"retention": 1.0 if kept.by_name and name == reference else None, "retention_interval": None}
    return {"retention": kept.by_name[name].estimate, "retention_interval": limits(kept.by_name[name])}


def retentions(metric: Metric, scores: Mapping[str, AnyScores], start: BaseScores, groups: np.ndarray) -> Retentions:
    """The slope of every file's change from the base on the tuned model's (`slope_through_origin`).

    What moves are the rows' vectors (`Metric.vectors`): the log-odds of the labels, or the log-likelihood of the
    answers a token.

    Base (03, transformers) and files (07, llama.cpp) are scored by two programs, whose difference is noise in both
    changes. The fine-tuned model was scored by both: the mean square of the difference of its two scores over that of
    its change bounds the bias of every slope (`slope_through_origin`); above `MOST_NOISE` no slope is given.

    Args:
        scores: by name, the unquantized reference (the tuned model) first.
        groups: (n,) near-duplicate cluster of each row.
    """
    reference, *names = scores
    if start.base is None:
        return Retentions(note=start.note)
    if start.base.ids != scores[reference].ids:
        return Retentions(note="03 scored other rows.")
    base, tuned = metric.vectors(start.base), metric.vectors(scores[reference])
    moved = metric.movement(tuned - base)
    if moved < metric.least_move:
        found = f"Fine-tuning moved the test rows by {moved:.2g} {metric.move_unit} (root mean square)"
        return Retentions(note=f"{found}, too little to tell what share of it a file keeps.")
    noise = None
    if start.tuned is not None and start.tuned.ids == start.base.ids:
        noise = (metric.movement(tuned - metric.vectors(start.tuned)) / moved) ** 2
    if noise is not None and noise > MOST_NOISE:
        return Retentions(
            note=f"The scores of 03 and of this page differ on the same model by {100 * noise:.0f} % of the square of "
            "what fine-tuning changed, too much to tell what share of it a file keeps."
        )
    sure = "how much the two programs differ is not known" if noise is None else f"at most {noise:.1g} of it is noise"
    return Retentions(
        {name: slope_through_origin(tuned - base, metric.vectors(scores[name]) - base, groups) for name in names},
        f"Fine-tuning moved the {len(base):,} test rows by {moved:.3g} {metric.move_unit} (root mean square); {sure}.",
    )
