"""`workbook inspect`, `unpack`, `unpickle`, `merge`, `convert`: what a model is, and how one form becomes another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from lib.cli.console import cell, replacing, show
from lib.errors import InputError, refusal
from lib.language import LABEL, told, translated
from lib.runs.files import user_path
from lib.runs.render import megabytes


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
    if not report["problems"] and report["kind"] in _STEPS:
        step, ask = _STEPS[report["kind"]]
        try:
            ask(path, report)
        except InputError as error:
            report["problems"].append(f"{step}: {error.found.rstrip('.')}")
    return report


def _ask_convert(folder: Path, report: dict[str, Any]) -> None:
    from lib.stages.convert.official import check_conversion

    report["notes"] += check_conversion(folder)


def _ask_merge(folder: Path, report: dict[str, Any]) -> None:
    """Against the base, where that lies on this disk."""
    from lib.models.adapters import read_adapter
    from lib.models.inspect import base_on_disk
    from lib.models.merge_plan import plan_merge, refuse_unsupported, remarks
    from lib.models.tokenizer_files import differences
    from lib.stages.merge.weights import check_rows

    adapter = read_adapter(folder)
    adapter.require_finite()
    refuse_unsupported(adapter)
    report["notes"] += remarks(adapter)
    if base := base_on_disk(report["base_model"]):
        plan = plan_merge(base, folder)
        if "vocabulary" in differences(folder, base):
            check_rows(folder, plan.base)
    else:
        report["notes"].append("its base model is no folder on this disk: whether it fits was not checked")


def _ask_serve(file: Path, report: dict[str, Any]) -> None:
    """Whether llama.cpp opens the file, and whether it can be asked anything."""
    from lib.models.gguf_file import read_metadata
    from lib.models.gguf_tokenizer import refuse_bad_vocabulary
    from lib.models.unpack_source import Keys
    from lib.stages.convert.convert import load_check

    keys = Keys(read_metadata(file), file)
    refuse_bad_vocabulary(keys.metadata, file)
    keys.require_numbers()
    try:
        load_check(Path(str(file).encode().decode()))
    except UnicodeEncodeError:
        report["notes"].append("its name is not UTF-8: no other command reads it under that name")
    if report["template"] is None:
        raise InputError("no chat template (quantize and perplexity need none).", "one.", "convert the model with it.")


def _ask_run(folder: Path, report: dict[str, Any]) -> None:
    """Whether the runtime that it is for opens the folder."""
    from lib.scoring.folders import open_folder

    open_folder(folder).close()


_STEPS: dict[str, tuple[str, Callable[[Path, dict[str, Any]], None]]] = {
    "model": ("workbook convert", _ask_convert),
    "adapter": ("workbook merge", _ask_merge),
    "gguf": ("workbook serve", _ask_serve),
    "onnx": ("workbook evaluate", _ask_run),
    "mnn": ("workbook evaluate", _ask_run),
}
"""Kind of a folder or file → the step that takes it; none here takes an adapter in GGUF."""


def as_text(report: Mapping[str, Any]) -> str:
    """A report as lines `key: value`, then notes and problems."""
    values = {key: value for key, value in report.items() if key not in ("notes", "problems")}
    lines = [_line(key.replace("_", " "), _value(key, value)) for key, value in values.items()]
    lines += [_line("note", told(note)) for note in report["notes"]]
    lines += [_line("PROBLEM", told(problem)) for problem in report["problems"]] or [told("no problem found")]
    return "\n".join(lines)


def _line(key: str, value: str) -> str:
    """A key and its value, the key and the colon in the language of this process."""
    return f"{translated(key, LABEL)}{translated(': ', LABEL)}{value}"


def _value(key: str, value: Any) -> str:
    if key == "bytes":
        return f"{value:,} ({megabytes(value)} MB)"
    if isinstance(value, bool):
        return translated("yes" if value else "no", LABEL)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        parts = {name: part[:12] if name == "sha256" else _value("", part) for name, part in value.items()}
        return ", ".join(f"{translated(str(name).replace('_', ' '), LABEL)} {part}" for name, part in parts.items())
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


def unpickle(folder: Path, output: Path, as_json: bool = False) -> None:
    """Turn pickled weights into safetensors, read as tensors alone in a process without network; other files copied."""
    from lib.models.unpickle import unpickle as write_folder

    report = {"folder": str(output), **write_folder(user_path(str(folder)), output)}
    lines = [str(output), _lines(report, "tensors", "bytes", "copied")]
    lines += [
        f"left out: {name}, which is {kept} (the configuration ties them)" for name, kept in report["left_out"].items()
    ]
    lines += [f"written whole: {name}, which shared its numbers with another" for name in report["copies"]]
    if not report["confined"]:
        lines.append("note: this system's kernel could not confine the reader; Python alone did")
    show(report, as_json, "\n".join(lines))


UNQUANTIZED, CONVERTED = (0, 1, 32), (0, 1, 7, 32)
"""general.file_type of F32, F16 and BF16 files; of those that `workbook convert` makes, Q8_0 among them."""


def kind_of_gguf(path: Path) -> Any:
    """general.file_type of a GGUF file, else its general.type; None of a file that is no GGUF."""
    from lib.models.gguf_file import read_metadata

    try:
        metadata = read_metadata(path)
    except InputError:
        return None
    return metadata.get("general.file_type", metadata.get("general.type"))


def merge(
    base_model: str,
    adapter: str,
    output_dir: Path,
    dtype: str | None = None,
    revision: str = "main",
    gguf: Path | None = None,
    outtype: str | None = None,
    tokenizer: str = "adapter",
    force: bool = False,
    as_json: bool = False,
) -> None:
    """Merge a LoRA adapter into its base model; with --gguf convert the result at the same time."""
    from lib.pipeline.merge_pair import find_pair, merge_pair

    if tokenizer not in ("adapter", "base"):
        raise InputError(f"--tokenizer {tokenizer!r}.", "adapter or base.", "choose one of them.")
    if outtype and gguf is None:
        raise InputError("--outtype without --gguf.", "both, or neither.", "add --gguf OUT.gguf.")
    if gguf is not None and gguf.resolve().is_relative_to(output_dir.resolve()):
        raise InputError(f"{gguf} in {output_dir}, the new folder.", "a file beside it.", "choose another --gguf.")
    if revision != "main" and user_path(base_model).exists():
        raise InputError("--revision for a base model on this disk.", "a hub id.", "leave out --revision.")
    pair = find_pair(base_model, adapter, revision)
    if gguf is not None and gguf.exists() and Path(base_model).is_file() and gguf.samefile(base_model):
        raise InputError(f"{gguf} is the base model.", "another file.", "choose another name for the output.")
    if gguf is not None:
        replacing(gguf, force, lambda path: kind_of_gguf(path) in CONVERTED)
    made = merge_pair(pair, output_dir, dtype, tokenizer, gguf, outtype or "f16")
    in_notes = ("trained_on", "names_base")
    plain = [k for k, value in made.report.items() if not isinstance(value, (dict, list, tuple)) and k not in in_notes]
    text = "\n".join([str(output_dir), _lines(made.report, *plain), *made.notes])
    if converted := made.report.get("gguf"):
        text += f"\n{gguf}\n{_lines(converted, 'architecture', 'outtype', 'tensors', 'bytes_after', 'loaded')}"
    show(made.report, as_json, text)


def convert(
    model_dir: Path,
    output: Path,
    outtype: str | None = None,
    base_model: str | None = None,
    llama_cpp: Path | None = None,
    force: bool = False,
    as_json: bool = False,
) -> None:
    """Convert a model folder to one GGUF file, or a LoRA adapter to one that llama.cpp loads beside its base.

    Qwen2, Qwen3 and the Llama family are converted here, others by llama.cpp's own script.
    """
    from lib.models.adapters import refuse_adapter_alone
    from lib.models.weights import open_weights
    from lib.stages.convert.convert import check_output

    if base_model is not None:
        _convert_adapter(model_dir, base_model, output, outtype or "f32", llama_cpp, force, as_json)
        return
    refuse_adapter_alone(model_dir)
    outtype = outtype or "f16"
    check_output(output, open_weights(model_dir), outtype)
    replacing(output, force, lambda path: kind_of_gguf(path) in CONVERTED)
    from lib.stages.convert.official import convert_folder, convert_officially

    if llama_cpp is not None:
        made = convert_officially(model_dir, output, outtype, llama_cpp)
    else:
        made = convert_folder(model_dir, output, outtype)
    _show_converted(asdict(made), as_json)


def _convert_adapter(
    adapter: Path, base_model: str, output: Path, outtype: str, llama_cpp: Path | None, force: bool, as_json: bool
) -> None:
    from lib.models.adapters import require_adapter
    from lib.models.base_model import resolve_base
    from lib.settings import OFFLINE_BASE
    from lib.stages.convert.adapter import convert_adapter
    from lib.stages.convert.convert import check_name

    if base_model == OFFLINE_BASE:
        raise refusal("models/no-base-of-adapter")
    require_adapter(adapter)
    check_name(output, outtype)
    replacing(output, force, lambda path: kind_of_gguf(path) == "adapter")
    base = resolve_base(base_model)
    _show_converted(asdict(convert_adapter(adapter, base.path, output, outtype, llama_cpp)), as_json)


def _show_converted(report: dict[str, Any], as_json: bool) -> None:
    report = {key: value for key, value in report.items() if value != ""}
    keys = ("output", "converter", "architecture", "outtype", "tensors", "pairs", "bytes_after", "loaded", "unsaid")
    show(report, as_json, _lines(report, *keys))


def _lines(report: dict[str, Any], *keys: str) -> str:
    """The named keys of a report, one a line."""
    return "\n".join(_line(key, cell(report[key])) for key in keys if report.get(key, []) != [])
