"""`workbook select` and `workbook pick`: which of several runs, and which file of a compared run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lib.cli.console import Json, show, table


def select(
    runs: Annotated[list[str], typer.Argument(help="names of finished runs (01 to 03 at least)", metavar="RUN...")],
    output: Annotated[
        Path | None, typer.Option("--out", help="folder for model_analysis.json [default: reports/]", metavar="DIR")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare runs on the test rows they share; take the best, and where rows cannot tell, the smaller or faster."""
    from lib.report.index import recipe_table, run_table

    found = analyse(runs, output)
    tables = [table(made.records(), made.headings) for made in (run_table(found), recipe_table(found))]
    show(found, as_json, "\n\n".join([*tables, found["text"], found["rule"], found["file"]]))


def analyse(names: list[str], output: Path | None = None) -> dict[str, Any]:
    """Compare runs and write model_analysis.json into a folder (default: reports/, whose index then shows it)."""
    from lib.report.index import write_all_index
    from lib.runs.files import reports_folder, writable
    from lib.select.choice import select, write_analysis

    analysis = select(names)
    folder = writable(output or reports_folder())
    path = write_analysis(analysis, folder)
    if output is None:
        write_all_index(folder)
    return {**analysis, "file": str(path)}


def pick(
    run: Annotated[str, typer.Argument(help="name of a run that 07 has compared", metavar="RUN")],
    max_mb: Annotated[float | None, typer.Option(help="largest file, 10⁶ bytes [default: any size]")] = None,
    max_loss: Annotated[float, typer.Option(help="accuracy points; without labels percent of answer perplexity")] = 1.0,
    as_json: Json = False,
) -> None:
    """The smallest GGUF file shown to lose no more than allowed; or none, and how many rows would tell."""
    from lib.report.display import rows_of
    from lib.runs.files import read_json
    from lib.runs.run import known_run
    from lib.stages.compare.recommend import pick_file

    comparison = known_run(run).require("comparison").path / "comparison.json"
    answer = pick_file(read_json(comparison), max_mb, max_loss)
    rows = rows_of("select.candidates", answer["candidates"])
    head = f"loss in {answer['limits']['unit']}, at most {max_loss:g}\n"
    show(answer, as_json, f"{head}{table(rows, list(rows[0]))}\n\n{answer['text']}\nRule: {answer['rule']}")
