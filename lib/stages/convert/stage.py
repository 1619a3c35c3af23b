"""Stage 05: the merged model as one GGUF file, proven to answer as the merged model does."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lib.models.unpack import plain_name
from lib.prompts.tasks import read_task
from lib.runs.files import read_json, read_jsonl, write_json
from lib.runs.run import Product, ProductDraft, Run
from lib.settings import Settings
from lib.stages.convert.convert import ConversionReport, metadata_table
from lib.stages.convert.gate import GateReport, gate
from lib.stages.convert.official import convert_folder

_GATE = 3
"""Raised when the gate asks more, so that an older file is tested again."""


@dataclass(frozen=True)
class ExportResult:
    """The GGUF of a run.

    Attributes:
        path: the file.
        conversion: sizes, tensor types, tokenizer.
        gate: how far its answers are from the merged model's.
        metadata: key and shortened value of everything the file says about itself.
    """

    product: Product
    path: Path
    conversion: ConversionReport
    gate: GateReport
    metadata: list[tuple[str, str]]


def export(settings: Settings, run: Run) -> ExportResult:
    """Make the product `gguf` from `merged`, or skip it when nothing changed.

    Raises:
        InputError: a model that cannot be converted, or a GGUF that fails the gate; the product is not published then.
    """
    product = run.produce(
        "gguf",
        lambda work: _build(settings, run, work),
        parameters=settings.pick("outtype", "gate_max_kld", "gate_min_label_agreement") | {"gate": _GATE},
        inputs=("data", "merged"),
        force=settings.force,
    )
    return _read(product)


def model_name(base: str, run_name: str) -> str:
    """Name of the converted model: base and run, as in "Qwen2.5-0.5B-Instruct-chnsenticorp".

    The naming convention of GGUF is BaseName-SizeLabel-FineTune-Version-Encoding; base names of hubs hold the size.
    """
    last = plain_name(base.rstrip("/").rsplit("/", 1)[-1] or "model")
    name = "Offline-base" if last == "offline" else last
    return re.sub(r"[^\w.-]+", "-", f"{name}-{run_name}").strip("-.")


def _build(settings: Settings, run: Run, work: ProductDraft) -> None:
    data, merged = run.require("data"), run.require("merged")
    name = model_name(str(merged.entry.facts.get("base_model", "model")), run.name)
    path = work.folder / f"{name}-{settings.outtype.upper()}.gguf"
    conversion = convert_folder(merged.path, path, settings.outtype, name.replace("-", " "))
    task, rows = read_task(data.path), read_jsonl(data.path / "validation.jsonl")
    limits = (settings.gate_max_kld, settings.gate_min_label_agreement)
    report = gate(merged.path, path, task, rows, *limits, settings.n_threads)
    record = {**asdict(conversion), "model": "merged", "output": path.name}
    write_json(work.folder / "conversion.json", record)
    write_json(work.folder / "gate.json", asdict(report))
    if conversion.converter:
        work.notes.append(f"the GGUF file is of {conversion.converter}: the workbook's own does not know the model")
    work.facts = {"file": path.name, "architecture": conversion.architecture, "outtype": settings.outtype}
    work.metrics = {
        "bytes": conversion.bytes_after,
        "mean_kld": report.mean_kld,
        "label_agreement": report.label_agreement,
        "same_top": report.same_top,
    }


def _read(product: Product) -> ExportResult:
    conversion: dict[str, Any] = read_json(product.path / "conversion.json")
    path = product.path / conversion["output"]
    return ExportResult(
        product=product,
        path=path,
        conversion=ConversionReport(**conversion),
        gate=GateReport(**read_json(product.path / "gate.json")),
        metadata=metadata_table(path),
    )
