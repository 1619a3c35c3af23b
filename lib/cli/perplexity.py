"""`workbook perplexity`: the numbers of llama-perplexity on a text; and texts and tables read for other commands."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.cli.console import show
from lib.errors import InputError, refusal, refusing
from lib.progress import say
from lib.runs.files import user_path, utf8

if TYPE_CHECKING:
    from lib.scoring.measure import Text

# Perplexity: the numbers of llama-perplexity on a text, with intervals over its documents.

_ROWS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
"""Suffixes of files with one document a row; any other file is plain text."""


def perplexity(
    model: str,
    text: Path,
    reference: str | None = None,
    n_ctx: int = 512,
    chunks: int = 0,
    text_column: str = "",
    n_gpu_layers: int = 0,
    n_threads: int = 0,
    as_json: bool = False,
) -> None:
    """Perplexity on a text; with --reference the table of llama-perplexity --kl-divergence, and intervals."""
    from lib.scoring.measure import measure_text

    content = read_text(text, text_column)
    result = measure_text(
        model, content, reference, n_ctx=n_ctx, chunks=chunks, n_threads=n_threads, n_gpu_layers=n_gpu_layers
    )
    show({"text": str(text), **result}, as_json, numbers(result))


def read_text(path: Path, text_column: str = "", split: str = "") -> Text:
    """The documents of a file; what of a table is left out is said.

    Args:
        split: whose rows are taken of a table that says the splits of its rows; empty = all.

    Raises:
        InputError: no file, not UTF-8, no text in it, no column with a text, or a column of what is no table.
    """
    from lib.scoring.measure import Text

    given, path = path, user_path(str(path))
    if not path.is_file():
        raise refusal("cli/no-text", place=given.expanduser().absolute())
    if path.suffix.lower() in _ROWS:
        text = Text.of_rows(_rows(path, text_column, split))
    elif text_column:
        raise InputError(f"--text-column {text_column}, and {path} is no table.", "a table.", "leave it out.")
    else:
        text = Text.of_file(utf8(path, path.read_bytes()))
    if not text.content.strip():
        raise InputError(f"{path} holds no text.", "a text of at least one window.", "give another file.")
    return text


def _rows(path: Path, text_column: str, split: str) -> list[str]:
    from lib.stages.data.cleaning import DamagedError, find_column, safe_text
    from lib.stages.data.reading import read_table

    splits = read_table(str(path)).splits
    taken = [row for part, rows in splits.items() if part in (split or part, "all") for row in rows]
    left_out = Counter({f"of {part}": len(rows) for part, rows in splits.items() if part not in (split or part, "all")})
    name = find_column(list(taken[0]), text_column, "text")
    with refusing(DamagedError, "cli/no-column-of-text", path=path, name=name):
        texts = [safe_text(row[name], Counter()) for row in taken]
    left_out["without a text"] = sum(not text.strip() for text in texts)
    if reasons := ", ".join(f"{count:,} {why}" for why, count in left_out.items() if count):
        say(f"{path}: {left_out.total():,} of {sum(map(len, splits.values())):,} rows left out ({reasons})")
    return texts


def numbers(result: dict[str, Any]) -> str:
    """The numbers as llama-perplexity prints them (shares in percent), with the intervals over documents."""
    from lib.report.sentences import word_rows

    intervals = any(value is not None for key, value in result.items() if key.endswith("_interval"))
    rows = word_rows("perplexity.numbers", r=result, intervals=intervals)
    return "\n".join(row[0] if len(row) == 1 else f"{row[0]:<22} {row[1]}" for row in rows)
