"""``workbook`` and ``python -m lib.cli``: the notebooks' functions as commands, and the table of them all."""

from __future__ import annotations

import os
import sys
from typing import Annotated
from urllib.parse import urlsplit

import typer

from lib.cli.console import answered, debugged, guarded, with_options
from lib.cli.doctor import doctor
from lib.cli.evaluate import ask, compare, evaluate
from lib.cli.export import export
from lib.cli.models import convert, inspect, merge, unpack, unpickle
from lib.cli.new import new
from lib.cli.package import package, serve
from lib.cli.perplexity import perplexity
from lib.cli.quantize import imatrix, quantize
from lib.cli.report import params, pick, report, select
from lib.errors import refusal, refusing
from lib.language import ENGLISH, HELP, language, translated
from lib.progress import LEVELS, shown_log
from lib.runs.files import data_file

COMMANDS = (
    *(doctor, new, params, inspect, report, select, pick, unpack, unpickle, merge),
    *(convert, imatrix, quantize, evaluate, ask, compare, perplexity, export, package, serve),
)
"""Every command, in the order of the help. Its module imports what does the work only when the command runs."""

app = typer.Typer(
    name="workbook",
    help=translated("From data to a quantized model for the phone, with the evidence for every step.", HELP),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for function in COMMANDS:
    short = translated(data_file("cli/options.yaml")["commands"][function.__name__], HELP)
    app.command(short_help=short)(guarded(with_options(function)))


LOG_LEVEL = "--log-level"
_LOG_LEVEL = data_file("cli/options.yaml")["every command"]["log_level"]
_SHOWN = {**_LOG_LEVEL, "help": translated(_LOG_LEVEL["help"], HELP)}


@app.callback()
def every_command(context: typer.Context, log_level: Annotated[str, typer.Option(**_SHOWN)] = "") -> None:
    """What is done before each of them."""

    @guarded
    def start() -> None:
        if log_level and log_level not in LEVELS:
            raise refusal("cli/log-level", level=log_level, known=", ".join(LEVELS))
        with refusing(ValueError, "cli/no-endpoint"):  # the hub's client cannot even be imported then
            urlsplit(os.environ.get("HF_ENDPOINT", ""))
        if level := log_level or ("debug" if debugged() else ""):
            context.with_resource(shown_log(level))

    start()


def joined(arguments: list[str]) -> list[str]:
    """``-p KEY VALUE`` (papermill's form) as ``-p KEY=VALUE``, which is the form the option parser knows; and the level
    of the log, wherever it stands, before the command, whose option it is not."""
    result, rest, first = [], list(arguments), []
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*first, *result, word, *rest]
        if word.partition("=")[0] == LOG_LEVEL:
            first = [word, *([rest.pop(0)] if word == LOG_LEVEL and rest else [])]
            continue
        result.append(word)
        if word in ("-p", "--parameter") and rest:
            key = rest.pop(0)
            result.append(f"{key}={rest.pop(0)}" if "=" not in key and rest else key)
    return [*first, *result]


def main() -> None:
    """Entry point of ``workbook``."""
    if language() != ENGLISH:
        from lib.cli.parser_words import speak

        speak()
    answered(lambda: app(joined(sys.argv[1:]), prog_name="workbook"))


if __name__ == "__main__":
    main()
