"""What all commands share: options, results as JSON or as aligned text, exit codes in place of tracebacks."""

from __future__ import annotations

import functools
import inspect
import io
import json
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from lib.errors import InputError, Terminated, as_input_error, in_words, refusal, refusing, sigterm_raises
from lib.language import AUTO, ENGLISH, HELP, TAGS, language, told, translated, use
from lib.progress import LOG_LEVEL_VARIABLE
from lib.runs.files import data_file, disk_error, json_text, refuse_device

_LONGEST = 1000
"""Most characters of a value: a name inside a file may be megabytes long."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

DEBUG_VARIABLE = "WORKBOOK_DEBUG"
"""Environment variable: show tracebacks, and log from debug on; empty or 0 = do not."""

FAULT, REFUSED, INTERRUPTED, TERMINATED = 1, 2, 130, 143
"""Exit codes beside 0: a fault of the workbook or of a notebook, input that was refused, Ctrl-C, SIGTERM."""


def width(text: str) -> int:
    """Columns that a text takes in a terminal (Chinese characters take two)."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def cell(value: Any) -> str:
    """A value as text for a table."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(cell(v) for v in value) + "]"
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … ({len(text):,} characters)"


def padded(text: str, columns: int) -> str:
    """A text with blanks up to so many columns of a terminal."""
    return text + " " * (columns - width(text))


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows as aligned columns with a head line."""
    grid = [list(columns)] + [[cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(width(line[i]) for line in grid) for i in range(len(columns))]
    lines = ["  ".join(map(padded, line, widths)).rstrip() for line in grid]
    return "\n".join(lines)


def printable(text: str) -> str:
    """Control characters written out: names inside a file must not move the cursor or colour the terminal."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def in_brackets(text: str) -> str:
    """A remark behind a text, in the brackets of its language."""
    return f" ({text})" if language() == ENGLISH else f"（{text}）"


def show(value: Mapping[str, Any], as_json: bool, text: str) -> None:
    """Print a result: JSON when asked for, else the text."""
    found = json_text(value, indent=1) if as_json else printable(text)
    try:
        found.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # what would stand in its place is no JSON
        found = json.dumps(json.loads(found), indent=1) if as_json else found
    print(found)


def tell(text: str) -> None:
    """A line on stderr, in the language of this process."""
    print(printable(told(text)), file=sys.stderr, flush=True)


def speak(wanted: str) -> None:
    """The language of what a command writes; auto leaves what the environment says.

    Raises:
        InputError: an unknown one.
    """
    if wanted not in (AUTO, *TAGS):
        raise InputError(f"--language {wanted!r}.", f"{', '.join((AUTO, *TAGS))}.", "choose one of them.")
    use(wanted)


def replacing(output: Path, force: bool, own: Callable[[Path], bool]) -> None:
    """Say that a file is replaced; only what is an earlier result of the same command is so without --force.

    Args:
        own: whether a file is such a result.

    Raises:
        InputError: something else would be lost.
    """
    if output.is_file():
        if not force and output.stat().st_size and not own(output):
            raise refusal("cli/would-be-lost", output=output)
        tell(f"{output} is there already: it is replaced.")


def _usable(value: Any, any_name: bool) -> Any:
    """A value with ~ as the shell would write it out, where it did not (quotes, `--output=~/x`).

    Raises:
        InputError: ~ before a name that is no user's (a folder of that name would be made); a device, which may have no
            end and would be replaced by an output.
        UnicodeEncodeError: a name that is not UTF-8 (but for `any_name`): llama.cpp and tokenizers open no other.
    """
    if isinstance(value, (list, tuple)):
        return type(value)(_usable(part, any_name) for part in value)
    if isinstance(value, Path) and str(value).startswith("~") and not value.exists():
        with refusing(RuntimeError, "cli/no-home", value=value):
            value = value.expanduser()
    if isinstance(value, (str, Path)):
        refuse_device(value)
        if not any_name:
            str(value.absolute() if isinstance(value, Path) else value).encode()
    return value


def _code_of(error: BaseException) -> int:
    """Tell the user what happened; the exit code for it."""
    error = as_input_error(error) or error
    if isinstance(error, (KeyboardInterrupt, Terminated)):
        tell("Interrupted: nothing half-written was left; run the command again to go on.")
        return INTERRUPTED if isinstance(error, KeyboardInterrupt) else TERMINATED
    if isinstance(error, BrokenPipeError):  # the reader of stdout has gone (| head): not a fault
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAULT
    if isinstance(error, OSError):  # a full disk and missing rights are the usual ones
        where = f" ({error.filename})" if error.filename else ""
        error = InputError(  # in code: a table cannot be read where no file can be opened any more
            f"{error.strerror or type(error).__name__}{where}.",
            "a file system that takes the output.",
            "check the path, its permissions and the free space, then run the command again; finished products are "
            "kept.",
        )
    if not isinstance(error, InputError):
        error = disk_error(error) or error  # in a library's own words
    if isinstance(error, MemoryError):
        error = InputError("no memory left.", "room for the model.", "close programs or take a smaller model.")
    if isinstance(error, InputError):
        tell(str(error))
        return REFUSED
    tell(f"The workbook failed: {in_words(error)}")
    tell(f"This is a fault of the workbook or of a library. Set {DEBUG_VARIABLE}=1 to see the traceback.")
    return FAULT


def _write_anything() -> None:
    """Escapes for what a terminal does not know (an en dash), and for a path that is not UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def answered(application: Callable[[], None]) -> None:
    """Run the command line: what it says by itself (help, usage) ends in an exit code, too, whatever the terminal."""
    _write_anything()
    try:
        application()
    except OSError as error:
        code = _code_of(error)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is not tried again
        sys.exit(code)


def with_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command whose parameters are told as ``options.yaml`` does; the fields of a dataclass are parameters, too.

    Its help is that of its docstring and of the table, in the language of this process.
    """
    options = data_file("cli/options.yaml")
    own, shared = options[command.__name__], options["of several commands"]
    found = {p.name: p for p in inspect.signature(command, eval_str=True).parameters.values()}
    groups = {name: p.annotation for name, p in found.items() if is_dataclass(p.annotation)}
    for kind in groups.values():
        found |= inspect.signature(kind, eval_str=True).parameters

    def parameter(name: str, words: dict[str, Any]) -> inspect.Parameter:
        words, kind = dict(words), found[name].annotation
        words |= {key: translated(words[key], HELP) for key in ("argument", "help") if key in words}
        plain = [f"--{name.replace('_', '-')}"] if kind is bool else []  # without this, there would be --no-NAME
        names, argument = words.pop("names", plain), words.pop("argument", None)
        info = typer.Argument(help=argument, **words) if argument else typer.Option(*names, **words)
        return found[name].replace(annotation=Annotated[kind, info], kind=inspect.Parameter.KEYWORD_ONLY)

    @functools.wraps(command)
    def run(**given: Any) -> Any:
        made = {name: kind(**{f.name: given.pop(f.name) for f in fields(kind)}) for name, kind in groups.items()}
        return command(**given, **made)

    parameters = [parameter(name, words or shared[name]) for name, words in own.items()]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__doc__ = "\n\n".join(translated(part, HELP) for part in inspect.cleandoc(command.__doc__ or "").split("\n\n"))
    return run


def debugged() -> bool:
    """Whether tracebacks are asked for: by the environment, or by --log-level debug."""
    return os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0") or os.environ.get(LOG_LEVEL_VARIABLE) == "debug"


def guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a command so that every exception becomes a message and an exit code."""

    @functools.wraps(command)
    def run(**keywords: Any) -> Any:
        _write_anything()
        try:
            with sigterm_raises():
                any_name = command.__name__ == "inspect"
                return command(**{name: _usable(value, any_name) for name, value in keywords.items()})
        except (typer.Exit, typer.Abort):
            raise
        except BaseException as error:
            if debugged() and not isinstance(error, (KeyboardInterrupt, Terminated)):
                import traceback

                traceback.print_exc()
            raise typer.Exit(_code_of(error)) from None

    return run
