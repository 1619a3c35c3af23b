"""Rows and sentences of notebooks 01, 03 and 07 for rows without labels: conversations and their reference answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lib.report.rows import Row
from lib.statistics.losses import kept_words

READABLE = 8
"""Written answers that a page shows; all of them are in generated.jsonl."""
ALPHA = 0.05


def _limits(values: Sequence[float] | None, form: str = ".3f") -> str | None:
    return None if values is None or None in values else f"[{values[0]:{form}},\u00a0{values[1]:{form}}]"


def leaks(result: Any) -> str:
    """How many test rows are copies of training rows (a DataResult)."""
    rows = result.rows("test")
    leaked = sum(row["leaked"] for row in rows)
    return (
        f"**{leaked:,} of {len(rows):,} test rows ({100 * leaked / len(rows):.1f} %) have nearly the opening or the "
        f"text of a training row, or one opening contains the other.** Split: {result.split_rule}."
    )


def example(result: Any) -> str:
    """Caption of the tokenized example (a DataResult)."""
    shown = result.example
    return (
        f"{shown['turns']} turns: {shown['prompt_tokens']} tokens that are only read and {shown['loss_tokens']} loss "
        f"tokens (marked). Prompt hash {result.product.entry.facts['prompt_hash'][:12]}."
    )


def learned_of_data(result: Any) -> str:
    """The conclusions of page 01 (a DataResult)."""
    shape = {row["split"]: row for row in result.balance}
    cut, learned, read = (
        sum(row.get(key, 0) for row in result.length_table)
        for key in ("truncated rows", "answers learned", "answers only read")
    )
    unlearned = (
        f"- {read:,} of {learned + read:,} answers are read and not learned: the chat template writes them otherwise "
        f"than it asks for an answer{', or without reasoning' if result.task.thinking else ''}.\n"
    )
    return (
        f"- {shape['train']['rows']:,} rows with {shape['train']['turns']:,} turns to train on, "
        f"{shape['test']['rows']:,} to test on; thinking is {'on' if result.task.thinking else 'off'}.\n"
        f"- {sum(row['leaked'] for row in result.rows('test')):,} test rows are leaked.\n"
        f"{unlearned if read else ''}"
        f"- The longest row has {max(max(v) for v in result.lengths.values()):,} tokens; {cut:,} rows lose turns at "
        f"{result.task.max_seq_length}."
    )


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
