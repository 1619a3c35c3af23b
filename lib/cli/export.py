"""`workbook export`: checkpoints in every wanted format, without a run; or what that would be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer

from lib.cli.console import REFUSED, show, speak, table
from lib.cli.evaluate import RowOptions
from lib.cli.perplexity import read_text
from lib.errors import InputError, as_input_error, in_words
from lib.language import AUTO
from lib.progress import say
from lib.runs.files import user_path
from lib.runs.render import megabytes

_NO_ROWS = RowOptions()


def export(
    checkpoints: list[str],
    output_dir: Path,
    base_model: str | None = None,
    formats: str = "fp16,int8,int4",
    text: Path | None = None,
    text_column: str = "",
    rows_from: RowOptions = _NO_ROWS,
    prompts: str = "cryptography",
    max_new_tokens: int = 64,
    tokenizer: str = "adapter",
    language: str = AUTO,
    n_threads: int = 0,
    simulate: bool = False,
    force: bool = False,
    as_json: bool = False,
) -> None:
    """Merge checkpoints, make every format of them, check each beside the merged model, and write the papers."""
    speak(language)
    if simulate:
        _simulate(checkpoints, output_dir, formats, base_model, as_json)
        return
    from lib.pipeline.export import Wanted, check_wanted, export_checkpoint
    from lib.pipeline.formats import folders_for, read_formats
    from lib.pipeline.papers import table_rows
    from lib.scoring.word_lists import read_prompts

    if tokenizer not in ("adapter", "base"):
        raise InputError(f"--tokenizer {tokenizer!r}.", "adapter or base.", "choose one of them.")
    rows: dict[str, Any] = {}
    if rows_from.data is not None or rows_from.run_name is not None:
        task = rows_from.task()
        chosen, source = rows_from.rows(task)
        rows = {"rows": chosen, "task": task, "source": source}
    wanted = Wanted(
        *read_formats(formats),
        base_model=base_model,
        tokenizer=tokenizer,
        text=(read_text(text, text_column, "train"), user_path(str(text))) if text else None,
        **rows,
        prompts=read_prompts(prompts, "--prompts"),
        max_new_tokens=max_new_tokens,
        n_threads=n_threads,
        force=force,
    )
    check_wanted(wanted)
    targets = folders_for(checkpoints, output_dir)
    reports = _each(checkpoints, targets, lambda one, folder: export_checkpoint(one, folder, wanted))
    lines = []
    for report, folder in zip(reports, targets, strict=True):
        if "error" in report:
            lines += [f"{report['checkpoint']}: NOT EXPORTED. {report['error']}", ""]
            continue
        lines += [f"{report['checkpoint']} → {folder}", *report["notes"]]
        found = table_rows(report)
        lines += [table(found, list(found[0]))]
        lines += [f"not made: {skip['format']} ({skip['reason']})" for skip in report["skipped"]] + [""]
    _finish(reports, lines, as_json)


def _each(
    checkpoints: Sequence[str], folders: Sequence[Path], make: Callable[[str, Path], dict[str, Any]]
) -> list[dict[str, Any]]:
    """A report each; of several checkpoints one that fails does not stop the others: {"checkpoint", "error"}."""
    if len(checkpoints) == 1:
        return [make(checkpoints[0], folders[0])]
    reports = []
    for number, (checkpoint, folder) in enumerate(zip(checkpoints, folders, strict=True), 1):
        say(f"checkpoint {number} of {len(checkpoints)}: {checkpoint}")
        try:
            reports.append(make(checkpoint, folder))
        except Exception as error:
            known = as_input_error(error)
            reports.append({"checkpoint": checkpoint, "error": str(known) if known else in_words(error)})
    return reports


def _simulate(checkpoints: list[str], output: Path, formats: str, base_model: str | None, as_json: bool) -> None:
    from lib.pipeline.formats import folders_for, read_formats
    from lib.pipeline.simulate import simulate

    folder_formats, recipes = read_formats(formats)
    targets = folders_for(checkpoints, output)
    reports = _each(
        checkpoints, targets, lambda one, folder: simulate(one, folder, folder_formats, recipes, base_model)
    )
    lines = []
    for report, folder in zip(reports, targets, strict=True):
        if "error" in report:
            lines += [f"{report['checkpoint']}: {report['error']}", ""]
            continue
        lines += [f"{report['checkpoint']}: SIMULATED, nothing was made; {folder} holds one README.md a format"]
        lines += [f"{number}. {step}" for number, step in enumerate(report["steps"], 1)]
        shown = [
            {
                "format": row["format"],
                "MB": ("" if row["exact"] else "about ") + megabytes(row["bytes"]),
                "memory to make it": f"about {row['memory_mib']:,} MiB",
                "time": row["time"],
            }
            for row in report["formats"]
        ]
        lines += [table(shown, list(shown[0])), ""]
    _finish(reports, lines, as_json)


def _finish(reports: list[dict[str, Any]], lines: list[str], as_json: bool) -> None:
    """Print; exit code 2 where something that was asked for is not there."""
    show(reports[0] if len(reports) == 1 else {"checkpoints": reports}, as_json, "\n".join(lines).rstrip())
    if any("error" in report or report.get("skipped") for report in reports):
        raise typer.Exit(REFUSED)
