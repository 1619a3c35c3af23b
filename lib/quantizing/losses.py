"""What every type would cost every tensor: bytes, and the KL divergence that its rounding is predicted to cost.

For child processes only.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lib.device import physical_cores
from lib.errors import InputError
from lib.progress import Progress
from lib.quantizing import imatrix as importance
from lib.quantizing import native
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


def measure(argument: dict[str, Any]) -> dict[str, Any]:
    """Quantize and turn back rows of every tensor in every type, and weigh the squared errors; as many tensors at once
    as there are cores (llama.cpp's functions and numpy leave Python's lock).

    Args:
        argument: "source" (GGUF), "folder" and "scales" (of `lib.quantizing.fisher`), "imatrix" (path or None).

    Returns:
        "tensors": [{"tensor", "weights", "rows_tried", "rows", "types": [{"type", "bytes", "kld"}]}], with the bytes
        in the file (padded) and KL divergence in nats a token.

    Raises:
        InputError: a tensor without sensitivities, an importance matrix of another model.
    """
    source, names, matrix = _open(argument)
    folder, scales = Path(argument["folder"]), argument["scales"]
    found = []
    with ThreadPoolExecutor(physical_cores()) as pool, Progress("trying types, tensors", len(names)) as progress:
        for entry in pool.map(lambda n: _measure(source, n, folder, scales.get(n, 0.0), matrix), names):
            found.append(entry)
            progress.advance(note=entry["tensor"])
    return {"tensors": found}


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


def _measure(
    source: Source, name: str, folder: Path, scale: float, matrix: importance.Imatrix | None
) -> dict[str, Any]:
    tensor = source.tensors[name]
    columns, rows = _shape(tensor)
    path = folder / f"{name}.npy"
    sensitivity = np.load(path, mmap_mode="r") if path.is_file() else None
    if sensitivity is None or sensitivity.shape != (rows, columns):
        found = f"no sensitivity of {name} ({rows} × {columns}) in the model folder."
        raise InputError(found, "a dense model of the Qwen2, Qwen3 or Llama family.", "do without a size budget.")
    step = -(-tensor["weights"] // _WEIGHTS)
    weights = rows_of(source.path, tensor, 0, rows, step)
    values = None if matrix is None else matrix.values.get(name)
    part = np.asarray(sensitivity[::step])
    share = float(sensitivity.sum(dtype=np.float64)) / max(float(part.sum(dtype=np.float64)), 1e-300)
    entries = []
    for kind in _candidates(name, columns, matrix):
        error, shrunk = _errors(kind, weights, values, part)
        kld = 0.5 * (share * error + scale * shrunk**2)
        entries.append({"type": kind, "bytes": _bytes(kind, rows, columns), "kld": kld})
    return {"tensor": name, "weights": tensor["weights"], "rows": rows, "rows_tried": len(weights), "types": entries}


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
