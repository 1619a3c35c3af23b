"""`workbook inspect` and `workbook unpack`: what a model is, and a model folder out of a GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from lib.cli.console import Json, cell, show
from lib.errors import InputError
from lib.runs.files import user_path


def inspect(
    path: Annotated[str, typer.Argument(help="model folder, adapter folder or .gguf file", metavar="PATH")],
    as_json: Json = False,
) -> None:
    """Describe a model, an adapter or a GGUF file without loading it; exit code 2 if it cannot be used."""
    report = examine(user_path(path))
    show(report, as_json, as_text(report))
    if report["problems"]:
        raise typer.Exit(2)


def examine(path: Path) -> dict[str, Any]:
    """`lib.models.inspect.inspect`, and what the step refuses that would take it, as far as that reads no weights."""
    from lib.models.inspect import inspect as look

    report = look(path)
    if not report["problems"]:
        step, ask = _STEPS[report["kind"]]
        try:
            ask(path, report)
        except InputError as error:
            report["problems"].append(f"{step}: {error.found.rstrip('.')}")
    return report


def _ask_convert(folder: Path, report: Mapping[str, Any]) -> None:
    from lib.models.weights import open_weights
    from lib.stages.convert.convert import Conversion

    Conversion(folder, open_weights(folder), folder / "inspected.gguf", "f16")


def _ask_merge(folder: Path, report: dict[str, Any]) -> None:
    """Against the base, where that lies on this disk."""
    from lib.models.adapters import read_adapter
    from lib.stages.merge.adapter import plan_merge, refuse_unsupported

    adapter = read_adapter(folder)
    adapter.require_finite()
    refuse_unsupported(adapter)
    base = user_path(str(report["base_model"] or ""))
    if report["base_model"] and base.is_dir():
        plan_merge(base, folder)
    else:
        report["notes"].append("its base model is no folder on this disk: whether it fits was not checked")


def _ask_serve(file: Path, report: dict[str, Any]) -> None:
    """Whether llama.cpp opens the file, and whether it can be asked anything."""
    from lib.stages.convert.convert import load_check

    try:
        load_check(Path(str(file).encode().decode()))
    except UnicodeEncodeError:
        report["notes"].append("its name is not UTF-8: no other command reads it under that name")
    if report["template"] is None:
        raise InputError("no chat template (quantize and perplexity need none).", "one.", "convert the model with it.")


_STEPS: dict[str, tuple[str, Callable[[Path, dict[str, Any]], None]]] = {
    "model": ("workbook convert", _ask_convert),
    "adapter": ("workbook merge", _ask_merge),
    "gguf": ("workbook serve", _ask_serve),
}
"""Kind of a folder or file → the step that takes it."""


def as_text(report: Mapping[str, Any]) -> str:
    """A report as lines `key: value`, then notes and problems."""
    values = {key: value for key, value in report.items() if key not in ("notes", "problems")}
    lines = [f"{key.replace('_', ' ')}: {_value(key, value)}" for key, value in values.items()]
    lines += [f"note: {note}" for note in report["notes"]]
    lines += [f"PROBLEM: {problem}" for problem in report["problems"]] or ["no problem found"]
    return "\n".join(lines)


def _value(key: str, value: Any) -> str:
    if key == "bytes":
        return f"{value:,} ({value / 1e6:,.1f} MB)"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        parts = {name: part[:12] if name == "sha256" else _value("", part) for name, part in value.items()}
        return ", ".join(f"{str(name).replace('_', ' ')} {part}" for name, part in parts.items())
    return cell(value)


def unpack(
    file: Annotated[Path, typer.Argument(help="GGUF file of a Qwen2, Qwen3 or Llama model", metavar="FILE.gguf")],
    folder: Annotated[Path, typer.Argument(help="new model folder", metavar="FOLDER")],
    dtype: Annotated[str, typer.Option(help="auto (float16 where they fit), float16, bfloat16 or float32")] = "auto",
    off_grid: Annotated[
        bool, typer.Option("--off-grid", help="rescale channels: same function, weights off the grid of their type")
    ] = False,
    as_json: Json = False,
) -> None:
    """Turn a GGUF file into a model folder: weights dequantized, configuration and tokenizer rebuilt."""
    from lib.models.unpack import notes_of
    from lib.models.unpack import unpack as write_folder
    from lib.report.weights_page import unpacked

    record = write_folder(user_path(str(file)), folder, dtype, off_grid)
    lines = [str(folder), *notes_of(record)]
    lines += [f"{key}: {value}" for key, value in unpacked({"unpacked": record}).items()]
    show({"folder": str(folder), **record}, as_json, "\n".join(lines))
