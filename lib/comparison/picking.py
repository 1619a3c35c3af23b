"""Which file fits a size and a loss that the user names: by a stated rule, from a finished comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lib.comparison.advice import rows_needed
from lib.comparison.files import GGUF
from lib.comparison.judging import REFERENCE_VERDICT
from lib.errors import InputError

RULE = (
    "Of the GGUF files no larger than the limit take the smallest whose loss is shown to be at most the one "
    "allowed: the whole 95 % interval of the paired difference from the reference lies on the allowed side. The "
    "reference itself counts as without loss. A file is refuted when its whole interval lies beyond, and open when "
    "the limit is inside."
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
        "candidates": {type, file, megabytes, loss, interval, fits, evidence} of every GGUF file, smallest first.

    Raises:
        InputError: limits that nothing can meet.
    """
    if (max_mb is not None and not max_mb > 0) or not max_loss > 0:
        raise InputError(f"max-mb {max_mb}, max-loss {max_loss}.", "numbers above 0.", "correct them.")
    labelled = "accuracy" in comparison["files"][0]
    unit = "accuracy points" if labelled else "% of answer perplexity"
    files = sorted((e for e in comparison["files"] if e.get("kind", GGUF) == GGUF), key=lambda e: e["bytes"])
    candidates = [_candidate(e, labelled, max_mb, max_loss) for e in files]
    fitting = [c for c in candidates if c["fits"]]
    shown = [c for c in fitting if c["evidence"] == "shown"]
    if comparison["recommendation"]["reason"] == "reference":
        chosen, reason, text = None, "reference", comparison["recommendation"]["text"]
    elif not fitting:
        chosen, reason = None, "size"
        text = f"None: the smallest file, {candidates[0]['type']}, takes {candidates[0]['megabytes']:.2f} MB."
    elif shown:
        chosen, reason, text = shown[0], "shown", _chosen(shown[0], unit, max_loss)
    else:
        chosen, reason = None, "open" if any(c["evidence"] == "open" for c in fitting) else "refuted"
        text = _none(fitting, unit, max_loss)
    needed = _needed(files, fitting, labelled, max_loss) if reason == "open" else None
    if needed:
        text += f" About {needed:,} rows would show it, if the difference seen is the true one."
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


def _candidate(entry: Mapping[str, Any], labelled: bool, max_mb: float | None, max_loss: float) -> dict[str, Any]:
    """Loss (positive = worse) with its interval, in the unit of the limit."""
    if entry["verdict"] == REFERENCE_VERDICT:
        loss, low, high = 0.0, 0.0, 0.0
    elif labelled:
        loss = -100 * entry["accuracy_difference"]
        low, high = (-100 * limit for limit in reversed(entry["accuracy_difference_interval"]))
    else:
        loss = 100 * (entry["answer_ratio"] - 1)
        low, high = (100 * (limit - 1) for limit in entry["answer_ratio_interval"])
    megabytes = entry["bytes"] / 1e6
    return {
        "type": entry["type"],
        "file": entry["file"],
        "megabytes": megabytes,
        "loss": loss,
        "interval": [low, high],
        "fits": max_mb is None or megabytes <= max_mb,
        "evidence": "shown" if high <= max_loss else "refuted" if low > max_loss else "open",
    }


def _loss(candidate: Mapping[str, Any], unit: str) -> str:
    low, high = candidate["interval"]
    return f"loss {candidate['loss']:+.2f} {unit} (95 % interval {low:+.2f} to {high:+.2f})"


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
    return min((c for c in fitting if c["evidence"] == "open"), key=lambda c: c["interval"][1], default=None)


def _needed(
    files: Sequence[Mapping[str, Any]], fitting: Sequence[Mapping[str, Any]], labelled: bool, max_loss: float
) -> int | None:
    near = _nearest(fitting)
    if near is None or not labelled:
        return None
    entry = next(e for e in files if e["type"] == near["type"])
    changed = entry["mcnemar_b"] + entry["mcnemar_c"]
    rows = rows_needed(changed, entry["n"], max_loss, max(0.0, near["loss"] / 100))
    return None if rows is None else max(rows, entry["n"] + 1)
