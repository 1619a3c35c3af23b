"""Stage 05: the merged model as one GGUF file, proven to answer as the merged model does."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lib.errors import refusal
from lib.models.gguf_file import read_metadata, read_tensors
from lib.models.unpack import plain_name
from lib.models.weights import open_weights
from lib.progress import Progress
from lib.prompts.tasks import read_task
from lib.runs.files import atomic_path, read_json, read_jsonl, require_space, write_json
from lib.runs.run import Product, ProductDraft, Run
from lib.settings import Settings
from lib.stages.convert.convert import ConversionReport, check_output, convert, load_check, metadata_table
from lib.stages.convert.gate import GateReport, gate

# Converting with the official script of a llama.cpp checkout: for models that this converter does not know.

SCRIPT = "convert_hf_to_gguf.py"


def convert_officially(model_dir: Path, output: Path, outtype: str, checkout: Path) -> dict[str, Any]:
    """Run `convert_hf_to_gguf.py` of `checkout` with this Python and publish its file once llama.cpp has opened it.

    The script's own code is run (it is not reviewed here); code inside the model folder is not.

    Raises:
        InputError: no script there, weights that are not safetensors, or the script or llama.cpp fails; nothing is left
            at `output` then.
    """
    started = time.monotonic()
    model_dir, output, script = Path(model_dir), Path(output), Path(checkout) / SCRIPT
    if not script.is_file():
        raise refusal("convert/no-script", checkout=checkout)
    weights = open_weights(model_dir)
    check_output(output, weights, outtype)
    require_space(output.parent, weights.parameters * (4 if outtype == "f32" else 2) + (64 << 20), output.name)
    with atomic_path(output, alone=True) as temporary:
        _run(script, model_dir, temporary, outtype)
        loaded = load_check(temporary)
    metadata = read_metadata(output)
    return {
        "model": str(model_dir),
        "output": str(output),
        "converter": f"{SCRIPT} of {checkout}",
        "architecture": metadata.get("general.architecture"),
        "outtype": outtype,
        "tensors": len(read_tensors(output)),
        "bytes_after": output.stat().st_size,
        "loaded": loaded,
        "seconds": round(time.monotonic() - started, 2),
    }


def _run(script: Path, model_dir: Path, output: Path, outtype: str) -> None:
    arguments = [str(model_dir.resolve()), "--outtype", outtype, "--outfile", str(output.resolve())]
    command = [sys.executable, str(script.resolve()), *arguments]
    with Progress(f"{SCRIPT} of llama.cpp"):
        done = subprocess.run(command, cwd=script.parent, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode or not output.is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1][:300] if lines else f"exit code {done.returncode}"
        absent = "ModuleNotFoundError" in reason
        raise refusal("convert/script-lacks-library" if absent else "convert/script-failed", reason=reason)


# Stage 05: the merged model as one GGUF file, proven to answer as the merged model does.

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
    conversion = convert(merged.path, path, settings.outtype, name.replace("-", " "))
    task, rows = read_task(data.path), read_jsonl(data.path / "validation.jsonl")
    limits = (settings.gate_max_kld, settings.gate_min_label_agreement)
    report = gate(merged.path, path, task, rows, *limits, settings.n_threads)
    record = {**asdict(conversion), "model": "merged", "output": path.name}
    write_json(work.folder / "conversion.json", record)
    write_json(work.folder / "gate.json", asdict(report))
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
