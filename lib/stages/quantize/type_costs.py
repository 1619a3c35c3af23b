"""What every type would cost every tensor: bytes, and the KL divergence that its rounding is predicted to cost, on text
and at answers.

llama.cpp's search for the small types takes nearly all of the time. So one cheap type is tried on all rows of a tensor,
and the others on some of them, drawn by their share in the cheap type's loss (with replacement, so that every row drawn
has a known weight); a type's loss is the cheap type's, times the ratio of the two on these rows. Rows differ far more
among themselves than in that ratio. For child processes only.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lib.errors import InputError
from lib.progress import Progress
from lib.runs.machine import physical_cores
from lib.stages.quantize import importance_matrix, llama_library, recipes
from lib.stages.quantize.bit_allocation import AT_ANSWERS, TEXT
from lib.stages.quantize.fisher import ANSWERS
from lib.stages.quantize.llama_library import rows_of
from lib.stages.quantize.planning import Source, check_coverage, dry_run, open_source, planned_types
from lib.stages.quantize.recipes import Options

PLAIN = (
    *("q8_0", "q6_K", "q5_K", "q5_1", "q5_0", "q4_K", "q4_1", "q4_0"),
    *("iq4_nl", "iq4_xs", "iq3_s", "q3_K", "q2_K"),
)
"""Types that any tensor may have."""
WITH_MATRIX = ("iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs")
"""Types for tensors with importance values only."""

_WEIGHTS = 1 << 21
"""Most weights of a tensor that are tried; a larger one is represented by rows at even distances."""
_CHEAP = "q4_0"
"""The type that is tried on all of them; its blocks of 32 weights fit wherever any type's do."""
_DRAWN = 96
"""Rows that the other types are tried on, of a tensor that has more than twice as many (docs/LOG.md: six budgets)."""
_EVEN = 0.25
"""Part of the draw that is even over all rows, so that none stands for too many."""


def sizes(argument: dict[str, Any]) -> dict[str, Any]:
    """What `measure` finds of bytes, without the work.

    Args:
        argument: "source" (GGUF), "imatrix" (path or None).

    Returns:
        "tensors": [[{"type", "bytes"}]].

    Raises:
        InputError: an importance matrix of another model.
    """
    source, names, matrix = _open(argument)
    found = []
    for name in names:
        columns, rows = _shape(source.tensors[name])
        found.append([{"type": t, "bytes": _bytes(t, rows, columns)} for t in _candidates(name, columns, matrix)])
    return {"tensors": found}


@dataclass(frozen=True)
class _Fisher:
    """Sensitivities of a tensor.

    Attributes:
        path: of them, (rows, columns).
        scale: information of the tensor's common factor.
        share: by what the sensitivities of all rows exceed those of the rows tried.
    """

    path: Path
    scale: float
    share: float


@dataclass(frozen=True)
class _Draw:
    """Some of the rows tried.

    Attributes:
        rows: their numbers among the rows tried.
        stands: how many rows each of them stands for, float64.
        ratios: {loss: the cheap type's on all rows tried over that on these}.
    """

    rows: np.ndarray
    stands: np.ndarray
    ratios: dict[str, float]


@dataclass(frozen=True)
class _Matrix:
    """A tensor to be tried: every `step`-th of its rows, weighed by its sensitivities.

    Attributes:
        fisher: {loss: sensitivities}.
        draw: the rows for all types but the cheap one; None = all that are tried.
        cheap: the losses of the cheap type.
    """

    name: str
    rows: int
    columns: int
    step: int
    fisher: dict[str, _Fisher]
    draw: _Draw | None
    cheap: dict[str, float]

    @property
    def rows_tried(self) -> int:
        return -(-self.rows // self.step)

    @property
    def rows_drawn(self) -> int:
        return self.rows_tried if self.draw is None else len(self.draw.rows)


def measure(argument: dict[str, Any]) -> dict[str, Any]:
    """Quantize and turn back rows of every tensor in every type, and weigh the squared errors; as many at once as there
    are threads (llama.cpp's functions and numpy leave Python's lock), the longest first.

    Args:
        argument: "source" (GGUF), "folder", "scales" and "answer_scales" (of `lib.stages.quantize.fisher`; None without
            answers), "imatrix" (path or None), "n_threads" (0 = physical cores).

    Returns:
        "tensors": [{"tensor", "weights", "rows_tried", "rows_drawn", "rows", "types": [{"type", "bytes", "kld",
        "answer_kld"}]}], with the bytes in the file (padded) and KL divergence in nats a token of text, and a position
        that predicts a token of an answer (absent without answers).

    Raises:
        InputError: a tensor without sensitivities, an importance matrix of another model.
    """
    source, names, matrix = _open(argument)
    folders = {TEXT: (Path(argument["folder"]), argument["scales"])}
    if argument["answer_scales"] is not None:
        folders[AT_ANSWERS] = (Path(argument["folder"]) / ANSWERS, argument["answer_scales"])
    with ThreadPoolExecutor(argument["n_threads"] or physical_cores()) as pool:
        longest = sorted(names, key=lambda name: -source.tensors[name]["weights"])
        prepared = pool.map(lambda name: _prepare(source, name, folders, matrix), longest)
        with Progress(f"trying {_CHEAP}, tensors", len(names)) as progress:
            tensors = []
            for tensor in prepared:
                tensors.append(tensor)
                progress.advance(note=tensor.name)
        jobs = [(t, kind) for t in tensors for kind in _candidates(t.name, t.columns, matrix) if kind != _CHEAP]
        jobs.sort(key=lambda job: -_seconds(*job))
        losses = {(tensor.name, _CHEAP): tensor.cheap for tensor in tensors}
        with Progress("trying types, tensors × types", len(jobs)) as progress:
            for (tensor, kind), lost in zip(jobs, pool.map(lambda job: _loss(source, *job, matrix), jobs), strict=True):
                losses[tensor.name, kind] = lost
                progress.advance(note=f"{tensor.name} {kind}")
    return {"tensors": [_entry(t, losses, matrix) for t in sorted(tensors, key=lambda t: names.index(t.name))]}


def _open(argument: dict[str, Any]) -> tuple[Source, list[str], importance_matrix.Imatrix | None]:
    """The source, its tensors for which there is a choice, and the importance matrix.

    Rows that do not fill blocks of 32 weights fit no type: llama.cpp leaves such a tensor in F16 whatever is wanted.

    Raises:
        InputError: no choice for any tensor, an importance matrix of another model.
    """
    matrix = importance_matrix.read(Path(argument["imatrix"])) if argument["imatrix"] else None
    source = open_source(Path(argument["source"]), matrix)
    names = list(planned_types(dry_run(source.path, "Q8_0", Options())))
    if matrix is not None:
        check_coverage(source, names, matrix)
    able = [name for name in names if _candidates(name, _shape(source.tensors[name])[0], matrix)]
    if not able:
        found = f"no tensor of {source.path.name} has rows that fill blocks of 32 weights."
        raise InputError(found, "a model that can be quantized.", "do without a size budget.")
    return source, able, matrix


def _prepare(
    source: Source,
    name: str,
    folders: dict[str, tuple[Path, dict[str, float]]],
    matrix: importance_matrix.Imatrix | None,
) -> _Matrix:
    """Try the cheap type, and draw rows for the others."""
    columns, rows = _shape(source.tensors[name])
    step = -(-source.tensors[name]["weights"] // _WEIGHTS)
    fisher = {}
    for loss, (folder, scales) in folders.items():
        path = folder / f"{name}.npy"
        values = np.load(path, mmap_mode="r") if path.is_file() else None
        if values is None or values.shape != (rows, columns):
            found = f"no sensitivity of {name} ({rows} × {columns}) in the model folder."
            raise InputError(found, "a dense model of the Qwen2, Qwen3 or Llama family.", "do without a size budget.")
        part = float(values[::step].sum(dtype=np.float64))
        share = float(values.sum(dtype=np.float64)) / max(part, 1e-300)
        fisher[loss] = _Fisher(path, scales.get(name, 0.0), share)
    all_rows = _Matrix(name, rows, columns, step, fisher, None, {})
    error, weights = _error(source, all_rows, _CHEAP, matrix)
    whole = {loss: np.load(of.path, mmap_mode="r")[::step] for loss, of in fisher.items()}
    cheap = _weigh(all_rows, error, weights, whole)
    if all_rows.rows_tried <= 2 * _DRAWN:
        return replace(all_rows, cheap=cheap)
    by_row = {loss: np.sum(values * error * error, axis=1, dtype=np.float64) for loss, values in whole.items()}
    return replace(all_rows, cheap=cheap, draw=_draw(by_row))


def _draw(losses: dict[str, np.ndarray]) -> _Draw:
    """Rows by their share in the losses, one at a random place of every stretch of equal share."""
    count = len(next(iter(losses.values())))
    shares = [values / total for values in losses.values() if (total := values.sum()) > 0]
    chance = np.full(count, 1 / count) if not shares else (1 - _EVEN) * np.mean(shares, axis=0) + _EVEN / count
    ends = np.cumsum(chance)
    places = (np.arange(_DRAWN) + np.random.default_rng(0).random(_DRAWN)) / _DRAWN * ends[-1]
    rows, times = np.unique(np.minimum(np.searchsorted(ends, places), count - 1), return_counts=True)
    stands = times / (_DRAWN * chance[rows])
    ratios = {loss: _over(values.sum(), np.sum(stands * values[rows])) for loss, values in losses.items()}
    return _Draw(rows, stands, ratios)


def _over(above: float, below: float) -> float:
    return float(above / below) if below > 0 else 1.0


def _seconds(tensor: _Matrix, kind: str) -> float:
    """Roughly, for the order."""
    return recipes.work([{"type": kind, "weights": tensor.rows_drawn * tensor.columns}])


def _loss(source: Source, tensor: _Matrix, kind: str, matrix: importance_matrix.Imatrix | None) -> dict[str, float]:
    """KL divergences that the tensor in a type is predicted to cost; its rows are read again for every type, which
    takes little time and spares the memory for all of them."""
    error, weights = _error(source, tensor, kind, matrix)
    fisher = {loss: np.load(of.path, mmap_mode="r")[:: tensor.step] for loss, of in tensor.fisher.items()}
    if tensor.draw is not None:
        fisher = {loss: values[tensor.draw.rows] for loss, values in fisher.items()}
    return _weigh(tensor, error, weights, fisher)


def _error(
    source: Source, tensor: _Matrix, kind: str, matrix: importance_matrix.Imatrix | None
) -> tuple[np.ndarray, np.ndarray]:
    """What a type changes of the rows drawn, and these rows, float32, (rows, columns)."""
    weights = rows_of(source.path, source.tensors[tensor.name], 0, tensor.rows, tensor.step)
    if tensor.draw is not None:
        weights = weights[tensor.draw.rows]
    values = None if matrix is None else matrix.values.get(tensor.name)
    error = llama_library.dequantize_rows(kind, llama_library.quantize_rows(kind, weights, values))
    error -= weights
    return error, weights


def _weigh(tensor: _Matrix, error: np.ndarray, weights: np.ndarray, fisher: dict[str, np.ndarray]) -> dict[str, float]:
    """½ (Σ F d² + F of the common factor × its square): by what share of themselves the weights shrink together."""
    draw, stands = tensor.draw, None if tensor.draw is None else tensor.draw.stands
    size = max(_sum(weights * weights, stands), 1e-300)
    shrunk = _sum(error * weights, stands) / size
    found = {}
    for loss, of in tensor.fisher.items():
        lost = _sum(fisher[loss] * error * error, stands) * (1.0 if draw is None else draw.ratios[loss])
        found[loss] = 0.5 * (of.share * lost + of.scale * shrunk**2)
    return found


def _sum(values: np.ndarray, stands: np.ndarray | None) -> float:
    """Over all rows; each as many times as it stands for."""
    if stands is None:
        return float(np.sum(values, dtype=np.float64))
    return float(np.sum(values, axis=1, dtype=np.float64) @ stands)


def _entry(
    tensor: _Matrix, losses: dict[tuple[str, str], dict[str, float]], matrix: importance_matrix.Imatrix | None
) -> dict[str, Any]:
    kinds = _candidates(tensor.name, tensor.columns, matrix)
    types = [{"type": k, "bytes": _bytes(k, tensor.rows, tensor.columns), **losses[tensor.name, k]} for k in kinds]
    counted = {"weights": tensor.rows * tensor.columns, "rows": tensor.rows, "rows_tried": tensor.rows_tried}
    counted |= {"rows_drawn": tensor.rows_drawn}
    return {"tensor": tensor.name, **counted, "types": types}


def _shape(tensor: dict[str, Any]) -> tuple[int, int]:
    """Columns and rows, those of all experts together."""
    return tensor["shape"][0], tensor["weights"] // tensor["shape"][0]


def _candidates(name: str, columns: int, matrix: importance_matrix.Imatrix | None) -> list[str]:
    """The types that a tensor may have."""
    types = PLAIN + (WITH_MATRIX if matrix is not None and name in matrix.values else ())
    return [kind for kind in types if columns % llama_library.block_size(kind) == 0]


def _bytes(kind: str, rows: int, columns: int) -> int:
    """In the file, with padding."""
    return -(-rows * llama_library.row_bytes(kind, columns) // 32) * 32
