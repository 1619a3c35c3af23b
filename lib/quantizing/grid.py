"""Whether the base's weights lie on the grid of a quantization type. For child processes only.

Weights that were once dequantized from a type sit on its grid, and rounding them to it again gives them back. So does
rounding them with a fine-tuning's small change on top: the change is lost. What a model's weights come from is written
nowhere, so it is measured: the share of blocks of 32 that each type gives back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lib.formats import NF4
from lib.progress import Progress
from lib.quantizing import imatrix as importance
from lib.quantizing import native
from lib.quantizing.base import BLOCK, LEAST_MOVE, BaseMatrix, base_matrices, given_back, varied
from lib.quantizing.losses import PLAIN
from lib.quantizing.stored import rows_of

_NF4_BLOCK, _NF4_BITS = 64, 4.5
_NF4_CODE = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023),
        1.0,
    ],
    dtype=np.float32,
)
"""Dettmers et al. (2023), arXiv:2305.14314, appendix E."""
_SAMPLED = 1 << 14
"""Most weights of a matrix that are tried, in rows at even distances."""


def measure(argument: dict[str, Any]) -> dict[str, Any]:
    """Shares of blocks that each type gives back, of the matrices that fine-tuning moved: only there is anything to
    lose. (Of all matrices where it moved none.)

    Args:
        argument: "base" (folder), "source" (the GGUF made from it, for names and row order), "imatrix" (path or None:
            with one llama.cpp searches scales, which finds grids that the plain rounding misses).

    Returns:
        "types" ({type: share of the blocks of 32 of those matrices, weighted by their weights}; tried are NF4 and the
        types that any tensor may have: those of two bits with a codebook take a hundred times as long), "distinct"
        (different values in a block of 32, likewise, see `_distinct`), "blocks" (tried), "matrices" (tried).

    Raises:
        InputError: see `lib.quantizing.base.base_matrices`; an importance matrix that cannot be read.
    """
    matrix = importance.read(Path(argument["imatrix"])) if argument["imatrix"] else None
    shares: dict[str, list[tuple[float, int]]] = {}
    distinct, blocks = [], 0
    with native.open_header(Path(argument["source"])) as source:
        found, _ = base_matrices(Path(argument["base"]), source)
        found = {name: stored for name, stored in found.items() if _moved(name, stored, source)} or found
        with Progress("grid of the base's weights, tensors", len(found)) as progress:
            for name, stored in found.items():
                rows = stored.stored.shape[0]
                weights = stored.rows(0, rows, _step(stored))
                total = source.tensors[name]["weights"]
                if weights.shape[1] % BLOCK == 0 and (counted := varied(weights)).any():
                    values = None if matrix is None else matrix.values.get(name)
                    for kind, share in _shares(weights, stored.dtype, values, counted).items():
                        shares.setdefault(kind, []).append((share, total))
                    distinct.append((_distinct(weights)[counted].mean(), total))
                    blocks += int(counted.sum())
                progress.advance(note=name)
    return {
        "types": {kind: _mean(pairs) for kind, pairs in shares.items()},
        "distinct": _mean(distinct) if distinct else None,
        "blocks": blocks,
        "matrices": len(found),
    }


def _step(stored: BaseMatrix) -> int:
    """Distance of the rows that are tried."""
    return max(1, -(-stored.stored.size // _SAMPLED))


def _moved(name: str, stored: BaseMatrix, source: native.Header) -> bool:
    """Whether fine-tuning moved a matrix, by the rows that are tried."""
    rows, step = stored.stored.shape[0], _step(stored)
    base = stored.rows(0, rows, step)
    tuned = rows_of(source.path, source.tensors[name], 0, rows, step)
    return float(np.linalg.norm(tuned - base)) > LEAST_MOVE * float(np.linalg.norm(base))


def _shares(weights: np.ndarray, dtype: str, values: np.ndarray | None, counted: np.ndarray) -> dict[str, float]:
    """The share of the counted blocks that each type gives back; types whose blocks the rows do not fill are left
    out."""
    columns, found = weights.shape[1], {}
    for kind in PLAIN:
        if columns % native.block_size(kind) == 0:
            rounded = native.dequantize_rows(kind, native.quantize_rows(kind, weights, values))
            bits = 8 * native.row_bytes(kind, columns) / columns
            found[kind] = float(given_back(rounded, weights, dtype, bits)[counted].mean())
    if columns % _NF4_BLOCK == 0:
        found[NF4] = float(given_back(nf4(weights), weights, dtype, _NF4_BITS)[counted].mean())
    return found


def nf4(weights: np.ndarray) -> np.ndarray:
    """Rounded to NF4 with a float scale for every 64 weights, and back; float32, (rows, columns)."""
    blocks = weights.reshape(-1, _NF4_BLOCK)
    scale = np.abs(blocks).max(axis=1, keepdims=True)
    scaled = np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0)
    nearest = np.searchsorted((_NF4_CODE[1:] + _NF4_CODE[:-1]) / 2, scaled)
    return (_NF4_CODE[nearest] * scale).reshape(weights.shape)


def _distinct(weights: np.ndarray) -> np.ndarray:
    """Different values in each block of 32, (rows, columns / 32): of those that are not zero, scaled to 32 of them.

    Zeros are no sign of a quantization: pruning sets many of them and leaves the others as they are.
    """
    ordered = np.sort(weights.reshape(len(weights), -1, BLOCK), axis=-1)
    zeros = np.count_nonzero(ordered == 0, axis=-1)
    different = 1 + np.count_nonzero(np.diff(ordered, axis=-1), axis=-1) - (zeros > 0)
    return BLOCK * different / np.maximum(1, BLOCK - zeros)


def _mean(pairs: list[tuple[float, int]]) -> float:
    values, weights = zip(*pairs, strict=True)
    return float(np.average(values, weights=weights))
