"""The commands that choose: among runs, and among the files of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lib.cli.guard import guarded
from lib.cli.options import Json


def register(app: typer.Typer) -> None:
    """Add `select` and `pick`."""
    app.command(short_help="which of several runs to take, by a stated rule")(select)
    app.command(short_help="which file of a compared run fits a size and a loss")(pick)


@guarded
def select(
    runs: Annotated[list[str], typer.Argument(help="names of finished runs (01 to 03 at least)", metavar="RUN...")],
    output: Annotated[
        Path | None, typer.Option("--out", help="folder for model_analysis.json [default: reports/]", metavar="DIR")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare runs on the test rows they share; take the best, and where rows cannot tell, the smaller or faster."""
    from lib.cli import selecting

    selecting.select(runs, output, as_json)


@guarded
def pick(
    run: Annotated[str, typer.Argument(help="name of a run that 07 has compared", metavar="RUN")],
    max_mb: Annotated[float | None, typer.Option(help="largest file, 10⁶ bytes [default: any size]")] = None,
    max_loss: Annotated[float, typer.Option(help="accuracy points; without labels percent of answer perplexity")] = 1.0,
    as_json: Json = False,
) -> None:
    """The smallest GGUF file shown to lose no more than allowed; or none, and how many rows would tell."""
    from lib.cli import picking

    picking.pick(run, max_mb, max_loss, as_json)
