"""The weights of a GGUF file as safetensors: dequantized, rounded once, written slab by slab."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lib.errors import InputError
from lib.models.floats import NUMPY, largest_magnitude, to_bfloat16, to_float16
from lib.models.unpacking.rescaling import Rescaling
from lib.models.unpacking.source import PackedTensor, Source
from lib.models.weights import SINGLE
from lib.progress import Progress

DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
"""dtype of a model folder → its name in safetensors."""

FLOAT16_MAX = 65504.0
_LAST_OF_BFLOAT16 = float(np.array(0x7F7F8000, np.uint32).view(np.float32))  # from here on rounding gives infinity


class TooLargeError(Exception):
    """A weight that the asked dtype cannot hold: its tensor and its magnitude."""


def rounded(values: np.ndarray, dtype: str, name: str, source: Source) -> np.ndarray:
    """float32 values in `dtype` (bfloat16 as its bits), each rounded once, to nearest, ties to even.

    Raises:
        InputError: NaN or infinity.
        TooLargeError: a value beyond the largest of the dtype.
    """
    largest = largest_magnitude(values, "F32")
    if not math.isfinite(largest):
        raise InputError(
            f"NaN or infinity in tensor {name} of {source.path}.", "finite weights.", "make or download the file again."
        )
    if (dtype == "float16" and largest > FLOAT16_MAX) or (dtype == "bfloat16" and largest >= _LAST_OF_BFLOAT16):
        raise TooLargeError(f"tensor {name} holds a weight of size {largest:.6g}")
    if dtype == "float32":
        return values
    return (to_float16 if dtype == "float16" else to_bfloat16)(values, "F32")


def scaled_slabs(tensor: PackedTensor, scaling: Rescaling | None) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, float32 rows) of a tensor, rescaled if asked."""
    for first, values in tensor.slabs():
        yield first, scaling.apply(tensor.name, first, values) if scaling else values


def write_weights(source: Source, folder: Path, dtype: str, scaling: Rescaling | None) -> None:
    """Write model.safetensors; a few slabs are in memory at a time.

    Raises:
        InputError: NaN or infinity.
        TooLargeError: a weight that `dtype` cannot hold.
    """
    width = np.dtype(NUMPY[DTYPES[dtype]]).itemsize
    with (folder / SINGLE).open("wb") as stream:
        stream.write(_header(source, dtype, width))
        with Progress(f"unpacking {source.path.name} (million weights)", source.parameters // 10**6) as progress:
            done = 0
            for tensor in source.tensors:
                for _, values in scaled_slabs(tensor, scaling):
                    data = rounded(np.ascontiguousarray(values).reshape(-1), dtype, tensor.name, source)
                    stream.write(memoryview(data).cast("B"))
                    before, done = done, done + values.size
                    progress.advance(done // 10**6 - before // 10**6)


def _header(source: Source, dtype: str, width: int) -> bytes:
    """Length and JSON of the safetensors header, padded so that the data begins at a multiple of 8 bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in source.tensors:
        start, end = end, end + tensor.size * width
        entries[tensor.name] = {"dtype": DTYPES[dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
