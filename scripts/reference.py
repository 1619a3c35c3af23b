"""The two generated pages: docs/cli.md from the command line's own options, docs/parameters.md from the settings.

python -m scripts.reference            write both
python -m scripts.reference --check    exit with 1 where one of them is not what would be written
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import typing
from pathlib import Path
from typing import Any

import jinja2
import typer
import yaml

from lib.cli.__main__ import COMMANDS
from lib.cli.console import with_options
from lib.language import ENGLISH, speaking
from lib.runs.files import PROJECT, data_file

HERE = Path(__file__).parent
_SECTION = re.compile(r"^# (\d\d_.+)$")


def written(name: str, **values: Any) -> str:
    """A page from its template beside this file."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(f"{name}.md.j2").render(**values).rstrip() + "\n"


def _cell(text: Any) -> str:
    """Words in a cell of a Markdown table: <think> is no tag there."""
    return re.sub(r"(<[^<>`]+>)", r"`\1`", str(text)).replace("|", r"\|").replace("\n", " ")


def _literal(value: Any) -> str:
    """A default as it stands in a parameter file; nothing for one that is empty."""
    return f"`{json.dumps(value, ensure_ascii=False)}`" if value not in ("", None) else ""


def _option(parameter: inspect.Parameter) -> dict[str, str]:
    """One line of a command's table: a parameter as `lib.cli.console.with_options` tells it."""
    kind, info = typing.get_args(parameter.annotation)
    value = info.metavar or _KINDS.get(next((k for k in _KINDS if k in _parts(kind)), str), "TEXT")
    if isinstance(info, typer.models.ArgumentInfo):
        name = info.metavar or parameter.name.upper()
    else:
        given = (info.default, *(info.param_decls or ()))  # typer takes the first name of an option for its default
        names = [name for name in given if str(name).startswith("-")] or [_dashed(parameter.name)]
        name = ", ".join(names) + ("" if kind is bool else f" {value}")
    needed = parameter.default is inspect.Parameter.empty
    shown = isinstance(parameter.default, (int, float, str)) and not isinstance(parameter.default, bool)
    default = "required" if needed else _literal(parameter.default) if shown else ""
    return {"name": name, "default": default, "help": _cell(info.help)}


_KINDS = {int: "INTEGER", float: "NUMBER", Path: "PATH"}


def _parts(kind: Any) -> tuple[Any, ...]:
    """The types of an annotation such as `Path | None` or `list[str]`."""
    return (kind, *typing.get_args(kind))


def _dashed(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def cli() -> str:
    """docs/cli.md."""
    options = data_file("cli/options.yaml")
    examples = yaml.safe_load((HERE / "examples.yaml").read_text(encoding="utf-8"))
    commands = []
    for function in COMMANDS:
        told = inspect.signature(with_options(function)).parameters.values()
        about = (function.__doc__ or "").strip().split("\n\n")[0]
        commands.append(
            {
                "name": function.__name__,
                "short": options["commands"][function.__name__],
                "about": re.sub(r"\s+", " ", about),
                "examples": examples[function.__name__],
                "options": [_option(parameter) for parameter in told],
            }
        )
    return written("cli", commands=commands, log_level=options["every command"]["log_level"]["help"])


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) or value >= 1000 else f"{value:g}"


def _values(entry: dict[str, Any]) -> str:
    """What a key may be, in words."""
    if "one_of" in entry:
        return ", ".join(f"`{'true' if value is True else value}`" for value in entry["one_of"])
    kinds = {bool: "true or false", int: "whole number", float: "number", str: "text", list: "list"}
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    limits = [f"{word} {_number(entry[limit])}" for limit, word in words.items() if limit in entry]
    return ", ".join([kinds[type(entry["default"])], *limits])


def parameters() -> str:
    """docs/parameters.md; its sections are the comments of settings.yaml."""
    path = PROJECT / "lib" / "settings.yaml"
    entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    sections: list[dict[str, Any]] = [{"title": "The run", "keys": []}]
    for line in path.read_text(encoding="utf-8").splitlines():
        if found := _SECTION.match(line):
            sections.append({"title": found[1], "keys": []})
        elif (key := line.partition(":")[0]) in entries:
            entry = entries[key]
            told = {"default": _cell(_literal(entry["default"])), "range": _values(entry)}
            sections[-1]["keys"].append({"name": key, **told, "meaning": _cell(entry["meaning"])})
    return written("parameters", sections=sections)


PAGES = {"docs/cli.md": cli, "docs/parameters.md": parameters}


def main() -> None:
    stale = []
    for name, make in PAGES.items():
        with speaking(ENGLISH):
            path, text = PROJECT / name, make()
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if "--check" not in sys.argv[1:]:
                path.write_text(text, encoding="utf-8")
                print(f"{name}: written")
    if "--check" in sys.argv[1:] and stale:
        sys.exit(f"Found: {', '.join(stale)} older than the options and settings. Do this: make docs.")


if __name__ == "__main__":
    main()
