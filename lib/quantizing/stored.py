"""Weights of a GGUF tensor as float32. For child processes only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lib.quantizing import native


def rows_of(path: Path, tensor: dict[str, Any], start: int, stop: int, step: int = 1) -> np.ndarray:
    """Every `step`-th row of a tensor, float32, (rows, columns).

    Args:
        path: the GGUF file.
        tensor: an entry of `lib.quantizing.native.Header.tensors`.
        start, stop: as in a slice.
    """
    rows = tensor["weights"] // tensor["shape"][0]
    row = tensor["bytes"] // rows
    raw = np.ascontiguousarray(np.memmap(path, np.uint8, "r", tensor["offset"], (rows, row))[start:stop:step])
    return raw.view("<f4") if tensor["type"] == "f32" else native.dequantize_rows(tensor["type"], raw)
