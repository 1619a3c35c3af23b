"""The stage `quantize`: one file for every type of the ladder, and one under a size budget; product `quantized`.

The door of this folder: what page 06 asks for stands here or is imported here.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.models.gguf_file import run_gguf
from lib.models.loading import weight_bytes
from lib.runs.files import read_json, sha256_file, write_json
from lib.runs.manifest import damage, versions
from lib.runs.run import ProductDraft, Run
from lib.scoring.texts import Text
from lib.stages.quantize import files
from lib.stages.quantize.calibration import collect, dataset_name, matrix_identity, run_options
from lib.stages.quantize.calibration import importance_matrix as importance_matrix
from lib.stages.quantize.files import PlannedFile, QuantizationReport, QuantizeResult
from lib.stages.quantize.held_out_kl import imatrix_effect as imatrix_effect
from lib.stages.quantize.held_out_kl import mix_effect as mix_effect
from lib.stages.quantize.recipes import Options
from lib.stages.quantize.size_budget import plan_mix, tokens_of
from lib.stages.quantize.weights import predictions as predictions
from lib.stages.quantize.weights import retention as retention
from lib.stages.quantize.weights import source_grid as source_grid
from lib.stages.quantize.weights import tensor_errors as tensor_errors

if TYPE_CHECKING:
    from lib.settings import Settings

_SUMMARY = "quantized.json"


def plan(settings: Settings, run: Run) -> list[dict[str, Any]]:
    """Exact sizes of the run's ladder before anything is quantized, as `predict_sizes` tells them. Where the files are
    there already, and would not be made again, their reports stand for them: no dry run is needed.

    Raises:
        InputError: as `quantize`, before the work.
    """
    options, mix = run_options(settings, run), plan_mix(settings, run, force=False)
    if _is_current(settings, run, options):
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
    parameters, inputs = _request(settings, options)
    product = run.produce(
        "quantized",
        lambda work: _build(settings, options, mix, run, work),
        parameters=parameters,
        inputs=inputs,
        force=settings.force,
        keep_partial=True,
    )
    summary = read_json(product.path / _SUMMARY)
    rows = [{key: value for key, value in row.items() if key != "sha256"} for row in summary["files"]]
    return QuantizeResult(product, summary["source"], tuple(QuantizationReport(**row) for row in rows))


def _request(settings: Settings, options: Options) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Parameters and inputs of the product."""
    budget = [settings.size_budget, "answer_weight"] if settings.size_budget else []
    parameters = {**settings.pick("ladder", *budget), **_identity(options)}
    return parameters, ("gguf", "sensitivity") if budget else ("gguf",)


def _identity(options: Options) -> dict[str, Any]:
    """What of the options decides about the bytes of the files: the importance matrix by its content and its name."""
    given = {**options.to_json(), "imatrix": matrix_identity(options.imatrix)}
    return {key: value for key, value in given.items() if value}


def _is_current(settings: Settings, run: Run, options: Options) -> bool:
    """Whether the product is there and would not be made again."""
    entry = run.manifest.entries().get("quantized")
    parameters, inputs = _request(settings, options)
    if entry is None or settings.force or entry.parameters != parameters:
        return False
    same = entry.inputs == {name: run.require(name).entry.digest for name in inputs}
    return same and damage(run.folder / "quantized", entry) is None


def _build(settings: Settings, options: Options, mix: PlannedFile | None, run: Run, work: ProductDraft) -> None:
    source = run_gguf(run)
    for stray in work.folder.glob(".*.part"):
        stray.unlink()
    predicted, description = files.survey(source, settings.ladder, options)
    files.require_matrix(predicted, options)
    planned = [PlannedFile(found, options) for found in predicted] + ([mix] if mix else [])
    identity = _identity(options)
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
        rows[report.type] = {**report.to_json(), "sha256": sha256_file(work.folder / report.file)}
        write_summary()

    at_once = files.Concurrency.choose(len(lacking), settings.n_threads)
    files.make_files(source, work.folder, lacking, settings.n_threads, done)
    write_summary()
    ordered = [rows[file.type] for file in planned]
    for leftover in {p.name for p in work.folder.glob("*.gguf")} - {row["file"] for row in ordered}:
        (work.folder / leftover).unlink()
    work.facts |= {"source": source.name, "reused": reused}
    work.facts |= {"at_once": at_once.files, "threads_each": at_once.threads}
    for row in ordered:
        bits = round(row["bits_per_weight"], 3)
        work.metrics[row["type"]] = {"bytes": row["bytes"], "bits_per_weight": bits, "seconds": row["seconds"]}
    work.notes += _fallback_note(ordered)


def _finished(run: Run, work: ProductDraft, identity: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Files that need not be made again, now in the folder of the work: {type: row of quantized.json}.

    Each verifies by SHA-256 and was made with the same options by the same llama.cpp.
    """
    folders = [work.folder] if work.resumed else []
    former = run.manifest.entries().get("quantized")
    if former is not None and former.inputs.get("gguf") == run.require("gguf").entry.digest:
        folders.append(run.folder / "quantized")
    found: dict[str, dict[str, Any]] = {}
    for folder in folders:
        for row in _rows(folder, identity):
            path = folder / row["file"]
            if row["type"] not in found and path.is_file() and sha256_file(path) == row["sha256"]:
                _take_over(path, work.folder / row["file"])
                found[row["type"]] = row
    return found


def _rows(folder: Path, identity: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of a folder's summary, if this version of llama.cpp made it with these options."""
    path = folder / _SUMMARY
    if path.is_file():
        summary = read_json(path)
        if (summary["quantizer"], summary.get("options", {})) == (versions()["llama-cpp-python"], identity):
            yield from summary["files"]


def _take_over(old: Path, new: Path) -> None:
    """Hard link, or copy where the disk has no hard links."""
    if old == new:
        return
    new.unlink(missing_ok=True)
    try:
        os.link(old, new)
    except OSError:
        shutil.copyfile(old, new)


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


def measure_imatrix(
    model: Path, output: Path, text: Text, file: Path, n_ctx: int = 512, chunks: int = 64
) -> dict[str, Any]:
    """Make an importance matrix of a model folder on a text, as 06 does of training rows.

    Args:
        model: folder of 16- or 32-bit weights that transformers loads.
        output: new GGUF file, which `workbook quantize --imatrix` and llama-quantize read; complete or absent.
        text: at most `chunks` windows of `n_ctx` tokens of it are used; `file`: where it was read from.

    Returns:
        "file", "dataset" (its name in the file: the text's, how much of it, its SHA-256), "text_sha256", "rows"
        (documents of which a token is used), "tokens", "windows", "window_tokens", "entries" (layers), "dtype",
        "device", "seconds".

    Raises:
        InputError: a place that cannot be written, a folder that is no model or is quantized, a text that does not fill
            a window, an architecture that is not known.
    """
    files.check_output(file, output)
    tokens = tokens_of(model, text)
    windows, digest = tokens.windows(n_ctx, chunks), sha256_file(file)
    used = n_ctx * len(windows)
    dataset = dataset_name(file.name, f"{len(windows)} windows of {n_ctx} tokens", digest)
    made = collect(model, weight_bytes(model), windows, output, dataset)
    return {
        "file": str(output),
        "dataset": dataset,
        "text_sha256": digest,
        "rows": None if tokens.documents is None else len(set(tokens.documents[:used].tolist())),
        "tokens": used,
        "windows": len(windows),
        "window_tokens": n_ctx,
        **{key: made[key] for key in ("dtype", "entries", "device", "seconds")},
    }
