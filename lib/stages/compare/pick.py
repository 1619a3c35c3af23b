"""Which file fits a size and a loss that the user names: by a stated rule, from a finished comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lib.errors import InputError
from lib.scoring.metric import REFERENCE_VERDICT, Metric, metric_in
from lib.stages.compare.retention import GGUF
from lib.statistics.losses import retention_warning

RULE = (
    "Of the GGUF files no larger than the limit take the smallest whose loss is shown to be at most the one "
    "allowed: the whole 95 % interval of the paired difference from the reference lies on the allowed side; where the "
    "leak-free rows judge it worse, theirs too. The reference itself counts as without loss. A file is refuted when "
    "its whole interval lies beyond, and open when the limit is inside. Each file is asked alone, without correction "
    "for their number."
)


def pick(comparison: Mapping[str, Any], max_mb: float | None, max_loss: float) -> dict[str, Any]:
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
    unit = metric.loss_unit
    files = sorted((e for e in comparison["files"] if e.get("kind", GGUF) == GGUF), key=lambda e: e["bytes"])
    candidates = [_candidate(e, metric, max_mb, max_loss) for e in files]
    fitting = [c for c in candidates if c["fits"]]
    shown = [c for c in fitting if c["evidence"] == "shown"]
    needed = None
    if not fitting:
        chosen, reason = None, "size"
        text = (
            f"None: the smallest file, {candidates[0]['type']}, takes {_over(candidates[0]['megabytes'], max_mb)} MB."
        )
    elif comparison["recommendation"]["reason"] == "reference":
        chosen, reason, text = None, "reference", comparison["recommendation"]["text"]
    elif shown:
        chosen, reason, text = shown[0], "shown", _chosen(shown[0], unit, max_loss)
        warning = retention_warning(next(e for e in files if e["type"] == chosen["type"]))
        text += f" {warning}" if warning else ""
    else:
        chosen, reason = None, "open" if any(c["evidence"] == "open" for c in fitting) else "refuted"
        text = _none(fitting, unit, max_loss)
        needed, more = _more_rows(files, fitting, metric, max_loss)
        text += more
    text += _leaky(fitting, chosen, unit)
    return {
        "rule": RULE,
        "limits": {"max_mb": max_mb, "max_loss": max_loss, "unit": unit},
        "type": chosen and chosen["type"],
        "file": chosen and chosen["file"],
        "reason": reason,
        "rows_needed": needed,
        "text": text,
        "candidates": candidates,
    }


def _candidate(entry: Mapping[str, Any], metric: Metric, max_mb: float | None, max_loss: float) -> dict[str, Any]:
    """Loss (positive = worse) with its interval, in the unit of the limit."""
    if entry["verdict"] == REFERENCE_VERDICT:
        loss, low, high = 0.0, 0.0, 0.0
    else:
        loss, low, high = metric.loss(entry)
    megabytes = entry["bytes"] / 1e6
    evidence = "open" if low is None or low <= max_loss < high else "shown" if high <= max_loss else "refuted"
    free = metric.loss(entry["leak_free"]) if evidence == "shown" and _worse_leak_free(entry) else None
    leaky = free is not None and not (free[2] is not None and free[2] <= max_loss)
    return {
        "type": entry["type"],
        "file": entry["file"],
        "megabytes": megabytes,
        "loss": loss,
        "interval": [low, high],
        "fits": max_mb is None or megabytes <= max_mb,
        "evidence": "open" if leaky else evidence,
        "leak_free": {"loss": free[0], "interval": list(free[1:]), "n": entry["leak_free"]["n"]} if leaky else None,
    }


def _worse_leak_free(entry: Mapping[str, Any]) -> bool:
    return (entry.get("leak_free") or {}).get("verdict") == "worse"


def _over(megabytes: float, max_mb: float | None) -> str:
    """The size with as many digits as show that it is larger than the limit."""
    digits = next((d for d in range(2, 7) if max_mb is None or round(megabytes, d) > max_mb), 6)
    return f"{megabytes:.{digits}f}"


def _loss(candidate: Mapping[str, Any], unit: str) -> str:
    low, high = candidate["interval"]
    limits = "no interval" if low is None else f"95 % interval {_signed(low)} to {_signed(high)}"
    return f"loss {_signed(candidate['loss'])} {unit} ({limits})"


def _signed(value: float) -> str:
    return f"{value:+.2f}" if round(value, 2) else "0.00"


def _leaky(fitting: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any] | None, unit: str) -> str:
    """What the leak-free rows say against files smaller than the chosen one."""
    against = [c for c in fitting if c["leak_free"] and (chosen is None or c["megabytes"] < chosen["megabytes"])]
    return "".join(
        f" {c['type']} is judged worse on the {c['leak_free']['n']:,} leak-free rows ({_loss(c['leak_free'], unit)}), "
        "so it is not chosen."
        for c in against
    )


def _chosen(candidate: Mapping[str, Any], unit: str, max_loss: float) -> str:
    shown = f"{_loss(candidate, unit)}, shown to be at most {max_loss:g}"
    return f"{candidate['type']}, {candidate['megabytes']:.2f} MB: {shown}."


def _none(fitting: Sequence[Mapping[str, Any]], unit: str, max_loss: float) -> str:
    near = _nearest(fitting)
    if near is None:
        best = min(fitting, key=lambda c: c["loss"])
        least = f"least {best['type']}, {_loss(best, unit)}"
        return f"None: every file that fits loses more than {max_loss:g} {unit}; {least}."
    size = f"{near['megabytes']:.2f} MB"
    return f"None: the evidence does not suffice. Nearest is {near['type']}, {size}: {_loss(near, unit)}."


def _nearest(fitting: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The open file whose interval reaches least beyond the limit."""

    def reach(candidate: Mapping[str, Any]) -> float:
        high = candidate["interval"][1]
        return math.inf if high is None else high

    return min((c for c in fitting if c["evidence"] == "open"), key=reach, default=None)


def _more_rows(
    files: Sequence[Mapping[str, Any]], fitting: Sequence[Mapping[str, Any]], metric: Metric, max_loss: float
) -> tuple[int | None, str]:
    """Rows that would decide about the nearest open file, and the sentence on them."""
    near = _nearest(fitting)
    if near is None or near["leak_free"]:
        return None, ""
    entry = next(e for e in files if e["type"] == near["type"])
    if near["loss"] >= max_loss:
        return None, " If that is the true difference, it is more than allowed, however many rows are tested."
    rows = metric.rows_needed(entry, max_loss, one_sided=True)
    if rows is None:
        return None, ""
    return rows, f" About {rows:,} rows would show it, if the difference seen is the true one."
