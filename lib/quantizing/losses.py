"""What every type would cost every tensor: bytes, and the KL divergence that its rounding is predicted to cost.

For child processes only.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lib.device import physical_cores
from lib.errors import InputError
from lib.progress import Progress
from lib.quantizing import imatrix as importance
from lib.quantizing import native, recipes
from lib.quantizing.calling import dry_run
from lib.quantizing.options import Options
from lib.quantizing.planning import Source, check_coverage, open_source, planned_types
from lib.quantizing.stored import rows_of

PLAIN = (
    *("q8_0", "q6_K", "q5_K", "q5_1", "q5_0", "q4_K", "q4_1", "q4_0"),
    *("iq4_nl", "iq4_xs", "iq3_s", "q3_K", "q2_K"),
)
"""Types that any tensor may have."""
WITH_MATRIX = ("iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs")
"""Types for tensors with importance values only."""

_WEIGHTS = 1 << 21
"""Most weights of a tensor that are tried; a larger one is represented by rows at even distances."""


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
class _Matrix:
    """A tensor to be tried: every `step`-th of its rows, weighed by its sensitivities.

    Attributes:
        path: of the sensitivities, (rows, columns).
        scale: information of its common factor.
        share: by what the sensitivities of all rows exceed those of the rows tried.
    """

    name: str
    rows: int
    columns: int
    step: int
    path: Path
    scale: float
    share: float

    @property
    def rows_tried(self) -> int:
        return -(-self.rows // self.step)


def measure(argument: dict[str, Any]) -> dict[str, Any]:
    """Quantize and turn back rows of every tensor in every type, and weigh the squared errors; as many at once as there
    are threads (llama.cpp's functions and numpy leave Python's lock), the longest first.

    Args:
        argument: "source" (GGUF), "folder" and "scales" (of `lib.quantizing.fisher`), "imatrix" (path or None),
            "n_threads" (0 = physical cores).

    Returns:
        "tensors": [{"tensor", "weights", "rows_tried", "rows", "types": [{"type", "bytes", "kld"}]}], with the bytes
        in the file (padded) and KL divergence in nats a token.

    Raises:
        InputError: a tensor without sensitivities, an importance matrix of another model.
    """
    source, names, matrix = _open(argument)
    folder, scales = Path(argument["folder"]), argument["scales"]
    with ThreadPoolExecutor(argument["n_threads"] or physical_cores()) as pool:
        tensors = list(pool.map(lambda name: _prepare(source, name, folder, scales.get(name, 0.0)), names))
        jobs = [(tensor, kind) for tensor in tensors for kind in _candidates(tensor.name, tensor.columns, matrix)]
        jobs.sort(key=lambda job: -_seconds(*job))
        losses = {}
        with Progress("trying types, tensors × types", len(jobs)) as progress:
            for (tensor, kind), kld in zip(jobs, pool.map(lambda job: _loss(source, *job, matrix), jobs), strict=True):
                losses[tensor.name, kind] = kld
                progress.advance(note=f"{tensor.name} {kind}")
    return {"tensors": [_entry(tensor, losses, matrix) for tensor in tensors]}


def _open(argument: dict[str, Any]) -> tuple[Source, list[str], importance.Imatrix | None]:
    """The source, its tensors for which there is a choice, and the importance matrix.

    Rows that do not fill blocks of 32 weights fit no type: llama.cpp leaves such a tensor in F16 whatever is wanted.

    Raises:
        InputError: no choice for any tensor, an importance matrix of another model.
    """
    matrix = importance.read(Path(argument["imatrix"])) if argument["imatrix"] else None
    source = open_source(Path(argument["source"]), matrix)
    names = list(planned_types(dry_run(source.path, "Q8_0", Options())))
    if matrix is not None:
        check_coverage(source, names, matrix)
    able = [name for name in names if _candidates(name, _shape(source.tensors[name])[0], matrix)]
    if not able:
        found = f"no tensor of {source.path.name} has rows that fill blocks of 32 weights."
        raise InputError(found, "a model that can be quantized.", "do without a size budget.")
    return source, able, matrix


def _prepare(source: Source, name: str, folder: Path, scale: float) -> _Matrix:
    tensor = source.tensors[name]
    columns, rows = _shape(tensor)
    path = folder / f"{name}.npy"
    sensitivity = np.load(path, mmap_mode="r") if path.is_file() else None
    if sensitivity is None or sensitivity.shape != (rows, columns):
        found = f"no sensitivity of {name} ({rows} × {columns}) in the model folder."
        raise InputError(found, "a dense model of the Qwen2, Qwen3 or Llama family.", "do without a size budget.")
    step = -(-tensor["weights"] // _WEIGHTS)
    part = float(sensitivity[::step].sum(dtype=np.float64))
    share = float(sensitivity.sum(dtype=np.float64)) / max(part, 1e-300)
    return _Matrix(name, rows, columns, step, path, scale, share)


def _seconds(tensor: _Matrix, kind: str) -> float:
    """Roughly, for the order."""
    return recipes.work([{"type": kind, "weights": tensor.rows_tried * tensor.columns}])


def _loss(source: Source, tensor: _Matrix, kind: str, matrix: importance.Imatrix | None) -> float:
    """KL divergence that the tensor in a type is predicted to cost; its rows are read again for every type, which takes
    a hundredth of the time and spares the memory for all of them."""
    weights = rows_of(source.path, source.tensors[tensor.name], 0, tensor.rows, tensor.step)
    part = np.asarray(np.load(tensor.path, mmap_mode="r")[:: tensor.step])
    values = None if matrix is None else matrix.values.get(tensor.name)
    error, shrunk = _errors(kind, weights, values, part)
    return 0.5 * (tensor.share * error + tensor.scale * shrunk**2)


def _entry(tensor: _Matrix, losses: dict[tuple[str, str], float], matrix: importance.Imatrix | None) -> dict[str, Any]:
    kinds = _candidates(tensor.name, tensor.columns, matrix)
    types = [{"type": k, "bytes": _bytes(k, tensor.rows, tensor.columns), "kld": losses[tensor.name, k]} for k in kinds]
    counted = {"weights": tensor.rows * tensor.columns, "rows": tensor.rows, "rows_tried": tensor.rows_tried}
    return {"tensor": tensor.name, **counted, "types": types}


def _shape(tensor: dict[str, Any]) -> tuple[int, int]:
    """Columns and rows, those of all experts together."""
    return tensor["shape"][0], tensor["weights"] // tensor["shape"][0]


def _candidates(name: str, columns: int, matrix: importance.Imatrix | None) -> list[str]:
    """The types that a tensor may have."""
    types = PLAIN + (WITH_MATRIX if matrix is not None and name in matrix.values else ())
    return [kind for kind in types if columns % native.block_size(kind) == 0]


def _bytes(kind: str, rows: int, columns: int) -> int:
    """In the file, with padding."""
    return -(-rows * native.row_bytes(kind, columns) // 32) * 32


def _errors(kind: str, weights: np.ndarray, values: np.ndarray | None, sensitivity: np.ndarray) -> tuple[float, float]:
    """Σ F d² of rows in a type, and by what share of themselves the weights shrink or grow together."""
    error = native.dequantize_rows(kind, native.quantize_rows(kind, weights, values))
    error -= weights
    size = max(float(np.sum(weights * weights, dtype=np.float64)), 1e-300)
    shrunk = float(np.sum(error * weights, dtype=np.float64)) / size
    return float(np.sum(sensitivity * error * error, dtype=np.float64)), shrunk
