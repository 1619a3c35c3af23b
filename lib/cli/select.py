"""`workbook pick`: the limits against the comparison of a finished run.
What `workbook select` does: compare runs, write model_analysis.json, print the table and the answer.
The commands that choose: among runs, and among the files of a run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lib.cli.console import Json, cell, guarded, show, table

# `workbook pick`: the limits against the comparison of a finished run.


def pick(run_name: str, max_mb: float | None, max_loss: float, as_json: bool) -> None:
    """Print the file to ship, or why there is none.

    Raises:
        InputError: no such run, no comparison in it, limits that cannot be.
    """
    from lib.runs.files import read_json
    from lib.runs.run import known_run
    from lib.stages.compare.recommend import pick_file

    product = known_run(run_name).require("comparison")
    answer = pick_file(read_json(product.path / "comparison.json"), max_mb, max_loss)
    rows = [
        {
            "type": c["type"],
            "MB": round(c["megabytes"], 3),
            "loss": round(c["loss"], 3) + 0.0,
            "95 % interval": "–" if None in c["interval"] else [round(limit, 3) + 0.0 for limit in c["interval"]],
            "fits": "yes" if c["fits"] else "no",
            "evidence": c["evidence"] + (" (worse on leak-free rows)" if c["leak_free"] else ""),
        }
        for c in answer["candidates"]
    ]
    head = f"loss in {answer['limits']['unit']}, at most {max_loss:g}\n"
    show(answer, as_json, f"{head}{table(rows, list(rows[0]))}\n\n{answer['text']}\nRule: {answer['rule']}")


# What `workbook select` does: compare runs, write model_analysis.json, print the table and the answer.


def choose(names: list[str], output: Path | None) -> dict[str, Any]:
    """Compare runs and write the analysis into a folder (default: reports/, whose index then shows it)."""
    from lib.report.index import write_all_index
    from lib.runs.files import reports_folder, writable
    from lib.select.choice import select

    analysis = select(names)
    folder = writable(output or reports_folder())
    path = analysis.write(folder)
    if output is None:
        write_all_index(folder)
    return {**analysis.content, "file": str(path)}


def select(names: list[str], output: Path | None, as_json: bool) -> None:
    """Compare runs, write the analysis and print it."""
    found = choose(names, output)
    show(found, as_json, "\n\n".join([_runs(found), _recipes(found), found["text"], found["rule"], found["file"]]))


def _runs(content: dict[str, Any]) -> str:
    from lib.report.index import run_rows

    columns, rows = run_rows(content)
    return table([dict(zip(columns, row, strict=True)) for row in rows], columns)


def _recipes(content: dict[str, Any]) -> str:
    from lib.report.index import recipe_rows

    columns, rows = recipe_rows(content)
    return table([dict(zip(columns, map(cell, row), strict=True)) for row in rows], columns)


# The commands that choose: among runs, and among the files of a run.


def register(app: typer.Typer) -> None:
    """Add `select` and `pick`."""
    app.command(short_help="which of several runs to take, by a stated rule")(select_command)
    app.command(short_help="which file of a compared run fits a size and a loss")(pick_command)


@guarded
def select_command(
    runs: Annotated[list[str], typer.Argument(help="names of finished runs (01 to 03 at least)", metavar="RUN...")],
    output: Annotated[
        Path | None, typer.Option("--out", help="folder for model_analysis.json [default: reports/]", metavar="DIR")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare runs on the test rows they share; take the best, and where rows cannot tell, the smaller or faster."""

    select(runs, output, as_json)


@guarded
def pick_command(
    run: Annotated[str, typer.Argument(help="name of a run that 07 has compared", metavar="RUN")],
    max_mb: Annotated[float | None, typer.Option(help="largest file, 10⁶ bytes [default: any size]")] = None,
    max_loss: Annotated[float, typer.Option(help="accuracy points; without labels percent of answer perplexity")] = 1.0,
    as_json: Json = False,
) -> None:
    """The smallest GGUF file shown to lose no more than allowed; or none, and how many rows would tell."""

    pick(run, max_mb, max_loss, as_json)
