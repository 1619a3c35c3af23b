"""``workbook`` and ``python -m lib.cli``: the notebooks' functions as commands, and the table of them all."""

from __future__ import annotations

import sys

import typer

from lib.cli.console import guarded, with_options
from lib.cli.doctor import doctor
from lib.cli.evaluate import ask, compare, evaluate, perplexity
from lib.cli.models import convert, inspect, merge, unpack
from lib.cli.package import package, serve
from lib.cli.quantize import imatrix, quantize
from lib.cli.report import params, pick, report, select
from lib.runs.files import data_file

COMMANDS = (
    *(doctor, params, inspect, report, select, pick, unpack, merge),
    *(convert, imatrix, quantize, evaluate, ask, compare, perplexity, package, serve),
)
"""Every command, in the order of the help. Its module imports what does the work only when the command runs."""

app = typer.Typer(
    name="workbook",
    help="From data to a quantized model for the phone, with the evidence for every step.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for function in COMMANDS:
    app.command(short_help=data_file("cli/options.yaml")["commands"][function.__name__])(
        guarded(with_options(function))
    )


def joined(arguments: list[str]) -> list[str]:
    """``-p KEY VALUE`` (papermill's form) as ``-p KEY=VALUE``, which is the form the option parser knows."""
    result, rest = [], list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*result, word, *rest]
        result.append(word)
        if word in ("-p", "--parameter") and rest:
            key = rest.pop(0)
            result.append(f"{key}={rest.pop(0)}" if "=" not in key and rest else key)
    return result


def main() -> None:
    """Entry point of ``workbook``."""
    app(joined(sys.argv[1:]), prog_name="workbook")


if __name__ == "__main__":
    main()
