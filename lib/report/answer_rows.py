"""Rows and sentences of notebooks 01, 03 and 07 for rows without labels: conversations and their reference answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
