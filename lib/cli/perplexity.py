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
    documents = "" if result["n_documents"] is None else f" of {result['n_documents']} documents"
    lines = [f"tokens scored: {result['n_tokens']:,}{documents}, {result['n_windows']} windows of {result['n_ctx']}"]
    lines += [_line("PPL", result, "ppl", 4, 5)]
    if result["kld_mean"] is not None:
        lines += [_line("PPL(reference)", result, "ppl_reference"), _line("PPL ratio", result, "ppl_ratio")]
        lines += [_line("ln(PPL ratio)", result, "ln_ppl_ratio"), _line("PPL difference", result, "ppl_difference")]
        lines += [f"{'correlation of ln(PPL)':<22} {100 * result['ppl_correlation']:.2f} %"]
        lines += [_line("KLD, nats", result, "kld_mean")]
        names = ("max", "p999", "p99", "p95", "p90", "median", "p10", "p05", "p01", "p001", "min")
        lines += [f"{'KLD ' + _percentile(q):<22} {result[f'kld_{q}']:.6f}" for q in names]
        lines += [f"{'mean Δp':<22} {_percent(result, 'mean_dp')}", f"{'RMS Δp':<22} {_percent(result, 'rms_dp')}"]
        names = ("max", "p999", "p99", "p95", "p90", "p75", "median", "p25", "p10", "p05", "p01", "p001", "min")
        lines += [f"{'Δp ' + _percentile(q):<22} {100 * result[f'dp_{q}']:.3f} %" for q in names]
        lines += [f"{'same top token':<22} {_percent(result, 'same_top')}{_interval(result, 'same_top', 100, 3)}"]
    if any(value is not None for key, value in result.items() if key.endswith("_interval")):
        lines.append("± one standard error, tokens taken as independent; [95 % interval, whole documents drawn]")
    return "\n".join([*lines, *filter(None, [result["note"]])])


def _line(name: str, result: dict[str, Any], key: str, digits: int = 6, error_digits: int = 6) -> str:
    error = result["kld_uncertainty" if key == "kld_mean" else f"{key}_uncertainty"]
    return f"{name:<22} {result[key]:.{digits}f} ± {error:.{error_digits}f}{_interval(result, key, 1, digits)}"


def _percent(result: dict[str, Any], key: str) -> str:
    return f"{100 * result[key]:.3f} ± {100 * result[f'{key}_uncertainty']:.3f} %"


def _interval(result: dict[str, Any], key: str, factor: float, digits: int) -> str:
    limits = result.get(f"{key}_interval")
    return "" if limits is None else f" [{factor * limits[0]:.{digits}f}, {factor * limits[1]:.{digits}f}]"


def _percentile(name: str) -> str:
    """p999 → 99.9 %, p001 → 0.1 %; min, median and max stay."""
    return f"{float('0.' + name[1:]) * 100:g} %" if name[0] == "p" else name
