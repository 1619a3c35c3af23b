"""`workbook perplexity`: the numbers of llama-perplexity on a text, with intervals over its documents."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lib.cli.console import GpuLayers, Json, TextColumn, Threads, show
from lib.errors import InputError
from lib.runs.files import user_path, utf8

if TYPE_CHECKING:
    from lib.scoring.measure import Text

_ROWS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
"""Suffixes of files with one document a row; any other file is plain text."""


def perplexity(
    model: Annotated[str, typer.Argument(help=".gguf file or model folder (quantized ones too)", metavar="MODEL")],
    text: Annotated[
        Path, typer.Option(help="plain text (documents end at blank lines), or CSV, TSV, JSON, JSONL, Parquet")
    ],
    reference: Annotated[
        str | None, typer.Option(help=".gguf file or model folder to compare with", metavar="REF")
    ] = None,
    n_ctx: Annotated[int, typer.Option(help="tokens a window", min=16)] = 512,
    chunks: Annotated[int, typer.Option(help="most windows; 0 = the whole text", min=0)] = 0,
    text_column: TextColumn = "",
    n_gpu_layers: GpuLayers = 0,
    n_threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Perplexity on a text; with --reference the table of llama-perplexity --kl-divergence, and intervals."""
    from lib.scoring.measure import measure_text

    content = read_text(text, text_column)
    result = measure_text(
        model, content, reference, n_ctx=n_ctx, chunks=chunks, n_threads=n_threads, n_gpu_layers=n_gpu_layers
    )
    show({"text": str(text), **result}, as_json, as_text(result))


def read_text(path: Path, text_column: str = "") -> Text:
    """The documents of a file.

    Raises:
        InputError: no file, not UTF-8, no text in it, or no column with a text.
    """
    from lib.scoring.measure import Text

    given, path = path, user_path(str(path))
    if not path.is_file():
        raise InputError(
            f"no file {given.expanduser().absolute()}.",
            "a text (UTF-8), or a table with one text a row.",
            "correct --text.",
        )
    if path.suffix.lower() in _ROWS:
        text = Text.of_rows(_rows(path, text_column))
    else:
        text = Text.of_file(utf8(path, path.read_bytes()))
    if not text.content.strip():
        raise InputError(f"{path} holds no text.", "a text of at least one window.", "give another file.")
    return text


def _rows(path: Path, text_column: str) -> list[str]:
    from collections import Counter

    from lib.stages.data.cleaning import DamagedError, find_column, safe_text
    from lib.stages.data.reading import read_table

    table = next(iter(read_table(str(path)).splits.values()))
    name = find_column(list(table[0]), text_column, "text")
    try:
        return [safe_text(value, Counter()) for value in (row[name] for row in table)]
    except DamagedError as reason:
        raise InputError(f"{path}, column {name!r}: {reason}.", "text.", "correct the file.") from None


def as_text(result: dict[str, Any]) -> str:
    """The numbers as llama-perplexity prints them (shares in percent), with the intervals over documents."""
    from lib.report.sentences import word_rows

    intervals = any(value is not None for key, value in result.items() if key.endswith("_interval"))
    rows = word_rows("perplexity.numbers", r=result, intervals=intervals)
    return "\n".join(row[0] if len(row) == 1 else f"{row[0]:<22} {row[1]}" for row in rows)
