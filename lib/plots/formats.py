"""How numbers are written in tables, by the name of their column; a table in a notebook need not repeat it."""

from __future__ import annotations

from collections.abc import Sequence

FORMATS: dict[str, str] = {
    **dict.fromkeys(("accuracy ↑", "macro-F1 ↑", "precision", "recall", "F1", "95 % low", "95 % high"), ".3f"),
    **dict.fromkeys(("MB", "predicted, MB"), ",.3f"),
    **dict.fromkeys(("bits per weight", "bits / weight", "bits", "load, s", "ms a row", "MDE, points"), ".2f"),
    **dict.fromkeys(("MiB", "peak memory, MiB", "prompt, tokens/s", "generation, tokens/s"), ",.0f"),
    **dict.fromkeys(
        (
            "KL, nats ↓",
            "label KL ↓",
            "leak-free label KL",
            "mean",
            "± (1.96 SE)",
            "median",
            "99th percentile",
            "largest",
        ),
        ".2e",
    ),
    **dict.fromkeys(("same top token ↑", "same first answer token ↑", "same top ↑", "share of the source"), ".1%"),
    "share of the effect": ".3%",
    **dict.fromkeys(("p", "p (Holm)", "p (TOST)", "TOST (Holm)"), ".2g"),
    **dict.fromkeys(("difference, points", "from, points", "to, points"), "+.2f"),
    **dict.fromkeys(("perplexity ↓", "PPL ↓", "±"), ".3f"),
    **dict.fromkeys(("truncated share", "seconds"), ".3g"),
    "margin change, nats": "+.4f",
    "Δ macro-F1": "+.3f",
    "ratio to reference": ".4f",
    "probability": ".3f",
    "answer PPL ↓": ".3f",
    "change, %": "+.3f",
}


def with_interval(value: float, limits: Sequence[float | None], form: str = ".2g") -> str:
    """ "0.1 [0.05, 0.2]"; "0.1 (no interval)" where a limit is open (None), as with two or three rows."""
    low, high = limits
    if low is None or high is None:
        return f"{value:{form}} (no interval)"
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"
