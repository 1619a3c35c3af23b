"""``workbook`` and ``python -m lib.cli``: the notebooks' functions as commands, and the table of them all."""

from __future__ import annotations

import sys

import typer

from lib.cli.console import guarded, with_options
from lib.cli.doctor import doctor
from lib.cli.evaluate import compare, evaluate, perplexity
from lib.cli.models import convert, inspect, merge, unpack
from lib.cli.package import package, serve
from lib.cli.quantize import imatrix, quantize
from lib.cli.report import params, pick, report, select

COMMANDS = {
    doctor: "what this machine can run, and the cure for every lack",
    params: "every key of a parameter file",
    inspect: "what a model folder, adapter or GGUF file is, and what it lacks",
    report: "run the seven notebooks, publish the pages",
    select: "which of several runs to take, by a stated rule",
    pick: "which file of a compared run fits a size and a loss",
    unpack: "GGUF file → model folder",
    merge: "adapter + base model → one model folder",
    convert: "model folder → GGUF",
    imatrix: "model folder + text → importance matrix for quantize",
    quantize: "GGUF → smaller GGUF, one type or several, or the best under a size",
    evaluate: "models on labelled rows",
    compare: "quantized files and folders against their reference",
    perplexity: "perplexity and KL divergence on a text, as llama-perplexity",
    package: "the chosen file of a run with card, guide, examples and test, as folder and zip",
    serve: "a GGUF file behind the OpenAI protocol, on this machine",
}
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
for function, short_help in COMMANDS.items():
    app.command(short_help=short_help)(guarded(with_options(function)))


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
