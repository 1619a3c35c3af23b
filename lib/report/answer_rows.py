"""Rows and sentences of notebook 07 for conversations and their reference answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lib.report.display import Row
from lib.statistics.losses import kept_words


def _limits(values: Sequence[float] | None, form: str = ".3f") -> str | None:
    return None if values is None or None in values else f"[{values[0]:{form}},\u00a0{values[1]:{form}}]"


def detectable(files: Sequence[Mapping[str, Any]], conditions: Mapping[str, Any]) -> str:
    """What the rows of 07 can show (entries of comparison.json without the reference, and its "conditions")."""
    margin, floor = conditions["perplexity_margin_percent"], conditions["unigram_ppl"]
    seen = [entry["mde"] for entry in files if entry["mde"] is not None]
    mdes = f"{100 * min(seen):.2f} to {100 * max(seen):.2f} %" if seen else "any size"
    return (
        f"With {files[0]['n']:,} test rows and {files[0]['answer_tokens']:,} answer tokens, changes of the answer "
        f"perplexity below {mdes} (depending on the file) would be missed more often than one time in five, after "
        f"correction for all {len(files)} files. The margin of equivalence is ± {margin:g} %. Equivalence is asked "
        "first: over so many tokens even a difference far below the margin is certain to exist. Token frequencies of "
        f"the training answers alone reach {floor:.1f}."
    )


def ratios(files: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Change of the answer perplexity, percent, for `charts.estimates` (entries of comparison.json)."""
    return [
        {
            "name": entry["type"],
            "estimate": 100 * (entry["answer_ratio"] - 1),
            "low": _change(entry["answer_ratio_interval"][0]),
            "high": _change(entry["answer_ratio_interval"][1]),
            "n": entry["n"],
        }
        for entry in files
    ]


def _change(ratio: float | None) -> float | None:
    return None if ratio is None else 100 * (ratio - 1)


def quality(files: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Size, quality and verdict of each file (entries of comparison.json)."""
    return [
        {
            "type": e["type"],
            "MB": e["bytes"] / 1e6,
            "bits / weight": e["bits_per_weight"],
            "answer PPL ↓": e["answer_ppl"],
            "95 % interval": _limits(e["answer_ppl_interval"]),
            "change, %": None if e["loss_difference"] is None else 100 * (e["answer_ratio"] - 1),
            "p (Holm)": e["p_holm"],
            "TOST (Holm)": e["equivalence_p_holm"],
            "verdict": e["verdict"],
            "leak-free verdict": (e["leak_free"] or {}).get("verdict"),
            "KL, nats ↓": e["kld_mean"],
            "kept ↑": kept_words(e),
            "same top ↑": e["same_top"],
        }
        for e in files
    ]
