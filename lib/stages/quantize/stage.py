"""The stage `quantize`: one file for every type of the ladder, and one under a size budget; product `quantized`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.errors import InputError
from lib.models.gguf_file import check_gguf
from lib.runs.files import read_json, require_space, sha256_file, user_path, write_json
from lib.runs.manifest import versions
from lib.runs.run import Product, Run, Work
from lib.stages.quantize import recipes
from lib.stages.quantize.bit_allocation import Mix, plan_mix
from lib.stages.quantize.effects import EffectResult, MixEffect, measure_effect, measure_mix_effect
from lib.stages.quantize.files import QuantizationReport, require_matrix, survey
from lib.stages.quantize.importance_matrix import AUTO, NONE, existing
from lib.stages.quantize.ladder import Job, Slots, run_jobs
from lib.stages.quantize.recipes import Options
from lib.stages.quantize.retention import Retention, SourceGrid, measure_retention, source_grid
from lib.stages.quantize.tensor_errors import TensorErrors, measure_errors

if TYPE_CHECKING:
    from lib.settings import Settings


_SUMMARY = "quantized.json"


@dataclass(frozen=True)
class QuantizeResult:
    """The ladder of a run.

    Attributes:
        product: the folder with one `<name>-<TYPE>.gguf` a type.
        source: description of the file that was quantized (see `describe_gguf`).
        files: one report a type, in the order of the ladder; behind them the one made for a size budget.
    """

    product: Product
    source: dict[str, Any]
    files: tuple[QuantizationReport, ...]


def plan(settings: Settings, run: Run) -> list[dict[str, Any]]:
    """Exact sizes of the run's ladder before anything is quantized: see `predict_sizes`.

    Raises:
        InputError: as `quantize`, before the work.
    """
    options = _options(settings, run)
    predictions, _ = survey(_only_gguf(run.require("gguf").path), settings.ladder, options)
    require_matrix(predictions, options)
    mixed = _mix(settings, run, options)
    return [*predictions, mixed.prediction] if mixed else predictions


def mix(settings: Settings, run: Run) -> Mix | None:
    """The types of a file under the size budget, by measured sensitivity; None without one.

    Raises:
        InputError: no products `data`, `merged` or `gguf`; a budget below the smallest file of the types tried.
    """
    return _mix(settings, run, _options(settings, run), settings.force)


def _mix(settings: Settings, run: Run, options: Options, force: bool = False) -> Mix | None:
    if not settings.size_budget:
        return None
    return plan_mix(settings, run, _only_gguf(run.require("gguf").path), options.imatrix, force)


def quantize(settings: Settings, run: Run) -> QuantizeResult:
    """Quantize the run's GGUF to every type of `settings.ladder`, and under the size budget if there is one.

    Files of the former product whose source and quantizer are the same are taken over, so that a longer ladder costs
    only its new types; after an interruption finished files are kept.

    Raises:
        InputError: no product `gguf`, a source that cannot be quantized, a type that needs an importance matrix, too
            little room.
    """

    options = _options(settings, run)
    mixed = _mix(settings, run, options)

    def build(work: Work) -> None:
        _build(settings, options, mixed, run, work)

    product = run.produce(
        "quantized",
        build,
        parameters={
            **settings.pick("ladder", *([settings.size_budget, "answer_weight"] if mixed else [])),
            **_identity(options),
        },
        inputs=("gguf", "sensitivity") if mixed else ("gguf",),
        force=settings.force,
        keep_partial=True,
    )
    summary = read_json(product.path / _SUMMARY)
    files = tuple(
        QuantizationReport(**{key: value for key, value in row.items() if key != "sha256"}) for row in summary["files"]
    )
    return QuantizeResult(product, summary["source"], files)


def effect(settings: Settings, run: Run, result: QuantizeResult) -> EffectResult | None:
    """The ladder's smallest types with and without the run's own importance matrix; None without `imatrix: auto`.

    Raises:
        InputError: too few test rows.
    """
    if settings.imatrix != AUTO:
        return None
    source = _only_gguf(run.require("gguf").path)
    return measure_effect(settings, _options(settings, run), run, source, result.files)


def mix_effect(settings: Settings, run: Run, result: QuantizeResult) -> MixEffect | None:
    """The file under the size budget beside every recipe, on held-out rows; None without a budget.

    Raises:
        InputError: too few test rows.
    """
    source = _only_gguf(run.require("gguf").path)
    return measure_mix_effect(settings, _options(settings, run), run, source, result.files)


def errors(settings: Settings, run: Run, result: QuantizeResult) -> TensorErrors:
    """How far every tensor of every file of the ladder is from the source.

    Raises:
        InputError: a damaged file.
    """
    return measure_errors(settings, run, _only_gguf(run.require("gguf").path), result.files)


def grid(settings: Settings, run: Run) -> SourceGrid:
    """On which types' grid the weights of the run's base lie: told before anything is quantized.

    Raises:
        InputError: no product `gguf`, or of another base.
    """
    options, source = _options(settings, run), _only_gguf(run.require("gguf").path)
    return source_grid(settings, run, source, options.imatrix, _identity(options).get("imatrix"))


def retention(settings: Settings, run: Run, result: QuantizeResult) -> Retention:
    """What every file of the ladder keeps of the change that fine-tuning made to the weights.

    Raises:
        InputError: a base of another model, a damaged file.
    """
    found = grid(settings.model_copy(update={"force": False}), run)
    return measure_retention(settings, run, _only_gguf(run.require("gguf").path), result.files, found)


def _options(settings: Settings, run: Run) -> Options:
    if made := existing(settings, run):
        matrix: Path | None = made.path
    else:
        matrix = None if settings.imatrix in ("", NONE) else user_path(settings.imatrix)
    if matrix is not None and not matrix.is_file():
        raise InputError(f"no file {matrix}.", "an importance matrix.", "correct imatrix, or set it to auto or none.")
    types = tuple(settings.tensor_types)
    return Options(matrix, types, settings.output_tensor_type, settings.token_embedding_type)


def _identity(options: Options) -> dict[str, Any]:
    """What of the options decides about the bytes of the files: the importance matrix by its content and its name."""
    given = {key: value for key, value in options.to_json().items() if value}
    if options.imatrix is not None:
        given["imatrix"] = f"{options.imatrix.name} {sha256_file(options.imatrix)}"
    return given


def _build(settings: Settings, options: Options, mixed: Mix | None, run: Run, work: Work) -> None:
    gguf = run.require("gguf")
    source = _only_gguf(gguf.path)
    for stray in work.folder.glob(".*.part"):
        stray.unlink()
    predictions, description = survey(source, settings.ladder, options)
    require_matrix(predictions, options)
    identity = _identity(options)
    rows = {} if settings.force else _finished(run, work, gguf.entry.digest, identity)
    if mixed:
        predictions = [*predictions, mixed.prediction]
    rows = {kind: row for kind, row in rows.items() if row.get("mix") in (None, mixed and mixed.record)}
    order = [prediction["type"] for prediction in predictions]
    reused = [kind for kind in order if kind in rows]
    jobs = [_job(p, work.folder, source, mixed) for p in predictions if p["type"] not in rows]
    require_space(run.folder, sum(job.prediction["bytes"] for job in jobs), f"{len(jobs)} quantized files")

    def write_summary() -> None:
        files = [rows[kind] for kind in order if kind in rows]
        quantizer = versions()["llama-cpp-python"]
        summary = {"source": description, "quantizer": quantizer, "options": identity, "files": files}
        write_json(work.folder / _SUMMARY, summary)

    def done(report: QuantizationReport) -> None:
        rows[report.type] = {**report.to_json(), "sha256": sha256_file(work.folder / report.file)}
        write_summary()

    slots = Slots.choose(len(jobs), settings.n_threads)
    run_jobs(source, jobs, options, slots, done)
    write_summary()
    ordered = [rows[kind] for kind in order]
    for leftover in {p.name for p in work.folder.glob("*.gguf")} - {row["file"] for row in ordered}:
        (work.folder / leftover).unlink()
    work.facts |= {"source": source.name, "reused": reused, "at_once": slots.files, "threads_each": slots.threads}
    work.metrics |= {row["type"]: _headline(row) for row in ordered}
    work.notes += _fallback_note(ordered)


def _job(prediction: dict[str, Any], folder: Path, source: Path, mixed: Mix | None) -> Job:
    options = mixed.options if mixed and prediction.get("mix") else None
    return Job(prediction, folder / f"{recipes.stem(source)}-{prediction['type']}.gguf", options)


def _only_gguf(folder: Path) -> Path:
    found = sorted(folder.glob("*.gguf"))
    if len(found) != 1:
        raise InputError(
            f"{len(found)} GGUF files in {folder}.",
            "exactly one.",
            "run notebooks/05_convert_gguf.ipynb with force: true.",
        )
    check_gguf(found[0])
    return found[0]


def _finished(run: Run, work: Work, source_digest: str, identity: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Files that need not be made again, now in the folder of the work: {type: row of quantized.json}.

    Each verifies by SHA-256 and was made with the same options by the same llama.cpp.
    """
    folders = [work.folder] if work.resumed else []
    former = run.manifest.entries().get("quantized")
    if former is not None and former.inputs.get("gguf") == source_digest:
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


def _headline(row: dict[str, Any]) -> dict[str, Any]:
    return {"bytes": row["bytes"], "bits_per_weight": round(row["bits_per_weight"], 3), "seconds": row["seconds"]}


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
