"""`workbook inspect`, `unpack`, `merge`, `convert`: what a model is, and one form of it made from another."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lib.cli.console import cell, show
from lib.errors import InputError
from lib.runs.files import user_path

if TYPE_CHECKING:
    from lib.models.weights import Weights
    from lib.stages.convert.tensors import GgufFile


def inspect(path: str, as_json: bool = False) -> None:
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


def _ask_convert(folder: Path, report: dict[str, Any]) -> None:
    from lib.stages.convert.convert import plan_conversion

    report["notes"] += plan_conversion(folder).tokenizer["unsaid"]


def _ask_merge(folder: Path, report: dict[str, Any]) -> None:
    """Against the base, where that lies on this disk."""
    from lib.models.adapters import read_adapter
    from lib.models.merge_plan import plan_merge, refuse_unsupported, remarks

    adapter = read_adapter(folder)
    adapter.require_finite()
    refuse_unsupported(adapter)
    report["notes"] += remarks(adapter)
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


def unpack(file: Path, folder: Path, dtype: str = "auto", off_grid: bool = False, as_json: bool = False) -> None:
    """Turn a GGUF file into a model folder: weights dequantized, configuration and tokenizer rebuilt."""
    from lib.models.unpack import notes_of
    from lib.models.unpack import unpack as write_folder
    from lib.report.weights_page import unpacked

    record = write_folder(user_path(str(file)), folder, dtype, off_grid)
    lines = [str(folder), *notes_of(record)]
    lines += [f"{key}: {value}" for key, value in unpacked({"unpacked": record}).items()]
    show({"folder": str(folder), **record}, as_json, "\n".join(lines))


def merge(
    base_model: str,
    adapter: str,
    output_dir: Path,
    dtype: str | None = None,
    revision: str = "main",
    gguf: Path | None = None,
    outtype: str | None = None,
    tokenizer: str = "adapter",
    as_json: bool = False,
) -> None:
    """Merge a LoRA adapter into its base model; with --gguf convert the result at the same time."""
    from lib.models import base_model as bases
    from lib.models.adapters import refuse_adapter, require_adapter
    from lib.models.tokenizer_files import differences, reader
    from lib.stages.convert.convert import Conversion
    from lib.stages.merge.stage import write_lineage
    from lib.stages.merge.weights import merge_folders

    if tokenizer not in ("adapter", "base"):
        raise InputError(f"--tokenizer {tokenizer!r}.", "adapter or base.", "choose one of them.")
    if outtype and gguf is None:
        raise InputError("--outtype without --gguf.", "both, or neither.", "add --gguf OUT.gguf.")
    if gguf is not None and gguf.resolve().is_relative_to(output_dir.resolve()):
        raise InputError(f"{gguf} in {output_dir}, the new folder.", "a file beside it.", "choose another --gguf.")
    given = Path(adapter) if Path(adapter).is_dir() else bases.resolve_adapter(adapter).path
    if Path(base_model).is_dir():
        base = Path(base_model)
        name, commit, exact = base.name, None, ""
        if bases.trained_base(given).startswith("sha256:"):
            exact = bases.fingerprint(base)
    else:
        found = bases.resolve_base(base_model, revision, **bases.unpacking_of(given))
        base, exact = found.path, found.revision
        name, commit = (found.unpacked["source"], None) if found.unpacked else (base_model, base.name)
    refuse_adapter(base)
    require_adapter(given)
    if gguf is not None and gguf.exists() and Path(base_model).is_file() and gguf.samefile(base_model):
        raise InputError(f"{gguf} is the base model.", "another file.", "choose another name for the output.")
    bases.refuse_other_folder(given, base)
    conversions: list[Conversion] = []

    @contextlib.contextmanager
    def also(folder: Path, weights: Weights) -> Iterator[GgufFile | None]:
        write_lineage(folder, name, commit, Path(adapter).name)
        if gguf is not None:
            conversions.append(Conversion(folder, weights, gguf, outtype or "f16"))
        with conversions[0].open() if conversions else contextlib.nullcontext() as file:
            yield file

    report = asdict(merge_folders(base, given, output_dir, dtype, tokenizer, also))
    plain = [key for key, value in report.items() if not isinstance(value, (dict, list, tuple))]
    text = f"{output_dir}\n{_lines(report, *plain)}" + "".join(f"\nnote: {words}" for words in report["remarks"])
    if tokenizer == "adapter" and (own := differences(given, base)):
        report["tokenizer"] = list(own)
        text += "\ntaken from the adapter: " + "; ".join(own.values())
    if trained := bases.other_revision(given, exact):
        report["trained_on"] = trained
        text += f"\nTHE ADAPTER WAS TRAINED ON ANOTHER BASE ({trained}), not on {exact}: evaluate before you use it"
    elif unlike := bases.unchecked_base(given, base_model, base, exact):
        report["names_base"] = unlike
        text += f"\nthe adapter names {unlike} as its base; whether {base_model} is the same was not checked"
    settings = "generation_config.json"
    if (given / settings).is_file() and reader(given)(settings) != reader(base)(settings):
        report["left_out"] = [settings]
        text += f"\nleft out: {settings} of the adapter; the merged model has the base's, also where answers end"
    for conversion in conversions:
        report["gguf"] = {**asdict(conversion.report()), "model": str(output_dir)}
        text += f"\n{gguf}\n{_lines(report['gguf'], 'architecture', 'outtype', 'tensors', 'bytes_after', 'loaded')}"
    show(report, as_json, text)


def convert(
    model_dir: Path, output: Path, outtype: str = "f16", llama_cpp: Path | None = None, as_json: bool = False
) -> None:
    """Convert a model folder (Qwen2, Qwen3 or Llama family) to one GGUF file."""
    if llama_cpp is not None:
        from lib.stages.convert.stage import convert_officially

        report = convert_officially(model_dir, output, outtype, llama_cpp)
    else:
        from lib.stages.convert.convert import convert as convert_folder

        report = asdict(convert_folder(model_dir, output, outtype))
    keys = ("output", "converter", "architecture", "outtype", "tensors", "bytes_after", "loaded", "unsaid")
    show(report, as_json, _lines(report, *keys))


def _lines(report: dict[str, Any], *keys: str) -> str:
    """The named keys of a report, one a line."""
    return "\n".join(f"{key}: {cell(report[key])}" for key in keys if report.get(key, []) != [])
