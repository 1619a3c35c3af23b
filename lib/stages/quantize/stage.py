"""The stage `quantize`: one file for every type of the ladder, and one under a size budget, product `quantized`; and
what their weights alone tell: how far every tensor is from its source (product `tensor_errors`), what grid the base's
weights lie on (`source_grid`), what quantizing leaves of the fine-tuning (`retention`).

The door of this folder: what page 06 asks for stands here or is imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lib.errors import InputError, refusal
from lib.models.base_model import base_of
from lib.models.gguf_file import read_metadata, run_gguf
from lib.runs.child import run_child
from lib.runs.files import link_or_copy, read_json, remove_abandoned, sha256_file, write_json
from lib.runs.manifest import versions
from lib.runs.render import render
from lib.runs.run import Product, ProductDraft, Run
from lib.settings import DEQUANTIZED, GRID_SIZABLE, NF4, Settings
from lib.stages.quantize import files
from lib.stages.quantize.calibration import AUTO, matrix_identity, run_options
from lib.stages.quantize.calibration import importance_matrix as importance_matrix
from lib.stages.quantize.files import Options, PlannedFile, QuantizationReport, QuantizeResult
from lib.stages.quantize.held_out_kl import imatrix_effect as imatrix_effect
from lib.stages.quantize.held_out_kl import mix_effect as mix_effect
from lib.stages.quantize.sensitivity import TEXT
from lib.stages.quantize.size_budget import plan_mix

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
        predicted, _ = files.survey(run_gguf(run), _types(settings, run), options)
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


def _types(settings: Settings, run: Run) -> list[str]:
    """The types of the ladder that are to be made: the converted file is there already, the first row of every table.

    Raises:
        InputError: there is nothing else in the ladder, and no size budget.
    """
    source = files.name_of(read_metadata(run_gguf(run)).get("general.file_type"))
    types = [name for name in settings.ladder if name != source]
    if not types and not settings.size_budget:
        raise refusal("quantize/only-source", source=source)
    return types


def _identity(options: Options) -> dict[str, Any]:
    """What of the options decides about the bytes of the files: the importance matrix by its content and its name."""
    given = {**vars(options), "imatrix": matrix_identity(options.imatrix)}
    return {key: value for key, value in given.items() if value}


def _build(settings: Settings, options: Options, mix: PlannedFile | None, run: Run, work: ProductDraft) -> None:
    source, identity = run_gguf(run), _identity(options)
    remove_abandoned(work.folder)
    predicted, description = files.survey(source, _types(settings, run), options)
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
    if description["type"] in settings.ladder:
        work.notes.append(_note("source", source=description["type"]))


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
    return [_note("fallbacks", affected=affected)] if affected else []


def _note(asked: str, **values: Any) -> str:
    """A note of notes.j2 on one line; empty where it has nothing to say."""
    return " ".join(render(Path(__file__).with_name("notes.j2"), asked=asked, **values).split())


# What is told by the weights alone; what the answers keep is measured in 07.

GRID_SHARE = 0.2
"""Share of blocks that a type gives back from which the weights count as lying on its grid. Generic ones give 0; a type
that shares a few blocks by chance of their form (q5_0 of a symmetric block of q4_1) gives some hundredths."""
FEW_VALUES = 22.0
"""Different values in a block of 32 (zeros left out) below which weights seem to come from a quantized file; generic
ones have 30 to 32."""


# How far every tensor is from its source.


@dataclass(frozen=True)
class TensorErrors:
    """Every quantized tensor of every file.

    Attributes:
        files: {type: [{"tensor", "layer" (None outside of the blocks), "kind", "type", "weights", "bits_per_weight",
            "relative_rmse"}]}; relative RMSE is ‖quantized - source‖ / ‖source‖.
    """

    product: Product
    files: dict[str, list[dict[str, Any]]]

    def by_kind(self, name: str) -> dict[str, dict[str, float]]:
        """{kind: {"relative_rmse" (root mean square, tensors weighted by their weights), "bits_per_weight"}}."""
        found: dict[str, dict[str, float]] = {}
        for kind in dict.fromkeys(row["kind"] for row in self.files[name]):
            rows = [row for row in self.files[name] if row["kind"] == kind]
            weights = [row["weights"] for row in rows]
            squares = float(np.average([row["relative_rmse"] ** 2 for row in rows], weights=weights))
            bits = float(np.average([row["bits_per_weight"] for row in rows], weights=weights))
            found[kind] = {"relative_rmse": squares**0.5, "bits_per_weight": bits}
        return found


def tensor_errors(settings: Settings, run: Run, result: QuantizeResult) -> TensorErrors:
    """Compare every file of the ladder with its source, tensor by tensor, or find it done.

    Raises:
        InputError: a damaged file.
    """

    def content(work: ProductDraft) -> dict[str, Any]:
        argument = {"source": run_gguf(run), "files": _paths(result)}
        files = _compared("compare_with_source", argument, "errors of single tensors")["files"]
        worst = {name: max(row["relative_rmse"] for row in rows) for name, rows in files.items() if rows}
        work.metrics |= {name: round(value, 5) for name, value in worst.items()}
        return {"files": files}

    parameters = {"types": [file.type for file in result.files]}
    product, found = run.produce_json("tensor_errors", content, parameters, ("gguf", "quantized"), settings.force)
    return TensorErrors(product, found["files"])


def _compared(function: str, argument: dict[str, Any], what: str) -> dict[str, Any]:
    """What a function of `lib.stages.quantize.compare_weights` finds, in a process of its own."""
    found = run_child(f"lib.stages.quantize.compare_weights:{function}", argument, what)
    return {key: value for key, value in found.items() if key != "peak_memory_mib"}


def _paths(result: QuantizeResult) -> dict[str, Path]:
    """{type: path} of the ladder's files."""
    return {file.type: result.product.path / file.file for file in result.files}


def predictions(run: Run, loss: str = TEXT) -> dict[str, float]:
    """{file of the product `quantized`: KL divergence from the source that its types predict, nats a token}.

    Args:
        loss: "kld" of text, or "answer_kld" of a position that predicts a token of an answer.

    The sum over its tensors, as for the file under a size budget; 0 for a file that rounds nothing. From products
    alone: `sensitivity` (losses) and `tensor_errors` (types). Empty where these files were made without sensitivities;
    a file with a type that was not tried is left out.

    Raises:
        InputError: a missing or damaged product, or one that was made for other files.
    """
    quantized = run.require("quantized")
    if "sensitivity" not in quantized.entry.inputs:
        return {}
    measured, errors = run.require("sensitivity"), run.require("tensor_errors")
    same = quantized.entry.inputs["sensitivity"] == measured.entry.digest
    if not same or errors.entry.inputs["quantized"] != quantized.entry.digest:
        raise refusal("quantize/other-sensitivities", run=run)
    tensors = read_json(measured.path / "sensitivity.json")["tensors"]
    losses = {(t["tensor"], kind["type"]): kind.get(loss) for t in tensors for kind in t["types"]}
    tried = {t["tensor"] for t in tensors}  # the others are in F16 in every file
    types = read_json(errors.path / "tensor_errors.json")["files"]
    found = {}
    for row in read_json(quantized.path / "quantized.json")["files"]:
        parts = [losses.get((t["tensor"], t["type"])) for t in types[row["type"]] if t["tensor"] in tried]
        if None not in parts:
            found[row["file"]] = sum(parts)
    return found


# The base and the fine-tuning.


@dataclass(frozen=True)
class SourceGrid:
    """What the base's weights come from, as far as they tell.

    Attributes:
        product: None where the base could not be had, or was not what was fine-tuned; `reason` says why.
        shares: {type: share of blocks of 32 that it gives back}.
        distinct: different values in a block of 32 (zeros left out), mean; None where no block could be tried.
        blocks, matrices: tried, those that fine-tuning moved.
    """

    product: Product | None
    shares: dict[str, float] = field(default_factory=dict)
    distinct: float | None = None
    blocks: int = 0
    matrices: int = 0
    reason: str = ""

    @property
    def types(self) -> dict[str, float]:
        """The types whose grid it is, the most exact first."""
        found = {kind: share for kind, share in self.shares.items() if share >= GRID_SHARE}
        return dict(sorted(found.items(), key=lambda pair: -pair[1]))

    def share(self, histogram: Iterable[Mapping[str, Any]]) -> float:
        """Share of a file's weights that are in such types (parts with "type" and "weights")."""
        parts = list(histogram)
        return sum(p["weights"] for p in parts if p["type"] in self.types) / sum(p["weights"] for p in parts)

    def marked(self, files: Iterable[tuple[str, Iterable[Mapping[str, Any]]]]) -> list[str]:
        """What tables mark: such types, and the files (name and histogram) with a `GRID_SIZABLE` share of them."""
        return [*self.types, *(name for name, parts in files if self.share(parts) >= GRID_SIZABLE)]


def stamp(grid: SourceGrid, trained: bool = True) -> str:
    """What every page of the run must say; empty for weights on no grid."""
    return _note("grid", grid=grid, few=FEW_VALUES, trained=trained)


@dataclass(frozen=True)
class Retention:
    """What every file of the ladder keeps of δ = tuned - base weights.

    Attributes:
        product: None where the base could not be had, or was not what was fine-tuned; `reason` says why.
        files: {type: rows of `lib.stages.quantize.compare_weights.compare_with_base`}.
        moved: ‖δ‖ / ‖base‖ over all matrices.
        left_out: matrices that the base does not have.
        source_grid: {file or folder name: share of its weights in types on the grid of the base's weights}.
    """

    product: Product | None
    files: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    moved: float = 0.0
    left_out: tuple[str, ...] = ()
    source_grid: dict[str, float] = field(default_factory=dict)
    reason: str = ""

    def kept(self, name: str, kind: str | None = None) -> float | None:
        """⟨q, δ⟩ / ‖δ‖² over the tensors (of a kind) that a file quantizes; None where fine-tuning moved none."""
        rows = [row for row in self.files[name] if kind in (None, row["kind"])]
        return float(np.average([r["kept"] for r in rows], weights=[r["square"] for r in rows])) if rows else None

    def returned(self, name: str, kind: str | None = None) -> float | None:
        """Share of the changed blocks of 32 that are the base's again; None where none changed."""
        rows = [row for row in self.files[name] if kind in (None, row["kind"])]
        changed = sum(row["changed"] for row in rows)
        return sum(row["returned"] for row in rows) / changed if changed else None


def source_grid(settings: Settings, run: Run, force: bool | None = None) -> SourceGrid:
    """On which types' grid the weights of the run's base lie: told before anything is quantized.

    Args:
        force: measure again even if nothing changed; None = as the settings say.

    Raises:
        InputError: no product `gguf`, or a base that does not belong to it.
    """
    source, matrix = run_gguf(run), run_options(settings, run).imatrix
    if reason := _rounded_start(run):
        return SourceGrid(None, reason=reason)

    def measure(work: ProductDraft, base: Path) -> dict[str, Any]:
        argument = {"base": base, "source": source, "imatrix": matrix}
        found = _compared("measure_grid", argument, "grid of the base's weights")
        grid = _grid(None, found)
        work.notes += [words] if (words := stamp(grid, not run.untrained)) else []
        work.metrics |= {kind: round(share, 4) for kind, share in grid.types.items()}
        return found

    inputs = ("data", "gguf", *(["imatrix"] if settings.imatrix == AUTO else []))
    parameters = {"imatrix": matrix_identity(matrix)}
    force = settings.force if force is None else force
    try:
        return _grid(*_measured_on_base(run, "source_grid", measure, parameters, inputs, force))
    except _NoBaseError as error:
        return SourceGrid(None, reason=str(error))


def _grid(product: Product | None, content: dict[str, Any]) -> SourceGrid:
    return SourceGrid(product, content["types"], content["distinct"], content["blocks"], content["matrices"])


def retention(settings: Settings, run: Run, result: QuantizeResult) -> Retention:
    """Compare tuned weights, base weights and every file of the ladder, or find it done.

    Raises:
        InputError: a base that does not belong to the GGUF, a damaged file.
    """
    if run.untrained:
        return Retention(None, reason=_note("untuned"))
    grid = source_grid(settings, run, force=False)
    if grid.product is None:
        return Retention(None, reason=grid.reason)

    def measure(work: ProductDraft, base: Path) -> dict[str, Any]:
        argument = {"base": base, "source": run_gguf(run), "files": _paths(result)}
        found = _compared("compare_with_base", argument, "what is left of the fine-tuning")
        shares = {file.file: grid.share(file.histogram) for file in result.files}
        shares |= {NF4: found["in_blocks"]} if NF4 in grid.types else {}
        kept = Retention(None, found["files"])
        work.metrics |= {name: kept.kept(name) for name in kept.files}
        return {"source_grid": shares, **found}

    inputs, parameters = ("data", "gguf", "quantized", "source_grid"), {"types": [file.type for file in result.files]}
    try:
        product, found = _measured_on_base(run, "retention", measure, parameters, inputs, settings.force)
    except _NoBaseError as error:
        return Retention(None, reason=str(error))
    return Retention(product, found["files"], found["moved"], tuple(found["left_out"]), found["source_grid"])


class _NoBaseError(Exception):
    """The base cannot be had; its text says why."""


def _measured_on_base(
    run: Run,
    product: str,
    measure: Callable[[ProductDraft, Path], dict[str, Any]],
    parameters: dict[str, Any],
    inputs: tuple[str, ...],
    force: bool,
) -> tuple[Product, dict[str, Any]]:
    """What is measured on the run's base, which is resolved (and hashed) only when something is measured.

    Raises:
        _NoBaseError: see there.
    """

    def content(work: ProductDraft) -> dict[str, Any]:
        try:
            base = base_of(run).path
        except InputError as error:
            raise _NoBaseError(f"The base model cannot be had now: {error.found}") from error
        return measure(work, base)

    revision = run.require("data").entry.facts.get("base_revision")  # as 01 recorded it
    return run.produce_json(product, content, {"base": revision, **parameters}, inputs, force)


def _rounded_start(run: Run) -> str:
    """Why nothing can be told of an adapter that was merged into the rounded weights that it was trained on; empty for
    others. Those weights are stored nowhere, and from the base's own they differ by the rounding to NF4 too, which
    would pass for fine-tuning."""
    merged = run.manifest.entries().get("merged")
    rounded = merged is not None and merged.facts.get("merge_base") == DEQUANTIZED
    return _note("rounded") if rounded else ""
