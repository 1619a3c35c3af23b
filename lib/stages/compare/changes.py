"""From scores that exist: how much of what fine-tuning taught is left in each file, what each step from the adapter to
the quantized file changed (the error ladder), and whether two backends choose the same labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lib.errors import InputError
from lib.runs.files import data_file
from lib.runs.run import Run
from lib.scoring.log_probabilities import NEAR_TIE, Scores, load_scores
from lib.scoring.metric import AnyScores, Metric, RowGroups
from lib.stages.compare.child import DEQUANTIZED, MERGED, MERGED_FLOAT32
from lib.statistics.intervals import Interval, wilson
from lib.statistics.losses import keeps_little, limits, retention_warning, slope_through_origin

# How much of what fine-tuning taught is left in each file, row by row: from scores of base, tuned model and files.

BASE_SCORES, TUNED_SCORES = "scores-base.jsonl", "scores-finetuned.jsonl"
"""Files of the product `evaluation`."""
MOST_NOISE = 0.1
"""Largest share of that change's square which may be noise of the two programs."""
GGUF, FOLDER = "gguf", "folder"
"""Kinds of entries: a file that llama.cpp runs, a folder that transformers loads."""
UNTUNED = "Nothing was trained in this run, so there is no change that a file could lose."
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
        gain: what fine-tuning gained on these rows: the base's loss against the reference, in the metric's unit; None
            where the base's scores are not known.
    """

    by_name: dict[str, Interval] = field(default_factory=dict)
    note: str = WITHOUT_RUN
    gain: float | None = None


def base_scores(run: Run) -> BaseScores:
    """The scores of 03, where they are of this run's rows."""
    entries = run.manifest.entries()
    if run.untrained:
        return BaseScores(note=UNTUNED)
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


_STALE: list[list[str]] = data_file("stages/compare/notes.yaml")["stale"]
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
    "source_grid" of every entry, "retention_note", "fine_tuning_gain", and the recommendation's "warning".

    Nothing of it needs a file to be scored again, so it is filled in anew whenever a comparison is read.

    Args:
        grid: by file name, share of its weights in types on the grid of the base's weights.
    """
    files = [
        {**entry, **_kept(entry["type"], content["reference"], kept), "source_grid": grid.get(entry["file"])}
        for entry in content["files"]
    ]
    advice = {**content["recommendation"], "warning": _warning(files, content["recommendation"]["type"])}
    told = {"retention_note": kept.note, "fine_tuning_gain": kept.gain}
    return {**content, "files": files, "recommendation": advice, **told}


def _warning(files: Sequence[Mapping[str, Any]], recommended: str | None) -> str:
    """Of the recommended file, if it keeps little, and with it of every other that does; of all that do where none is
    recommended, the one that keeps least first."""
    poor = sorted(filter(keeps_little, files), key=lambda entry: (entry["type"] != recommended, entry["retention"]))
    return retention_warning(*poor) if poor and recommended in (None, poor[0]["type"]) else ""


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
    moved, gain = metric.movement(tuned - base), metric.loss(scores[reference], start.base)
    if moved < metric.least_move:
        found = f"Fine-tuning moved the test rows by {moved:.2g} {metric.move_unit} (root mean square)"
        return Retentions(note=f"{found}, too little to tell what share of it a file keeps.", gain=gain)
    noise = None
    if start.tuned is not None and start.tuned.ids == start.base.ids:
        noise = (metric.movement(tuned - metric.vectors(start.tuned)) / moved) ** 2
    if noise is not None and noise > MOST_NOISE:
        note = data_file("stages/compare/notes.yaml")["noise"].format(share=100 * noise)
        return Retentions(note=note, gain=gain)
    sure = "how much the two programs differ is not known" if noise is None else f"at most {noise:.1g} of it is noise"
    return Retentions(
        {name: slope_through_origin(tuned - base, metric.vectors(scores[name]) - base, groups) for name in names},
        f"Fine-tuning moved the {len(base):,} test rows by {moved:.3g} {metric.move_unit} (root mean square); {sure}.",
        gain,
    )


# The error ladder: what each step from the trained adapter to the quantized file changed, from scores that exist.
#
# A step is a model on one backend. What differs between neighbours: adapter → merged (the merge), merged → merged in
# float32 (16-bit → 32-bit arithmetic), that → GGUF (other file and runtime), GGUF → its quantized weights computed
# exactly (the rounding of weights, and the runtime back), those → the quantized file in llama.cpp (the runtime's
# arithmetic, which rounds activations too).

STEP_SCORES = {way: f"scores-{way.replace('_', '-')}.jsonl" for way in (MERGED, MERGED_FLOAT32, DEQUANTIZED)}
"""Scores of the models that transformers computes, beside those of the files."""


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
    files += [(f"GGUF {reference}, llama.cpp", f"scores-{reference}.jsonl")]
    exact = (f"weights of {name}, transformers (float32)", STEP_SCORES[DEQUANTIZED])
    files += [exact] if asked.get("dequantized", True) else []
    files += [(f"{name}, llama.cpp", f"scores-{name}.jsonl")]
    steps = [(words, load_scores(folder / file)) for words, file in files]
    note = "" if run.untrained else other_model(run)
    if not note and not run.untrained:
        adapter = load_scores(run.folder / "evaluation" / TUNED_SCORES)
        if adapter.ids == steps[0][1].ids:
            entries = run.manifest.entries()
            method, dtype = entries["adapter"].facts.get("method", "LoRA"), entries["evaluation"].facts.get("dtype")
            computed = f" ({dtype})" if dtype else ""
            words = "trained model (full)" if run.whole else f"adapter ({method})"
            steps.insert(0, (f"{words}, transformers{computed}", adapter))
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
        margin: loss from which a file is not good enough, in `metric.loss_unit`.
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
