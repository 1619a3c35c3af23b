"""`workbook quantize`: by recipes, and under a size budget by the sensitivity of every tensor; `workbook imatrix`."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lib.cli.console import Json, TextColumn, show, table
from lib.errors import InputError
from lib.runs.files import user_path

if TYPE_CHECKING:
    from lib.stages.quantize.files import Options
    from lib.stages.quantize.size_budget import Budget


def quantize(
    source: Annotated[Path, typer.Argument(help="GGUF with F32, F16 or BF16 weights", metavar="IN.gguf")],
    output: Annotated[Path, typer.Argument(help="new GGUF file; a folder for several", metavar="OUT")],
    types: Annotated[list[str] | None, typer.Argument(help="e.g. Q4_K_M, or Q8_0 Q4_K_M Q4_0", metavar="TYPE")] = None,
    imatrix: Annotated[Path | None, typer.Option(help="importance matrix", metavar="FILE")] = None,
    size_budget_mb: Annotated[
        float | None,
        typer.Option(help="a file of at most so many MB (10⁶ bytes), types by measurement", min=0.01, max=1e6),
    ] = None,
    bits_per_weight: Annotated[
        float | None, typer.Option(help="the same budget in bits per weight", min=0.01, max=32)
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="for the budget: folder that IN.gguf was converted from", metavar="DIR")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="for the budget: text like the model's task, or a table", metavar="FILE")
    ] = None,
    text_column: TextColumn = "",
    data: Annotated[
        Path | None, typer.Option(help="in place of --text: runs/RUN/data, whose rows have answers", metavar="DIR")
    ] = None,
    answer_weight: Annotated[
        float, typer.Option(help="with --data: what the loss at answers counts, 0 = text alone", min=0, max=1)
    ] = 0.5,
    n_ctx: Annotated[int, typer.Option(help="tokens a window of that text", min=16)] = 512,
    tensor_type: Annotated[
        list[str] | None, typer.Option(help="type of single tensors; may be repeated", metavar="REGEX=TYPE")
    ] = None,
    output_tensor_type: Annotated[str, typer.Option(help="type of the output matrix", metavar="TYPE")] = "",
    token_embedding_type: Annotated[str, typer.Option(help="type of the token embedding", metavar="TYPE")] = "",
    n_threads: Annotated[int, typer.Option(help="CPU threads together; 0 = physical cores", min=0)] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only tell the sizes")] = False,
    as_json: Json = False,
) -> None:
    """Quantize a GGUF file with llama.cpp: to types, or under a size budget with types chosen by measurement."""
    from lib.stages.quantize.files import Options

    options = Options(imatrix, tuple(tensor_type or ()), output_tensor_type, token_embedding_type)
    wanted = types or []
    if not wanted and options.any_types():
        do = "name a TYPE, or leave them out: a size budget decides every tensor."
        raise InputError("types of single tensors without a TYPE.", "the type of the other tensors.", do)
    budget = _budget(source, size_budget_mb, bits_per_weight, model, text, text_column, data, n_ctx, answer_weight)
    if not wanted and budget is None:
        do = "name one, e.g. Q4_K_M, or give --size-budget-mb or --bits-per-weight."
        raise InputError("no type.", "a TYPE, several, or a size budget.", do)
    if dry_run:
        rows = _predict(source, wanted, options, budget, n_threads)
        show({"files": rows}, as_json, _as_text(rows))
        return
    rows = _make(source, output, wanted, options, budget, n_threads)
    single = len(rows) == 1 and not output.is_dir()
    show(rows[0] if single else {"files": rows}, as_json, _as_text(rows))


def imatrix(
    model_dir: Annotated[Path, typer.Argument(help="folder that the GGUF is converted from", metavar="MODEL_DIR")],
    output: Annotated[Path, typer.Argument(help="new importance matrix", metavar="OUT.gguf")],
    text: Annotated[Path, typer.Option(help="text like the model's task, or a table; no test rows", metavar="FILE")],
    text_column: TextColumn = "",
    n_ctx: Annotated[int, typer.Option(help="tokens a window", min=16)] = 512,
    chunks: Annotated[int, typer.Option(help="most windows; 0 = the whole text", min=0)] = 64,
    as_json: Json = False,
) -> None:
    """Measure which inputs of every layer are large on a text: what llama-imatrix measures, for --imatrix."""
    from lib.cli.evaluate import read_text
    from lib.stages.quantize.calibration import measure_imatrix

    made = measure_imatrix(model_dir, output, read_text(text, text_column), user_path(str(text)), n_ctx, chunks)
    rows = "" if made["rows"] is None else f" of {made['rows']:,} rows"
    words = f"{output}: {made['entries']} layers, {made['tokens']:,} tokens{rows}; {made['dataset']}"
    show(made, as_json, words)


def _budget(
    source: Path,
    megabytes: float | None,
    bits: float | None,
    model: Path | None,
    text: Path | None,
    text_column: str,
    data: Path | None,
    n_ctx: int,
    answer_weight: float,
) -> Budget | None:
    """What the options say of a budget.

    Raises:
        InputError: two budgets; one of the three options without the others; a text and the rows of a run.
    """
    if megabytes is not None and bits is not None:
        found = "--size-budget-mb and --bits-per-weight."
        raise InputError(found, "one of the two: they are one budget in two units.", "leave one out.")
    budget = "--size-budget-mb" if bits is None else "--bits-per-weight"
    if text is not None and data is not None:
        raise InputError("--text and --data.", "one of the two: what gradients are of.", "leave one out.")
    given = {budget: megabytes if bits is None else bits, "--model": model}
    given |= {"--text": text} if data is None else {"--data": data}
    lacking = [name for name, value in given.items() if value is None]
    if len(lacking) == 3:
        return None
    if lacking or model is None:
        found = f"{' and '.join(set(given) - set(lacking))} without {' and '.join(lacking)}."
        expected = (
            "all three: gradients of the model folder on a text tell which weights matter; a GGUF alone cannot give "
            "them."
        )
        do = "add --model DIR (of a run: runs/RUN/merged) and --text FILE (or --data runs/RUN/data), or name a TYPE in "
        do += "place of the budget."
        raise InputError(found, expected, do)
    from lib.cli.evaluate import read_text
    from lib.models.gguf_file import check_gguf
    from lib.stages.quantize.size_budget import Budget, budget_bytes

    check_gguf(source)
    most = budget_bytes(source, megabytes or 0.0, bits or 0.0)
    if data is not None:
        return Budget(most, model, n_ctx=n_ctx, data=user_path(str(data)), answer_weight=answer_weight)
    assert text is not None
    return Budget(most, model, read_text(text, text_column), user_path(str(text)), n_ctx)


def _predict(
    source: Path, types: list[str], options: Options, budget: Budget | None, n_threads: int
) -> list[dict[str, Any]]:
    """What the files would be; nothing is written."""
    from lib.stages.quantize.files import predict_sizes
    from lib.stages.quantize.size_budget import mix_for_budget

    rows = predict_sizes(source, types, options) if types else []
    if budget is None:
        return rows
    with tempfile.TemporaryDirectory() as scratch:
        return [*rows, mix_for_budget(source, budget, options.imatrix, Path(scratch), n_threads).prediction]


def _make(
    source: Path, output: Path, types: list[str], options: Options, budget: Budget | None, n_threads: int
) -> list[dict[str, Any]]:
    """Write the files; their reports."""
    from lib.settings import mix_name
    from lib.stages.quantize.files import make_files, plan_files
    from lib.stages.quantize.size_budget import mix_for_budget

    count = len(types) + (budget is not None)
    if output.suffix not in ("", ".gguf") and not output.is_dir():
        do = f"write {output.with_suffix('.gguf')}, or make the folder {output} first."
        raise InputError(f"the output {output}.", "a name that ends with .gguf, or a folder.", do)
    if count > 1 and output.suffix == ".gguf" and not output.is_dir():
        do = "name a folder; the files in it get the source's name and their type."
        raise InputError(f"one file {output} for {count} types.", "a folder for several types.", do)
    beside = [mix_name(budget.bytes)] if budget else []
    planned = plan_files(source, output, types, options, beside)
    if budget:
        scratch = output.parent if output.suffix == ".gguf" and not output.is_dir() else output
        planned.append(mix_for_budget(source, budget, options.imatrix, scratch, n_threads))
    return [asdict(report) for report in make_files(source, output, planned, n_threads)]


def _as_text(rows: list[dict[str, Any]]) -> str:
    """A table, and what its columns leave open."""
    from lib.report.sentences import sentence

    columns = ["type", "bytes", "bits_per_weight", "fallbacks", "set_by_hand"]
    columns += [name for name in ("imatrix", "seconds", "peak_memory_mib", "file") if name in rows[0]]
    counted = [{**r, "fallbacks": len(r["fallbacks"]), "set_by_hand": len(r["set_by_hand"])} for r in rows]
    lines = [table(counted, columns)]
    if any(row["fallbacks"] for row in rows):
        lines.append("fallbacks: tensors of another type than the recipe wants, whose rows do not fill its blocks")
    lines += [sentence("quantize.mix_in_words", row=row, mix=row["mix"]) for row in rows if row.get("mix")]
    return "\n".join(lines)
