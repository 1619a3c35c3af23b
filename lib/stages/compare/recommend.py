"""Which file to ship, by the one rule (`lib.statistics.noninferiority`): within the run's margin, or within a size and
a loss that the user names. Words are in templates/."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.errors import InputError, refusal
from lib.language import sentences
from lib.models.runtime_folders import LLAMA_CPP, RUNTIMES, TRANSFORMERS
from lib.runs.render import render
from lib.scoring.metric import Entry, Metric, metric_in
from lib.stages.compare.changes import GGUF, UNTUNED
from lib.statistics import noninferiority
from lib.statistics.losses import retention_warning


def _written(template: str, **values: Any) -> str:
    """A template's paragraphs, each on one line, with a blank line between them."""
    text = render(Path(__file__).with_name("templates") / template, **values)
    parts = (re.sub("[ \n]+", " ", part).strip() for part in re.split("\n{2,}", text))
    return "\n\n".join(part for part in parts if part)


def judge(
    metric: Metric, reference: Entry, others: Sequence[Entry], margin: float, floor: float | None
) -> dict[str, str]:
    """Verdict of every file and folder but the reference, by type."""
    if metric.problem(reference, floor):
        return {entry["type"]: noninferiority.NO_VERDICT for entry in others}
    tested = smaller(reference, others)
    return noninferiority.verdicts(tested, [entry for entry in others if entry not in tested], margin)


def smaller(reference: Entry, others: Sequence[Entry], runtimes: Collection[str] = (LLAMA_CPP,)) -> list[Entry]:
    """The files that save anything: one that is as large as the reference, or larger, is never recommended.

    Args:
        runtimes: programs whose files are meant, as entries name them.
    """
    return [entry for entry in others if program(entry) in runtimes and entry["bytes"] < reference["bytes"]]


def program(entry: Entry) -> str:
    """What runs a file or folder; an older comparison does not say so of folders."""
    return entry.get("runtime") or (LLAMA_CPP if entry.get("kind", GGUF) == GGUF else TRANSFORMERS)


def recommend(
    metric: Metric,
    reference: Entry,
    files: Sequence[Entry],
    margin: float,
    floor: float | None,
    trained: bool = True,
    runtimes: Collection[str] = (LLAMA_CPP,),
) -> dict[str, Any]:
    """The recommendation: the smallest file that is good enough.

    Args:
        reference, files: entries of comparison.json; of the files only those of `smaller` can be recommended;
            folders for other programs are named in the details.
        margin: in `metric.loss_unit`. floor: what the reference must beat (`Metric.floor`).
        runtimes: programs whose files are meant.
        trained: False of a run in which nothing is trained, which nobody is told to do first.

    Returns:
        "rule", "formulas" (with which it can be applied by hand), "margin", "unit", "type" (None when no file is good
        enough), "reason" ("good enough" | "not shown", or why nothing can be judged: "alone" | "few" | "constant" |
        "unlearned"), "tested" (types in the order of the tests, to the one that ended them), "ended_by" (that one; None
        where every file is good enough), "rows_needed" (with which that one would be shown, if what was seen of it is
        true; None where more rows would not help or are not needed), "unproven" (where nothing is recommended for want
        of rows: the smallest file without a sign of harm, or None); in words "headline" (a sentence), "text" (how sure
        that is and the facts beside it; with the headline at most 60 words) and "details" (paragraphs behind blank
        lines). Whoever reads a comparison adds a "warning" (`lib.stages.compare.changes.with_retention`).
    """
    folders = [entry for entry in files if entry["kind"] != GGUF and program(entry) not in runtimes]
    files = smaller(reference, files, runtimes)
    order, folds = noninferiority.by_size(files), reference.get("folds")
    passed = noninferiority.good_enough(files, margin)
    problem = "alone" if not files else metric.problem(reference, floor)
    # by this margin, which may be a user's own
    verdict = {} if problem else noninferiority.verdicts(files, folders, margin)
    chosen = None if problem or not passed else order[len(passed) - 1]
    ended = None if problem or len(passed) == len(order) else order[len(passed)]
    needed = _rows_needed(metric, ended, margin) if ended else None
    reason = problem or (noninferiority.GOOD_ENOUGH if chosen else noninferiority.NOT_SHOWN)
    harmless = noninferiority.no_sign_of_harm(files, margin) if reason in (noninferiority.NOT_SHOWN, "few") else []
    unproven = order[len(harmless) - 1] if harmless else None
    write = functools.partial(
        _written,
        "recommendation.j2",
        metric=metric,
        worst=noninferiority.worst_limit,
        reason=reason,
        trained=trained,
        gguf_alone=tuple(runtimes) == (LLAMA_CPP,),
        reference=reference,
        floor=floor,
        margin=margin,
        chosen=chosen,
        ended=ended,
        unproven=unproven,
        limit_nats=noninferiority.NO_HARM_NATS,
        rows_at_best=noninferiority.rows_for(0.0, margin / 100) if unproven else None,
        rows_needed=needed and _two_digits(needed),
        after=[e["type"] for e in order[len(passed) + 1 :] if verdict.get(e["type"]) == noninferiority.NOT_SHOWN],
        folds=folds,
        fewest=noninferiority.FEWEST_GROUPS,
        groups=noninferiority.fewest_groups(reference),
        least_margin=100 * noninferiority.least_margin(reference["n"] / reference.get("copies_effect", 1.0)),
        worse=[entry for entry in order if verdict.get(entry["type"]) == noninferiority.WORSE],
        **{
            f"{name}_folders": [entry for entry in folders if verdict.get(entry["type"]) == word]
            for name, word in (
                ("good", noninferiority.GOOD_ENOUGH),
                ("open", noninferiority.NOT_SHOWN),
                ("worse", noninferiority.WORSE),
            )
        },
    )
    return {
        "rule": _written(
            "rule.j2",
            metric=metric,
            margin=margin,
            level=noninferiority.LEVEL,
            fewest=noninferiority.FEWEST_GROUPS,
            folds=folds,
            gguf_alone=tuple(runtimes) == (LLAMA_CPP,),
        ),
        "formulas": _written("formulas.j2", metric=metric, folds=folds),
        "margin": margin,
        "unit": metric.loss_unit,
        "type": chosen and chosen["type"],
        "reason": reason,
        "tested": [] if problem else [entry["type"] for entry in order[: len(passed) + 1]],
        "ended_by": ended and ended["type"],
        "rows_needed": needed,
        "unproven": unproven and unproven["type"],
        "headline": write(part="headline"),
        "text": sentences(one for part in ("confidence", "facts") for one in write(part=part).split("\n\n")),
        "details": write(part="details"),
    }


def reworded(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """The recommendation of a comparison.json, which is kept in English, in the language of this process."""
    reference, *others = comparison["files"]
    stored, metric = comparison["recommendation"], metric_in(comparison["files"])
    floor, trained = comparison["conditions"]["floor"], _of_trained(comparison)
    return {**stored, **recommend(metric, reference, others, stored["margin"], floor, trained)}


def _of_trained(comparison: Mapping[str, Any]) -> bool:
    return comparison.get("retention_note") != UNTUNED


def _rows_needed(metric: Metric, entry: Entry, margin: float) -> int | None:
    """Rows like these that would show the file on all of them and on the leak-free ones, whose share stays the same;
    None where the loss of either is too large to be shown, or has no limit."""
    found = []
    for part in (entry, entry.get("leak_free")):
        if part:
            rows = None if part["loss_limit"] is None else metric.rows_needed(part, margin)
            if rows is None:
                return None
            found.append(math.ceil(rows * entry["n"] / part["n"]))
    return max(found)


def _two_digits(rows: int) -> int:
    """Rounded up: an estimate from a few changed rows has no more digits."""
    step = 10 ** max(len(str(rows)) - 2, 0)
    return -(-rows // step) * step


def step_file(files: Sequence[Entry], recommendation: Mapping[str, Any]) -> str | None:
    """The GGUF file the ladder of steps ends at: the recommended one, else the smallest not worse, else the smallest.

    Args:
        files: entries of the quantized GGUF files.
    """
    if recommendation["type"] is not None or not files:
        return recommendation["type"]
    kept = [entry for entry in files if entry["verdict"] != noninferiority.WORSE]
    return min(kept or files, key=lambda entry: entry["bytes"])["type"]


# By limits that the user names, from a finished comparison.


def pick_file(
    comparison: Mapping[str, Any], max_mb: float | None, max_loss: float, runtimes: Sequence[str] = ()
) -> dict[str, Any]:
    """The smallest file that is good enough for a loss, by the same rule, if it fits; the reference loses nothing.

    Args:
        comparison: content of comparison.json.
        max_mb: largest size, 10⁶ bytes; None = any.
        max_loss: the margin: accuracy points; percent of answer perplexity where the rows have no labels.
        runtimes: names of the programs whose files are meant, whatever their case; none = llama.cpp.

    Returns:
        what `recommend` says ("reason" may be "size": that file is too large) with "limits", "file" (of the type) and
        "candidates": {type, file, runtime, megabytes, loss, loss_limit, fits, good_enough, peak_memory_mib,
        generation_tokens_per_second} of every file of these programs, the largest first; "measured_on":
        processor and threads of speed and memory.

    Raises:
        InputError: limits that nothing can meet; a comparison by an older version; a runtime of which nothing was
            compared, or folders beside folds, which they are not judged on.
    """
    if not all(0 < limit < math.inf for limit in (max_loss, 1.0 if max_mb is None else max_mb)):
        raise InputError(f"max-mb {max_mb}, max-loss {max_loss}.", "finite numbers above 0.", "correct them.")
    reference, *others = comparison["files"]
    if "headline" not in comparison["recommendation"] or any("loss_limit" not in entry for entry in others):
        raise refusal("compare/older-comparison")
    metric, programs = metric_in(comparison["files"]), _programs(comparison["files"], runtimes)
    files, whole = smaller(reference, others, programs), program(reference) in programs
    floor, trained = comparison["conditions"]["floor"], _of_trained(comparison)
    found = recommend(metric, reference, files, max_loss, floor, trained, programs)
    chosen = next((entry for entry in files if entry["type"] == found["type"]), None)
    if chosen is None and whole and found["reason"] in (noninferiority.NOT_SHOWN, "alone"):
        chosen = reference
    passed = {chosen["type"], reference["type"], *noninferiority.good_enough(files, max_loss)} if chosen else set()
    fits = chosen is None or max_mb is None or chosen["bytes"] / 1e6 <= max_mb
    candidates = [
        {
            **{key: entry[key] for key in ("type", "file")},
            "runtime": program(entry),
            "megabytes": entry["bytes"] / 1e6,
            "loss": entry.get("loss") or 0.0,
            "loss_limit": entry.get("loss_limit"),
            "fits": max_mb is None or entry["bytes"] / 1e6 <= max_mb,
            "good_enough": entry["type"] in passed,
            **{key: entry.get(key) for key in ("generation_tokens_per_second", "peak_memory_mib")},
        }
        for entry in noninferiority.by_size([*([reference] if whole else []), *files])
    ]
    headline = _written(
        "pick.j2",
        headline=found["headline"],
        reference=reference,
        chosen=chosen,
        too_large=None if fits else _over(chosen["bytes"] / 1e6, max_mb),
    )
    taken = chosen if fits else None
    return {
        **found,
        "limits": {"max_mb": max_mb, "max_loss": max_loss, "unit": metric.loss_unit},
        "measured_on": {key: comparison["conditions"].get(key) for key in ("processor", "n_threads")},
        "type": taken and taken["type"],
        "file": taken and taken["file"],
        "reason": "size" if not fits else noninferiority.GOOD_ENOUGH if taken else found["reason"],
        "headline": headline,
        "warning": retention_warning(chosen) if chosen else "",
        "candidates": candidates,
    }


def _programs(entries: Sequence[Entry], asked: Sequence[str]) -> tuple[str, ...]:
    """The programs of these names, in the comparison's spelling."""
    known = {name.lower(): name for name in map(program, entries)}
    names = [name.strip().lower() for name in asked if name.strip()] or [LLAMA_CPP]
    aliases = {runtime.module: runtime.title.lower() for runtime in RUNTIMES}
    names = [aliases.get(name, name) for name in names]
    if absent := [name for name in names if name not in known]:
        raise refusal("compare/no-such-runtime", absent=", ".join(absent), known=", ".join(known.values()))
    if names != [LLAMA_CPP] and entries[0].get("folds"):
        raise refusal("compare/folders-and-folds")
    return tuple(known[name] for name in names)


def _over(megabytes: float, max_mb: float | None) -> str:
    """The size with as many digits as show that it is larger than the limit."""
    digits = next((d for d in range(2, 7) if max_mb is None or round(megabytes, d) > max_mb), 6)
    return f"{megabytes:.{digits}f}"
