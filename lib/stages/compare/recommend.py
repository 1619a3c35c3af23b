"""Which file to ship: by the stage's own rule, or by a size and a loss that the user names. Words are in templates/."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.runs.files import render
from lib.scoring.metric import REFERENCE_VERDICT, Entry, Metric, metric_in
from lib.stages.compare.changes import GGUF
from lib.statistics.losses import retention_warning
from lib.statistics.verdicts import in_words

SURVIVES = 0.025
"""Level of a corrected p of "not equivalent": the verdict's 95 % interval is two one-sided tests at this level."""


def _written(template: str, **values: Any) -> str:
    """A template's paragraphs, each on one line, with a blank line between them."""
    text = render(Path(__file__).with_name("templates") / template, **values)
    parts = (re.sub("[ \n]+", " ", part).strip() for part in re.split("\n{2,}", text))
    return "\n\n".join(part for part in parts if part)


def worse_on(entry: Entry) -> str | None:
    """The rows on which a file is judged worse: "all", "leak-free", or None."""
    if entry["verdict"] == "worse":
        return "all"
    return "leak-free" if (entry.get("leak_free") or {}).get("verdict") == "worse" else None


def recommend(
    metric: Metric, entries: Sequence[Entry], margin: float, floor: float | None, compared: int | None = None
) -> dict[str, Any]:
    """The recommendation.

    Args:
        entries: one a GGUF file as in comparison.json, the reference (verdict "reference") among them.
        margin: what counts as equivalent, in `metric.loss_unit`.
        floor: what the reference must beat (`Metric.floor`).
        compared: files and folders that were compared with the reference; None = those of `entries`.

    Returns:
        "rule", "type" (None when the evidence does not suffice), "reason" ("equivalent" | "better" | "insufficient" |
        "reference"), "rows_needed" (None where more rows would not help or are not needed), "next_higher" ({type
        judged worse: next larger one that is not, or the reference}), "text" (a paragraph; behind a blank line another
        on the files judged worse, where there are any).
    """
    reference = next(e for e in entries if e["verdict"] == REFERENCE_VERDICT)
    files = sorted((e for e in entries if e is not reference), key=lambda e: e["bytes"])
    kept = [e for e in files if not worse_on(e)]
    good = [e for e in kept if e["verdict"].startswith(("equivalent", "better")) and e.get("endpoint") != "margin"]
    chosen, near, needed = None, None, None
    if not files:
        reason, words = "insufficient", "alone"
    elif not metric.learned(reference, floor):
        reason = words = "reference"
    elif good:
        chosen = good[0]
        reason = words = chosen["verdict"].split()[0]
    else:
        reason = words = "insufficient"
        near = min(kept if metric.tells_rows else files, key=metric.distance, default=None)
        needed = metric.rows_needed(near, margin) if metric.tells_rows and near else None
    steps = next_higher(files, reference)
    text = _written(
        "recommendation.j2",
        metric=metric,
        reason=words,
        reference=reference,
        floor=floor,
        margin=margin,
        files=files,
        kept=kept,
        by_type={e["type"]: e for e in files},
        chosen=chosen,
        compared=compared or len(files),
        survives=SURVIVES,
        near=near,
        rows_needed=needed,
        smaller_open=_smaller_open(metric, chosen, files, margin) if chosen else [],
        next_higher=steps,
        in_words=in_words,
    )
    return {
        "rule": _written("rule.j2", metric=metric),
        "type": chosen and chosen["type"],
        "reason": reason,
        "rows_needed": needed,
        "next_higher": steps,
        "text": text,
    }


def next_higher(files: Sequence[Entry], reference: Entry) -> dict[str, str]:
    """For each type judged worse (on all or on the leak-free rows) the next larger one that is not, or the reference.

    Args:
        files: by size, the smallest first.
    """
    steps = {}
    for i, entry in enumerate(files):
        if worse_on(entry):
            larger = (e for e in files[i + 1 :] if not worse_on(e) and e["bytes"] > entry["bytes"])
            steps[entry["type"]] = next(larger, reference)["type"]
    return steps


def _smaller_open(
    metric: Metric, chosen: Entry, files: Sequence[Entry], margin: float
) -> list[tuple[Entry, int | None]]:
    """Files below the chosen one of which it is open whether they are as good, and the rows that would tell."""
    below = [e for e in files if metric.tells_rows and e["bytes"] < chosen["bytes"]]
    by_margins = [e["verdict"] == "better" and e["endpoint"] != "accuracy" for e in below]
    undecided = [e for e, only in zip(below, by_margins, strict=True) if only or e["verdict"].startswith("cannot")]
    return [(e, metric.rows_needed(e, margin)) for e in undecided]


def step_file(files: Sequence[Entry], recommendation: Mapping[str, Any]) -> str | None:
    """The GGUF file the ladder ends at: the recommended one, else the smallest not judged worse, else the smallest.

    Args:
        files: entries of the quantized GGUF files.
    """
    if recommendation["type"] is not None or not files:
        return recommendation["type"]
    kept = [entry for entry in files if not worse_on(entry)]
    return min(kept or files, key=lambda entry: entry["bytes"])["type"]


# By limits that the user names, from a finished comparison.


def pick_file(comparison: Mapping[str, Any], max_mb: float | None, max_loss: float) -> dict[str, Any]:
    """The file to ship, or why there is none.

    Args:
        comparison: content of comparison.json.
        max_mb: largest size, 10⁶ bytes; None = any.
        max_loss: accuracy points; percent of answer perplexity where the rows have no labels.

    Returns:
        "rule", "limits", "type" and "file" (None when there is none), "reason" ("shown" | "open" | "refuted" | "size" |
        "reference"), "rows_needed" (of the nearest open file, if its difference is the true one), "text", and
        "candidates": {type, file, megabytes, loss, interval, fits, evidence ("shown" | "open" | "refuted"), leak_free
        (loss and interval there, where those rows call it worse and do not show the limit; else None)} of every GGUF
        file, smallest first.

    Raises:
        InputError: limits that nothing can meet.
    """
    if not all(0 < limit < math.inf for limit in (max_loss, 1.0 if max_mb is None else max_mb)):
        raise InputError(f"max-mb {max_mb}, max-loss {max_loss}.", "finite numbers above 0.", "correct them.")
    metric = metric_in(comparison["files"])
    files = sorted((e for e in comparison["files"] if e.get("kind", GGUF) == GGUF), key=lambda e: e["bytes"])
    candidates = [_candidate(e, metric, max_mb, max_loss) for e in files]
    fitting = [c for c in candidates if c["fits"]]
    shown = [c for c in fitting if c["evidence"] == "shown"]
    chosen, near, needed = None, None, None
    if not fitting:
        reason = "size"
    elif comparison["recommendation"]["reason"] == "reference":
        reason = "reference"
    elif shown:
        chosen, reason = shown[0], "shown"
    else:
        open_files = [c for c in fitting if c["evidence"] == "open"]
        reach = {c["type"]: math.inf if c["interval"][1] is None else c["interval"][1] for c in open_files}
        near = min(open_files, key=lambda c: reach[c["type"]], default=None)
        reason = "open" if near else "refuted"
        if near and not near["leak_free"] and near["loss"] < max_loss:
            needed = metric.rows_needed(_entry(files, near["type"]), max_loss, one_sided=True)
    text = _written(
        "pick.j2",
        unit=metric.loss_unit,
        max_loss=max_loss,
        reason=reason,
        smallest=candidates[0],
        too_large=_over(candidates[0]["megabytes"], max_mb),
        unlearned=comparison["recommendation"].get("text", ""),
        chosen=chosen,
        warning=retention_warning(_entry(files, chosen["type"])) if chosen else "",
        fitting=fitting,
        near=near,
        rows_needed=needed,
    )
    return {
        "rule": _written("pick_rule.j2"),
        "limits": {"max_mb": max_mb, "max_loss": max_loss, "unit": metric.loss_unit},
        "type": chosen and chosen["type"],
        "file": chosen and chosen["file"],
        "reason": reason,
        "rows_needed": needed,
        "text": text,
        "candidates": candidates,
    }


def _entry(files: Sequence[Entry], name: str) -> Entry:
    return next(e for e in files if e["type"] == name)


def _candidate(entry: Entry, metric: Metric, max_mb: float | None, max_loss: float) -> dict[str, Any]:
    """Loss (positive = worse) with its interval, in the unit of the limit."""
    loss, low, high = (0.0, 0.0, 0.0) if entry["verdict"] == REFERENCE_VERDICT else metric.loss(entry)
    evidence = "open" if low is None or low <= max_loss < high else "shown" if high <= max_loss else "refuted"
    free = None
    if evidence == "shown" and (entry.get("leak_free") or {}).get("verdict") == "worse":
        value, *limits = metric.loss(entry["leak_free"])
        if limits[1] is None or limits[1] > max_loss:
            evidence, free = "open", {"loss": value, "interval": limits, "n": entry["leak_free"]["n"]}
    megabytes = entry["bytes"] / 1e6
    return {
        "type": entry["type"],
        "file": entry["file"],
        "megabytes": megabytes,
        "loss": loss,
        "interval": [low, high],
        "fits": max_mb is None or megabytes <= max_mb,
        "evidence": evidence,
        "leak_free": free,
    }


def _over(megabytes: float, max_mb: float | None) -> str:
    """The size with as many digits as show that it is larger than the limit."""
    digits = next((d for d in range(2, 7) if max_mb is None or round(megabytes, d) > max_mb), 6)
    return f"{megabytes:.{digits}f}"
