"""The stage `quantize`: one file for every type of the ladder, and one under a size budget; product `quantized`.

The door of this folder: what page 06 asks for stands here or is imported here.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from lib.models.gguf_file import run_gguf
from lib.runs.files import link_or_copy, read_json, remove_abandoned, sha256_file, write_json
from lib.runs.manifest import versions
from lib.runs.run import ProductDraft, Run
from lib.settings import Settings
from lib.stages.quantize import files
from lib.stages.quantize.calibration import importance_matrix as importance_matrix
from lib.stages.quantize.calibration import matrix_identity, run_options
from lib.stages.quantize.files import PlannedFile, QuantizationReport, QuantizeResult
from lib.stages.quantize.held_out_kl import imatrix_effect as imatrix_effect
from lib.stages.quantize.held_out_kl import mix_effect as mix_effect
from lib.stages.quantize.recipes import Options
from lib.stages.quantize.size_budget import plan_mix
from lib.stages.quantize.weights import predictions as predictions
from lib.stages.quantize.weights import retention as retention
from lib.stages.quantize.weights import source_grid as source_grid
from lib.stages.quantize.weights import tensor_errors as tensor_errors

_SUMMARY = "quantized.json"


def plan(settings: Settings, run: Run) -> list[dict[str, Any]]:
    """Exact sizes of the run's ladder before anything is quantized, as `predict_sizes` tells them. Where the files are
    there already, and would not be made again, their reports stand for them: no dry run is needed.

    Raises:
        InputError: as `quantize`, before the work.
    """
    options, mix = run_options(settings, run), plan_mix(settings, run, force=False)
    if not settings.force and run.is_current("quantized", *_request(settings, options)):
        rows = read_json(run.folder / "quantized" / _SUMMARY)["files"]
        predicted = [{**row, "bytes": row["predicted_bytes"]} for row in rows if not row["mix"]]
    else:
        predicted, _ = files.survey(run_gguf(run), settings.ladder, options)
        files.require_matrix(predicted, options)
    return [*predicted, mix.prediction] if mix else predicted


def quantize(settings: Settings, run: Run) -> QuantizeResult:
    """Quantize the run's GGUF to every type of `settings.ladder`, and under the size budget if there is one.

    Files of the former product whose source and quantizer are the same are taken over, so that a longer ladder costs
    only its new types; after an interruption finished files are kept.

    Raises:
        InputError: no product `gguf`, a source that cannot be quantized, a type that needs an importance matrix, too
            little room.
    """
    options, mix = run_options(settings, run), plan_mix(settings, run, force=False)
    product = run.produce(
        "quantized",
        lambda work: _build(settings, options, mix, run, work),
        *_request(settings, options),
        force=settings.force,
        keep_partial=True,
    )
    summary = read_json(product.path / _SUMMARY)
    for row in summary["files"]:
        del row["sha256"]
    return QuantizeResult(product, summary["source"], tuple(QuantizationReport(**row) for row in summary["files"]))


def _request(settings: Settings, options: Options) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Parameters and inputs of the product."""
    budget = [settings.size_budget, "answer_weight"] if settings.size_budget else []
    parameters = {**settings.pick("ladder", *budget), **_identity(options)}
    return parameters, ("gguf", "sensitivity") if budget else ("gguf",)


def _identity(options: Options) -> dict[str, Any]:
    """What of the options decides about the bytes of the files: the importance matrix by its content and its name."""
    given = {**vars(options), "imatrix": matrix_identity(options.imatrix)}
    return {key: value for key, value in given.items() if value}


def _build(settings: Settings, options: Options, mix: PlannedFile | None, run: Run, work: ProductDraft) -> None:
    source, identity = run_gguf(run), _identity(options)
    remove_abandoned(work.folder)
    predicted, description = files.survey(source, settings.ladder, options)
    files.require_matrix(predicted, options)
    planned = [PlannedFile(found, options) for found in predicted] + ([mix] if mix else [])
    rows = {} if settings.force else _finished(run, work, identity)
    rows = {kind: row for kind, row in rows.items() if row.get("mix") in (None, mix and mix.record)}
    reused = [file.type for file in planned if file.type in rows]
    lacking = [file for file in planned if file.type not in rows]

    def write_summary() -> None:
        made = [rows[file.type] for file in planned if file.type in rows]
        quantizer = versions()["llama-cpp-python"]
        summary = {"source": description, "quantizer": quantizer, "options": identity, "files": made}
        write_json(work.folder / _SUMMARY, summary)

    def done(report: QuantizationReport) -> None:
        rows[report.type] = {**asdict(report), "sha256": sha256_file(work.folder / report.file)}
        write_summary()

    together, threads = files.at_once(len(lacking), settings.n_threads)
    files.make_files(source, work.folder, lacking, settings.n_threads, done)
    write_summary()
    ordered = [rows[file.type] for file in planned]
    for leftover in {p.name for p in work.folder.glob("*.gguf")} - {row["file"] for row in ordered}:
        (work.folder / leftover).unlink()
    work.facts |= {"source": source.name, "reused": reused, "at_once": together, "threads_each": threads}
    for row in ordered:
        bits = round(row["bits_per_weight"], 3)
        work.metrics[row["type"]] = {"bytes": row["bytes"], "bits_per_weight": bits, "seconds": row["seconds"]}
    work.notes += _fallback_note(ordered)


def _finished(run: Run, work: ProductDraft, identity: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Files that need not be made again, now in the folder of the work: {type: row of quantized.json}.

    Each verifies by SHA-256 and was made with the same options by the same llama.cpp.
    """
    wanted = versions()["llama-cpp-python"], identity
    found: dict[str, dict[str, Any]] = {}
    for folder in run.earlier(work, "quantized", "gguf"):
        summary = read_json(folder / _SUMMARY) if (folder / _SUMMARY).is_file() else {"quantizer": None}
        for row in summary["files"] if (summary["quantizer"], summary.get("options", {})) == wanted else []:
            path, target = folder / row["file"], work.folder / row["file"]
            if row["type"] not in found and path.is_file() and sha256_file(path) == row["sha256"]:
                found[row["type"]] = row
                if path != target:
                    target.unlink(missing_ok=True)
                    link_or_copy(path, target)
    return found


def _fallback_note(rows: list[dict[str, Any]]) -> list[str]:
    """One sentence for every page when type names promise more than the files hold."""
    affected = [row for row in rows if row["fallbacks"]]
    if not affected:
        return []
    columns = sorted({fallback["columns"] for row in affected for fallback in row["fallbacks"]})
    listed = ", ".join(f"{row['type']} ({row['bits_per_weight']:.2f} bits per weight)" for row in affected)
    widths = " and ".join(str(width) for width in columns)
    return [
        f"type names mislead for this model: rows of {widths} weights do not fill blocks of 256, so llama.cpp stored "
        f"some tensors of {listed} in larger types than the names say"
    ]
