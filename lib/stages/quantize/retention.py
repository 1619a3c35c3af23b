"""The products `source_grid` and `retention`: what grid the base's weights lie on, and what quantizing leaves of δ.

Neither needs a score: both compare weights. What the answers keep is measured in 07.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.errors import InputError
from lib.runs.child import run_child
from lib.runs.files import read_json, write_json
from lib.runs.run import Product, Run, Work
from lib.settings import GRID_SIZABLE, NF4
from lib.stages.quantize.files import QuantizationReport
from lib.stages.quantize.importance_matrix import AUTO

if TYPE_CHECKING:
    from lib.settings import Settings


GRID, KEPT = "source_grid.json", "retention.json"
GRID_SHARE = 0.2
"""Share of blocks that a type gives back from which the weights count as lying on its grid. Generic ones give 0; a type
that shares a few blocks by chance of their form (q5_0 of a symmetric block of q4_1) gives some hundredths."""
FEW_VALUES = 22.0
"""Different values in a block of 32 (zeros left out) below which weights seem to come from a quantized file; generic
ones have 30 to 32."""


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


def stamp(grid: SourceGrid) -> str:
    """What every page of the run must say; empty for weights on no grid."""
    if grid.types:
        kinds = ", ".join(f"{kind} ({100 * share:.0f} %)" for kind, share in grid.types.items())
        return (
            f"the base's weights lie on the grid of {next(iter(grid.types))} (blocks of 32 that a type gives back: "
            f"{kinds}): files with those types can round the fine-tuning away, and types cannot be compared fairly"
        )
    if grid.distinct is not None and grid.distinct < FEW_VALUES:
        return (
            f"the base's weights seem to come from a quantized file ({grid.distinct:.1f} different values in a block "
            "of 32), though none of the types tried gives them back"
        )
    return ""


@dataclass(frozen=True)
class Retention:
    """What every file of the ladder keeps of δ = tuned - base weights.

    Attributes:
        product: None where the base could not be had, or was not what was fine-tuned; `reason` says why.
        files: {type: rows of `lib.stages.quantize.base_grid.measure_surviving`}.
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


def source_grid(settings: Settings, run: Run, source: Path, matrix: Path | None, identity: Any) -> SourceGrid:
    """Measure the grid of the base's weights, or find it done.

    Args:
        source: the run's unquantized GGUF.
        matrix: importance matrix of the ladder; identity: what distinguishes it (JSON).

    Raises:
        InputError: a base that does not belong to the GGUF.
    """
    if reason := _rounded_start(run):
        return SourceGrid(None, reason=reason)

    def build(work: Work) -> None:
        argument = {"base": _base(run), "source": str(source.resolve())}
        argument["imatrix"] = None if matrix is None else str(matrix.resolve())
        answer = run_child("lib.stages.quantize.base_grid:measure", argument, "grid of the base's weights")
        write_json(work.folder / GRID, {k: v for k, v in answer.items() if k != "peak_memory_mib"})
        found = _read_grid(None, work.folder)
        work.notes += [words] if (words := stamp(found)) else []
        work.metrics |= {kind: round(share, 4) for kind, share in found.types.items()}

    try:
        product = run.produce(
            "source_grid",
            build,
            parameters={"base": _revision(run), "imatrix": identity},
            inputs=("data", "gguf", *(["imatrix"] if settings.imatrix == AUTO else [])),
            force=settings.force,
        )
    except _NoBaseError as error:
        return SourceGrid(None, reason=str(error))
    return _read_grid(product, product.path)


def _read_grid(product: Product | None, folder: Path) -> SourceGrid:
    content = read_json(folder / GRID)
    return SourceGrid(product, content["types"], content["distinct"], content["blocks"], content["matrices"])


def measure_retention(
    settings: Settings, run: Run, source: Path, files: tuple[QuantizationReport, ...], grid: SourceGrid
) -> Retention:
    """Compare tuned weights, base weights and every file, or find it done.

    Raises:
        InputError: a base that does not belong to the GGUF, a damaged file.
    """
    if grid.product is None:
        return Retention(None, reason=grid.reason)

    def build(work: Work) -> None:
        folder = run.require("quantized").path
        argument = {
            "base": _base(run),
            "source": str(source.resolve()),
            "files": {file.type: str((folder / file.file).resolve()) for file in files},
        }
        answer = run_child(
            "lib.stages.quantize.base_grid:measure_surviving", argument, "what is left of the fine-tuning"
        )
        shares = {file.file: grid.share(file.histogram) for file in files}
        shares |= {NF4: answer["in_blocks"]} if NF4 in grid.types else {}
        write_json(
            work.folder / KEPT,
            {"source_grid": shares, **{k: v for k, v in answer.items() if k != "peak_memory_mib"}},
        )
        found = _read(None, work.folder)
        work.metrics |= {name: found.kept(name) for name in found.files}

    try:
        product = run.produce(
            "retention",
            build,
            parameters={"base": _revision(run), "types": [file.type for file in files]},
            inputs=("data", "gguf", "quantized", "source_grid"),
            force=settings.force,
        )
    except _NoBaseError as error:
        return Retention(None, reason=str(error))
    return _read(product, product.path)


def _read(product: Product | None, folder: Path) -> Retention:
    content = read_json(folder / KEPT)
    moved, left_out = content["moved"], tuple(content["left_out"])
    return Retention(product, content["files"], moved, left_out, content["source_grid"])


class _NoBaseError(Exception):
    """The base cannot be had; its text says why."""


def _base(run: Run) -> str:
    """Folder of the run's base, resolved (and hashed) only when something is measured.

    Raises:
        _NoBaseError: see there.
    """
    from lib.models.base_model import base_of

    try:
        return str(base_of(run).path.resolve())
    except InputError as error:
        raise _NoBaseError(f"The base model cannot be had now: {error.found}") from error


def _revision(run: Run) -> str | None:
    """The base's, as 01 recorded it."""
    return run.require("data").entry.facts.get("base_revision")


def _rounded_start(run: Run) -> str:
    """Why nothing can be told of an adapter that was merged into the rounded weights that it was trained on; empty for
    others. Those weights are stored nowhere, and from the base's own they differ by the rounding to NF4 too, which
    would pass for fine-tuning."""
    merged = run.manifest.entries().get("merged")
    if merged is None or merged.facts.get("merge_base") != "dequantized":
        return ""
    return (
        "The adapter was merged into weights that had been rounded to NF4 (`merge_base: dequantized`), which are not "
        "kept, so what fine-tuning changed cannot be told from that rounding. They lie on the grid of NF4: the export "
        "`nf4` can round the fine-tuning away."
    )
