"""What is left of a fine-tuning in the weights of every file, tensor by tensor. For child processes only.

With δ = tuned - base and q = file - base, ⟨q, δ⟩ / ⟨δ, δ⟩ is the share of δ that the file keeps: 1 where it rounds δ
as noise, 0 where it rounds it away. Rounding errors that have nothing to do with δ cancel in the sum.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np

from lib.progress import Progress
from lib.quantizing import native
from lib.quantizing.base import BLOCK, LEAST_MOVE, BaseMatrix, base_matrices, given_back
from lib.quantizing.errormap import place
from lib.quantizing.stored import rows_of

_PLACES = "BF16"
"""Floats to whose last places a block counts as the base's: the change that is lost also moves a block's scale by some
thousandths, which float16 would see."""
_AT_ONCE = 1 << 22
"""Weights of a tensor that are held together."""


def measure(argument: dict[str, Any]) -> dict[str, Any]:
    """Shares for every file.

    Args:
        argument: "base" (folder), "source" (the unquantized GGUF of the tuned model), "files" ({type: path}).

    Returns:
        "files": {type: [{"tensor", "layer", "kind", "type", "weights", "square" (‖δ‖²), "kept" (⟨q, δ⟩ / ‖δ‖²),
        "changed", "returned"}]}, of the matrices that fine-tuning moved and the file quantizes (changed: blocks of 32
        in which the tuned weights are not the base's to bfloat16; returned: those of them in which the file's are the
        base's again); "moved" (‖δ‖ / ‖base‖ over all matrices), "in_blocks" (share of the weights in matrices of the
        layers), "left_out" (matrices that the base does not have).

    Raises:
        InputError: see `lib.quantizing.base.base_matrices`; a damaged file.
    """
    files: dict[str, list[dict[str, Any]]] = {name: [] for name in argument["files"]}
    with contextlib.ExitStack() as stack:
        source, *headers = (
            stack.enter_context(native.open_header(Path(path)))
            for path in (argument["source"], *argument["files"].values())
        )
        found, left_out = base_matrices(Path(argument["base"]), source)
        squares = np.zeros(2)
        with Progress("what is left of the fine-tuning, tensors", len(found)) as progress:
            for name, stored in found.items():
                own = _tensor(name, stored, source, headers)
                squares += own.delta, own.base
                if own.delta > LEAST_MOVE**2 * own.base:
                    for rows, header, sums in zip(files.values(), headers, own.sums, strict=True):
                        if header.tensors[name]["type"] != source.tensors[name]["type"]:
                            rows.append(_row(name, header, own.delta, sums))
                progress.advance(note=name)
        weights = {name: tensor["weights"] for name, tensor in source.tensors.items()}
        inside = sum(weights[name] for name in found if place(name)["layer"] is not None)
    moved = float(np.sqrt(squares[0] / squares[1]))
    return {"files": files, "moved": moved, "in_blocks": inside / sum(weights.values()), "left_out": left_out}


class _Sums:
    """Σ of one tensor: ‖δ‖², ‖base‖², and for every file ⟨q, δ⟩, changed and returned blocks."""

    def __init__(self, files: int) -> None:
        self.delta, self.base, self.sums = 0.0, 0.0, np.zeros((files, 3))


def _tensor(name: str, stored: BaseMatrix, source: Any, headers: list[Any]) -> _Sums:
    rows, columns = stored.stored.shape
    total, step = _Sums(len(headers)), max(1, _AT_ONCE // columns)
    for start in range(0, rows, step):
        base = stored.rows(start, start + step)
        tuned = rows_of(source.path, source.tensors[name], start, start + step)
        delta = tuned - base
        total.delta += _dot(delta, delta)
        total.base += _dot(base, base)
        if not delta.any():
            continue
        for sums, header in zip(total.sums, headers, strict=True):
            tensor = header.tensors[name]
            made = rows_of(header.path, tensor, start, start + step)
            sums[0] += _dot(made - base, delta)
            if columns % BLOCK == 0:
                bits = 8 * tensor["bytes"] / tensor["weights"]
                changed = ~given_back(tuned, base, _PLACES, bits)
                sums[1] += changed.sum()
                sums[2] += (changed & given_back(made, base, _PLACES, bits)).sum()
    return total


def _dot(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.einsum("ij,ij->i", first, second).sum(dtype=np.float64))


def _row(name: str, header: Any, square: float, sums: np.ndarray) -> dict[str, Any]:
    tensor = header.tensors[name]
    return {
        "tensor": name,
        **place(name),
        "type": tensor["type"],
        "weights": tensor["weights"],
        "square": square,
        "kept": float(sums[0]) / square,
        "changed": int(sums[1]),
        "returned": int(sums[2]),
    }
