"""`workbook merge` and `workbook convert`: one model folder of base and adapter, one GGUF file of a folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lib.cli.console import Json, cell, show
from lib.errors import InputError

if TYPE_CHECKING:
    from lib.models.weights import Weights
    from lib.stages.convert.convert import Conversion
    from lib.stages.convert.tensors import GgufFile


def merge(
    base_model: Annotated[str, typer.Option(help="folder, .gguf file or id of the base model", metavar="DIR")],
    adapter: Annotated[str, typer.Option(help="folder, hub or ModelScope id of the LoRA adapter", metavar="DIR")],
    output_dir: Annotated[Path, typer.Option(help="new folder of the merged model", metavar="DIR")],
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 [default: as the base]")] = None,
    revision: Annotated[str, typer.Option(help="commit, branch or tag of a hub id")] = "main",
    gguf: Annotated[
        Path | None, typer.Option(help="also convert, in the same pass over the weights", metavar="OUT.gguf")
    ] = None,
    outtype: Annotated[str, typer.Option(help="of the GGUF: f16, bf16, f32 or q8_0")] = "f16",
    tokenizer: Annotated[
        str, typer.Option(help="where the adapter's own tokenizer or template differs: adapter or base")
    ] = "adapter",
    as_json: Json = False,
) -> None:
    """Merge a LoRA adapter into its base model; with --gguf convert the result at the same time."""
    from lib.models.adapters import refuse_adapter, require_adapter
    from lib.models.base_model import (
        fingerprint,
        other_revision,
        refuse_other_folder,
        resolve_adapter,
        resolve_base,
        trained_base,
        unpacking_of,
    )
    from lib.models.tokenizer_files import differences
    from lib.stages.merge.stage import write_lineage
    from lib.stages.merge.weights import merge_folders

    if tokenizer not in ("adapter", "base"):
        raise InputError(f"--tokenizer {tokenizer!r}.", "adapter or base.", "choose one of them.")
    given = Path(adapter) if Path(adapter).is_dir() else resolve_adapter(adapter).path
    if Path(base_model).is_dir():
        base = Path(base_model)
        name, commit, exact = base.name, None, ""
        if trained_base(given).startswith("sha256:"):
            exact = fingerprint(base)
    else:
        found = resolve_base(base_model, revision, **unpacking_of(given))
        base, exact = found.path, found.revision
        name, commit = (found.unpacked["source"], None) if found.unpacked else (base_model, base.name)
    refuse_adapter(base)
    require_adapter(given)
    if gguf is not None and gguf.exists() and Path(base_model).is_file() and gguf.samefile(base_model):
        raise InputError(f"{gguf} is the base model.", "another file.", "choose another name for the output.")
    refuse_other_folder(given, base)
    conversions: list[Conversion] = []

    @contextlib.contextmanager
    def also(folder: Path, weights: Weights) -> Iterator[GgufFile | None]:
        write_lineage(folder, name, commit, Path(adapter).name)
        if gguf is None:
            yield None
            return
        from lib.stages.convert.convert import Conversion

        conversions.append(Conversion(folder, weights, gguf, outtype))
        with conversions[0].open() as file:
            yield file

    report = asdict(merge_folders(base, given, output_dir, dtype, tokenizer, also))
    plain = [key for key, value in report.items() if not isinstance(value, (dict, list, tuple))]
    text = f"{output_dir}\n{_lines(report, *plain)}"
    if tokenizer == "adapter" and (own := differences(given, base)):
        report["tokenizer"] = list(own)
        text += "\ntaken from the adapter: " + "; ".join(own.values())
    if trained := other_revision(given, exact):
        report["trained_on"] = trained
        text += f"\nTHE ADAPTER WAS TRAINED ON ANOTHER BASE ({trained}), not on {exact}: evaluate before you use it"
    for conversion in conversions:
        report["gguf"] = {**asdict(conversion.report()), "model": str(output_dir)}
        text += f"\n{gguf}\n{_lines(report['gguf'], 'architecture', 'outtype', 'tensors', 'bytes_after', 'loaded')}"
    show(report, as_json, text)


def convert(
    model_dir: Annotated[Path, typer.Argument(help="folder of a full model", metavar="MODEL_DIR")],
    output: Annotated[Path, typer.Argument(help="new GGUF file", metavar="OUT.gguf")],
    outtype: Annotated[str, typer.Option(help="f16, bf16, f32 or q8_0")] = "f16",
    llama_cpp: Annotated[
        Path | None, typer.Option(help="checkout whose official script converts instead", metavar="DIR")
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert a model folder (Qwen2, Qwen3 or Llama family) to one GGUF file."""
    if llama_cpp is not None:
        from lib.stages.convert.stage import convert_officially

        report = convert_officially(model_dir, output, outtype, llama_cpp)
    else:
        from lib.stages.convert.convert import convert as convert_folder

        report = asdict(convert_folder(model_dir, output, outtype))
    keys = ("output", "converter", "architecture", "outtype", "tensors", "bytes_after", "loaded")
    show(report, as_json, _lines(report, *keys))


def _lines(report: dict[str, Any], *keys: str) -> str:
    """The named keys of a report, one a line."""
    return "\n".join(f"{key}: {cell(report[key])}" for key in keys if key in report)
